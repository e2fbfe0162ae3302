"""Run records, as they are read: what was run, with what, and what came out.

What a record depends on, and where that is held:

run         configuration (compared whole); code (keys.arithmetic); photos and labels (keys.train_data, keys.test_data);
            starting weights (keys.weights); number of processes, where each has batch statistics of its own
            (environment.processes: told where it is another than today's)
evaluation  the run and the values that differ (its name, see evaluation_id); code (made_by)
comparison  runs, values, streams, epoch, resamples (its name, and a, b, epoch, num_resamples); code that reads scores
            and resamples (made_by); scores (their mAP is held against that of the run's record when it is made)
regions     the run, N and tau where they are not its own (its name); code (made_by); annotated boxes (boxes)
cheaper     the run and the ways of looking at its regions (its name); code (made_by)

A file that is no whole record is named and passed over: one that is broken stops no other run.
"""

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from mcar_lib.errors import ConfigError, MCARError, ResultsError
from mcar_lib.files import content_id, read_json
from mcar_lib.progress import say
from mcar_lib.runs.config import RunConfig, make_config
from mcar_lib.runs.fingerprints import accepted
from mcar_lib.runs.measures import LABEL_METRICS, OPERATING_POINTS, STREAMS

RECORD_FORMAT = 1
RUN_NUMBERS = ("metrics", "history")  # of a run that was scored: null is NaN there
NO_NUMBERS = ("changes", "environment")  # of other records: null is null there
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
            return _config(json.dumps(self.content["config"]))
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


@functools.lru_cache(maxsize=4096)
def _config(text: str) -> RunConfig:
    """Checked once: a grid looks at every record for every run."""
    return make_config(json.loads(text))


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
        """What the run cost; operations of the test are those with the values it was tested with."""
        return {**self.record.content["cost"], **(self.evaluation["cost"] if self.evaluation else {})}


@dataclass(frozen=True)
class Failure:
    """A run that could not be had, and why; a later attempt may succeed."""

    config: RunConfig
    error: str


def read_records(folder: Path) -> list[Record]:
    """All run records under a profile's results, in name order; files that are none are named and passed over."""
    found = ((path, read_kept(path, "runs")) for path in _record_files(folder / "runs"))
    return [Record(path, content) for path, content in found if content is not None]


def _record_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.json") if not path.name.startswith("."))  # "._x.json" is a Mac's


def kept(
    folders: Sequence[Path], kind: str, name: str, made_by: str, keys: Mapping[str, str]
) -> Mapping[str, Any] | None:
    """The content of <kind>/<name>.json in the first of these results/<profile> folders that has one made by the
    definitions of this fingerprint (see mcar_lib.runs.fingerprints) from what the keys tell."""
    for path in (folder / kind / f"{name}.json" for folder in folders):
        content = read_kept(path, kind) if path.exists() else None
        made_so = content is not None and content.get("made_by", "") in accepted(made_by)
        if content is not None and made_so and all(content.get(key) == keys[key] for key in keys):
            return content
    return None


def following(folder: Path, runs: Sequence[str]) -> list[Path]:
    """The records in a folder, results/<profile>/<kind>, that follow from these runs and no others."""
    contents = ((path, read_kept(path, folder.name)) for path in _record_files(folder))
    return [path for path, content in contents if content and set(runs) >= set(runs_of(content))]


def runs_of(content: Mapping[str, Any]) -> Sequence[str]:
    """The ids of the runs that a record is of."""
    found: Sequence[str] = content["runs"] if "runs" in content else [content["run_id"]]
    return found


def read_kept(path: Path, kind: str) -> Mapping[str, Any] | None:
    """The content of a record of a kind (one of SHAPES), numbers that were none as NaN.

    None, and a line that says why, once a session, where it is no such record.
    """
    try:
        state = path.stat()
    except OSError:
        return _read(path, kind, 0, 0, 0)
    return _read(path, kind, state.st_size, state.st_mtime_ns, state.st_ino)


@functools.lru_cache(maxsize=4096)
def _read(path: Path, kind: str, *state: int) -> Mapping[str, Any] | None:
    try:
        content = read_json(path)
        if content.get("format") != RECORD_FORMAT:
            raise ResultsError(f"{path}: not a record of format {RECORD_FORMAT}")
        _check(kind, content)
    except ValidationError as error:
        first = error.errors()[0]
        reason = f"{'.'.join(map(str, first['loc'])) or 'record'}: {first['msg']}"
    except MCARError as error:
        reason = str(error)
    else:
        numbers = RUN_NUMBERS if kind == "runs" else content.keys() - NO_NUMBERS
        scored = kind != "runs" or content["metrics"] is not None
        return {key: _with_nan(value) if scored and key in numbers else value for key, value in content.items()}
    say(f"{'' if str(path) in reason else f'{path}: '}{reason}; passed over, move it away")
    return None


def _with_nan(value: Any) -> Any:
    """JSON has no NaN: null stands for it."""
    if isinstance(value, Mapping):
        return {key: _with_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_with_nan(each) for each in value]
    return math.nan if value is None else value


# What a record must hold, so that no table ends in a missing key; it may hold more


def _shape(**fields: Any) -> type[BaseModel]:
    """A JSON object that has at least these keys, of these types."""
    there: dict[str, Any] = {name: (kind, ...) for name, kind in fields.items()}
    return create_model("Shape", __config__=ConfigDict(strict=True, extra="allow"), **there)


def _shapes(**fields: Any) -> Any:
    return list[_shape(**fields)]  # type: ignore[misc]


_NUMBER = float | None
_POINTS = {point: _shape(**dict.fromkeys(LABEL_METRICS, _NUMBER)) for point in OPERATING_POINTS}
_STREAM = _shape(mAP=_NUMBER, classes_without_positives=int, AP=list[_NUMBER], at=_shape(**_POINTS))
_METRICS = _shape(epoch=int, **dict.fromkeys(STREAMS, _STREAM))
_NAMES = {"run_id": str, "label": str}
SHAPES: Mapping[str, type[BaseModel]] = {
    "runs": _shape(
        **_NAMES,
        profile=str,
        config=dict[str, Any],
        keys=dict[str, str],
        data=_shape(
            **{"train": str, "test": str | None, "train_images": int, "test_images": int | None},
            **{"subset": bool, "classes": list[str]},
        ),
        metrics=_shape(last=_METRICS, best=_METRICS) | None,
        history=_shapes(
            **{"epoch": int, "global_loss": _NUMBER, "local_loss": _NUMBER},
            **{"map_global": _NUMBER, "map_local": _NUMBER, "map_fused": _NUMBER},
            **{"train_seconds": float, "test_seconds": float},
        ),
        cost=_shape(
            **{"parameters": int, "parameters_over_backbone": int, "macs_per_image": int},
            **{"train_seconds": float, "test_seconds": float},
        ),
        environment=dict[str, Any],
    ),
    "evaluations": _shape(
        **_NAMES,
        changes=dict[str, Any],
        metrics=_METRICS,
        cost=_shape(macs_per_image=int),
    ),
    "comparisons": _shape(
        **{"a": list[str], "b": list[str], "runs": list[str], "low": _NUMBER, "high": _NUMBER},
        **{"seed_error": _NUMBER, "image_error": _NUMBER, "degrees_of_freedom": _NUMBER},
    ),
    "cheaper": _shape(
        **_NAMES,
        **{"data": str, "images": int},
        ways=_shapes(way=str, value=_NUMBER, mAP=_NUMBER, regions=_NUMBER, macs_per_image=int),
    ),
    "regions": _shape(
        **_NAMES,
        **{"data": str, "images": int, "difficult": int, "counts": dict[str, str]},
        settings=_shape(num_regions=int, threshold=float, occlusion_threshold=float),
        sums=_shapes(way=str, N=int, among=str, measure=str, sums=str),
        grid=_shapes(way=str, tau=float, N=int, F1=_NUMBER),
        gallery=_shapes(image=str, labels=list[str], boxes=list[Any], cells=list[Any], annotated=list[list[Any]]),
    ),
}
_DIFFERENCE = _shape(difference=_NUMBER, p_value=_NUMBER, seeds=list[int], paired=bool)
_INTERVAL_OF_ONE = _shape(mAP=_NUMBER, seeds=int)


def _check(kind: str, content: Mapping[str, Any]) -> None:
    """Raises pydantic's ValidationError, ResultsError or ConfigError where a record lacks what readers of it need."""
    SHAPES[kind].model_validate(content)
    if kind == "comparisons":
        (_DIFFERENCE if content["b"] else _INTERVAL_OF_ONE).model_validate(content)
    if kind == "runs":
        make_config(content["config"])
        if not content["history"]:
            raise ResultsError("its history has no epoch")
    if kind == "runs" and content["metrics"] is not None:
        count = len(content["data"]["classes"])
        streams = [metrics[name] for metrics in content["metrics"].values() for name in STREAMS]
        if not content["data"]["test_images"] or any(len(stream["AP"]) != count for stream in streams):
            raise ResultsError(f"its metrics are not those of test images of {count} classes")


def run_id_of(config: RunConfig, keys: Mapping[str, str]) -> str:
    """A hash of what differs from the defaults (so that a new option renames no run) and its keys."""
    return content_id({"config": config.model_dump(mode="json", exclude_defaults=True), **keys})


def evaluation_id(run_id: str, changes: Mapping[str, Value]) -> str:
    """What names the record of a test of a run with other values."""
    return content_id({"run": run_id, "changes": changes})
