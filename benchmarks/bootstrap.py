"""Intervals of mAP over resampled test images at COCO's size, for one model and for a pair."""

import statistics

import numpy as np
import torch
from metrics import COCO, random_case
from reports import Cell, Finding, Report, Table
from timing import in_turns

from mcar_lib.intervals import map_difference, map_interval
from mcar_lib.metrics import average_precision

RESAMPLES, ROUNDS = 2000, 3
PLAINLY = 4  # resamples that are scored one by one
GOAL = 10.0  # seconds
ONE, PAIR, PLAIN = "one model", "a pair of models", "one model, each resample scored anew"


def measure(quick: bool) -> Report:
    num_images, resamples = (2000, 64) if quick else (COCO[0], RESAMPLES)
    scores, targets = random_case(num_images, *COCO[1:])
    noise = torch.randn(scores.shape, generator=torch.Generator().manual_seed(1))
    other = (scores.logit() + 0.3 * noise).sigmoid()
    generator = np.random.default_rng(0)

    def plainly() -> None:
        for _ in range(PLAINLY):
            drawn = torch.from_numpy(generator.integers(num_images, size=num_images))
            average_precision(scores[drawn], targets[drawn])

    arms = {
        ONE: lambda: map_interval(scores, targets, resamples),
        PAIR: lambda: map_difference(scores, other, targets, resamples),
        PLAIN: plainly,
    }
    seconds = in_turns(arms, 1 if quick else ROUNDS)
    each = {name: statistics.median(found) for name, found in seconds.items()}
    each[PLAIN] *= resamples / PLAINLY
    size = f"{resamples:,} resamples of {num_images:,} x {COCO[1]}"
    findings = tuple(
        Finding(what=f"interval of {name}: {size}", ours=each[name], unit="s", at_most=GOAL, in_readme=name == PAIR)
        for name in (ONE, PAIR)
    )
    rows: list[tuple[Cell, ...]] = [(name, each[name], each[name] / each[ONE]) for name in arms]
    return Report(
        title="Bootstrap",
        about=f"{size} random scores, both models on the same draws; ranking is included. The last row sorts every "
        f"resample anew, as a plain loop would: {PLAINLY} were timed, and the time of all is extrapolated.",
        findings=findings,
        tables=(Table(heading="All ways", columns=("what", "s", "times one model"), rows=tuple(rows)),),
        notes=("They take turns; medians over rounds.",),
    )
