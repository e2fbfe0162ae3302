"""Run records, as they are read: what was run, with what, and what came out.

What a record depends on, and where that is held:

run         configuration (compared whole); code (keys.arithmetic); photos and labels (keys.train_data, keys.test_data);
            starting weights (keys.weights); number of processes, where each has batch statistics of its own
            (environment.processes: told where it is another than today's)
evaluation  the run and the values that differ (its name, see evaluation_id); code (made_by)
comparison  runs, values, streams, epoch, resamples (its name, and a, b, epoch, num_resamples); code that reads scores
            and resamples (made_by); scores (their mAP is held against that of the run's record when it is made)
regions     the run (its name); code (made_by); annotated boxes (boxes)
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mcar_lib.errors import ConfigError, ResultsError
from mcar_lib.files import content_id, read_json
from mcar_lib.runs.config import RunConfig, make_config
from mcar_lib.runs.fingerprints import accepted

RECORD_FORMAT = 1
NO_TEST_LABELS = "VOC2012 test has no public labels, so there is nothing to score"
Value = int | float | str


@dataclass(frozen=True)
class Record:
    """A run record as it was read: the path of its JSON file and the content."""

    path: Path
    content: Mapping[str, Any]

    @property
    def run_id(self) -> str:
        return str(self.content["run_id"])

    @functools.cached_property
    def config(self) -> RunConfig:
        try:
            return make_config(self.content["config"])
        except ConfigError as error:
            raise ResultsError(f"{self.path}: {error}; move it away") from error

    @property
    def data(self) -> Mapping[str, Any]:
        """What it was trained and tested on: titles, numbers of images, classes, whether that is a subset."""
        data: Mapping[str, Any] = self.content["data"]
        return data

    @property
    def classes(self) -> list[str]:
        return list(self.data["classes"])

    @property
    def is_scored(self) -> bool:
        """Whether there are metrics: not where the labels of the test split are not public."""
        return self.content["metrics"] is not None

    @property
    def metrics(self) -> Mapping[str, Any]:
        """ "last" and "best" epoch: the metrics of each stream; raises ResultsError where nothing was scored."""
        if not self.is_scored:
            raise ResultsError(f"{self.path}: no metrics: {NO_TEST_LABELS}; mcar submit voc2012 has its server do it")
        metrics: Mapping[str, Any] = self.content["metrics"]
        return metrics

    def stream(self, name: str = "fused", epoch: str = "last") -> Mapping[str, Any]:
        """The metrics of one stream (global, local, fused) at the last or the best epoch."""
        stream: Mapping[str, Any] = self.metrics[epoch][name]
        return stream

    def map(self, name: str = "fused", epoch: str = "last") -> float:
        """mAP as a fraction."""
        return float(self.stream(name, epoch)["mAP"])

    def prediction(self, stream: str = "fused") -> "Prediction":
        """What one stream of this run says of the test images."""
        return Prediction(self, stream=stream)

    @property
    def num_processes(self) -> int:
        """How many processes trained it together; records that lack the number were made by one."""
        return int(self.content.get("environment", {}).get("processes", 1))

    def is_current(self, keys: Mapping[str, str]) -> bool:
        """Whether it was made by this arithmetic, data and weights, as far as these keys tell."""
        own = self.content.get("keys", {})
        return all(own.get(name) in accepted(value) for name, value in keys.items())


@dataclass(frozen=True)
class Prediction:
    """One score of each test image and class: a stream of a run, as it was trained or with other values in the test.

    changes: any of num_regions, threshold, selection that differ from the run's; none of them changes a weight.
    evaluation: the record of that test; None without changes.
    """

    record: Record
    changes: Mapping[str, Value] = field(default_factory=dict)
    stream: str = "fused"
    evaluation: Mapping[str, Any] | None = None

    @property
    def id(self) -> str:
        """The run's id where it is the run's own prediction."""
        if not self.changes and self.stream == "fused":
            return self.record.run_id
        return content_id({"run": self.record.run_id, "changes": self.changes, "stream": self.stream})

    @property
    def config(self) -> RunConfig:
        """The run's configuration, as it was trained."""
        return self.record.config

    @property
    def metrics(self) -> Mapping[str, Any]:
        metrics: Mapping[str, Any] = (self.evaluation["metrics"] if self.evaluation else self.record.metrics["last"])[
            self.stream
        ]
        return metrics

    def map(self) -> float:
        """mAP as a fraction."""
        return float(self.metrics["mAP"])

    @property
    def cost(self) -> Mapping[str, Any]:
        """Parameters, operations and seconds; milliseconds_per_image of its tests, reading included."""
        cost, tests = self.record.content["cost"], self.record.config.epochs * self.record.data["test_images"]
        measured = self.evaluation["cost"] if self.evaluation else {}
        return {**cost, "milliseconds_per_image": 1000 * cost["test_seconds"] / tests, **measured}


@dataclass(frozen=True)
class Failure:
    """A run that could not be had, and why; a later attempt may succeed."""

    config: RunConfig
    error: str


def read_records(folder: Path) -> list[Record]:
    """All run records under a profile's results, in name order. Raises ResultsError on a file that is no record."""
    return [_read_record(path, path.stat().st_mtime_ns) for path in sorted((folder / "runs").glob("*.json"))]


@functools.lru_cache(maxsize=1024)
def _read_record(path: Path, changed_ns: int) -> Record:
    record = Record(path, read_json(path))
    if record.content.get("format") != RECORD_FORMAT:
        raise ResultsError(f"{path}: not a run record of format {RECORD_FORMAT}; move it away")
    return record


def kept(
    folders: Sequence[Path], kind: str, name: str, made_by: str, keys: Mapping[str, str]
) -> Mapping[str, Any] | None:
    """The content of <kind>/<name>.json in the first of these results/<profile> folders that has one made by the
    definitions of this fingerprint (see mcar_lib.runs.fingerprints) from what the keys tell."""
    for path in (folder / kind / f"{name}.json" for folder in folders):
        if not path.exists():
            continue
        content = read_json(path)
        if content.get("made_by", "") in accepted(made_by) and all(content.get(key) == keys[key] for key in keys):
            return content
    return None


def run_id_of(config: RunConfig, keys: Mapping[str, str]) -> str:
    """A hash of what differs from the defaults (so that a new option renames no run) and its keys."""
    return content_id({"config": config.model_dump(mode="json", exclude_defaults=True), **keys})


def evaluation_id(run_id: str, changes: Mapping[str, Value]) -> str:
    """What names the record of a test of a run with other values."""
    return content_id({"run": run_id, "changes": changes})
