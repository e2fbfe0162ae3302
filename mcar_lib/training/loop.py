"""Fit and evaluate. A run that is killed goes on from its last checkpoint and ends with the same numbers.

Several processes (see processes) share each batch in equal consecutive shards, and the batches of a test. A shard has
its own batch statistics, as the images on each of the release's GPUs had: so P processes train like one with
statistics_batch = batch_size / P, but for the running statistics, which are those of the main process's shards.
"""

import contextlib
import copy
import functools
import json
import os
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from mcar_lib.data.squares import ResizedImages
from mcar_lib.data.transforms import jitter_colours, network_input
from mcar_lib.errors import ConfigError, Stopped
from mcar_lib.files import OTHER_ARTIFACTS, without_nan, write_bytes
from mcar_lib.inference import keep_freed_memory
from mcar_lib.metrics import average_precision
from mcar_lib.model import MCAR
from mcar_lib.progress import Progress, format_seconds, say
from mcar_lib.training import processes
from mcar_lib.training.checkpoint import EpochResult, Fit, Position, Stateful, resume, save
from mcar_lib.training.execution import Execution, Standing
from mcar_lib.training.reader import Reader, lost_worker_told, num_workers
from mcar_lib.training.recipe import (
    EPOCH,
    EVALUATION,
    Recipe,
    StepLoss,
    StreamScores,
    TrainingBatch,
    TrainingImages,
    batch_scores,
    build_optimizer,
    build_schedule,
    check_loss,
    seed_everything,
    training_step,
)
from mcar_lib.training.stopping import StopRequest, stop_request

EVALUATION_BATCH = 32
LOG = "log.jsonl"  # beside the checkpoints: an epoch a line
STEPS_BETWEEN_CHECKS = 20  # of the loss on a GPU, which each of them makes wait
LATEST_LOOK, MOST_STEPS = 2.0, 25  # seconds and steps until several processes look whether one is asked to stop
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Maps = tuple[float | None, float | None, float | None]
NOT_TESTED: Maps = (None, None, None)
# Settings that are read where we cannot set them, and what they may say. Anything else rounds float32 more coarsely;
# the last takes TF32 away from the convolutions of a GPU. Those that act like another processor (its instructions, its
# algorithms) are not here: a record names them, as it names the processor.
SETTINGS = {
    "ONEDNN_DEFAULT_FPMATH_MODE": ("", "STRICT"),
    "DNNL_DEFAULT_FPMATH_MODE": ("", "STRICT"),
    "NVIDIA_TF32_OVERRIDE": ("",),
}


def fit(
    model: MCAR,
    train: ResizedImages,
    test: ResizedImages | None,
    recipe: Recipe,
    folder: Path,
    execution: Execution = Execution(),  # noqa: B008  # frozen
    verbose: bool = True,
    run: str = "",
    tell: Callable[[Standing], None] | None = None,
) -> Fit:
    """Trains a model, tests it as the recipe says, and leaves checkpoints in a folder, and a log of one line an epoch.

    Called again with the same arguments it goes on from the last checkpoint; the end is the same bit for bit on one
    machine with as many processes, whatever the execution. The model holds the last epoch's weights afterwards, or
    their average. test: None where nothing can be scored. run: names all else that the numbers depend on. tell: is
    given where the run is, after every step.
    SIGINT, SIGTERM or SIGHUP end it after the step that it is in: a checkpoint is written and Stopped is raised.
    Raises TrainingError on a loss that is no number, CheckpointError on a checkpoint that cannot be gone on from here
    (see resume), ResultsError where none can be written, ConfigError on a batch that the processes cannot share or that
    leaves an image alone (see check_groups); a damaged checkpoint is passed over for the one before it, and said so.
    """
    processes.check_batch(recipe.batch_size, recipe.statistics_batch)
    check_groups(model, len(train), train.size, recipe)
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    with (
        lost_worker_told(),
        stop_request() as request,
        contextlib.closing(_Job(model, train, test, recipe, folder, execution, verbose, run, request, tell)) as job,
    ):
        while len(job.state.history) < recipe.epochs:
            job.one_epoch()
        if job.average is not None:
            model.load_state_dict(job.tested_model.state_dict())
        return job.state


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

    def __init__(
        self,
        model: MCAR,
        train: ResizedImages,
        test: ResizedImages | None,
        recipe: Recipe,
        folder: Path,
        execution: Execution,
        verbose: bool,
        run: str,
        request: StopRequest,
        tell: Callable[[Standing], None] | None,
    ) -> None:
        self.model, self.test, self.recipe, self.folder = model, test, recipe, folder
        self.execution, self.verbose, self.run, self.request, self.tell = execution, verbose, run, request, tell
        self.accelerator = _accelerator(model, execution.trackers, folder)
        self.device = self.accelerator.device
        self.images = TrainingImages(train, recipe)
        self.steps = -(-len(train) // recipe.batch_size)
        self.optimizer = build_optimizer(model, recipe)
        self.schedule = build_schedule(self.optimizer, recipe, self.steps)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=recipe.precision == "fp16")
        self.average = _average(model, recipe.average_decay)
        parts: dict[str, Any] = {"optimizer": self.optimizer, "schedule": self.schedule}
        parts |= {"scaler": self.scaler} if self.scaler.is_enabled() else {}
        parts |= {"average": self.average} if self.average is not None else {}
        self.parts: Mapping[str, Stateful] = parts
        with warnings.catch_warnings():
            # accelerate knows no other name for that option of torch
            warnings.filterwarnings("ignore", message="`broadcast_buffers`", category=FutureWarning)
            self.wrapped = self.accelerator.prepare_model(model)
        self.forward = _autocast(self.device, recipe.precision)(self.wrapped.__call__)
        shard = recipe.batch_size // processes.num_processes()
        workers = num_workers(execution.workers, self.device, train.kept is None)
        self.reader = Reader(self.images.batch, workers, shard * 3 * train.size**2, self.device)
        model.recompute = execution.recompute
        self.state = resume(folder, recipe, model, self.parts, run)
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self.saved_at, self.steps_to_look, self.fits = time.monotonic(), 1, False

    def close(self) -> None:
        self.reader.close()
        if self.execution.trackers:
            self.accelerator.end_training()

    @property
    def tested_model(self) -> MCAR:
        """The model whose scores count: the averaged one where there is an average."""
        averaged: Any = self.model if self.average is None else self.average.module
        model: MCAR = averaged
        return model

    def one_epoch(self) -> None:
        """Trains an epoch, or what is left of one, tests, and writes down how it stands."""
        epoch, recipe = len(self.state.history) + 1, self.recipe
        position = self.train_epoch(epoch - 1)
        losses = (torch.stack(processes.gather([self.sums.cpu()])).sum(dim=0) / len(self.images)).tolist()
        started, scores, maps = time.monotonic(), None, NOT_TESTED
        if self.test is not None and self.is_tested(epoch):
            self.look(position, at_once=True)
            look = functools.partial(self.look, position) if processes.num_processes() == 1 else None
            options = (recipe.precision, recipe.seed, self.verbose, self.execution, look)
            scores = evaluate(self.tested_model, self.test, *options)
            maps = stream_map(scores, self.test)
        seconds = (position.train_seconds, time.monotonic() - started, position.wait_seconds)
        result = EpochResult(epoch, losses[0], losses[1], *maps, *seconds)
        self.state.note(result, scores)
        self.save()
        self.tell_epoch()

    def is_tested(self, epoch: int) -> bool:
        return self.test is not None and (epoch % self.recipe.evaluate_every == 0 or epoch == self.recipe.epochs)

    def train_epoch(self, epoch: int) -> Position:
        """One pass over the images, from where the last checkpoint left it; losses are summed up in `sums`."""
        position = self.state.position or Position()
        self.state.position = position
        seed_everything(self.model, self.recipe.seed, epoch, EPOCH)
        self.sums.zero_()
        if position.sums:
            self.sums += position.sums[processes.rank()].to(self.device)
            _set_random_states(self.model, self.device, position.random[processes.rank()])
        self.wrapped.train()
        total, batch_size, order = len(self.images), self.recipe.batch_size, self.images.order(epoch)
        first, started = position.step, time.monotonic()
        tasks = [(epoch, _own_share(order, step, batch_size)) for step in range(first, self.steps)]
        with Progress(f"epoch {epoch + 1}/{self.recipe.epochs}", total, enabled=self.verbose) as progress:
            progress.advance(min(first * batch_size, total))
            asked = time.monotonic()
            for step, batch in enumerate(self.reader.batches(tasks), start=first):
                position.wait_seconds += time.monotonic() - asked
                size = min(batch_size, total - step * batch_size)
                own = processes.shard_size(size, batch_size)
                parts = self.step(TrainingBatch(*batch), own, size)
                self.sums += torch.stack(parts).double() * own
                if self.device.type == "cpu" or (step + 1) % STEPS_BETWEEN_CHECKS == 0:
                    check_loss(self.sums)
                progress.advance(size)
                position.step = step + 1
                position.train_seconds += time.monotonic() - asked
                self.tell_standing(epoch + 1, (position.step - first) * batch_size / (time.monotonic() - started))
                self.look(position)
                asked = time.monotonic()
        check_loss(self.sums)
        # Each process has running statistics of its own shards. All go on with the main process's, which the checkpoint
        # holds, as data parallelism in the release kept those of its first GPU.
        for each in (self.model, self.average):
            processes.broadcast_buffers(each)
        return position

    def step(self, batch: TrainingBatch, own: int, size: int) -> StepLoss:
        """One step on this process's `own` images of a batch that has `size` images in all."""
        # A process that has no image of its own takes part with others, which count for nothing.
        images, targets, kinds, factors = (part.to(self.device, non_blocking=True) for part in batch)
        if self.recipe.jitter:
            images = jitter_colours(images, kinds, factors)
        self.optimizer.zero_grad(set_to_none=True)
        back = functools.partial(self.back, own * processes.num_processes() / size)
        x, group = network_input(self.model, images), self.recipe.statistics_batch
        parts = self.first_that_fits(lambda: training_step(self.forward, x, targets, group, back))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.schedule.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return parts

    def back(self, weight: float, loss: Tensor) -> None:
        """Backward pass. Gradients are averaged over the processes: weighted by their images, that is the mean over the
        batch."""
        self.scaler.scale(loss * weight).backward()

    def first_that_fits(self, compute: Callable[[], StepLoss]) -> StepLoss:
        """What `compute` does to the gradients; in the first step here once more, with `recompute`, where the GPU's
        memory is too small without it."""
        if self.fits or processes.num_processes() > 1:  # the others would be in the middle of theirs
            return compute()
        buffers, random = [each.clone() for each in self.model.buffers()], _random_states(self.model, self.device)
        try:
            parts = compute()
        except torch.OutOfMemoryError:
            if self.model.recompute:
                raise
        else:
            self.fits = True
            return parts
        # Not in the except clause: there the error keeps alive what the first attempt has taken.
        say("the GPU has too little memory to keep all activations: the backward pass computes some again")
        self.model.recompute = True
        for each, before in zip(self.model.buffers(), buffers, strict=True):
            each.copy_(before)
        _set_random_states(self.model, self.device, random)
        self.optimizer.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
        return self.first_that_fits(compute)

    # What a run writes down ------------------------------------------------------------------------------------------

    def look(self, position: Position, at_once: bool = False) -> None:
        """Writes a checkpoint if it is time, or if a signal asks for an end, which then comes: Stopped is raised.

        All processes look at the same steps, and together.
        """
        self.steps_to_look -= 1
        if self.steps_to_look > 0 and not at_once:
            return
        is_due = time.monotonic() - self.saved_at > 60 * self.execution.checkpoint_minutes
        seconds = position.train_seconds / max(1, position.step)
        steps = 1 if processes.num_processes() == 1 else int(LATEST_LOOK / max(seconds, 1e-3))
        looks = processes.gather([(self.request.signal, is_due, max(1, min(steps, MOST_STEPS)))])
        asked, (_, is_due, self.steps_to_look) = max(each[0] for each in looks), looks[0]
        if asked or is_due:
            check_loss(self.sums)
            position.sums = processes.gather([self.sums.cpu()])
            position.random = processes.gather([_random_states(self.model, self.device)])
            self.save()
        if asked:
            raise Stopped(asked, resumable=True)

    def save(self) -> None:
        processes.broadcast_from_main(
            lambda: save(self.folder, self.recipe, self.state, self.model, self.parts, self.run)
        )
        self.saved_at = time.monotonic()

    def tell_standing(self, epoch: int, rate: float) -> None:
        if self.tell is None:
            return
        epochs, total, position = self.recipe.epochs, len(self.images), self.state.position
        done = min(position.step * self.recipe.batch_size, total) if position else total
        tests = [each for each in self.state.history if each.map_fused is not None]
        to_test = sum(self.is_tested(each) for each in range(epoch, epochs + 1)) if position else 0
        left = ((epochs - epoch + 1) * total - done) / rate + (to_test * tests[-1].test_seconds if tests else 0)
        self.tell(Standing(epoch, epochs, done, total, rate, left, tests[-1].map_fused if tests else None))

    def tell_epoch(self) -> None:
        """A line for the reader, one in the log, and the scalars for the trackers."""
        history = self.state.history
        rates = [len(self.images) / max(each.train_seconds, 1e-9) for each in history]
        lines = [{**asdict(each), "images_per_second": rate} for each, rate in zip(history, rates, strict=True)]
        log = "".join(f"{json.dumps(without_nan(line))}\n" for line in lines)
        processes.broadcast_from_main(lambda: write_bytes(self.folder / LOG, log.encode(), advice=OTHER_ARTIFACTS))
        if self.execution.trackers:
            scalars = {name: value for name, value in lines[-1].items() if value is not None and name != "epoch"}
            self.accelerator.log({**scalars, "learning_rate": self.optimizer.param_groups[0]["lr"]}, step=len(history))
        self.tell_standing(len(history), rates[-1])
        if self.verbose:
            say(_epoch_line(history[-1], self.recipe.epochs, rates[-1]))


def _own_share(order: Sequence[int], step: int, batch_size: int) -> list[int]:
    """Which images of a step's batch are this process's; where none is, those of the epoch's first batch stand in."""
    batch = order[step * batch_size : (step + 1) * batch_size]
    shard = batch_size // processes.num_processes()
    first = processes.rank() * shard
    return list(batch[first : first + shard] or order[:shard])


def _average(model: MCAR, decay: float) -> AveragedModel | None:
    """The exponential average of weights and batch statistics over the steps; None for a decay of 0."""
    if not decay:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def _random_states(model: MCAR, device: torch.device) -> dict[str, Tensor]:
    """The streams that seed_everything has seeded, as far as they have come."""
    states = {"torch": torch.get_rng_state()}
    states |= {"device": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {}
    return states | ({"model": model.generator.get_state()} if model.generator is not None else {})


def _set_random_states(model: MCAR, device: torch.device, states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["torch"])
    if "device" in states:
        torch.cuda.set_rng_state(states["device"], device)
    if model.generator is not None:
        model.generator.set_state(states["model"])


def _autocast(device: torch.device, precision: str) -> torch.autocast:
    return torch.autocast(device.type, PRECISIONS.get(precision), enabled=precision != "fp32")


def _accelerator(model: MCAR, trackers: Sequence[str] = (), folder: Path | None = None) -> Accelerator:
    """The device, where the model is moved. No setting of the environment changes the arithmetic: ConfigError names one
    that would."""
    check_settings()
    check_trackers(trackers)
    processes.forget_accelerate_settings()
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    keep_freed_memory()
    processes.num_processes()  # makes the process group, if there is to be one, the way this project wants it
    AcceleratorState._reset_state()  # what another job in this process has set
    accelerator = Accelerator(
        mixed_precision="no",  # autocast is the loop's own: it acts on the pass over the crops alone
        log_with=list(trackers) or None,
        project_dir=folder,
        # To hand out buffers before each forward pass would forbid several of them (statistics_batch) in one step.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
    )
    if trackers:
        accelerator.init_trackers("scalars")
    model.to(accelerator.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return accelerator


def check_trackers(names: Sequence[str]) -> None:
    """Raises ConfigError for a tracker that accelerate does not know, or whose package is not here."""
    there = [str(each) for each in get_available_trackers()]
    if missing := [name for name in names if name not in there]:
        raise ConfigError(
            f"no tracker {', '.join(missing)} here (there are: {', '.join(there) or 'none'}); install its package, or "
            "choose another"
        )


def check_settings() -> None:
    """Raises ConfigError for a setting of the environment that changes what float32 computes."""
    for name, allowed in SETTINGS.items():
        if (value := os.environ.get(name, "")).upper() not in allowed:
            raise ConfigError(f"{name} is {value!r} in the environment, which changes what float32 computes; unset it")


def evaluate(
    model: MCAR,
    test: ResizedImages,
    precision: str = "fp32",
    seed: int = 0,
    verbose: bool = True,
    execution: Execution = Execution(),  # noqa: B008  # frozen
    after_batch: Callable[[], None] | None = None,
) -> StreamScores:
    """Scores (n, K) of every image in order, under no_grad and in evaluation mode.

    Several processes take the batches in turn, and all get all scores: those of one process, but for selection
    "random", whose numbers each process draws for itself. after_batch: called after each batch.
    """
    device = _accelerator(model).device
    model.eval()
    seed_everything(model, seed, 0, EVALUATION)
    batches = [range(len(test))[first : first + EVALUATION_BATCH] for first in range(0, len(test), EVALUATION_BATCH)]
    own = batches[processes.rank() :: processes.num_processes()]
    workers = num_workers(execution.workers, device, test.kept is None)
    reader = Reader(functools.partial(_squares, test), workers, EVALUATION_BATCH * 3 * test.size**2, device)
    parts: list[tuple[int, StreamScores]] = []
    with lost_worker_told(), contextlib.closing(reader), Progress("testing", len(test), enabled=verbose) as progress:
        for batch, (images,) in zip(own, reader.batches(own), strict=True):
            with _autocast(device, precision):
                parts.append((batch.start, batch_scores(model, network_input(model, images))))
            progress.update(batch.stop, len(test))
            if after_batch is not None:
                after_batch()
    in_order = [scores for _, scores in sorted(processes.gather(parts), key=lambda part: part[0])]
    return StreamScores(*(torch.cat(stream) for stream in zip(*in_order, strict=True)))


def _squares(test: ResizedImages, indices: Sequence[int]) -> tuple[Tensor]:
    return (test.batch(indices),)


def stream_map(scores: StreamScores, test: ResizedImages) -> tuple[float, float, float]:
    """mAP of the global, local and fused scores, classes without positives left out."""
    targets = test.image_set.targets
    streams = (scores.global_scores, scores.local_scores, scores.fused)
    each = [average_precision(stream, targets).nanmean().item() for stream in streams]
    return each[0], each[1], each[2]


def _epoch_line(result: EpochResult, epochs: int, rate: float) -> str:
    maps = {"global": result.map_global, "local": result.map_local, "fused": result.map_fused}
    scored = " ".join(f"{name} {100 * value:.1f}" for name, value in maps.items() if value is not None)
    return (
        f"epoch {result.epoch}/{epochs}: loss global {result.global_loss:.4f} local {result.local_loss:.4f}, "
        f"{f'mAP {scored}' if scored else 'not scored'}, {rate:.0f} images/s, "
        f"{format_seconds(result.train_seconds + result.test_seconds)}"
    )
