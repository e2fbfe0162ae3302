"""Peak memory of a training step, each way in a process of its own."""

import itertools

import torch
from reports import Cell, Finding, Report, Table
from steps import (
    ALONE,
    BF16,
    PLAIN,
    RECOMPUTED,
    REGIONS,
    RELEASED,
    built,
    random_images,
    released_training,
    training,
    training_so,
    ways,
)
from timing import each_in_a_process

from mcar_lib.inference import keep_freed_memory
from mcar_lib.runs.environment import PeakMemory

BATCH, STEPS, SIZES = 16, 2, (128, 224)
LARGEST = SIZES[-1]
OTHERS = (ALONE, RELEASED)  # beside the ways, at the largest size
TOLD = (RECOMPUTED, BF16)  # beside float32


def peak(way: str, batch: int, size: int) -> float:
    """Of this process, in GiB."""
    keep_freed_memory()
    memory, images = PeakMemory(), random_images(batch, size)
    if way == RELEASED:
        step = released_training(built(), images)
    elif way == ALONE:
        step = training(built(local_stream=False), random_images((REGIONS + 1) * batch, size))
    else:
        step = training_so(way, images)
    for _ in range(STEPS):
        step()
    return (memory.bytes or 0) / 2**30


def measure(quick: bool) -> Report:
    batch = 2 if quick else BATCH
    asked = [(size, way) for size in SIZES for way in ways()[: 2 if quick else None]]
    asked += [] if quick else [(LARGEST, way) for way in OTHERS]
    measured = each_in_a_process(peak, [(way, batch, size) for size, way in asked])
    found = dict(zip(asked, measured, strict=True))
    rows: list[tuple[Cell, ...]] = [
        (size, way, gibibytes, gibibytes / found[size, PLAIN]) for (size, way), gibibytes in found.items()
    ]
    findings = [
        Finding(
            what=f"memory of a training step, {size} px, batch {batch}, {way}",
            ours=found[size, way],
            unit="GiB",
            against=PLAIN,
            theirs=found[size, PLAIN],
            ratio=found[size, way] / found[size, PLAIN],
            in_readme=size == LARGEST,
        )
        for size, way in itertools.product(SIZES, TOLD)
        if (size, way) in found
    ]
    return Report(
        title="Memory",
        about=f"Peak memory of a process that trains: MobileNet-v2, N = {REGIONS}, 80 classes, batch {batch}. "
        "Recomputed: the activations of the crops are computed again in the backward pass instead of kept, and freed "
        "memory goes back to the system, with the same numbers: what `mcar train --memory GIB` turns on. Backbone "
        f"alone: the global stream on {REGIONS + 1} times the images. The process with its libraries is counted.",
        findings=tuple(findings),
        tables=(Table(heading="Each way", columns=("px", "way", "peak, GiB", "times float32"), rows=tuple(rows)),),
        notes=(
            "Each way in a fresh process, after two steps.",
            f"Instructions of this processor, as torch uses them: {torch.backends.cpu.get_cpu_capability()}. Without "
            "AVX512 bf16 is left out, for a step takes minutes; what it takes with it is in [Training](training.md).",
        ),
    )
