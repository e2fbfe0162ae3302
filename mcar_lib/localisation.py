"""The attentional regions held against annotated boxes. The paper gives no such measure; this one is the project's.

n images, K classes, N regions an image, m annotated objects, S the side of the square network input. All boxes are
x1 y1 x2 y2, half-open, in pixels of that input. Objects marked difficult (COCO: crowds) are left out throughout, so a
class is present in an image here if it has an object there that is not difficult.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_area, box_iou

from mcar_lib.data.image_set import ImageSet
from mcar_lib.data.transforms import ResizedImages
from mcar_lib.errors import ConfigError, DataError
from mcar_lib.files import content_id
from mcar_lib.intervals import mean_intervals
from mcar_lib.model import MCAR
from mcar_lib.regions import Selection, attention_maps, attentional_regions, locate_intervals, select_classes
from mcar_lib.runs.config import RunConfig
from mcar_lib.runs.environment import describe_environment
from mcar_lib.runs.fingerprints import fingerprint
from mcar_lib.runs.records import RECORD_FORMAT
from mcar_lib.runs.runs import Runs
from mcar_lib.training import network_input
from mcar_lib.training.loop import check_settings

SIZES = {"small": (0.0, 0.2), "medium": (0.2, 0.5), "large": (0.5, float("inf"))}
"""Bins of an object's relative size, the square root of its share of the image's area; each holds its lower end."""
MEASURES = (
    *("IoU, own class", "found at 0.3, own class", "found at 0.5, own class", "class taken"),
    *("IoU, any class", "found at 0.3, any class", "found at 0.5, any class"),
)
POINTS = ("peak of the map", "centre of the highest cell", "centre of the image", "random pixel")
ENDS = ("mean", "low", "high")
COUNTS = (1, 2, 4, 6, 8)  # the N that a record tells of, and the model's own
GALLERY_IMAGES, GALLERY_REGIONS = 4, 3
MAP_VALUES = 1 << 25  # upsampled map values held at a time: 128 MiB of float32


class Objects(NamedTuple):
    """Annotated objects: boxes (m, 4) float64; classes (m,) int64; images (m,) int64, index of the image; sizes (m,)
    float64 in (0, 1], see SIZES."""

    boxes: Tensor
    classes: Tensor
    images: Tensor
    sizes: Tensor


NO_OBJECTS = Objects(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), torch.zeros(0))


class ClassRegions(NamedTuple):
    """What the module finds for every class of every image; N and the selection only choose among these.

    scores: (n, K) float32 global scores, as logits. boxes: (n, K, 4) int64. peaks: (n, K, 2) float64 x y, the centre of
    the pixel in which the upsampled map of the class is highest; cells: the same for the map before upsampling. Among
    equal maxima the first in reading order counts. size: S.
    """

    scores: Tensor
    boxes: Tensor
    peaks: Tensor
    cells: Tensor
    size: int


class Pointing(NamedTuple):
    """The pointing game for the p pairs of image and present class: images, classes and ranks (p,) int64 (rank 0 is
    the image's highest score); hits (p, 4) float64, a column for each of POINTS: 1 is a hit, the last is a chance."""

    images: Tensor
    classes: Tensor
    ranks: Tensor
    hits: Tensor


def annotated_objects(images: ImageSet, size: int) -> Objects:
    """The objects of a split that are not difficult, their boxes scaled with the photo to a size x size square.

    Raises DataError if the data set has no boxes, none that is not difficult, or a photo that cannot be read.
    """
    parts = []
    for index in range(len(images)):
        annotated = images.boxes(index)
        kept = ~annotated.difficult
        try:
            with Image.open(images.paths[index]) as photo:  # the header only
                width, height = photo.size
        except OSError as error:
            raise DataError(f"{images.paths[index]}: not a complete image file ({error}); fetch it again") from error
        scale = torch.tensor([size / width, size / height], dtype=torch.float64).repeat(2)
        boxes = annotated.xyxy[kept].minimum(torch.tensor([width, height] * 2)) * scale
        parts.append((boxes, annotated.classes[kept], torch.full((len(boxes),), index), box_area(boxes).sqrt() / size))
    objects = Objects(*(torch.cat(column) for column in zip(*parts, strict=True)))
    if len(objects.boxes) == 0:
        raise DataError(
            f"{images.title} has no annotated object that is not difficult; regions need some to be held to"
        )
    return objects


@torch.no_grad()
def class_maps(model: MCAR, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the region module is given: global scores (B, K) and the maps (B, K, h, w) of all classes, both before the
    sigmoid, of images uint8 (B, 3, S, S)."""
    feature_map = model.features(network_input(model, images))
    return model.classify(model.pool(feature_map)), model.class_logits(feature_map)


@torch.no_grad()
def class_regions(model: MCAR, squares: ResizedImages, batch_size: int = 32) -> ClassRegions:
    """One pass of the global stream over all images, and the box of every class's map; crops are not looked at.

    model: in evaluation mode (else ConfigError), on any device; its own tau is used, its N and selection are not.
    Returns tensors on the CPU. The boxes are the model's own up to the last bit of the maps, which varies with how many
    are computed together and decides where a marginal meets tau exactly.
    """
    if model.training:
        raise ConfigError("the model is in training mode, where batches change its statistics; call model.eval()")
    size, num_classes = squares.size, model.convclass.out_channels
    batch = max(1, min(batch_size, MAP_VALUES // (num_classes * size * size)))
    parts = []
    for first in range(0, len(squares), batch):
        images = torch.stack([squares[index] for index in range(first, min(first + batch, len(squares)))])
        scores, class_logits = class_maps(model, images)
        found = attentional_regions(class_logits, scores, (size, size), num_classes, model.threshold)
        by_class = found.classes.argsort(dim=1)[..., None].expand(-1, -1, 4)
        every_class = torch.arange(num_classes, device=scores.device).expand(len(images), -1)
        maps = attention_maps(class_logits, every_class, (size, size))
        parts.append((scores, found.boxes.gather(1, by_class), _highest(maps, size), _highest(class_logits, size)))
    scores, boxes, peaks, cells = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return ClassRegions(scores, boxes, peaks, cells, size)


def _highest(maps: Tensor, size: int) -> Tensor:
    """Maps (B, K, h, w) -> (B, K, 2), the centre x y of the highest cell in pixels of the input."""
    height, width = maps.shape[-2:]
    cell = maps.flatten(2).argmax(dim=2)
    x, y = ((cell % width) + 0.5) * size / width, ((cell // width) + 0.5) * size / height
    return torch.stack((x, y), dim=-1).double()


def overlap_measures(objects: Objects, boxes: Tensor, classes: Tensor) -> Tensor:
    """MEASURES of each object under given regions: (m, N, 7) float64, [:, N - 1] for the first N regions of its image.

    boxes: (n, N, 4); classes: (n, N). IoU is the best one, found means that it reaches 0.3 or 0.5; with a region of the
    object's own class (0 if that class is not taken, that is, among the N) or of any class.
    """
    iou = box_iou(objects.boxes[:, None], boxes[objects.images].double())[:, 0]  # (m, N)
    same = classes[objects.images] == objects.classes[:, None]
    own, any_class = (iou * same).cummax(dim=1).values, iou.cummax(dim=1).values
    columns = (own, own >= 0.3, own >= 0.5, same.cumsum(dim=1) > 0, any_class, any_class >= 0.3, any_class >= 0.5)
    return torch.stack([column.double() for column in columns], dim=-1)


def measure_overlaps(
    objects: Objects, found: ClassRegions, max_regions: int = 8, draws: int = 5, seed: int = 0
) -> dict[str, Tensor]:
    """overlap_measures of each way to choose regions, by its name.

    Ways: "top", "bottom" and "random" classes ("random" is the mean of seeded draws), and "centre", a reference that
    ignores the image: the middle three quarters of both sides, the box on which the module falls back. It is one box
    for any N and belongs to no class, so its measures of the own class are NaN.
    Raises ConfigError if max_regions is above K.
    """
    generator = torch.Generator().manual_seed(seed)

    def chosen(selection: Selection) -> Tensor:
        classes = select_classes(found.scores, max_regions, selection, generator)  # (n, N)
        boxes = found.boxes.gather(1, classes[..., None].expand(-1, -1, 4))
        return overlap_measures(objects, boxes, classes)

    random = torch.stack([chosen("random") for _ in range(draws)]).mean(dim=0)
    start, end = locate_intervals(torch.ones(1, found.size), 0.5)[0].tolist()  # a constant marginal: the fallback
    box = torch.tensor([start, start, end, end]).expand(len(found.scores), max_regions, 4)
    centre = overlap_measures(objects, box, torch.zeros(box.shape[:2], dtype=torch.int64))
    centre[..., :4] = float("nan")
    return {"top": chosen("top"), "bottom": chosen("bottom"), "random": random, "centre": centre}


def overlap_rows(
    objects: Objects, measured: Mapping[str, Tensor], counts: Iterable[int], num_images: int, num_resamples: int = 1000
) -> list[dict[str, Any]]:
    """The means of measure_overlaps as rows: regions, N, size, objects, measure, mean, low, high (fractions).

    regions: a way to choose them, or "top - random" and "top - centre", the paired difference; size: "all" or of SIZES.
    counts: the N to tell. mean, low and high are NaN where there is nothing to measure.
    """
    ways = {**measured, **{f"top - {other}": measured["top"] - measured[other] for other in ("random", "centre")}}
    keys = [(way, count, measure) for way in ways for count in counts for measure in MEASURES]
    table = torch.stack([ways[way][:, count - 1, MEASURES.index(measure)] for way, count, measure in keys], dim=1)
    rows = []
    for size, (low_end, high_end) in {"all": (0.0, float("inf")), **SIZES}.items():
        inside = (objects.sizes >= low_end) & (objects.sizes < high_end)
        means = mean_intervals(table[inside], objects.images[inside], num_images, num_resamples)
        for (way, count, measure), found in zip(keys, means.T.tolist(), strict=True):
            row = {"regions": way, "N": count, "size": size, "objects": int(inside.sum()), "measure": measure}
            rows.append(row | dict(zip(ENDS, found, strict=True)))
    return rows


def pointing_game(objects: Objects, found: ClassRegions) -> Pointing:
    """Whether the highest point of a present class's map lies in one of the boxes of that class.

    References: the same for the centre of the highest cell before upsampling and for the centre of the image, and
    the share of the pixels that the boxes cover, which is the chance of a pixel drawn at random.
    Source: Zhang et al. 2016, "Top-down neural attention by excitation backprop". They let a point miss by 15 pixels;
    here the tolerance is 0.
    """
    num_classes = found.scores.shape[1]
    pairs, pair_of = torch.unique(objects.images * num_classes + objects.classes, return_inverse=True)
    images, classes = pairs // num_classes, pairs % num_classes
    middle = torch.full((len(pairs), 2), found.size / 2, dtype=torch.float64)
    points = torch.stack((found.peaks[images, classes], found.cells[images, classes], middle), dim=1)[pair_of]
    inside = ((points >= objects.boxes[:, None, :2]) & (points < objects.boxes[:, None, 2:])).all(dim=-1)  # (m, 3)
    hits = torch.zeros(len(pairs), 3, dtype=torch.float64)
    hits = hits.scatter_reduce(0, pair_of[:, None].expand(-1, 3), inside.double(), "amax")
    covered = torch.stack([_covered(objects.boxes[pair_of == pair], found.size) for pair in range(len(pairs))])
    ranks = select_classes(found.scores, num_classes).argsort(dim=1)[images, classes]
    return Pointing(images, classes, ranks, torch.cat((hits, covered[:, None]), dim=1))


def _covered(boxes: Tensor, size: int) -> Tensor:
    """The share of the pixels whose centres lie in at least one of the boxes."""
    centres = torch.arange(size, dtype=torch.float64) + 0.5
    inside = (centres >= boxes[:, :2, None]) & (centres < boxes[:, 2:, None])  # (b, 2, S)
    x, y = inside.float().unbind(dim=1)
    return (y.T @ x > 0).double().mean()


def pointing_rows(
    pointing: Pointing, num_regions: int, num_images: int, num_resamples: int = 1000
) -> list[dict[str, Any]]:
    """Hit rates of the pointing game as rows: classes, pairs, point, mean, low, high (fractions).

    point: one of POINTS, or a paired difference: "peak", "cell" against "random pixel", "centre of the image".
    """
    names = (*POINTS, *(f"{a} - {b}" for a in ("peak", "cell") for b in ("random pixel", "centre of the image")))
    table = torch.cat((pointing.hits, pointing.hits[:, [0, 0, 1, 1]] - pointing.hits[:, [3, 2, 3, 2]]), dim=1)
    rows = []
    counted = {"present": pointing.ranks >= 0, f"among the top {num_regions}": pointing.ranks < num_regions}
    for classes, kept in counted.items():
        means = mean_intervals(table[kept], pointing.images[kept], num_images, num_resamples)
        for point, found in zip(names, means.T.tolist(), strict=True):
            row = {"classes": classes, "pairs": int(kept.sum()), "point": point}
            rows.append(row | dict(zip(ENDS, found, strict=True)))
    return rows


def measure_regions(runs: Runs, config: RunConfig) -> Mapping[str, Any]:
    """The record of a run's regions on its test images, made once: overlap_rows, pointing_rows, and a small gallery.

    The gallery holds, for the first test images, each region's box, class and map cells, and the annotated objects.
    Without annotated boxes in the data set (a table has none) nothing is measured, and the gallery is all there is.
    """
    run_id = runs.run(config).run_id

    def measured() -> dict[str, Any]:
        check_settings()
        test = runs.data(config).test
        found = _measured(runs.trained_model(config), runs.splits.squares(test, config.image_size))
        names = {"format": RECORD_FORMAT, "run_id": run_id, "label": config.label, "data": test.title}
        return {**names, **found, "environment": describe_environment(runs.profile.threads)}

    keys = {"boxes": boxes_fingerprint(runs.data(config).test)} if "test_data" in runs.look(config)[0] else {}
    return runs.keep("regions", run_id, regions_fingerprint(), measured, **keys)


def regions_fingerprint() -> str:
    """What a record of regions computes with."""
    return fingerprint(_measured)


def boxes_fingerprint(images: ImageSet) -> str:
    """A short hash of the annotated objects of a split: corners, class and difficult of each, image by image."""
    found = [images.boxes(index) for index in range(len(images))] if images.has_boxes else []
    rows = [[part.tolist() for part in (each.xyxy, each.classes, each.difficult)] for each in found]
    return content_id({"boxes": rows})


def _measured(model: MCAR, squares: ResizedImages) -> dict[str, Any]:
    test, num_images = squares.image_set, len(squares)
    if not test.has_boxes:
        unmeasured = {"difficult": 0, "objects": {}, "overlap": [], "pointing": []}
        return {"images": num_images, **unmeasured, "gallery": _gallery(model, squares, NO_OBJECTS)}
    objects, found = annotated_objects(test, squares.size), class_regions(model, squares)
    counts = sorted({count for count in (*COUNTS, model.num_regions) if count <= len(test.classes)})
    overlap = overlap_rows(objects, measure_overlaps(objects, found, max(counts)), counts, num_images)
    return {
        "images": num_images,
        "difficult": sum(int(test.boxes(index).difficult.sum()) for index in range(num_images)),
        "objects": {row["size"]: row["objects"] for row in overlap if row["size"] != "all"},
        "overlap": overlap,
        "pointing": pointing_rows(pointing_game(objects, found), model.num_regions, num_images),
        "gallery": _gallery(model, squares, objects),
    }


def _gallery(model: MCAR, squares: ResizedImages, objects: Objects) -> list[dict[str, Any]]:
    size, names = (squares.size, squares.size), squares.image_set.classes
    indices = range(min(GALLERY_IMAGES, len(squares)))
    scores, class_logits = class_maps(model, torch.stack([squares[at] for at in indices]))
    found = attentional_regions(
        class_logits, scores, size, model.num_regions, model.threshold, model.selection, model.generator
    )

    def entry(at: int) -> dict[str, Any]:
        classes, here = found.classes[at, :GALLERY_REGIONS].tolist(), objects.images == at
        annotated = zip(objects.classes[here].tolist(), objects.boxes[here].tolist(), strict=True)
        return {
            "image": squares.image_set.ids[at],
            "labels": [names[k] for k in classes],
            "boxes": found.boxes[at, :GALLERY_REGIONS].tolist(),
            "cells": torch.sigmoid(class_logits)[at, classes].tolist(),
            "annotated": [[names[k], box] for k, box in annotated],
        }

    return [entry(at) for at in indices]
