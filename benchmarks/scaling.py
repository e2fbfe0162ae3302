"""How time and memory grow with the number of regions, of classes, the size and the batch, drawn."""

import statistics
from typing import TYPE_CHECKING, NamedTuple

from reports import Cell, Report, Table
from steps import built, inference, random_images, training
from timing import each_in_a_process, in_turns

from mcar_lib.inference import keep_freed_memory
from mcar_lib.runs.environment import PeakMemory, taken_memory

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Setting(NamedTuple):
    """What a step is made of."""

    regions: int = 4
    classes: int = 80
    size: int = 160
    batch: int = 8


GROWN = {  # field of Setting -> its values, and what the axis says
    "regions": ((1, 2, 4, 6, 8), "N, regions"),
    "classes": ((20, 80, 200, 500, 1000), "K, classes"),
    "size": ((96, 160, 224, 320, 448), "size, px"),
    "batch": ((1, 2, 4, 8, 16, 32), "batch, photos"),
}
KINDS = {"inference": inference, "training": training}
MOST_TRAINED = 32 * 160**2 * 5  # pixels of photos and crops in a step: more needs more than 10 GiB
ROUNDS = 3
COLUMNS = ("step", "grown", "N", "K", "px", "batch", "ms a step", "ms a photo", "memory of a step, MiB")


def one(kind: str, setting: Setting, rounds: int) -> tuple[float, float | None]:
    """Milliseconds of a step, and the MiB that it takes in this process beyond libraries, its model included."""
    keep_freed_memory()
    KINDS[kind](built(), random_images(1, 64))()  # libraries that are loaded late
    memory, before = PeakMemory(), taken_memory()
    step = KINDS[kind](built(setting.regions, setting.classes), random_images(setting.batch, setting.size))
    (seconds,) = in_turns({kind: step}, rounds).values()
    return 1000 * statistics.median(seconds), None if memory.bytes is None else (memory.bytes - before) / 2**20


def settings(kind: str, quick: bool) -> list[tuple[str, Setting]]:
    """What grows, and the settings that are measured, but for training steps that are too large."""
    found = []
    for field, (values, _) in GROWN.items():
        for value in values[:2] if quick else values:
            setting = Setting(batch=2 if quick else Setting().batch)._replace(**{field: value})
            pixels = setting.batch * setting.size**2 * (1 + setting.regions)
            if kind == "inference" or pixels <= MOST_TRAINED:
                found.append((field, setting))
    return found


def measure(quick: bool) -> Report:
    grown = [(kind, field, setting) for kind in KINDS for field, setting in settings(kind, quick)]
    different = list(dict.fromkeys((kind, setting) for kind, _, setting in grown))
    measured = each_in_a_process(one, [(*each, 1 if quick else ROUNDS) for each in different])
    known = dict(zip(different, measured, strict=True))
    rows: list[tuple[Cell, ...]] = []
    for kind, field, setting in grown:
        milliseconds, memory = known[kind, setting]
        rows.append((kind, field, *setting, milliseconds, milliseconds / setting.batch, memory))
    usual = Setting()
    return Report(
        title="How time and memory grow",
        about=f"MobileNet-v2, float32, channels_last; where nothing else is told N = {usual.regions}, K = "
        f"{usual.classes}, {usual.size} px, batch {usual.batch}. Memory is what a step takes with its model, "
        "beyond Python and its libraries, each in a process of its own. Training steps that need more than 10 GiB are "
        "left out.",
        tables=(Table(heading="What is drawn", columns=COLUMNS, rows=tuple(rows)),),
        notes=("Medians over rounds, one setting after the other.",),
        alt="Time a photo and memory of a step, of inference and training, against the number of regions, the number "
        "of classes, the size and the batch",
    )


def draw(report: Report) -> "Figure":
    """Time a photo above, memory of a step below, a column for each value that grows."""
    from mcar_lib.figures import COLOURS, figure

    drawn, axes = figure(2, len(GROWN), width=3.2, height=2.8)
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in report.tables[0].rows]
    names = dict(zip(GROWN, ("N", "K", "px", "batch"), strict=True))
    for column, (field, (_, label)) in enumerate(GROWN.items()):
        for colour, marker, kind in zip(COLOURS, "os", KINDS, strict=False):
            mine = [row for row in rows if row["grown"] == field and row["step"] == kind]
            for place, what in ((column, "ms a photo"), (len(GROWN) + column, "memory of a step, MiB")):
                at = [(row[names[field]], row[what]) for row in mine if row[what] is not None]
                axes[place].plot(*zip(*at, strict=True), color=colour, marker=marker, label=kind)
                axes[place].set(xlabel=label, ylabel=what)
    for each in axes:
        each.set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    return drawn
