"""The attentional regions held against annotated boxes. The paper gives no such measure; this one is the project's.

n images, K classes, N regions an image, m annotated objects, S the side of the square network input. All boxes are
x1 y1 x2 y2, half-open, in pixels of that input. Objects marked difficult (COCO: crowds) are left out throughout, so a
class is present in an image here if it has an object there that is not difficult.
"""

import itertools
from bisect import bisect_right
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_area, box_iou

from mcar_lib.attribution import ClassMaps
from mcar_lib.data.image_set import ImageSet
from mcar_lib.errors import DataError
from mcar_lib.regions import attention_maps, attentional_regions, locate_intervals, select_classes

SIZES = {"small": (0.0, 0.2), "medium": (0.2, 0.5), "large": (0.5, float("inf"))}
"""Bins of an object's relative size, the square root of its share of the image's area; each holds its lower end."""
FOUND, F1 = "found at 0.3, any class", "F1 at 0.3, own class"
MEASURES = (FOUND, "found at 0.5, any class", "found at 0.3, own class", "class taken")  # of an object; F1 is of images
POINTING = "pointing game"
PEAK, CELL, OCCLUDED = "peak of the map", "centre of the highest cell", "highest cell of occlusion"
MIDDLE, RANDOM_PIXEL = "centre of the image", "random pixel"
POINTS = (PEAK, CELL, OCCLUDED, MIDDLE, RANDOM_PIXEL)
COUNTS = (1, 2, 4, 6, 8)  # the N that a record tells of, and the chosen one
TAUS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # to choose from on val
MAP_VALUES = 1 << 25  # upsampled map values held at a time: 128 MiB of float32


class Objects(NamedTuple):
    """Annotated objects: boxes (m, 4) float64; classes (m,) int64; images (m,) int64, index of the image; sizes (m,)
    float64 in (0, 1], see SIZES."""

    boxes: Tensor
    classes: Tensor
    images: Tensor
    sizes: Tensor


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


class Key(NamedTuple):
    """What a share is of: a way to choose N regions, or a point; the objects or pairs that it is a share of; a measure
    of MEASURES, F1 or POINTING."""

    way: str
    N: int
    among: str
    measure: str


class Pointing(NamedTuple):
    """The pointing game for the p pairs of image and present class: images, classes and ranks (p,) int64 (rank 0 is
    the image's highest score); hits (p, 5) float64, a column for each of POINTS: 1 is a hit, the last is a chance."""

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
def class_regions(maps: ClassMaps, threshold: float, batch_size: int = 32) -> ClassRegions:
    """The box of every class's map at this tau, and where each map is highest.

    The boxes are the model's own up to the last bit of the maps, which varies with how many are computed together and
    decides where a marginal meets tau exactly.
    """
    size, num_classes = maps.size, maps.cells.shape[1]
    batch = max(1, min(batch_size, MAP_VALUES // (num_classes * size * size)))
    parts = []
    for scores, cells in zip(maps.scores.split(batch), maps.cells.split(batch), strict=True):
        found = attentional_regions(cells, scores, (size, size), num_classes, threshold)
        by_class = found.classes.argsort(dim=1)[..., None].expand(-1, -1, 4)
        every_class = torch.arange(num_classes).expand(len(scores), -1)
        upsampled = attention_maps(cells, every_class, (size, size))
        parts.append((found.boxes.gather(1, by_class), _highest(upsampled, size), _highest(cells, size)))
    boxes, peaks, highest = (torch.cat(column) for column in zip(*parts, strict=True))
    return ClassRegions(maps.scores, boxes, peaks, highest, size)


def _highest(maps: Tensor, size: int) -> Tensor:
    """Maps (B, K, h, w) -> (B, K, 2), the centre x y of the highest cell in pixels of the input."""
    height, width = maps.shape[-2:]
    cell = maps.flatten(2).argmax(dim=2)
    x, y = ((cell % width) + 0.5) * size / width, ((cell // width) + 0.5) * size / height
    return torch.stack((x, y), dim=-1).double()


def overlap_measures(objects: Objects, boxes: Tensor, classes: Tensor) -> Tensor:
    """MEASURES of each object under given regions: (m, N, 4) float64, [:, N - 1] for the first N regions of its image.

    boxes: (n, N, 4); classes: (n, N). Found means that the best IoU reaches 0.3 or 0.5, with a region of any class or
    of the object's own; taken, that its class is among the N.
    """
    iou, same = _overlaps(objects, boxes, classes)
    any_class, own = iou.cummax(dim=1).values, (iou * same).cummax(dim=1).values
    columns = (any_class >= 0.3, any_class >= 0.5, own >= 0.3, same.cumsum(dim=1) > 0)
    return torch.stack([column.double() for column in columns], dim=-1)


def matched_regions(objects: Objects, boxes: Tensor, classes: Tensor) -> Tensor:
    """How many of the first N regions of each image reach an IoU of 0.3 with an object of their class: (n, N) float64.

    A class has one region, so these are the true positives of F1 = 2 TP / (objects + regions).
    """
    iou, same = _overlaps(objects, boxes, classes)
    best = torch.zeros(classes.shape, dtype=torch.float64)
    best = best.scatter_reduce(0, objects.images[:, None].expand_as(iou), iou * same, "amax")
    return (best >= 0.3).double().cumsum(dim=1)


def _overlaps(objects: Objects, boxes: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """IoU of each object with the regions of its image (m, N), and which of them are of its class."""
    iou = box_iou(objects.boxes[:, None], boxes[objects.images].double())[:, 0]
    return iou, classes[objects.images] == objects.classes[:, None]


def measure_overlaps(
    objects: Objects,
    found: ClassRegions,
    occluded: ClassRegions | None = None,
    max_regions: int = 8,
    draws: int = 5,
    seed: int = 0,
) -> dict[str, tuple[Tensor, Tensor]]:
    """overlap_measures and matched_regions of each way to choose regions, by its name.

    Ways: "top" classes; "random" classes (the mean of seeded draws); "occlusion", the top classes with the boxes of
    their occlusion maps, if there are any; and "centre", a reference that ignores the image: the middle three quarters
    of both sides, the box on which the module falls back. It is one box for any N and belongs to no class, so its
    measures of the own class are NaN. Raises ConfigError if max_regions is above K.
    """
    generator = torch.Generator().manual_seed(seed)

    def measured(boxes: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
        taken = boxes.gather(1, classes[..., None].expand(-1, -1, 4))
        return overlap_measures(objects, taken, classes), matched_regions(objects, taken, classes)

    top = select_classes(found.scores, max_regions)  # (n, N)
    drawn = [
        measured(found.boxes, select_classes(found.scores, max_regions, "random", generator)) for _ in range(draws)
    ]
    objects_found, matched = (torch.stack(column).mean(dim=0) for column in zip(*drawn, strict=True))
    start, end = locate_intervals(torch.ones(1, found.size), 0.5)[0].tolist()  # a constant marginal: the fallback
    centre, none = measured(torch.tensor([start, start, end, end]).expand_as(found.boxes), top)
    centre[..., 2:] = float("nan")
    return {
        "top": measured(found.boxes, top),
        "random": (objects_found, matched),
        **({} if occluded is None else {"occlusion": measured(occluded.boxes, top)}),
        "centre": (centre, torch.full_like(none, float("nan"))),
    }


def pointing_game(objects: Objects, found: ClassRegions, occluded: ClassRegions | None = None) -> Pointing:
    """Whether the highest point of a present class's map lies in one of the boxes of that class.

    References: the same for the centre of the highest cell before upsampling, for that of the occlusion map (NaN
    without one) and for the centre of the image, and the share of the pixels that the boxes cover, which is the chance
    of a pixel drawn at random.
    Source: Zhang et al. 2016, "Top-down neural attention by excitation backprop". They let a point miss by 15 pixels;
    here the tolerance is 0.
    """
    num_classes = found.scores.shape[1]
    pairs, pair_of = torch.unique(objects.images * num_classes + objects.classes, return_inverse=True)
    images, classes = pairs // num_classes, pairs % num_classes
    middle = torch.full((len(pairs), 2), found.size / 2, dtype=torch.float64)
    of_occlusion = torch.full_like(found.cells, float("nan")) if occluded is None else occluded.cells
    highest = [points[images, classes] for points in (found.peaks, found.cells, of_occlusion)]
    points = torch.stack((*highest, middle), dim=1)[pair_of]
    inside = ((points >= objects.boxes[:, None, :2]) & (points < objects.boxes[:, None, 2:])).all(dim=-1)  # (m, 4)
    hits = torch.zeros(len(pairs), 4, dtype=torch.float64)
    hits = hits.scatter_reduce(0, pair_of[:, None].expand(-1, 4), inside.double(), "amax")
    if occluded is None:
        hits[:, POINTS.index(OCCLUDED)] = float("nan")
    covered = torch.stack([_covered(objects.boxes[pair_of == pair], found.size) for pair in range(len(pairs))])
    ranks = select_classes(found.scores, num_classes).argsort(dim=1)[images, classes]
    return Pointing(images, classes, ranks, torch.cat((hits, covered[:, None]), dim=1))


def _covered(boxes: Tensor, size: int) -> Tensor:
    """The share of the pixels whose centres lie in at least one of the boxes."""
    centres = torch.arange(size, dtype=torch.float64) + 0.5
    inside = (centres >= boxes[:, :2, None]) & (centres < boxes[:, 2:, None])  # (b, 2, S)
    x, y = inside.float().unbind(dim=1)
    return (y.T @ x > 0).double().mean()


def image_sums(
    objects: Objects, ways: Mapping[str, tuple[Tensor, Tensor]], pointing: Pointing, num_regions: int, num_images: int
) -> tuple[dict[str, Tensor], dict[Key, Tensor]]:
    """Counts and sums of each image (n,), the denominators and numerators of all shares that a record tells.

    Counts, by what is counted: objects ("all" and of SIZES), pairs of image and class ("present", "among the top N").
    Sums, by Key. Over the counts they are MEASURES and POINTING; F1, over the objects and N, is kept as 2 TP.
    """

    def by_image(values: Tensor, images: Tensor) -> Tensor:
        return torch.zeros(num_images, dtype=torch.float64).index_add(0, images, values.double())

    numbers = counts_to_tell(num_regions, max_regions=next(iter(ways.values()))[1].shape[1])
    ranges = {"all": (0.0, float("inf")), **SIZES}
    bins = {size: (objects.sizes >= low) & (objects.sizes < high) for size, (low, high) in ranges.items()}
    pairs = {"present": pointing.ranks >= 0, f"among the top {num_regions}": pointing.ranks < num_regions}
    counts = {size: by_image(inside, objects.images) for size, inside in bins.items()}
    counts |= {among: by_image(kept, pointing.images) for among, kept in pairs.items()}
    sums = {}
    for way, (of_objects, matched) in ways.items():
        told = [(count, "all", FOUND) for count in numbers] + [(num_regions, size, FOUND) for size in SIZES]
        for count, size, measure in [*told, *((num_regions, "all", measure) for measure in MEASURES[1:])]:
            values = of_objects[:, count - 1, MEASURES.index(measure)] * bins[size]
            sums[Key(way, count, size, measure)] = by_image(values.where(bins[size], 0), objects.images)
        sums[Key(way, num_regions, "all", F1)] = 2 * matched[:, num_regions - 1]
    for (among, kept), (at, point) in itertools.product(pairs.items(), enumerate(POINTS)):
        sums[Key(point, num_regions, among, POINTING)] = by_image(pointing.hits[:, at] * kept, pointing.images)
    return counts, {key: values for key, values in sums.items() if not values.isnan().any()}


def counts_to_tell(num_regions: int, max_regions: int) -> list[int]:
    """COUNTS, as far as there are classes, and the N that is reported."""
    return sorted({count for count in (*COUNTS, num_regions) if count <= max_regions})


def val_grid(objects: Objects, maps: Mapping[str, ClassMaps]) -> list[dict[str, Any]]:
    """F1 of the top regions for every N of COUNTS and every tau of TAUS as rows: way, tau, N, F1 (a fraction). maps: by
    way, "top" and "occlusion"."""
    rows = []
    for (way, of_way), tau in itertools.product(maps.items(), TAUS):
        found = class_regions(of_way, tau)
        classes = select_classes(found.scores, min(max(COUNTS), found.scores.shape[1]))
        boxes = found.boxes.gather(1, classes[..., None].expand(-1, -1, 4))
        positives = matched_regions(objects, boxes, classes).sum(dim=0).tolist()
        for count in COUNTS[: bisect_right(COUNTS, classes.shape[1])]:
            share = 2 * positives[count - 1] / (len(objects.boxes) + count * len(classes))
            rows.append({"way": way, "tau": tau, "N": count, "F1": round(share, 6)})
    return rows
