"""One run on this machine: its model drawn, trained, tested, and all that its record says."""

import contextlib
import itertools
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mcar_lib.data import ImageSet
from mcar_lib.data.squares import ResizedImages
from mcar_lib.data.transforms import sample_generator
from mcar_lib.errors import CheckpointError, ConfigError
from mcar_lib.model import MCAR, build_mcar
from mcar_lib.progress import format_seconds
from mcar_lib.runs.config import RunConfig
from mcar_lib.runs.environment import PeakMemory, describe_environment
from mcar_lib.runs.fingerprints import fingerprint
from mcar_lib.runs.measures import chosen_threshold, count_macs, run_cost, run_metrics
from mcar_lib.runs.outcome import Outcome
from mcar_lib.runs.splits import Data, Splits
from mcar_lib.training import (
    EVALUATION_BATCH,
    INITIALISATION,
    EpochResult,
    Execution,
    Fit,
    Standing,
    check_groups,
    evaluate,
    fit,
    processes,
)
from mcar_lib.weights import load_named, load_release_checkpoint, read_state_dict


def arithmetic_fingerprint() -> str:
    """What a run computes with: from the bytes of a photo to its metrics, training, loop and loading of weights."""
    return fingerprint(ImageSet.image, Splits.squares, train, evaluate, run_metrics, count_macs)


def build_model(config: RunConfig, num_classes: int, weights: str | None = None) -> MCAR:
    """The model of a configuration, drawn from its seed; weights: in place of the configuration's own."""
    return build_mcar(
        config.backbone,
        num_classes,
        config.weights if weights is None else weights,
        seed=sample_generator(config.seed, 0, INITIALISATION).initial_seed(),
        pooling=config.pooling,
        num_regions=config.num_regions,
        threshold=config.threshold,
        selection=config.selection,
        local_stream=config.local_stream,
        box_source=config.box_source,
    )


def load_model(config: RunConfig, num_classes: int, path: Path, release: bool = False) -> MCAR:
    """The model of a configuration with weights of this project's own from a file, or those of a release checkpoint.

    Raises CheckpointError where they are of another architecture, or else WeightsError where they cannot be read.
    """
    mcar = build_model(config, num_classes, weights="none")
    if release:
        load_release_checkpoint(path, mcar)
    else:
        load_named(mcar, read_state_dict(path), str(path))
    return mcar


def load_checkpoint(
    config: RunConfig, images: ImageSet, path: Path, release: bool = False, about: Mapping[str, Any] | None = None
) -> MCAR:
    """As load_model, to score images. about: the header of an exported file, whose classes have to be theirs, in this
    order, and whose normalisation is used; else CheckpointError."""
    if about is not None and tuple(about["classes"]) != images.classes:
        pairs = itertools.zip_longest(about["classes"], images.classes)
        number, (found, wanted) = next((n, pair) for n, pair in enumerate(pairs, start=1) if pair[0] != pair[1])
        same = ", the same in another order" if sorted(about["classes"]) == sorted(images.classes) else ""
        raise CheckpointError(
            f"{path} has other classes than {images.title}{same}: class {number} is {found!r} there and {wanted!r} "
            "here; score the data set that it was trained on"
        )
    mcar = load_model(config, len(images.classes), path, release)
    if about is not None:
        mcar.mean, mcar.std = about["mean"], about["std"]
    return mcar


def train(
    splits: Splits,
    config: RunConfig,
    outcome: Outcome,
    threads: int = 0,
    execution: Execution = Execution(),  # noqa: B008  # frozen
    tell: Callable[[Standing], None] | None = None,
) -> tuple[MCAR, Fit]:
    """Trains a run, going on from the last checkpoint that its folder holds; leaves weights and scores there. tell: as
    for fit."""
    data = splits.of(config)
    if config.num_regions > len(data.train.classes):
        raise ConfigError(
            f"num_regions is {config.num_regions}; {data.train.title} has {len(data.train.classes)} classes, and "
            f"each region is of another class: --set num_regions={len(data.train.classes)}, or less"
        )
    mcar = processes.main_first(lambda: build_model(config, len(data.train.classes)))  # may be a download
    squares = splits.squares(data.train, config.image_size)
    at_the_end_only = config.evaluate_every >= config.epochs
    test = None if data.scored is None else splits.squares(data.scored, config.image_size, at_the_end_only)
    with cpu_threads(threads):
        run = outcome.folder.name
        state = fit(mcar, squares, test, config, outcome.folder, execution, splits.verbose, run, tell)
    processes.broadcast_from_main(lambda: outcome.save(mcar, state))
    return mcar, state


def described(
    config: RunConfig, data: Data, mcar: MCAR, state: Fit, seconds: float, memory: PeakMemory, threads: int
) -> dict[str, Any]:
    """What a run's record says beside its names and keys. seconds, memory: of this session."""
    test = data.scored
    return {
        "config": config.model_dump(mode="json"),
        "data": {
            "train": data.train.title,
            "test": None if test is None else test.title,
            "train_images": len(data.train),
            "test_images": None if test is None else len(test),
            "subset": data.train.is_subset or (test is not None and test.is_subset),
            "classes": list(data.train.classes),
        },
        "metrics": run_metrics(config, state, test),
        **chosen_threshold(config, state, test),
        "history": [asdict(result) for result in state.history],
        "cost": run_cost(mcar, config, state, seconds, memory),
        "environment": describe_environment(threads),
    }


@contextlib.contextmanager
def cpu_threads(count: int) -> Iterator[None]:
    """That many CPU threads for a while; 0 changes nothing."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class DryRun:
    """What the first steps of a run took: images trained on and tested, their epoch, peak memory in bytes.

    train_total, test_total: images of the whole run's epoch and test.
    """

    config: RunConfig
    train_images: int
    test_images: int
    train_total: int
    test_total: int
    result: EpochResult
    peak_memory_bytes: int | None

    @property
    def total_seconds(self) -> float:
        """Of the whole run at this speed: every epoch and every test."""
        train, test = self.result.train_seconds / self.train_images, self.result.test_seconds / self.test_images
        return self.config.epochs * self.train_total * train + self.num_tests * self.test_total * test

    @property
    def num_tests(self) -> int:
        """After every so many epochs, and after the last."""
        return -(-self.config.epochs // self.config.evaluate_every) if self.test_total else 0

    @property
    def lines(self) -> list[str]:
        """For the reader."""
        steps = -(-self.train_images // self.config.batch_size)
        loss = self.result.global_loss + self.result.local_loss
        peak = self.peak_memory_bytes
        return [
            f"{self.config.label}: it runs",
            f"{steps} training steps of {self.config.batch_size} images: {self.result.train_seconds:.2f} s (the first "
            f"steps are slower than the others), loss {loss:.4f}",
            f"one test batch of {self.test_images} images: {self.result.test_seconds:.2f} s",
            f"the whole run: about {format_seconds(self.total_seconds)} at this speed, {self.config.epochs} epochs of "
            f"{self.train_total:,} images and {self.num_tests} tests of {self.test_total:,}",
            f"peak memory: {'not known on this system' if peak is None else f'{peak / 2**30:.1f} GiB'}",
        ]


def dry_run(
    splits: Splits,
    config: RunConfig,
    threads: int = 0,
    execution: Execution = Execution(),  # noqa: B008  # frozen
    passes: int = 1,
) -> DryRun:
    """Two training steps and one test batch of a run, on its own data and device; nothing is kept.

    Where the test labels are not public, training photos are scored instead. passes: how often these are done; the
    last time is told, so that with two of them the slow first steps are not.
    """
    data = splits.of(config)
    train = data.train.select(range(min(2 * config.batch_size, len(data.train))))
    scored = data.train if data.scored is None else data.scored
    test = scored.select(range(min(EVALUATION_BATCH, len(scored))))
    mcar = processes.main_first(lambda: build_model(config, len(train.classes)))
    check_groups(mcar, len(data.train), config.image_size, config)
    squares = (ResizedImages(train, config.image_size), ResizedImages(test, config.image_size))
    memory = PeakMemory()
    with tempfile.TemporaryDirectory() as folder, cpu_threads(threads):
        state = fit(
            mcar, *squares, config.vary(epochs=passes, evaluate_every=1), Path(folder), execution, verbose=False
        )
    totals = len(data.train), 0 if data.scored is None else len(data.scored)
    return DryRun(config, len(train), len(test), *totals, state.history[-1], memory.bytes)
