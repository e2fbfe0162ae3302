"""Peak memory of a training step, each way in a process of its own."""

import torch
from reports import Cell, Finding, Report, Table
from steps import ALONE, REGIONS, RELEASED, built, random_images, released_training, training
from timing import each_in_a_process

from mcar_lib.inference import keep_freed_memory
from mcar_lib.runs.environment import PeakMemory

BATCH, STEPS = 16, 2
PLAIN, BF16 = "float32", "bf16"
RECOMPUTED = f"{PLAIN}, recomputed"
WAYS = {  # name -> precision, whether activations of the crops are computed again
    PLAIN: ("fp32", False),
    RECOMPUTED: ("fp32", True),
    BF16: ("bf16", False),
    f"{BF16}, recomputed": ("bf16", True),
}
# bf16 takes minutes a step on a processor that has no instructions for it, so it is measured at the smaller size.
CASES = {128: tuple(WAYS), 224: (PLAIN, RECOMPUTED, ALONE, RELEASED)}  # px -> ways
TOLD = ((128, BF16), (224, RECOMPUTED))


def peak(way: str, batch: int, size: int) -> float:
    """Of this process, in GiB."""
    precision, recompute = WAYS.get(way, WAYS[PLAIN])
    keep_freed_memory(not recompute)  # as training does
    memory, images = PeakMemory(), random_images(batch, size)
    if way == RELEASED:
        step = released_training(built(), images)
    elif way == ALONE:
        step = training(built(local_stream=False), random_images((REGIONS + 1) * batch, size))
    else:
        model = built()
        model.recompute = recompute
        step = training(model, images, precision)
    for _ in range(STEPS):
        step()
    return (memory.bytes or 0) / 2**30


def measure(quick: bool) -> Report:
    batch = 2 if quick else BATCH
    asked = [(size, way) for size, ways in CASES.items() for way in (ways[:2] if quick else ways)]
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
            in_readme=way == RECOMPUTED,
        )
        for size, way in TOLD
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
            f"Instructions of this processor, as torch uses them: {torch.backends.cpu.get_cpu_capability()}; bf16 is "
            "quick from AVX512 on.",
        ),
    )
