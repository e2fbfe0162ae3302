"""Time the region module against plain loops, and against the backbone that runs on its crops.

   python benchmarks/regions.py [--write FILE.md]

Batch 16, 80 classes, 448 px, N = 4, float32 on the CPU. "Per-class loop" does what the released code does, one class
at a time: every map upsampled, marginals and intervals of the chosen classes by a plain loop over breakpoints. The
second loop is kinder: it never touches a class that was not chosen. Takes about two minutes.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from timing import machine, median_seconds, print_report, report_parser
from torch import Tensor

from mcar_lib.inference import keep_freed_memory
from mcar_lib.model import build_mcar
from mcar_lib.regions import attentional_regions, crop_regions

BATCH, CLASSES, SIZE, REGIONS, TAU = 16, 80, 448, 4, 0.5


def interval(marginal: Tensor) -> tuple[int, int]:
    """The released interval rule for one marginal, as a loop over its segments."""
    length = len(marginal)
    values = marginal.tolist()
    signs = torch.sign(marginal - TAU).tolist()
    breaks = [i for i in range(length - 1) if abs(signs[i + 1] - signs[i]) == 2]
    if not breaks:
        return math.ceil(0.125 * length), math.ceil(0.875 * length)
    segments = [(0, breaks[0])] if breaks[0] > 0 else []
    segments += [(breaks[-1], length), *itertools.pairwise(breaks)]
    start, end = max(segments, key=lambda segment: (max(values[segment[0] : segment[1]]), segment[1] - segment[0]))
    minimum = math.ceil(0.125 * length)
    if end - start <= minimum:
        pad = minimum - (end - start)
        half = math.ceil(pad / 2)
        if start > half and length - end > pad:
            start, end = start - half + 1, end + half
        if start < half:
            start, end = 0, minimum
        if length - end < half:
            start, end = length - minimum + 1, length
    return start, end


def scaled(marginal: Tensor) -> Tensor:
    low, high = marginal.min(), marginal.max()
    return (marginal - low) / (high - low) if high > low else marginal / high


def loop_boxes(class_logits: Tensor, scores: Tensor, all_maps: bool) -> Tensor:
    """Boxes (B, N, 4) by loops over images and classes."""
    boxes = []
    for logits, image_scores in zip(class_logits, scores, strict=True):
        chosen = image_scores.argsort(descending=True, stable=True)[:REGIONS].tolist()
        upsampled = {}
        for index in range(CLASSES) if all_maps else chosen:
            one = torch.sigmoid(logits[index])[None, None]
            upsampled[index] = F.interpolate(one, size=(SIZE, SIZE), mode="bilinear", align_corners=True)[0, 0]
        for index in chosen:
            (x1, x2), (y1, y2) = (interval(scaled(upsampled[index].amax(dim=axis))) for axis in (0, 1))
            boxes.append((x1, y1, x2, y2))
    return torch.tensor(boxes).view(len(scores), REGIONS, 4)


@torch.no_grad()
def report() -> str:
    keep_freed_memory()
    torch.manual_seed(0)
    model = build_mcar("mobilenet_v2", CLASSES, weights="none").to(memory_format=torch.channels_last).eval()
    images = torch.randn(BATCH, 3, SIZE, SIZE).contiguous(memory_format=torch.channels_last)
    class_logits, scores = 4 * torch.randn(BATCH, CLASSES, SIZE // 32, SIZE // 32), torch.rand(BATCH, CLASSES)

    def boxes() -> Tensor:
        return attentional_regions(class_logits, scores, (SIZE, SIZE), REGIONS, TAU).boxes

    def crops() -> Tensor:
        return crop_regions(images, boxes()).contiguous(memory_format=torch.channels_last)

    assert torch.equal(boxes(), loop_boxes(class_logits, scores, all_maps=False))
    ready = crops()
    module = median_seconds(boxes, 9)
    whole = median_seconds(crops, 5)
    kind_loop = median_seconds(lambda: loop_boxes(class_logits, scores, all_maps=False), 3)
    class_loop = median_seconds(lambda: loop_boxes(class_logits, scores, all_maps=True), 3)
    forward = median_seconds(lambda: model.classify(model.pool(model.features(ready))), 3)
    rows = [
        ("maps to boxes, vectorised", module, "1"),
        ("maps to boxes, loop over the chosen classes", kind_loop, f"{kind_loop / module:.1f} x slower"),
        ("maps to boxes, loop over every class", class_loop, f"{class_loop / module:.1f} x slower"),
        ("whole region step (boxes, crops, resize)", whole, f"{100 * whole / forward:.1f} % of the next row"),
        (f"MobileNet-v2 forward over the {BATCH * REGIONS} crops", forward, "-"),
    ]
    lines = ["| what | median seconds | against |", "| --- | --- | --- |"]
    lines += [f"| {what} | {seconds:.4f} | {against} |" for what, seconds, against in rows]
    return "\n".join([*lines, "", machine()])


if __name__ == "__main__":
    options = report_parser(__doc__).parse_args()
    print_report(report(), options.write)
