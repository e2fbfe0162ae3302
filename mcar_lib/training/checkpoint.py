"""What a killed run goes on from: a whole checkpoint, and the one before it while that is written."""

import io
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mcar_lib.errors import CheckpointError, reason_of
from mcar_lib.files import OTHER_ARTIFACTS, check_zip, reading, write_bytes
from mcar_lib.model import MCAR
from mcar_lib.progress import say
from mcar_lib.training import processes
from mcar_lib.training.recipe import Recipe, StreamScores
from mcar_lib.weights import load_named

CHECKPOINT, PREVIOUS, NEW = "checkpoint.pt", "checkpoint-previous.pt", "checkpoint-new.pt"
PARTS = ("optimizer", "schedule")  # of every run


@dataclass(frozen=True)
class EpochResult:
    """One line of a run's history: mean losses over the epoch's images, mAP of each stream on the test set, cost.

    mAP is None where nothing was tested. wait_seconds: of train_seconds, those in which no photos were there to train
    on.
    """

    epoch: int
    global_loss: float
    local_loss: float
    map_global: float | None
    map_local: float | None
    map_fused: float | None
    train_seconds: float
    test_seconds: float
    wait_seconds: float = 0.0


@dataclass
class Position:
    """How far an epoch is: steps done, seconds that they took and waited, and for each process the sums of its losses,
    float64 (2,), and the states of its random streams."""

    step: int = 0
    train_seconds: float = 0.0
    wait_seconds: float = 0.0
    sums: list[Tensor] = field(default_factory=list)
    random: list[dict[str, Tensor]] = field(default_factory=list)


@dataclass
class Fit:
    """Where a training run stands: its history and the test scores after the last and after the best epoch.

    Before the first epoch, and without a test set, there are no scores, and best_epoch is 0. position: within the epoch
    that a checkpoint was written in.
    """

    history: list[EpochResult] = field(default_factory=list)
    last: StreamScores | None = None
    best: StreamScores | None = None
    best_epoch: int = 0
    position: Position | None = None

    def note(self, result: EpochResult, scores: StreamScores | None) -> None:
        """Adds an epoch; the best is the first with the highest fused mAP."""
        best = self.history[self.best_epoch - 1].map_fused if self.best_epoch else None
        if result.map_fused is not None and (best is None or result.map_fused > best):
            self.best, self.best_epoch = scores, result.epoch
        self.history.append(result)
        self.last, self.position = scores, None


class Stateful(Protocol):
    """What a checkpoint holds the state of."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any], /) -> object: ...


def save(folder: Path, recipe: Recipe, state: Fit, model: MCAR, parts: Mapping[str, Stateful], run: str = "") -> None:
    """Writes a whole checkpoint beside the last one, then swaps: there is a good one at every moment.

    parts: what goes on beside the model, by name: optimizer, schedule, and what else the recipe needs. run: what else
    the numbers depend on, by a name. Raises ResultsError where it cannot be written.
    """
    content = {
        "recipe": recipe.model_dump(mode="json"),
        "made": _circumstances(model, run),
        "model": model.state_dict(),
        **{name: _plain(part.state_dict()) for name, part in parts.items()},
        "history": [asdict(result) for result in state.history],
        "last": tuple(state.last or ()),
        "best": tuple(state.best or ()),
        "best_epoch": state.best_epoch,
        "position": state.position and vars(state.position),
    }
    stream = io.BytesIO()
    torch.save(content, stream)
    write_bytes(folder / NEW, stream.getbuffer(), advice=OTHER_ARTIFACTS)
    if (folder / CHECKPOINT).exists():
        (folder / CHECKPOINT).replace(folder / PREVIOUS)
    (folder / NEW).replace(folder / CHECKPOINT)


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not callable(value)}


def resume(folder: Path, recipe: Recipe, model: MCAR, parts: Mapping[str, Stateful], run: str = "") -> Fit:
    """Where the run in a folder stands, its state put into model and parts; a new Fit if there is none.

    Raises CheckpointError on a checkpoint of another architecture, recipe or run, or one that another number of
    processes or another kind of device made: it would not end with the numbers of either.
    """
    found = processes.broadcast_from_main(lambda: _newest(folder, set(parts)))
    if found is None:
        return Fit()
    path, content = found
    with reading(path, "a checkpoint of this run", CheckpointError):
        own = recipe.model_dump(mode="json")
        then = {**type(recipe)().model_dump(mode="json"), **content["recipe"]}  # it may lack what came later
        if then != own:
            differing = [f"{key} {value!r}" for key, value in then.items() if own.get(key) != value]
            raise CheckpointError(
                f"{path} was made by another recipe ({', '.join(differing)}); move {folder} away or train with that "
                "recipe"
            )
        _check_circumstances(path, content.get("made", {}), _circumstances(model, run))
        load_named(model, content["model"], str(path))
        for name, part in parts.items():
            part.load_state_dict(content[name])
        last, best = (StreamScores(*content[epoch]) if content[epoch] else None for epoch in ("last", "best"))
        position = Position(**content["position"]) if content.get("position") else None
        return Fit(
            [EpochResult(**result) for result in content["history"]], last, best, content["best_epoch"], position
        )


def _circumstances(model: MCAR, run: str) -> dict[str, Any]:
    """What the numbers depend on beside the recipe."""
    device = next(model.parameters()).device.type
    return {
        "run": run,
        "processes": processes.num_processes(),
        "device": device,
        "threads": torch.get_num_threads() if device == "cpu" else 0,
        "torch": str(torch.__version__),
    }


def _check_circumstances(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    if not then:
        say(f"{path} does not say how many processes made it: going on with {now['processes']}")
        return
    anew = f"or move {path.parent} away to start anew"
    if then["run"] != now["run"]:
        raise CheckpointError(
            f"{path} belongs to the run {then['run']!r}, not to {now['run']!r}: data, arithmetic or starting weights "
            f"differ; put it back where it is from, {anew}"
        )
    if then["processes"] != now["processes"]:
        start = f"torchrun --nproc-per-node {then['processes']}" if then["processes"] > 1 else "one process"
        raise CheckpointError(
            f"{path} was made with processes: {then['processes']}, and here are {now['processes']}, which do not give "
            f"the same numbers; start the same command with {start}, {anew}"
        )
    if then["device"] != now["device"]:
        raise CheckpointError(
            f"{path} was made on {then['device']}, and this is {now['device']}, which does not give the same numbers; "
            f"go on there, {anew}"
        )
    if other := [f"{name} {then[name]}, not {now[name]}" for name in ("threads", "torch") if then[name] != now[name]]:
        say(f"{path} was made with {'; '.join(other)}: the last digits may differ from those of a run in one go")


def _newest(folder: Path, parts: Collection[str] = PARTS) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that is whole; says so when that is not the newest one."""
    for path in (folder / NEW, folder / CHECKPOINT, folder / PREVIOUS):
        if path.exists():
            try:
                return path, _read(path, parts)
            except Exception as error:  # a cut or damaged file raises zip, pickle or IO errors alike
                say(f"{path} cannot be read ({reason_of(error)}); going on from what there is before it")
    return None


def _read(path: Path, parts: Collection[str] = PARTS) -> dict[str, Any]:
    check_zip(path)
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    absent = {"recipe", "model", *parts, "history", "last", "best", "best_epoch"} - set(content)
    if absent or not isinstance(content["recipe"], dict):
        raise ValueError(f"not a checkpoint of a run: no {', '.join(sorted(absent)) or 'recipe'}")
    return content
