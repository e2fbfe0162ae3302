"""The learning rate of each arm of a study, chosen on validation images: the same small budget for every arm."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mcar_lib.metrics import best_threshold
from mcar_lib.runs.comparisons import scores_of, tested
from mcar_lib.runs.config import AxisName, RunConfig, Tuning, arm_of
from mcar_lib.runs.grid import find_or_train
from mcar_lib.runs.records import Failure, Record, Value
from mcar_lib.runs.runs import Runs


@dataclass
class Arm:
    """What is tuned, and what each rate that was tried came to: mAP on the val list as a fraction, None where the run
    failed."""

    config: RunConfig
    tried: dict[float, float | None]

    @property
    def best(self) -> float | None:
        """The rate of the highest mAP, of equals the lowest; None where every run failed."""
        scored = {rate: value for rate, value in sorted(self.tried.items()) if value is not None}
        return max(scored, key=lambda rate: scored[rate]) if scored else None

    def wanted(self, tuning: Tuning) -> list[float]:
        """Rates that are still to be tried: those of the grid, then beyond an end at which the best one lies."""
        if missing := [rate for rate in tuning.rates if rate not in self.tried]:
            return missing
        low, high = min(self.tried), max(self.tried)
        if self.best == low and low > tuning.rates[0] / 2**tuning.widenings * 1.001:
            return [float(f"{low / 2:.6g}")]
        if self.best == high and high < tuning.rates[-1] * 2**tuning.widenings * 0.999:
            return [float(f"{high * 2:.6g}")]
        return []


def arms(runs: Runs, configs: Sequence[RunConfig], train: bool = True) -> list[Arm]:
    """The arm of each configuration, tuned: its runs are found or trained, one a rate. Empty where the profile fixes
    its rates. train: False only finds them: a rate without a record counts as one that failed."""
    tuning = runs.profile.tuning
    if tuning is None:
        return []
    asked = [arm_of(config, tuning) for config in configs]
    found = {run.model_dump_json(): Arm(run, {}) for run in asked}
    while True:
        wanted = [(arm, rate) for arm in found.values() for rate in arm.wanted(tuning)]
        if not wanted:
            return [found[run.model_dump_json()] for run in asked]
        tried = [arm.config.vary(learning_rate=rate) for arm, rate in wanted]
        tests: Sequence[Record | Failure | None]
        tests = find_or_train(runs, tried) if train else [runs.find(config) for config in tried]
        for (arm, rate), each in zip(wanted, tests, strict=True):
            arm.tried[rate] = value_of(each)


def value_of(found: Record | Failure | None) -> float | None:
    """What a tuning run is judged by: fused mAP on the val list after the last epoch, as a fraction; None without a
    record."""
    return found.map() if isinstance(found, Record) else None


def tune(runs: Runs, configs: Sequence[RunConfig], train: bool = True) -> list[RunConfig]:
    """The configurations, each with the rate of its arm; as they are where the profile fixes its rates. train: as for
    arms; False for what is shown only where it was trained before."""
    if runs.profile.tuning is None:
        return list(configs)
    return [
        config if arm.best is None else config.vary(learning_rate=arm.best)
        for config, arm in zip(configs, arms(runs, configs, train), strict=True)
    ]


def tuning_run(config: RunConfig, tuning: Tuning) -> RunConfig:
    """The run on the val list at a configuration's own rate: by it, what no weight depends on is chosen."""
    return arm_of(config, tuning).vary(learning_rate=config.learning_rate)


@dataclass(frozen=True)
class Chosen:
    """What the val list decides beside the rate: values of the test, and the score from which a label is predicted.

    changes: num_regions and threshold (tau) where they are others than those of the training; none of them changes a
    weight. decision_threshold: a probability. scored_on: the title of the images.
    """

    changes: Mapping[str, Value]
    decision_threshold: float
    scored_on: str


def choose(runs: Runs, config: RunConfig) -> Chosen | None:
    """N, then tau, of the highest mAP on the val list among the profile's values, and the decision threshold of the
    highest OF1 there, of equals the lowest; by the tuning run of this configuration. None without a tuning.

    Raises the errors of that run's data and weights where they are needed.
    """
    tuning = runs.profile.tuning
    if tuning is None:
        return None
    record = runs.run(tuning_run(config, tuning))
    changes: dict[str, Value] = {}
    names: list[AxisName] = ["num_regions", "threshold"] if config.local_stream else []
    for name in names:
        own = getattr(config, name)
        values = [own, *(value for value in runs.profile.axis(name).values if value != own)]
        found = {value: tested(runs, record, **{**changes, name: value}).map() for value in values}
        best = max(found, key=lambda value: found[value])
        changes |= {name: best} if best != own else {}
    scores = scores_of(runs, tested(runs, record, **changes)).fused
    val = runs.data(record.config).test
    return Chosen(changes, best_threshold(scores, val.targets), val.title)


def tuning_rows(runs: Runs, configs: Sequence[RunConfig]) -> list[dict[str, Any]]:
    """The tuning of these configurations, for a table: a row for each arm and rate, mAP on val in percent."""
    rows, seen = [], set()
    for arm in arms(runs, configs):
        if (key := arm.config.model_dump_json()) not in seen:
            seen.add(key)
            name = arm.config.label.removesuffix(f"-s{arm.config.seed}")
            rows += [
                {
                    "arm": f"{name}, {arm.config.epochs} epochs",
                    "learning rate": rate,
                    "mAP on val": None if value is None else 100 * value,
                    "chosen": "yes" if rate == arm.best else "",
                }
                for rate, value in sorted(arm.tried.items())
            ]
    return rows
