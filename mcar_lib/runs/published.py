"""What was measured here beside what was published, and the report of an evaluation: a log that can be committed."""

import csv
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcar_lib.data import ImageSet, load_image_set
from mcar_lib.errors import ConfigError, as_markdown
from mcar_lib.files import file_hash, made_folder, shipped, write_text
from mcar_lib.runs.config import RunConfig, load_profile
from mcar_lib.runs.environment import describe_environment
from mcar_lib.runs.measures import LABEL_METRICS, STREAMS, stream_metrics
from mcar_lib.runs.plan import key_of, published_map
from mcar_lib.runs.records import Record
from mcar_lib.runs.splits import Splits
from mcar_lib.runs.trainer import load_checkpoint
from mcar_lib.training import Execution, evaluate, processes

RELEASE_BOUND = 0.1  # points: what is published is rounded to 0.1, and resizing and sums round otherwise here
TRAINED_BOUND = 0.5  # points, a convention of this project: no source was found for how far seeds lie apart
# What a trained row may have otherwise and still be the paper's: seed, device, when it is tested.
FREE = ("seed", "precision", "statistics_batch", "evaluate_every")
# What the scores of a released checkpoint depend on beside its weights; pooling is known of one of them only.
OF_A_TEST = ("num_regions", "threshold", "selection", "local_stream", "box_source", "scored_on")
OFFICIAL = {"all": "0.6", "top-3": "0.6 top-3"}  # labels of the published rows -> our operating point: the release's
REPORT_LINE = "Written by `mcar evaluate --report`; do not edit by hand."


@dataclass(frozen=True)
class Beside:
    """mAP in percent, published (None: nothing is) and ours, fused, after the last epoch or of a released checkpoint;
    bound: points within which they agree; why_not: what keeps them from being compared."""

    published: float | None
    ours: float
    bound: float
    why_not: str = ""

    @property
    def agrees(self) -> bool | None:
        """None where they do not compare."""
        if self.published is None or self.why_not:
            return None
        return abs(self.ours - self.published) <= self.bound + 1e-9

    @property
    def line(self) -> str:
        """For the reader."""
        if self.published is None:
            return f"not compared with the published figures: {self.why_not}"
        both = f"published mAP {self.published:.1f} %, ours {self.ours:.2f} %"
        if self.why_not:
            return f"{both}: not compared: {self.why_not}"
        verdict = "agrees within" if self.agrees else "does not agree within"
        return f"{both}, difference {self.ours - self.published:+.2f} points: it {verdict} {self.bound:g} points"


def beside_record(record: Record) -> Beside | None:
    """A trained run beside the published figure of its data set, backbone and input size; None where there is none, or
    nothing was scored."""
    published, row = published_map().get(key_of(record.config)), _row_of(record.config)
    if published is None or row is None or not record.is_scored:
        return None
    config = record.config.vary(**{name: getattr(row, name) for name in FREE})
    why_not = _told_of_subset(record.data["train"], record.data["test"]) if record.data["subset"] else ""
    if other := _differing(config, row, type(config).model_fields):
        why_not = f"its recipe is not the paper's ({other})"
    return Beside(published, 100 * record.map(), TRAINED_BOUND, why_not)


def beside_release(config: RunConfig, test: ImageSet, streams: Mapping[str, Any]) -> Beside:
    """A released checkpoint, scored with this configuration, beside what was published of it."""
    published, row = published_map().get(key_of(config)), _row_of(config)
    why_not = _told_of_subset(test.title) if test.is_subset else ""
    if published is None or row is None:
        why_not = f"there is none of {config.dataset}, {config.backbone}, {config.image_size} px"
    elif other := _differing(config, row, OF_A_TEST):
        why_not = f"it was not scored as the paper's was ({other})"
    return Beside(published, 100 * streams["fused"]["mAP"], RELEASE_BOUND, why_not)


def _row_of(config: RunConfig) -> RunConfig | None:
    """The row of the paper's profile with this data set, backbone and input size."""
    paper = load_profile("paper")
    rows = (paper.row(name) for name in paper.rows)
    return next((row for row in rows if key_of(row) == key_of(config)), None)


def _differing(config: RunConfig, row: RunConfig, names: Iterable[str]) -> str:
    others = [name for name in names if getattr(config, name) != getattr(row, name)]
    return ", ".join(f"{name} {getattr(config, name)} in place of {getattr(row, name)}" for name in others)


def _told_of_subset(*titles: str) -> str:
    parts = " and ".join(title for title in titles if "subset" in title)
    return f"photos are missing ({parts}), and the published figure is of all"


# The report ----------------------------------------------------------------------------------------------------------


def check_report(path: Path) -> None:
    """Raises ConfigError where the report would be written over something else, ResultsError where it cannot be
    written: before an hour of scoring."""
    if path.suffix != ".md":
        raise ConfigError(f"--report {path}: the name must end in .md")
    if os.path.lexists(path) and not (path.is_file() and REPORT_LINE.encode() in path.read_bytes()):
        raise ConfigError(f"{path} is there and is no report that mcar evaluate wrote; choose another --report")
    made_folder(path.resolve().parent, "choose another --report")


@dataclass(frozen=True)
class Evaluated:
    """What was scored, with what, and what came out.

    data: title and number of the images, and the classes, as a record has them. streams: the metrics of each.
    """

    title: str
    origin: str
    settings: Mapping[str, Any]
    data: Mapping[str, Any]
    streams: Mapping[str, Any]
    environment: Mapping[str, Any]
    beside: Beside | None

    def write(self, path: Path) -> None:
        """Writes all of it as Markdown; of several processes the main one does."""
        processes.broadcast_from_main(lambda: write_text(path, self._text()))

    def _text(self) -> str:
        data, streams = self.data, self.streams
        images = [f"tested on {data['test']} ({data['test_images']:,} images)"]
        images += [f"trained on {data['train']} ({data['train_images']:,} images)"] if "train" in data else []
        points = [
            [name, point, _percent(streams[name]["mAP"]), *(_percent(at[metric]) for metric in LABEL_METRICS)]
            for name in STREAMS
            for point, at in streams[name]["at"].items()
        ]
        classes = zip(data["classes"], *(streams[name]["AP"] for name in STREAMS), strict=True)
        parts = [
            f"# {as_markdown(self.title)}",
            REPORT_LINE,
            f"{self.origin}; {as_markdown(', '.join(images))}.",
            *([f"{as_markdown(_sentence(self.beside.line))}."] if self.beside else []),
            *_label_metrics(self.beside, self.settings, streams),
            "## Metrics",
            _table(["stream", "labels at", "mAP %", *LABEL_METRICS], points),
            "## AP of each class, %",
            _table(["class", *STREAMS], [[as_markdown(name), *map(_percent, values)] for name, *values in classes]),
            "## Settings",
            _table(["setting", "value"], [[name, _cell(value)] for name, value in self.settings.items()]),
            "## Environment",
            _table(["what", "value"], [[name, _cell(value)] for name, value in _flat(self.environment)]),
        ]
        return "\n\n".join(parts) + "\n"


def evaluated(record: Record, epoch: str) -> Evaluated:
    """What a trained run came to after its "last" or its "best" epoch."""
    metrics, content = record.metrics[epoch], record.content
    which = "the last" if epoch == "last" else "the best one on the test set"
    origin = f"Run `{record.run_id}` of profile `{content['profile']}`, epoch {metrics['epoch']}, {which}"
    settings, environment = record.config.model_dump(mode="json"), content["environment"]
    return Evaluated(str(content["label"]), origin, settings, record.data, metrics, environment, beside_record(record))


def score_file(
    splits: Splits,
    config: RunConfig,
    path: Path,
    release: bool,
    about: Mapping[str, Any] | None,
    settings: Sequence[str],
    execution: Execution,
) -> Evaluated:
    """What weights from a file come to on a configuration's test split, which alone is read. settings: those that their
    scores depend on. release, about: as for load_checkpoint."""
    root = splits.root_of(config.dataset)
    test = load_image_set(config.dataset, "test", root, config.scored_on, **config.data_options)
    mcar, squares = (
        load_checkpoint(config, test, path, release, about),
        splits.squares(test, config.image_size, once=True),
    )
    scores = evaluate(mcar, squares, config.precision, config.seed, splits.verbose, execution)
    streams = stream_metrics(scores, test)
    values = config.model_dump(mode="json")
    return Evaluated(
        title=path.name,
        origin=f"Weights `{path.name}`, SHA-256 `{file_hash(path)}`",
        settings={name: values[name] for name in settings},
        data={"test": test.title, "test_images": len(test), "classes": test.classes},
        streams=streams,
        environment=describe_environment(),
        beside=beside_release(config, test, streams) if release else None,
    )


def _label_metrics(beside: Beside | None, settings: Mapping[str, Any], streams: Mapping[str, Any]) -> list[str]:
    """CP to OF1 beside the published ones, where there are any and they compare. No AP per class is published."""
    name = "{dataset}_{backbone}_{image_size}.csv".format(**settings)
    path = shipped("results/published") / name
    if beside is None or beside.agrees is None or not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as stream:
        cells = [row for row in csv.DictReader(stream) if row["metric"] in LABEL_METRICS]
    rows: list[Sequence[str]] = []
    for labels, point in OFFICIAL.items():
        published = {row["metric"]: row["percent"] for row in cells if row["labels"] == labels}
        ours = streams["fused"]["at"][point]
        rows.append([labels, "published", *(published.get(metric, "-") for metric in LABEL_METRICS)])
        rows.append([labels, f"ours, at {point}", *(_percent(ours[metric]) for metric in LABEL_METRICS)])
    return [_table(["labels", "of", *LABEL_METRICS], rows)]


def _flat(environment: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in environment.items():
        yield from value.items() if isinstance(value, Mapping) else [(name, value)]


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None or fraction != fraction else f"{100 * fraction:.2f}"


def _cell(value: object) -> str:
    return as_markdown(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"
