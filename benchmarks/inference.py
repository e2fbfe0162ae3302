"""Inference of MCAR beside its backbone alone on N + 1 times the images, and beside the release's way."""

import itertools
import statistics

from reports import Cell, Report, Table
from steps import (
    ALONE,
    OURS,
    REGIONS,
    RELEASED,
    Step,
    built,
    check_same_boxes,
    inference,
    random_images,
    released_inference,
)
from timing import beside, in_turns, ratio

from mcar_lib.inference import keep_freed_memory
from mcar_lib.released import made_quick

SIZES, BATCHES = (128, 224, 448), (1, 8)
ROUNDS = {1: 15, 8: 3}  # by batch
LOADED = "MCAR, as loaded"
IN_TWO = "backbone in two passes"
GOAL = 1.05  # MCAR to the backbone alone, one photo at a time
GOAL_FROM = README_SIZE = 224  # px
BESIDE = {ALONE: (LOADED, OURS), IN_TWO: (OURS,), RELEASED: (LOADED, OURS)}  # whose ratio is told beside what
TOLD = {(LOADED, 1): ALONE, (OURS, 1): ALONE, (LOADED, 8): RELEASED}  # in README at 224 px: beside what


def in_two(batch: int, size: int) -> Step:
    """The backbone alone on the images, and then on N times as many."""
    passes = [inference(built(local_stream=False), random_images(times * batch, size)) for times in (1, REGIONS)]
    return lambda: [one() for one in passes]


def measure(quick: bool) -> Report:
    keep_freed_memory()
    rows: list[tuple[Cell, ...]] = []
    findings = []
    for size in SIZES[:1] if quick else SIZES:
        for batch in BATCHES:
            images = random_images(batch, size)
            check_same_boxes(built(), images)
            arms = {
                LOADED: inference(made_quick(built()), images),
                OURS: inference(built(), images),
                ALONE: inference(built(local_stream=False), random_images((REGIONS + 1) * batch, size)),
                IN_TWO: in_two(batch, size),
                RELEASED: released_inference(built(), images),
            }
            seconds = in_turns(arms, 1 if quick else ROUNDS[batch])
            each = {name: 1000 * statistics.median(found) / batch for name, found in seconds.items()}
            cells: list[Cell] = [size, batch, each[LOADED], each[OURS]]
            for other, ours in BESIDE.items():
                cells += [each[other], *(ratio(seconds, name, other) for name in ours)]
            rows.append(tuple(cells))
            for name, other in itertools.product((LOADED, OURS), (ALONE, RELEASED)):
                told = size == README_SIZE and TOLD.get((name, batch)) == other
                has_goal = batch == 1 and size >= GOAL_FROM and other == ALONE
                if told or has_goal:
                    findings.append(
                        beside(
                            seconds,
                            each,
                            name,
                            other,
                            what=f"inference{' as loaded' * (name == LOADED)}, {size} px, batch {batch}",
                            unit="ms a photo",
                            against=f"{REGIONS + 1} times the backbone" if other == ALONE else RELEASED,
                            at_most=GOAL if has_goal else None,
                            in_readme=told,
                        )
                    )
    columns = (
        *("px", "batch", "MCAR as loaded, ms a photo", "MCAR"),
        *(f"backbone alone on {REGIONS + 1} times the images", "MCAR as loaded, times that", "MCAR, times that"),
        *(f"backbone on the images, then on {REGIONS} times as many", "MCAR, times that"),
        *("release's way", "MCAR as loaded, times that", "MCAR, times that"),
    )
    return Report(
        title="Inference",
        about=f"MobileNet-v2, N = {REGIONS}, 80 classes, float32, from uint8 squares to scores; times in ms a photo. "
        f"MCAR runs its backbone on the photo and on N crops of it, so the backbone alone on {REGIONS + 1} times the "
        "images is what it cannot go far below; but it needs the first pass before it knows the crops, so of one photo "
        "the backbone in two passes is what it can come near to. The release's way is a plain loop over images and "
        "classes that resizes the map of every class, in the memory layout that the release had (ours: channels_last); "
        "its boxes were checked to be the same. MCAR is the module as training leaves it, like the backbone alone; as "
        "loaded is what `mcar_lib.load` and `mcar predict` ask: the same boxes, the pass over the crops with its "
        "batch normalisation folded and its convolutions packed.",
        findings=tuple(findings),
        tables=(Table(heading="All sizes and batches", columns=columns, rows=tuple(rows)),),
        notes=("The arms take turns; medians over rounds, and ratios are medians of each round's own.",),
    )
