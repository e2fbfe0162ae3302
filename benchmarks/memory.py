"""Peak memory of a training step, each way in a process of its own."""

import statistics

from reports import Cell, Finding, Report, Table
from steps import ALONE, REGIONS, RELEASED, built, random_images, released_training, training
from timing import each_in_a_process, in_turns

from mcar_lib.inference import keep_freed_memory
from mcar_lib.runs.environment import PeakMemory

BATCH, SIZE, STEPS = 16, 224, 2
PLAIN, BF16 = "float32", "bf16"
WAYS = {  # name -> precision, whether activations of the crops are computed again
    PLAIN: ("fp32", False),
    f"{PLAIN}, recomputed": ("fp32", True),
    BF16: ("bf16", False),
    f"{BF16}, recomputed": ("bf16", True),
}


def peak(way: str, batch: int, size: int) -> tuple[float, float]:
    """Of this process, in GiB, and seconds of a step after the first."""
    keep_freed_memory()
    memory, images = PeakMemory(), random_images(batch, size)
    if way == RELEASED:
        step = released_training(built(), images)
    elif way == ALONE:
        step = training(built(local_stream=False), random_images((REGIONS + 1) * batch, size))
    else:
        precision, recompute = WAYS[way]
        model = built()
        model.recompute = recompute
        step = training(model, images, precision)
    (seconds,) = in_turns({way: step}, STEPS).values()
    return (memory.bytes or 0) / 2**30, statistics.median(seconds)


def measure(quick: bool) -> Report:
    batch, size = (2, 64) if quick else (BATCH, SIZE)
    ways = (*WAYS, ALONE, RELEASED)
    found = dict(zip(ways, each_in_a_process(peak, [(way, batch, size) for way in ways]), strict=True))
    plain, half = found[PLAIN][0], found[BF16][0]
    rows: list[tuple[Cell, ...]] = [
        (way, gibibytes, gibibytes / plain, seconds) for way, (gibibytes, seconds) in found.items()
    ]
    finding = Finding(
        what=f"memory of a training step, {size} px, batch {batch}, bf16",
        ours=half,
        unit="GiB",
        against=PLAIN,
        theirs=plain,
        ratio=half / plain,
        in_readme=True,
    )
    return Report(
        title="Memory",
        about=f"Peak memory of a process that trains: MobileNet-v2, N = {REGIONS}, 80 classes, batch {batch}, {size} "
        "px. Recomputed: the activations of the crops are computed again in the backward pass instead of kept, with "
        f"the same numbers. Backbone alone: the global stream on {REGIONS + 1} times the images. The python process "
        "with its libraries is counted, about half a GiB.",
        findings=(finding,),
        tables=(
            Table(heading="Each way", columns=("way", "peak, GiB", "times float32", "s a step"), rows=tuple(rows)),
        ),
        notes=("Each way in a fresh process, so seconds a step are not of the same minutes.",),
    )
