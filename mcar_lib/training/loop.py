"""Fit and evaluate. A run that is killed goes on from its last whole epoch and ends with the same numbers.

Several processes (see processes) share each batch in equal consecutive shards, and the batches of a test. A shard has
its own batch statistics, as the images on each of the release's GPUs had: so P processes train like one with
statistics_batch = batch_size / P, but for the running statistics, which are those of the main process's shards.
"""

import contextlib
import copy
import ctypes
import os
import time
import warnings
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, DistributedDataParallelKwargs
from torch import Tensor
from torch.utils.data import DataLoader

from mcar_lib.data.transforms import ResizedImages, network_input
from mcar_lib.errors import ConfigError
from mcar_lib.metrics import average_precision
from mcar_lib.model import MCAR
from mcar_lib.progress import Progress, format_seconds, say
from mcar_lib.training import processes
from mcar_lib.training.checkpoint import EpochResult, Fit, resume, save
from mcar_lib.training.recipe import (
    EPOCH,
    EVALUATION,
    EpochOrder,
    Recipe,
    StepLoss,
    StreamScores,
    TrainingImages,
    batch_scores,
    build_optimizer,
    build_schedule,
    seed_everything,
    training_step,
)

EVALUATION_BATCH = 32
Maps = tuple[float | None, float | None, float | None]
# Settings that are read where we cannot set them, and what they may say. Anything else rounds float32 more coarsely;
# the last takes TF32 away from the convolutions of a GPU. Those that act like another processor (its instructions, its
# algorithms) are not here: a record names them, as it names the processor.
SETTINGS = {
    "ONEDNN_DEFAULT_FPMATH_MODE": ("", "STRICT"),
    "DNNL_DEFAULT_FPMATH_MODE": ("", "STRICT"),
    "NVIDIA_TF32_OVERRIDE": ("",),
}
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h


def fit(
    model: MCAR,
    train: ResizedImages,
    test: ResizedImages | None,
    recipe: Recipe,
    folder: Path,
    workers: int = 0,
    verbose: bool = True,
    run: str = "",
) -> Fit:
    """Trains a model, tests it after each epoch, and leaves a checkpoint of each epoch in a folder.

    Called again with the same arguments it goes on after the last whole epoch; the end is the same bit for bit on one
    machine with as many processes. The model holds the last epoch's weights afterwards. test: None where nothing can be
    scored. workers: processes that read images (0: this one). run: names all else that the numbers depend on.
    Raises TrainingError on a loss that is no number, CheckpointError on a checkpoint that cannot be gone on from here
    (see resume), ResultsError where none can be written, ConfigError on a batch that the processes cannot share or that
    leaves an image alone (see check_groups); a damaged checkpoint is passed over for the one before it, and said so.
    """
    processes.check_batch(recipe.batch_size, recipe.statistics_batch)
    check_groups(model, len(train), train.size, recipe)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    job = _Job(model, train, recipe, workers)
    state = resume(folder, recipe, model, job.optimizer, job.schedule, run)
    for epoch in range(len(state.history), recipe.epochs):
        started = time.monotonic()
        losses = job.train_epoch(epoch, verbose)
        trained = time.monotonic()
        scores, maps = _test(model, test, recipe, verbose)
        result = EpochResult(epoch + 1, *losses, *maps, trained - started, time.monotonic() - trained)
        state.note(result, scores)
        processes.broadcast_from_main(lambda: save(folder, recipe, state, model, job.optimizer, job.schedule, run))
        if verbose:
            say(_epoch_line(result, recipe.epochs, len(train)))
    return state


def check_groups(model: MCAR, images: int, size: int, recipe: Recipe) -> None:
    """Raises ConfigError where a step has an image alone that batch normalisation cannot take: at image_size 32 it has
    one value per channel. On a larger map such an image trains."""
    if _smallest_group(images, recipe) > 1:
        return
    features = copy.deepcopy(model.features).train()
    try:
        with torch.no_grad():
            features(torch.zeros(1, 3, size, size, device=model.convclass.weight.device))
    except ValueError as error:  # from torch.nn.functional.batch_norm
        batch, group, count = recipe.batch_size, recipe.statistics_batch, processes.num_processes()
        step = count * (group if count > 1 and group else 1)  # see processes.check_batch
        batches = range(batch + step, 2 * (batch + step) + 1, step)
        works = (
            each for each in batches if _smallest_group(images, recipe.model_copy(update={"batch_size": each})) > 1
        )
        ways = [f"batch_size {each}" for each in works][:1]
        ways += ["another statistics_batch"] if group and images > 1 else []
        ways += ["image_size 64 or more"] if size < 64 else []
        raise ConfigError(
            f"of {images} images in batches of {batch}{f' and groups of {group}' if group else ''} one is alone, which "
            f"batch normalisation at image_size {size} cannot train on; choose {' or '.join(ways or ['more images'])}"
        ) from error


def _smallest_group(images: int, recipe: Recipe) -> int:
    """The fewest images that share batch statistics in any step, of any process."""
    shard = recipe.batch_size // processes.num_processes()
    sizes = {min(images, recipe.batch_size), images % recipe.batch_size or recipe.batch_size}
    shares = {len(range(size)[first : first + shard]) for size in sizes for first in range(0, recipe.batch_size, shard)}
    # A process without an image of its own stands in with a whole shard.
    groups = [(share or shard, recipe.statistics_batch or share or shard) for share in shares]
    return min(share if share < group else share % group or group for share, group in groups)


class _Job:
    """What a run trains with. The processes share the steps of `wrapped`, whose weights are those of `model`."""

    def __init__(self, model: MCAR, train: ResizedImages, recipe: Recipe, workers: int) -> None:
        self.model, self.recipe = model, recipe
        self.accelerator = _accelerator(model, recipe.precision)
        self.images, self.order = TrainingImages(train, recipe), EpochOrder(len(train), recipe.seed)
        batches = DataLoader(self.images, recipe.batch_size, sampler=self.order, num_workers=workers)
        optimizer = build_optimizer(model, recipe)
        self.schedule = build_schedule(optimizer, recipe, len(batches))
        with warnings.catch_warnings():
            # accelerate knows no other name for that option of torch
            warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
            self.wrapped, self.optimizer, self.batches = self.accelerator.prepare(model, optimizer, batches)

    def train_epoch(self, epoch: int, verbose: bool) -> tuple[float, float]:
        """One pass over the images; returns the global and the local loss, each the mean over all of them."""
        self.images.epoch = self.order.epoch = epoch
        seed_everything(self.model, self.recipe.seed, epoch, EPOCH)
        self.wrapped.train()
        total, batch_size = len(self.images), self.recipe.batch_size
        sums = torch.zeros(2, dtype=torch.float64)
        with Progress(f"epoch {epoch + 1}/{self.recipe.epochs}", total, enabled=verbose) as progress:
            for step, (images, targets) in enumerate(self.batches):
                size = min(batch_size, total - step * batch_size)
                own = processes.shard_size(size, batch_size)
                sums += torch.tensor(self.step(images, targets, own, size), dtype=torch.float64) * own
                progress.advance(size)
        # Each process has running statistics of its own shards. All go on with the main process's, which the checkpoint
        # holds, as data parallelism in the release kept those of its first GPU.
        processes.broadcast_buffers(self.model)
        global_loss, local_loss = (torch.stack(processes.gather([sums])).sum(dim=0) / total).tolist()
        return global_loss, local_loss

    def step(self, images: Tensor, targets: Tensor, own: int, size: int) -> StepLoss:
        """One step on this process's `own` images of a batch that has `size` images in all."""
        # accelerate fills up the epoch's last batch with images of its first: they count for nothing here, and stand in
        # only where a process has no image of its own, for it must take part in the step.
        used = own or len(images)
        x = network_input(self.model, images[:used])
        # Gradients are averaged over the processes: weighted by their images, that is the mean over the batch.
        weight = own * processes.num_processes() / size
        self.optimizer.zero_grad(set_to_none=True)
        parts = training_step(
            self.wrapped,
            x,
            targets[:used],
            self.recipe.statistics_batch,
            lambda loss: self.accelerator.backward(loss * weight),
        )
        self.optimizer.step()
        self.schedule.step()
        return parts


def _accelerator(model: MCAR, precision: str) -> Accelerator:
    """The device and the precision; the model is moved there. No setting of the environment changes the arithmetic:
    ConfigError names one that would."""
    check_settings()
    processes.forget_accelerate_settings()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    keep_freed_memory()
    processes.num_processes()  # makes the process group, if there is to be one, the way this project wants it
    AcceleratorState._reset_state()  # else a process could only use the precision of its first run
    # The effective batch stays the recipe's: several processes share it instead of each taking one.
    accelerator = Accelerator(
        mixed_precision="bf16" if precision == "bf16" else "no",
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        # To hand out buffers before each forward pass would forbid several of them (statistics_batch) in one step.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return accelerator


def check_settings() -> None:
    """Raises ConfigError for a setting of the environment that changes what float32 computes."""
    for name, allowed in SETTINGS.items():
        if (value := os.environ.get(name, "")).upper() not in allowed:
            raise ConfigError(f"{name} is {value!r} in the environment, which changes what float32 computes; unset it")


def _test(model: MCAR, test: ResizedImages | None, recipe: Recipe, verbose: bool) -> tuple[StreamScores | None, Maps]:
    """Scores and mAP of the test set, if there is one."""
    if test is None:
        return None, (None, None, None)
    scores = evaluate(model, test, recipe.precision, recipe.seed, verbose)
    return scores, stream_map(scores, test)


def evaluate(
    model: MCAR, test: ResizedImages, precision: str = "fp32", seed: int = 0, verbose: bool = True
) -> StreamScores:
    """Scores (n, K) of every image in order, under no_grad and in evaluation mode.

    Several processes take the batches in turn, and all get all scores: those of one process, but for selection
    "random", whose numbers each process draws for itself.
    """
    accelerator = _accelerator(model, precision)
    model.eval()
    seed_everything(model, seed, 0, EVALUATION)
    parts: list[tuple[int, StreamScores]] = []
    with Progress("testing", len(test), enabled=verbose) as progress:
        for first in range(0, len(test), EVALUATION_BATCH):
            last = min(first + EVALUATION_BATCH, len(test))
            if first // EVALUATION_BATCH % processes.num_processes() == processes.rank():
                images = torch.stack([test[index] for index in range(first, last)])
                with accelerator.autocast():
                    parts.append((first, batch_scores(model, network_input(model, images))))
            progress.update(last, len(test))
    in_order = [scores for _, scores in sorted(processes.gather(parts), key=lambda part: part[0])]
    return StreamScores(*(torch.cat(stream) for stream in zip(*in_order, strict=True)))


def stream_map(scores: StreamScores, test: ResizedImages) -> tuple[float, float, float]:
    """mAP of the global, local and fused scores, classes without positives left out."""
    targets = test.image_set.targets
    streams = (scores.global_scores, scores.local_scores, scores.fused)
    each = [average_precision(stream, targets).nanmean().item() for stream in streams]
    return each[0], each[1], each[2]


def _epoch_line(result: EpochResult, epochs: int, num_images: int) -> str:
    maps = {"global": result.map_global, "local": result.map_local, "fused": result.map_fused}
    scored = " ".join(f"{name} {100 * value:.1f}" for name, value in maps.items() if value is not None)
    return (
        f"epoch {result.epoch}/{epochs}: loss global {result.global_loss:.4f} local {result.local_loss:.4f}, "
        f"{f'mAP {scored}' if scored else 'not scored'}, {num_images / result.train_seconds:.0f} images/s, "
        f"{format_seconds(result.train_seconds + result.test_seconds)}"
    )


def keep_freed_memory() -> None:
    """Lets glibc reuse large freed blocks instead of handing them back to the system after every layer; fetching
    them anew costs more than half of a CPU training step. Has no effect on numbers, nor where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TOP_PAD, 2**28)
