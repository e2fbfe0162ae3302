"""Fit, evaluate, checkpoint. A run that is killed goes on from its last whole epoch and ends with the same numbers.

Several processes (mcar_lib.processes) share each batch in equal consecutive pieces, and the batches of a test. A piece
has its own batch statistics, as the images on each of the release's GPUs had: so P processes train like one with
statistics_batch = batch_size / P, but for the running statistics, which are those of the main process's pieces.
"""

import contextlib
import ctypes
import math
import os
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from torch.utils.data import DataLoader

from mcar_lib import processes
from mcar_lib.checkpoints import load_named
from mcar_lib.data.transforms import ResizedImages
from mcar_lib.errors import CheckpointError, ConfigError
from mcar_lib.metrics import average_precision
from mcar_lib.model import MCAR
from mcar_lib.progress import Progress, format_seconds, say
from mcar_lib.recipe import (
    EPOCH,
    EVALUATION,
    INITIALISATION,
    EpochOrder,
    MeanStd,
    Recipe,
    StreamScores,
    TrainingImages,
    batch_scores,
    build_optimizer,
    build_schedule,
    network_input,
    seed_everything,
    training_step,
)

EVALUATION_BATCH = 32
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
CHECKPOINT, PREVIOUS = "checkpoint.pt", "checkpoint-previous.pt"


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


def fit(
    model: MCAR,
    train: ResizedImages,
    test: ResizedImages | None,
    recipe: Recipe,
    mean_std: MeanStd,
    folder: Path,
    workers: int = 0,
    verbose: bool = True,
) -> Fit:
    """Trains a model, tests it after each epoch, and leaves a checkpoint of each epoch in a folder.

    Called again with the same arguments it goes on after the last whole epoch; the end is the same bit for bit on one
    machine with as many processes. The model holds the last epoch's weights afterwards. test: None where nothing can be
    scored. workers: processes that read images (0: this one).
    Raises TrainingError on a loss that is no number, CheckpointError on a checkpoint of another architecture or recipe,
    ConfigError on a batch that the processes cannot share; a truncated checkpoint is passed over for the one before it,
    and said so.
    """
    processes.check_batch(recipe.batch_size, recipe.statistics_batch)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    accelerator = _accelerator(recipe.precision)
    model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    dataset, order = TrainingImages(train, recipe), EpochOrder(len(train), recipe.seed)
    loader = DataLoader(dataset, recipe.batch_size, sampler=order, num_workers=workers)
    optimizer = build_optimizer(model, recipe)
    _check_warmup(recipe, len(loader))
    schedule = build_schedule(optimizer, recipe, len(loader))
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="`broadcast_buffers`", category=FutureWarning
        )  # accelerate has no other
        wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    state = _resume(folder, recipe, model, optimizer, schedule)
    for epoch in range(len(state.history), recipe.epochs):
        dataset.epoch = order.epoch = epoch
        _seed(model, recipe.seed, epoch, EPOCH)
        started = time.monotonic()
        wrapped.train()
        sums = torch.zeros(2, dtype=torch.float64)
        with Progress(f"epoch {epoch + 1}/{recipe.epochs}", len(train), enabled=verbose) as progress:
            for step, (images, targets) in enumerate(loader):
                size = min(recipe.batch_size, len(train) - step * recipe.batch_size)
                own = processes.share_of(size, recipe.batch_size)
                # accelerate fills up the epoch's last batch with images of its first: they count for nothing here, and
                # stand in only where a process has no image of its own, for it must take part in the step.
                used = own or len(images)
                x = network_input(images[:used], accelerator.device, mean_std)
                loss, parts = training_step(wrapped, x, targets[:used], recipe.statistics_batch)
                optimizer.zero_grad(set_to_none=True)
                # Gradients are averaged over the processes: weighted by their images, that is the mean over the batch.
                accelerator.backward(loss * (own * processes.count() / size))
                optimizer.step()
                schedule.step()
                sums += torch.tensor(parts, dtype=torch.float64) * own
                progress.advance(size)
        # Each process has running statistics of its own pieces. All go on with the main process's, which the checkpoint
        # holds, as data parallelism in the release kept those of its first GPU.
        processes.take_buffers_of_main(model)
        trained = time.monotonic()
        scores = None if test is None else evaluate(model, test, mean_std, recipe.precision, recipe.seed, verbose)
        global_loss, local_loss = (torch.stack(processes.gathered([sums])).sum(dim=0) / len(train)).tolist()
        maps = stream_map(scores, test) if scores is not None and test is not None else (None, None, None)
        tested = time.monotonic()
        result = EpochResult(
            epoch + 1, global_loss, local_loss, maps[0], maps[1], maps[2], trained - started, tested - trained
        )
        _note_epoch(state, result, scores)
        if processes.is_main():
            _save(folder, recipe, state, model, optimizer, schedule)
        if verbose:
            say(_epoch_line(result, recipe.epochs, len(train)))
    return state


def evaluate(
    model: MCAR,
    test: ResizedImages,
    mean_std: MeanStd,
    precision: str = "fp32",
    seed: int = 0,
    verbose: bool = True,
) -> StreamScores:
    """Scores (n, K) of every image in order, under no_grad and in evaluation mode.

    Several processes take the batches in turn, and all get all scores: those of one process, but for selection
    "random", whose numbers each process draws for itself.
    """
    accelerator = _accelerator(precision)
    model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.eval()
    _seed(model, seed, 0, EVALUATION)
    parts: list[tuple[int, StreamScores]] = []
    with Progress("testing", len(test), enabled=verbose) as progress:
        for first in range(0, len(test), EVALUATION_BATCH):
            last = min(first + EVALUATION_BATCH, len(test))
            if first // EVALUATION_BATCH % processes.count() == processes.index():
                images = torch.stack([test[index] for index in range(first, last)])
                with accelerator.autocast():
                    scores = batch_scores(model, network_input(images, accelerator.device, mean_std))
                parts.append((first, scores))
            progress.update(last, len(test))
    in_order = [scores for _, scores in sorted(processes.gathered(parts), key=lambda part: part[0])]
    return StreamScores(*(torch.cat(stream) for stream in zip(*in_order, strict=True)))


def keep_freed_memory() -> None:
    """Lets glibc reuse large freed blocks instead of handing them back to the system after every layer; fetching
    them anew costs more than half of a CPU training step. Has no effect on numbers, nor where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TOP_PAD, 2**28)


def stream_map(scores: StreamScores, test: ResizedImages) -> tuple[float, float, float]:
    """mAP of the global, local and fused scores, classes without positives left out."""
    targets = test.image_set.targets
    streams = (scores.global_scores, scores.local_scores, scores.fused)
    each = [average_precision(stream, targets).nanmean().item() for stream in streams]
    return each[0], each[1], each[2]


def _seed(model: MCAR, seed: int, epoch: int, stream: int) -> None:
    """Seeds a process for an epoch or a test; no two draw the same numbers. INITIALISATION is the last stream."""
    seed_everything(model, seed, epoch, stream + INITIALISATION * processes.index())


def _check_warmup(recipe: Recipe, steps_per_epoch: int) -> None:
    steps = recipe.epochs * steps_per_epoch
    if recipe.schedule == "onecycle" and math.isclose(recipe.warmup * steps, 1):  # torch would divide by zero
        raise ConfigError(
            f"warmup {recipe.warmup:g} of {steps} steps is a single step, which a one-cycle schedule cannot have; "
            "change warmup, epochs or batch_size"
        )


def _accelerator(precision: str) -> Accelerator:
    keep_freed_memory()
    processes.count()  # makes the process group, if there is to be one, the way this project wants it
    AcceleratorState._reset_state()  # else a process could only use the precision of its first run
    # The effective batch stays the recipe's: several processes share it instead of each taking one.
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        # To hand out buffers before each forward pass would forbid several of them (statistics_batch) in one step.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )


def _note_epoch(state: Fit, result: EpochResult, scores: StreamScores | None) -> None:
    state.history.append(result)
    state.last = scores
    if result.map_fused is None:
        return
    best = state.history[state.best_epoch - 1].map_fused if state.best_epoch else None
    if best is None or result.map_fused > best:
        state.best, state.best_epoch = scores, result.epoch


def _epoch_line(result: EpochResult, epochs: int, num_images: int) -> str:
    maps = {"global": result.map_global, "local": result.map_local, "fused": result.map_fused}
    scored = " ".join(f"{name} {100 * value:.1f}" for name, value in maps.items() if value is not None)
    return (
        f"epoch {result.epoch}/{epochs}: loss global {result.global_loss:.4f} local {result.local_loss:.4f}, "
        f"{f'mAP {scored}' if scored else 'not scored'}, {num_images / result.train_seconds:.0f} images/s, "
        f"{format_seconds(result.train_seconds + result.test_seconds)}"
    )


def _save(folder: Path, recipe: Recipe, state: Fit, model: MCAR, optimizer: Any, schedule: Any) -> None:
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
    written = folder / "checkpoint-new.pt"
    write_atomically(written, lambda path: torch.save(content, path))
    current = folder / CHECKPOINT
    if current.exists():
        current.replace(folder / PREVIOUS)
    written.replace(current)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write on a temporary neighbour, forces it to disk, and renames: the file is whole or it is not there."""
    partial = path.with_name(path.name + ".part")
    write(partial)
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.replace(path)


def _resume(folder: Path, recipe: Recipe, model: MCAR, optimizer: Any, schedule: Any) -> Fit:
    found = processes.from_main(lambda: _newest_checkpoint(folder))
    if found is None:
        return Fit()
    path, content = found
    own = recipe.model_dump(mode="json")
    differing = [f"{key} {value!r}" for key, value in content["recipe"].items() if own.get(key) != value]
    if content["recipe"] != own:
        raise CheckpointError(
            f"{path} was made by another recipe ({', '.join(differing)}); move {folder} away or train with that recipe"
        )
    load_named(model, content["model"], str(path))
    optimizer.load_state_dict(content["optimizer"])
    schedule.load_state_dict(content["schedule"])
    history = [EpochResult(**result) for result in content["history"]]
    last, best = (StreamScores(*content[epoch]) if content[epoch] else None for epoch in ("last", "best"))
    return Fit(history, last, best, content["best_epoch"])


def _newest_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint that can be read; says so when that is not the newest one."""
    for name in (CHECKPOINT, PREVIOUS):
        path = folder / name
        if not path.exists():
            continue
        try:
            return path, torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a cut file raises zip, pickle or IO errors alike
            say(f"{path} cannot be read ({type(error).__name__}); going on from the checkpoint before it")
    return None
