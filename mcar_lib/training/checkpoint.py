"""What a killed run goes on from: after each epoch a whole checkpoint, and the one before it while that is written."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from mcar_lib.errors import CheckpointError
from mcar_lib.files import write_atomically
from mcar_lib.model import MCAR
from mcar_lib.progress import say
from mcar_lib.training import processes
from mcar_lib.training.recipe import Recipe, StreamScores
from mcar_lib.weights import load_named

CHECKPOINT, PREVIOUS, NEW = "checkpoint.pt", "checkpoint-previous.pt", "checkpoint-new.pt"


@dataclass(frozen=True)
class EpochResult:
    """One line of a run's history: mean losses over the epoch's images, mAP of each stream on the test set, cost.

    mAP is None where there is no test set.
    """

    epoch: int
    global_loss: float
    local_loss: float
    map_global: float | None
    map_local: float | None
    map_fused: float | None
    train_seconds: float
    test_seconds: float


@dataclass
class Fit:
    """Where a training run stands: its history and the test scores after the last and after the best epoch.

    Before the first epoch, and without a test set, there are no scores, and best_epoch is 0.
    """

    history: list[EpochResult] = field(default_factory=list)
    last: StreamScores | None = None
    best: StreamScores | None = None
    best_epoch: int = 0

    def note(self, result: EpochResult, scores: StreamScores | None) -> None:
        """Adds an epoch; the best is the first with the highest fused mAP."""
        best = self.history[self.best_epoch - 1].map_fused if self.best_epoch else None
        if result.map_fused is not None and (best is None or result.map_fused > best):
            self.best, self.best_epoch = scores, result.epoch
        self.history.append(result)
        self.last = scores


def save(folder: Path, recipe: Recipe, state: Fit, model: MCAR, optimizer: Optimizer, schedule: LRScheduler) -> None:
    """Writes a whole checkpoint beside the last one, then swaps: there is a good one at every moment."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "recipe": recipe.model_dump(mode="json"),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "schedule": {key: value for key, value in schedule.state_dict().items() if not callable(value)},
        "history": [asdict(result) for result in state.history],
        "last": tuple(state.last or ()),
        "best": tuple(state.best or ()),
        "best_epoch": state.best_epoch,
    }
    write_atomically(folder / NEW, lambda path: torch.save(content, path))
    if (folder / CHECKPOINT).exists():
        (folder / CHECKPOINT).replace(folder / PREVIOUS)
    (folder / NEW).replace(folder / CHECKPOINT)


def resume(folder: Path, recipe: Recipe, model: MCAR, optimizer: Optimizer, schedule: LRScheduler) -> Fit:
    """Where the run in a folder stands, its state put into model, optimizer and schedule; a new Fit if there is none.

    Raises CheckpointError on a checkpoint of another architecture or recipe.
    """
    found = processes.broadcast_from_main(lambda: _newest(folder))
    if found is None:
        return Fit()
    path, content = found
    own = recipe.model_dump(mode="json")
    if content["recipe"] != own:
        differing = [f"{key} {value!r}" for key, value in content["recipe"].items() if own.get(key) != value]
        raise CheckpointError(
            f"{path} was made by another recipe ({', '.join(differing)}); move {folder} away or train with that recipe"
        )
    load_named(model, content["model"], str(path))
    optimizer.load_state_dict(content["optimizer"])
    schedule.load_state_dict(content["schedule"])
    last, best = (StreamScores(*content[epoch]) if content[epoch] else None for epoch in ("last", "best"))
    return Fit([EpochResult(**result) for result in content["history"]], last, best, content["best_epoch"])


def _newest(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read; says so when that is not the newest one."""
    for path in (folder / CHECKPOINT, folder / PREVIOUS):
        if path.exists():
            try:
                return path, torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # a cut file raises zip, pickle or IO errors alike
                say(f"{path} cannot be read ({type(error).__name__}); going on from the checkpoint before it")
    return None
