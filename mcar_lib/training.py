"""Fit, evaluate, checkpoint. A run that is killed goes on from its last whole epoch and ends with the same numbers."""

import contextlib
import ctypes
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration
from torch import Tensor
from torch.utils.data import DataLoader

from mcar_lib.checkpoints import load_named
from mcar_lib.data.transforms import ResizedImages
from mcar_lib.errors import CheckpointError, ConfigError
from mcar_lib.metrics import average_precision
from mcar_lib.model import MCAR
from mcar_lib.progress import Progress, format_seconds, say
from mcar_lib.recipe import (
    EPOCH,
    EVALUATION,
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
    """One line of a run's history: mean losses over the epoch's images, mAP of each stream on the test set, cost."""

    epoch: int
    global_loss: float
    local_loss: float
    map_global: float
    map_local: float
    map_fused: float
    train_seconds: float
    test_seconds: float


@dataclass
class Fit:
    """Where a training run stands: its history and the test scores after the last and after the best epoch."""

    history: list[EpochResult] = field(default_factory=list)
    last: StreamScores | None = None
    best: StreamScores | None = None
    best_epoch: int = 0


def fit(
    model: MCAR,
    train: ResizedImages,
    test: ResizedImages,
    recipe: Recipe,
    mean_std: MeanStd,
    folder: Path,
    workers: int = 0,
    verbose: bool = True,
) -> Fit:
    """Trains a model, tests it after each epoch, and leaves a checkpoint of each epoch in a folder.

    Called again with the same arguments it goes on after the last whole epoch; the end is the same bit for bit on one
    machine. The model holds the last epoch's weights afterwards. workers: processes that read images (0: this one).
    Raises TrainingError on a loss that is no number, CheckpointError on a checkpoint of another architecture or
    recipe; a truncated checkpoint is passed over for the one before it, and said so.
    """
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    accelerator = _accelerator(recipe.precision)
    model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    dataset, order = TrainingImages(train, recipe), EpochOrder(len(train), recipe.seed)
    loader = DataLoader(dataset, recipe.batch_size, sampler=order, num_workers=workers)
    optimizer = build_optimizer(model, recipe)
    _check_warmup(recipe, len(loader))
    schedule = build_schedule(optimizer, recipe, len(loader))
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, loader)

    state = _resume(folder, recipe, model, optimizer, schedule)
    for epoch in range(len(state.history), recipe.epochs):
        dataset.epoch = order.epoch = epoch
        seed_everything(model, recipe.seed, epoch, EPOCH)
        started = time.monotonic()
        wrapped.train()
        sums, count = torch.zeros(2, dtype=torch.float64), 0
        with Progress(f"epoch {epoch + 1}/{recipe.epochs}", len(train), enabled=verbose) as progress:
            for images, targets in loader:
                x = network_input(images, accelerator.device, mean_std)
                loss, parts = training_step(wrapped, x, targets, recipe.statistics_batch)
                optimizer.zero_grad(set_to_none=True)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                sums += torch.tensor(parts, dtype=torch.float64) * len(images)
                count += len(images)
                progress.advance(len(images))
        trained = time.monotonic()
        scores = evaluate(model, test, mean_std, recipe.precision, recipe.seed, verbose=verbose)
        global_loss, local_loss = (sums / count).tolist()
        seconds = (trained - started, time.monotonic() - trained)
        result = EpochResult(epoch + 1, global_loss, local_loss, *stream_map(scores, test), *seconds)
        _note_epoch(state, result, scores)
        if accelerator.is_main_process:
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
    """Scores (n, K) of every image in order, under no_grad and in evaluation mode."""
    accelerator = _accelerator(precision)
    model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    model.eval()
    seed_everything(model, seed, 0, EVALUATION)
    parts: list[StreamScores] = []
    with Progress("testing", len(test), enabled=verbose) as progress:
        for images in _batches(test):
            with accelerator.autocast():
                parts.append(batch_scores(model, network_input(images, accelerator.device, mean_std)))
            progress.advance(len(images))
    return StreamScores(*(torch.cat(stream) for stream in zip(*parts, strict=True)))


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


def _batches(images: ResizedImages) -> Iterator[Tensor]:
    for first in range(0, len(images), EVALUATION_BATCH):
        last = min(first + EVALUATION_BATCH, len(images))
        yield torch.stack([images[index] for index in range(first, last)])


def _check_warmup(recipe: Recipe, steps_per_epoch: int) -> None:
    steps = recipe.epochs * steps_per_epoch
    if recipe.schedule == "onecycle" and math.isclose(recipe.warmup * steps, 1):  # torch would divide by zero
        raise ConfigError(
            f"warmup {recipe.warmup:g} of {steps} steps is a single step, which a one-cycle schedule cannot have; "
            "change warmup, epochs or batch_size"
        )


def _accelerator(precision: str) -> Accelerator:
    keep_freed_memory()
    AcceleratorState._reset_state()  # else a process could only use the precision of its first run
    # The effective batch stays the recipe's: several processes share it instead of each taking one.
    return Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )


def _note_epoch(state: Fit, result: EpochResult, scores: StreamScores) -> None:
    if not state.history or result.map_fused > state.history[state.best_epoch - 1].map_fused:
        state.best, state.best_epoch = scores, result.epoch
    state.history.append(result)
    state.last = scores


def _epoch_line(result: EpochResult, epochs: int, num_images: int) -> str:
    return (
        f"epoch {result.epoch}/{epochs}: loss global {result.global_loss:.4f} local {result.local_loss:.4f}, "
        f"mAP global {100 * result.map_global:.1f} local {100 * result.map_local:.1f} "
        f"fused {100 * result.map_fused:.1f}, {num_images / result.train_seconds:.0f} images/s, "
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
    found = _newest_checkpoint(folder)
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
    return Fit(history, StreamScores(*content["last"]), StreamScores(*content["best"]), content["best_epoch"])


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
