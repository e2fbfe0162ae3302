"""The region module beside plain loops, and beside the backbone that runs on its crops."""

import statistics

import torch
from released_way import boxes_by_loops
from reports import Cell, Report, Table
from steps import CLASSES, REGIONS, built
from timing import beside, in_turns, ratio
from torch import Tensor

from mcar_lib.inference import keep_freed_memory
from mcar_lib.regions import attentional_regions, crop_regions

BATCH, SIZE, TAU, ROUNDS = 16, 448, 0.5, 5
MODULE, CHOSEN, EVERY = "maps to boxes, vectorised", "loop over the chosen classes", "loop over every class"
WHOLE = "whole region step (boxes, crops, resize)"


@torch.no_grad()
def measure(quick: bool) -> Report:
    keep_freed_memory()
    batch, size = (2, 128) if quick else (BATCH, SIZE)
    generator = torch.Generator().manual_seed(0)
    model = built().eval()
    images = torch.randn(batch, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)
    class_logits = 4 * torch.randn(batch, CLASSES, size // 32, size // 32, generator=generator)
    scores = torch.rand(batch, CLASSES, generator=generator)

    def boxes() -> Tensor:
        return attentional_regions(class_logits, scores, (size, size), REGIONS, TAU).boxes

    def crops() -> Tensor:
        return crop_regions(images, boxes()).contiguous(memory_format=torch.channels_last)

    def by_loops(all_maps: bool) -> Tensor:
        return boxes_by_loops(class_logits, scores, (size, size), REGIONS, TAU, all_maps)

    assert torch.equal(boxes(), by_loops(all_maps=True)), "the loops find other boxes"
    ready = crops()
    forward = f"MobileNet-v2 over the {batch * REGIONS} crops"
    arms = {
        MODULE: boxes,
        CHOSEN: lambda: by_loops(all_maps=False),
        EVERY: lambda: by_loops(all_maps=True),
        WHOLE: crops,
        forward: lambda: model.classify(model.pool(model.features(ready))),
    }
    seconds = in_turns(arms, 1 if quick else ROUNDS)
    each = {name: 1000 * statistics.median(found) for name, found in seconds.items()}
    rows: list[tuple[Cell, ...]] = [(name, each[name], ratio(seconds, name, MODULE)) for name in arms]
    findings = (
        beside(
            seconds,
            each,
            MODULE,
            EVERY,
            what=f"maps to boxes, {size} px, batch {batch}",
            unit="ms",
        ),
        beside(
            seconds,
            each,
            WHOLE,
            forward,
            what=f"whole region step, {size} px, batch {batch}",
            unit="ms",
        ),
    )
    return Report(
        title="The region step",
        about=f"Batch {batch}, {CLASSES} classes, {size} px, N = {REGIONS}, float32. The loop over every class does "
        "what the release does; the other one is kinder and never touches a class that was not chosen. All find the "
        "same boxes.",
        findings=findings,
        tables=(Table(heading="All parts", columns=("what", "ms", "times the vectorised"), rows=tuple(rows)),),
        notes=("They take turns; medians over rounds.",),
    )
