"""Training on photos of one's own: what is told of them before, and what a training on them is scored by after."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from mcar_lib.data.image_set import ImageSet
from mcar_lib.data.own import Own, class_counts, overview, read_own
from mcar_lib.data.preparation import Checked, counted, unreadable
from mcar_lib.errors import DataError
from mcar_lib.runs.config import RunConfig
from mcar_lib.runs.measures import stream_metrics
from mcar_lib.runs.records import Record
from mcar_lib.runs.runs import Runs
from mcar_lib.training import evaluate, processes

MOST_REGIONS = 4
CLASSES = 20  # for which the rate of the profile own is right


@dataclass(frozen=True)
class OwnData:
    """Photos of one's own, every file checked. options: of the data set own, with what is left out. lines: for the
    reader; counts: columns of a table, photos of each class."""

    own: Own
    options: Mapping[str, object]
    lines: tuple[str, ...]
    counts: Mapping[str, Any]


def check_own(runs: Runs, config: RunConfig, skip_unreadable: bool = False) -> OwnData:
    """Reads the files and every photo of the data set own below the data root of `runs`.

    Raises DataError for what is wrong in the files, and with a list of the photos that cannot be read, which
    skip_unreadable leaves out instead, and says so.
    """
    options, left_out = dict(config.data_options), dict[str, str]()
    root = runs.splits.root_of("own")

    def read() -> tuple[Own, dict[str, Checked]]:
        own = read_own(root, **options)
        return own, {part: runs.splits.check(images) for part, images in own.parts.items()}

    def check() -> tuple[Own, dict[str, Checked]]:
        try:
            return read()
        except DataError:
            left_out.update(_unreadable(read_own(root, **options)))
            if not left_out:
                raise
            if not skip_unreadable:
                raise DataError(
                    f"{root}: {counted(list(left_out), 'photo')} cannot be read; mend them, or go on without them with "
                    "--skip-unreadable:" + "".join(f"\n  {reason}" for reason in left_out.values())
                ) from None
            earlier = config.data_options.get("without", ())
            options["without"] = tuple(sorted({*(earlier if isinstance(earlier, tuple) else ()), *left_out}))
            return read()

    own, checked = processes.main_first(check)
    lines = [*own.told, *(f"left out, it cannot be read: {reason}" for reason in left_out.values())]
    return OwnData(own, options, (*lines, *overview(own, checked)), class_counts(own))


def _unreadable(own: Own) -> dict[str, str]:
    return {name: reason for images in own.parts.values() for name, reason in unreadable(images).items()}


def own_config(config: RunConfig, data: OwnData, fixed: Collection[str] = ()) -> RunConfig:
    """The configuration of a training on these photos. N is min(4, K), and the learning rate that of CLASSES times K /
    CLASSES, but for what is fixed: the loss is a mean over the classes, so of fewer each pulls harder."""
    count = len(data.own.parts["train"].classes)
    rate = float(f"{config.learning_rate * min(count, CLASSES) / CLASSES:.3g}")
    changes = {"num_regions": min(MOST_REGIONS, count), "learning_rate": rate}
    kept = {name: value for name, value in changes.items() if name not in fixed}
    return config.vary(data_options=dict(data.options), **kept)


def metrics_on(runs: Runs, record: Record, test: ImageSet) -> dict[str, Any]:
    """The metrics of a run on another split, for the reader only: no record holds them."""
    model = runs.trained_model(record.config)
    squares = runs.splits.squares(test, record.config.image_size, once=True)
    scores = evaluate(model, squares, record.config.precision, record.config.seed, runs.verbose, runs.execution)
    return stream_metrics(scores, test)
