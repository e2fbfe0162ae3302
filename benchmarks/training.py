"""A training step of MCAR beside its backbone alone on N + 1 times the images, and beside the release's way."""

import statistics

from reports import Cell, Finding, Report, Table
from steps import (
    ALONE,
    OURS,
    PLAIN,
    REGIONS,
    RELEASED,
    built,
    random_images,
    released_training,
    training,
    training_so,
    ways,
)
from timing import beside, in_turns, ratio

from mcar_lib.inference import keep_freed_memory

CASES = ((8, 128), (16, 128), (16, 224), (4, 448))  # batch, px
TOLD = (16, 224)  # in README
WAYS_AT = ((16, 128), (16, 224))
ROUNDS = 5


def measure(quick: bool) -> Report:
    keep_freed_memory()
    rows: list[tuple[Cell, ...]] = []
    of_ways: list[tuple[Cell, ...]] = []
    findings: list[Finding] = []
    for batch, size in ((2, 64),) if quick else CASES:
        images = random_images(batch, size)
        arms = {
            OURS: training(built(), images),
            ALONE: training(built(local_stream=False), random_images((REGIONS + 1) * batch, size)),
            RELEASED: released_training(built(), images),
        }
        seconds = in_turns(arms, 1 if quick else ROUNDS)
        each = {name: statistics.median(found) for name, found in seconds.items()}
        ratios = {name: ratio(seconds, OURS, name) for name in (ALONE, RELEASED)}
        rows.append((size, batch, each[OURS], each[ALONE], ratios[ALONE], each[RELEASED], 1 / ratios[RELEASED]))
        if (batch, size) == TOLD or quick:
            findings += [
                beside(
                    seconds,
                    each,
                    OURS,
                    name,
                    what=f"training step, {size} px, batch {batch}",
                    unit="s",
                    against=against,
                    in_readme=True,
                )
                for name, against in ((ALONE, f"{REGIONS + 1} times the backbone"), (RELEASED, RELEASED))
            ]
    columns = (
        *("px", "batch", "MCAR, s a step", f"backbone alone on {REGIONS + 1} times the images, s a step"),
        *("MCAR takes, times", "release's way, s a step", "it takes, times MCAR's"),
    )
    for batch, size in ((2, 64),) if quick else WAYS_AT:
        images = random_images(batch, size)
        seconds = in_turns({way: training_so(way, images) for way in ways()}, 1 if quick else ROUNDS)
        of_ways += [
            (size, batch, way, statistics.median(times), ratio(seconds, way, PLAIN)) for way, times in seconds.items()
        ]
    told = Table(
        heading="For less memory",
        columns=("px", "batch", "way", "s a step", f"times {PLAIN}"),
        rows=tuple(of_ways),
    )
    return Report(
        title="Training",
        about=f"A step is forward, backward and SGD: MobileNet-v2, N = {REGIONS}, 80 classes, float32; reading photos "
        "is not part of it. The backbone alone is the global stream. The release's way keeps the activations of both "
        "streams for one backward pass, in the memory layout that the release had. What the ways for less memory save: "
        "[Memory](memory.md).",
        findings=tuple(findings),
        tables=(Table(heading="All sizes and batches", columns=columns, rows=tuple(rows)), told),
        notes=("The arms take turns; medians over rounds, and ratios are medians of each round's own.",),
    )
