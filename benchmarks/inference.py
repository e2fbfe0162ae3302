"""Inference of MCAR beside its backbone alone on N + 1 times the images, and beside the release's way."""

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

SIZES, BATCHES = (128, 224, 448), (1, 8)
ROUNDS = {1: 15, 8: 3}  # by batch
IN_TWO = "backbone in two passes"
GOAL = 1.05  # MCAR to the backbone alone, one photo at a time
GOAL_FROM = 224  # px
TOLD = {(1, 224): ALONE, (1, 448): ALONE, (8, 224): RELEASED}  # in README: beside what


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
                OURS: inference(built(), images),
                ALONE: inference(built(local_stream=False), random_images((REGIONS + 1) * batch, size)),
                IN_TWO: in_two(batch, size),
                RELEASED: released_inference(built(), images),
            }
            seconds = in_turns(arms, 1 if quick else ROUNDS[batch])
            each = {name: 1000 * statistics.median(found) / batch for name, found in seconds.items()}
            ratios = {name: ratio(seconds, OURS, name) for name in (ALONE, IN_TWO, RELEASED)}
            others = (cell for name in ratios for cell in (each[name], ratios[name]))
            rows.append((size, batch, each[OURS], *others))
            has_goal = batch == 1 and size >= GOAL_FROM
            for name in (ALONE, RELEASED):
                told = TOLD.get((batch, size)) == name
                if told or (has_goal and name == ALONE):
                    findings.append(
                        beside(
                            seconds,
                            each,
                            OURS,
                            name,
                            what=f"inference, {size} px, batch {batch}",
                            unit="ms a photo",
                            against=f"{REGIONS + 1} times the backbone" if name == ALONE else RELEASED,
                            at_most=GOAL if has_goal and name == ALONE else None,
                            in_readme=told,
                        )
                    )
    columns = (
        *("px", "batch", "MCAR, ms a photo", f"backbone alone on {REGIONS + 1} times the images", "MCAR, times that"),
        *(f"backbone on the images, then on {REGIONS} times as many", "MCAR, times that"),
        *("release's way", "MCAR, times that"),
    )
    return Report(
        title="Inference",
        about=f"MobileNet-v2, N = {REGIONS}, 80 classes, float32, from uint8 squares to scores; times in ms a photo. "
        f"MCAR runs its backbone on the photo and on N crops of it, so the backbone alone on {REGIONS + 1} times the "
        "images is what it cannot go far below; but it needs the first pass before it knows the crops, so of one photo "
        "the backbone in two passes is what it can come near to. The release's way is a plain loop over images and "
        "classes that resizes the map of every class, in the memory layout that the release had (ours: channels_last); "
        "its boxes were checked to be the same. No arm folds its batch normalisation.",
        findings=tuple(findings),
        tables=(Table(heading="All sizes and batches", columns=columns, rows=tuple(rows)),),
        notes=("The arms take turns; medians over rounds, and ratios are medians of each round's own.",),
    )
