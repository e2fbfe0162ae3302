"""What the released code does, as plain loops written for these benchmarks: image by image, class by class, no compute
saved anywhere. The boxes are those of mcar_lib.regions.
"""

import itertools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from mcar_lib.model import MCAR


class Scores(NamedTuple):
    """Of both streams, (B, K) in [0, 1], and boxes (B, N, 4) int64 as x1 y1 x2 y2."""

    global_scores: Tensor
    local_scores: Tensor
    boxes: Tensor


def two_streams(model: MCAR, images: Tensor) -> Scores:
    """images (B, 3, H, W) through the layers of an MCAR model: its backbone, pooling and classifier alone are used."""
    feature_map = model.features(images)
    global_scores = torch.sigmoid(model.classify(model.pool(feature_map)))
    boxes = loop_boxes(model.class_logits(feature_map.detach()), global_scores.detach(), images, model)
    crops = [
        F.interpolate(
            images[index : index + 1, :, y1:y2, x1:x2], size=images.shape[-2:], mode="bilinear", align_corners=True
        )
        for index, of_image in enumerate(boxes.tolist())
        for x1, y1, x2, y2 in of_image
    ]
    region_scores = torch.sigmoid(model.classify(model.pool(model.features(torch.cat(crops).detach()))))
    return Scores(global_scores, region_scores.view(*boxes.shape[:2], -1).amax(dim=1), boxes)


def training_step(model: MCAR, optimizer: Optimizer, images: Tensor, targets: Tensor) -> None:
    """Both streams forward, then one pass back through both, and a step."""
    optimizer.zero_grad()
    found = two_streams(model, images)
    loss = F.binary_cross_entropy(found.global_scores, targets) + F.binary_cross_entropy(found.local_scores, targets)
    loss.backward()
    optimizer.step()


def loop_boxes(class_logits: Tensor, scores: Tensor, images: Tensor, model: MCAR) -> Tensor:
    """Boxes (B, N, 4), with every class's map resized."""
    height, width = images.shape[-2:]
    return boxes_by_loops(class_logits, scores, (height, width), model.num_regions, model.threshold, all_maps=True)


@torch.no_grad()
def boxes_by_loops(
    class_logits: Tensor, scores: Tensor, size: tuple[int, int], num_regions: int, threshold: float, all_maps: bool
) -> Tensor:
    """Boxes (B, N, 4) from class logits (B, K, h, w) and scores (B, K) by loops over images and classes.

    all_maps: resize the maps of all classes, as the release does, or, which is kinder, of the chosen ones.
    """
    boxes = []
    for logits, image_scores in zip(class_logits, scores, strict=True):
        chosen = image_scores.argsort(descending=True, stable=True)[:num_regions].tolist()
        resized = {}
        for index in range(len(logits)) if all_maps else chosen:
            one = torch.sigmoid(logits[index])[None, None]
            resized[index] = F.interpolate(one, size=size, mode="bilinear", align_corners=True)[0, 0]
        for index in chosen:
            marginals = (scaled(resized[index].amax(dim=axis)) for axis in (0, 1))
            (x1, x2), (y1, y2) = (interval(marginal, threshold) for marginal in marginals)
            boxes.append((x1, y1, x2, y2))
    return torch.tensor(boxes).view(len(scores), num_regions, 4)


def interval(marginal: Tensor, threshold: float) -> tuple[int, int]:
    """The released interval rule for one marginal (L,), as a loop over its segments."""
    length = len(marginal)
    values = marginal.tolist()
    signs = torch.sign(marginal - threshold).tolist()
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
    """To [0, 1] by its own minimum and maximum; a constant one by its maximum."""
    low, high = marginal.min(), marginal.max()
    return (marginal - low) / (high - low) if high > low else marginal / high
