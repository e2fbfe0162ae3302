"""What the runs of a profile cost before any is started: images, steps, operations, hours on a device of a given speed.

Needs neither data nor weights: the published data sets are as large as their official counts.
"""

import csv
import functools
import json
import math
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from mcar_lib.backbones import build_backbone
from mcar_lib.data import splits_of
from mcar_lib.data.published import PUBLISHED
from mcar_lib.data.voc import VOC_OFFICIAL_SIZES
from mcar_lib.errors import ConfigError
from mcar_lib.files import shipped
from mcar_lib.runs.config import AxisName, Profile, RunConfig, arm_of

BACKWARD = 2  # a backward pass costs about two forward passes: gradients of the inputs and of the weights
TESTS_LINE = (
    "tests: what they add to the training, in hours or percent of it; --set evaluate_every=60 tests a run of 60 epochs "
    "at the end only, and then the best epoch is not known"
)
TUNING_LINE = (
    "rates: mcar reproduce chooses them by the runs of the tuning, of which there are more where the best rate is the "
    "last of the grid; the command of any other run trains it at the profile's own rate"
)
MAIN, EQUAL_COST, TUNING, ROWS = "main comparison", "equal cost", "tuning", "rows"  # studies; the others are ablations
NUM_CLASSES = {"coco2014": 80}  # the others have VOC's 20
Key = tuple[str, str, int]


@dataclass(frozen=True)
class NamedRun:
    """One run of a profile: its name, the options by which `mcar train` knows it, and what it is trained for."""

    name: str
    config: RunConfig
    options: tuple[str, ...]
    study: str = MAIN


@dataclass(frozen=True)
class PlannedRun:
    """One run and its cost. published: mAP in percent for its data set, backbone and input size, None if there is none.

    macs_per_image: multiply-accumulates of one forward pass of both streams.
    """

    name: str
    config: RunConfig
    published: float | None
    train_images: int
    test_images: int
    macs_per_image: int
    command: str
    study: str = MAIN

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.config.epochs * math.ceil(self.train_images / self.config.batch_size)

    @property
    def macs(self) -> int:
        """Of the whole run: training, and the tests that its evaluate_every asks for."""
        return self._training_macs + self.test_macs(self.config.evaluate_every)

    @property
    def _training_macs(self) -> int:
        return self.config.epochs * (1 + BACKWARD) * self.train_images * self.macs_per_image

    def test_macs(self, every: int) -> int:
        """Of the tests of the whole run, one after every so many epochs and one after the last; none where test labels
        are not public (VOC 2012's)."""
        tests = 0 if self.config.dataset == "voc2012" else math.ceil(self.config.epochs / every)
        return tests * self.test_images * self.macs_per_image

    def hours(self, throughput: Mapping[str, float]) -> float | None:
        """Hours on a device of this speed, in 10^12 multiply-accumulates a second by backbone ("" for all others);
        None without a speed for this backbone."""
        return self._hours(self.macs, throughput)

    def _hours(self, macs: int, throughput: Mapping[str, float]) -> float | None:
        speed = throughput.get(self.config.backbone, throughput.get(""))
        return None if speed is None else macs / (speed * 1e12) / 3600

    def tests(self, every: int, throughput: Mapping[str, float]) -> str | None:
        """What tests after every so many epochs add: hours where the speed is known, else percent of the training."""
        macs = self.test_macs(every)
        hours = self._hours(macs, throughput)
        if not macs:
            return None
        return f"{100 * macs / self._training_macs:.1f} %" if hours is None else f"{hours:.2f} h"

    def cells(self, throughput: Mapping[str, float]) -> dict[str, object]:
        """The run as a row of a table; hours in all only where there is a throughput."""
        return {
            "run": self.name,
            "study": self.study,
            "published mAP %": self.published,
            "training images": f"{self.train_images:,}",
            "test images": f"{self.test_images:,}",
            "epochs": self.config.epochs,
            "rate": f"{self.config.learning_rate:g}",
            "steps": f"{self.steps:,}",
            "GMACs an image": self.macs_per_image / 1e9,
            "MACs in all": _counted(self.macs),
            "tests every epoch": self.tests(1, throughput),
            "at the end only": self.tests(self.config.epochs, throughput),
            **({"hours": self.hours(throughput)} if throughput else {}),
        }


def plan(profile: Profile, named: str | None = None, everything: bool = False) -> list[PlannedRun]:
    """The rows of a profile in the order of the published table, or its main comparison where it has no rows.

    named: the profile as commands are to name it, a path say; by default its own name. everything: the runs of its
    studies too, with those that tune their rates, each once.
    Raises ConfigError for a data set whose size is not known beforehand (one's own images).
    """
    published, command = published_map(), ("mcar", "train", "--profile", named or profile.name)
    folder = " --data-root DIR" if profile.rows else ""
    return [
        _planned(run, published.get(key_of(run.config)), shlex.join((*command, *run.options)) + folder)
        for run in (all_runs(profile) if everything else named_runs(profile))
    ]


def total_line(runs: Sequence[PlannedRun], throughput: Mapping[str, float]) -> str:
    """How many runs there are, of each study, and what they cost together."""
    counts = ", ".join(f"{name} {count}" for name, count in Counter(run.study for run in runs).items())
    macs = f"{_counted(sum(run.macs for run in runs))} MACs"
    hours = [run.hours(throughput) for run in runs]
    known = [each for each in hours if each is not None]
    if not known:
        return f"{len(runs)} runs ({counts}): {macs}; with --throughput their hours"
    left_out = f", without {len(hours) - len(known)} runs whose speed is not given" if len(known) < len(hours) else ""
    return f"{len(runs)} runs ({counts}): {macs}, {sum(known):.2f} hours one after another{left_out}"


def _counted(macs: int) -> str:
    """1.5e15 -> '1.5 P'."""
    unit, size = next((each for each in (("E", 1e18), ("P", 1e15)) if macs >= each[1]), ("T", 1e12))
    return f"{macs / size:,.3g} {unit}"


def all_runs(profile: Profile) -> list[NamedRun]:
    """The rows of a profile and the runs of its studies, each once, under the first study that it is in."""
    found = {run.config.model_dump_json(): run for run in named_runs(profile)} if profile.rows else {}
    for study, configs in studies(profile).items():
        for config in configs:
            options = tuple(_settings(config, *_changed(config, profile.run)))
            found.setdefault(config.model_dump_json(), NamedRun(config.label, config, options, study))
    return list(found.values())


def studies(profile: Profile) -> dict[str, list[RunConfig]]:
    """The runs that a profile's notebooks compare, by study, at the rate that the profile fixes; last those that tune
    the rates, where it has a tuning. What is only tested is no run."""
    found = {MAIN: _main_comparison(profile)}
    if profile.equal_cost:
        seeds = profile.equal_cost.seeds
        found[EQUAL_COST] = [arm.vary(seed=seed) for arm in profile.equal_cost_arms().values() for seed in seeds]
    for name in profile.ablations:
        found[f"ablation of {name}"] = _ablation(profile, name)
    if profile.tuning:
        arms = [arm_of(config, profile.tuning) for configs in found.values() for config in configs]
        found[TUNING] = [arm.vary(learning_rate=rate) for arm in arms for rate in profile.tuning.rates]
    return found


def _main_comparison(profile: Profile) -> list[RunConfig]:
    """Both models with every seed."""
    return [profile.run.vary(local_stream=local, seed=seed) for local in (False, True) for seed in profile.seeds]


def _ablation(profile: Profile, name: AxisName) -> list[RunConfig]:
    base, axis = profile.base(name), profile.axis(name)
    arms = [base] if axis.tested_only else [base.vary(**{name: value}) for value in axis.values]
    if name == "num_regions":  # the global stream has none
        arms = [base.vary(local_stream=False), *arms]
    elif name not in ("selection", "threshold"):  # these are MCAR's; of all else, both models are trained
        arms = [arm.vary(local_stream=local) for local in (False, True) for arm in arms]
    return [arm.vary(seed=seed) for arm in arms for seed in axis.seeds]


def _changed(config: RunConfig, base: RunConfig) -> list[str]:
    return [name for name in RunConfig.model_fields if getattr(config, name) != getattr(base, name)]


def named_runs(profile: Profile, rows: Sequence[str] = ()) -> list[NamedRun]:
    """The rows of a profile, all or those named, in the order of the published table; its main comparison, both models
    with every seed, where it has no rows. Raises ConfigError for a row that it has not."""
    if profile.rows or rows:
        names = dict.fromkeys(rows or profile.rows)
        runs = [NamedRun(name, profile.row(name), ("--row", name), ROWS) for name in names]
    else:
        both = _main_comparison(profile)
        runs = [NamedRun(each.label, each, tuple(_settings(each, "local_stream", "seed"))) for each in both]
    order = {key: place for place, key in enumerate(published_map())}
    return sorted(runs, key=lambda run: order.get(key_of(run.config), len(order)))


def _settings(config: RunConfig, *names: str) -> Iterator[str]:
    for name in names:
        yield from ("--set", f"{name}={json.dumps(getattr(config, name))}")


def parse_throughput(texts: Sequence[str]) -> dict[str, float]:
    """["20", "mobilenet_v2=3"] -> {"": 20.0, "mobilenet_v2": 3.0}; raises ConfigError for anything else."""
    found = {}
    for text in texts:
        backbone, _, number = text.rpartition("=")
        try:
            found[backbone] = float(number)
        except ValueError:
            found[backbone] = math.nan
        if not 0 < found[backbone] < math.inf:
            raise ConfigError(f"throughput {text!r}: give a positive number, or BACKBONE=NUMBER")
    return found


def key_of(config: RunConfig) -> Key:
    """What tells the published figures apart: data set, backbone and input size."""
    return config.dataset, config.backbone, config.image_size


def published_map() -> dict[Key, float]:
    """The published mAP in percent by data set, backbone and input size (results/published/map.csv)."""
    with (shipped("results/published") / "map.csv").open(encoding="utf-8", newline="") as stream:
        rows = csv.DictReader(stream)
        return {(row["dataset"], row["backbone"], int(row["image_size"])): float(row["percent"]) for row in rows}


def _planned(run: NamedRun, published: float | None, command: str) -> PlannedRun:
    config = run.config
    train, test = (_num_images(config, split) for split in ("train", "test"))
    macs = _macs(config.backbone, config.image_size, NUM_CLASSES.get(config.dataset, 20))
    passes = 1 + config.num_regions if config.local_stream else 1
    return PlannedRun(run.name, config, published, train, test, passes * macs, command, run.study)


def _num_images(config: RunConfig, split: str) -> int:
    count = config.data_options.get(f"num_{split}" if config.scored_on == "test" else "num_train")  # scenes
    if isinstance(count, int):
        val = count // 5  # of the training images
        return count if config.scored_on == "test" else val if split == "test" else count - val
    official = config.dataset[-4:], splits_of(config.dataset, config.scored_on)[split]
    if config.scored_on == "val" and official in VOC_OFFICIAL_SIZES:
        return VOC_OFFICIAL_SIZES[official]
    if (config.dataset, split) not in PUBLISHED:
        raise ConfigError(f"how many images {config.dataset} has is not known beforehand; plan a published data set")
    return PUBLISHED[config.dataset, split].images


@functools.cache
def _macs(backbone: str, image_size: int, num_classes: int) -> int:
    """Of one pass through backbone and classifier, counted on tensors that have a shape and no content."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        built = build_backbone(backbone, "none")
        built.features.eval()(torch.zeros(1, 3, image_size, image_size))
    return counter.get_total_flops() // 2 + built.num_features * num_classes
