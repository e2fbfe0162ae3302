"""The attentional regions held against annotated boxes. The paper gives no such measure; this one is the project's.

n images, K classes, N regions an image, m annotated objects, S the side of the square network input. All boxes are
x1 y1 x2 y2, half-open, in pixels of that input. Objects marked difficult (COCO: crowds) are left out throughout, so a
class is present in an image here if it has an object there that is not difficult.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mcar_lib.data.image_set import ImageSet
from mcar_lib.data.transforms import ResizedImages, normalise
from mcar_lib.errors import ConfigError, DataError
from mcar_lib.model import MCAR
from mcar_lib.regions import Selection, attention_maps, attentional_regions, locate_intervals, select_classes

SIZES = {"small": (0.0, 0.2), "medium": (0.2, 0.5), "large": (0.5, float("inf"))}
"""Bins of an object's relative size, the square root of its share of the image's area; each holds its lower end."""
MEASURES = (
    *("IoU, own class", "found at 0.3, own class", "found at 0.5, own class", "class taken"),
    *("IoU, any class", "found at 0.3, any class", "found at 0.5, any class"),
)
POINTS = ("peak of the map", "centre of the highest cell", "centre of the image", "random pixel")
ENDS = ("mean", "low", "high")
NO_DIFFERENCE = "no difference that this data can show"
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

    scores: (n, K) float32 global scores. boxes: (n, K, 4) int64. peaks: (n, K, 2) float64 x y, the centre of the pixel
    in which the upsampled map of the class is highest; cells: the same for the map before upsampling. Among equal
    maxima the first in reading order counts. size: S.
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
        width, height = _photo_size(images, index)
        scale = torch.tensor([size / width, size / height], dtype=torch.float64).repeat(2)
        boxes = annotated.xyxy[kept] * scale
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        parts.append((boxes, annotated.classes[kept], torch.full((len(boxes),), index), area.sqrt() / size))
    objects = Objects(*(torch.cat(column) for column in zip(*parts, strict=True)))
    if len(objects.boxes) == 0:
        raise DataError(
            f"{images.title} has no annotated object that is not difficult; regions need some to be held to"
        )
    return objects


def _photo_size(images: ImageSet, index: int) -> tuple[int, int]:
    try:
        with Image.open(images.paths[index]) as photo:  # the header only
            return photo.size
    except OSError as error:
        raise DataError(f"{images.paths[index]}: not a complete image file ({error}); fetch it again") from error


@torch.no_grad()
def class_regions(
    model: MCAR, squares: ResizedImages, mean_std: tuple[Sequence[float], Sequence[float]], batch_size: int = 32
) -> ClassRegions:
    """One pass of the global stream over all images, and the box of every class's map; crops are not looked at.

    model: in evaluation mode (else ConfigError), on any device; its own tau is used, its N and selection are not.
    mean_std: of its normalisation. Returns tensors on the CPU. The boxes are the model's own up to the last bit of the
    maps, which varies with how many are computed together and decides where a marginal meets tau exactly.
    """
    if model.training:
        raise ConfigError("the model is in training mode, where batches change its statistics; call model.eval()")
    device, size, num_classes = model.convclass.weight.device, squares.size, model.convclass.out_channels
    batch = max(1, min(batch_size, MAP_VALUES // (num_classes * size * size)))
    parts = []
    for first in range(0, len(squares), batch):
        images = torch.stack([squares[index] for index in range(first, min(first + batch, len(squares)))])
        x = normalise(images.to(device), *mean_std).contiguous(memory_format=torch.channels_last)
        feature_map = model.features(x)
        scores = torch.sigmoid(model.classify(model.pool(feature_map)))  # (B, K)
        class_logits = model.class_logits(feature_map)  # (B, K, h, w)
        found = attentional_regions(class_logits, scores, (size, size), num_classes, model.threshold)
        by_class = found.classes.argsort(dim=1)[..., None].expand(-1, -1, 4)
        every_class = torch.arange(num_classes, device=device).expand(len(images), -1)
        maps = attention_maps(class_logits, every_class, (size, size))
        parts.append((scores, found.boxes.gather(1, by_class), _highest(maps, size), _highest(class_logits, size)))
    scores, boxes, peaks, cells = (torch.cat(column).cpu() for column in zip(*parts, strict=True))
    return ClassRegions(scores, boxes, peaks, cells, size)


def _highest(maps: Tensor, size: int) -> Tensor:
    """Maps (B, K, h, w) -> (B, K, 2), the centre x y of the highest cell in pixels of the input."""
    height, width = maps.shape[-2:]
    cell = maps.flatten(2).argmax(dim=2)
    return torch.stack(
        (((cell % width) + 0.5) * size / width, ((cell // width) + 0.5) * size / height), dim=-1
    ).double()


def overlap_measures(objects: Objects, boxes: Tensor, classes: Tensor) -> Tensor:
    """MEASURES of each object under given regions: (m, N, 7) float64, [:, N - 1] for the first N regions of its image.

    boxes: (n, N, 4); classes: (n, N). IoU is the best one, found means that it reaches 0.3 or 0.5; with a region of the
    object's own class (0 if that class is not taken, that is, among the N) or of any class.
    """
    iou = _iou(objects.boxes[:, None], boxes[objects.images].double())  # (m, N)
    same = classes[objects.images] == objects.classes[:, None]
    own, any_class = (iou * same).cummax(dim=1).values, iou.cummax(dim=1).values
    columns = (own, own >= 0.3, own >= 0.5, same.cumsum(dim=1) > 0, any_class, any_class >= 0.3, any_class >= 0.5)
    return torch.stack([column.double() for column in columns], dim=-1)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes (..., 4) with boxes (..., 4), element by element."""
    sides = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    areas = ((box[..., 2:] - box[..., :2]).prod(dim=-1) for box in (a, b))
    common = sides.prod(dim=-1)
    return common / (sum(areas) - common)


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


def mean_intervals(
    values: Tensor, images: Tensor, num_images: int, num_resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """Mean of each column and its 95 % percentile interval by bootstrap over images, since the objects of one image
    stand or fall together. values: (m, C); images: (m,), the image of each row. Returns (3, C): mean, low, high.

    A resample without any row is left out; without rows, or where a column holds a NaN, all three are NaN.
    """
    totals = np.zeros((num_images, values.shape[1]))
    np.add.at(totals, images.numpy(), values.double().numpy())
    counts = np.bincount(images.numpy(), minlength=num_images)
    weights = np.random.default_rng(seed).multinomial(num_images, np.full(num_images, 1 / num_images), num_resamples)
    drawn = weights @ counts
    if len(values) == 0 or not drawn.any():
        return np.full((3, values.shape[1]), np.nan)
    samples = (weights @ totals)[drawn > 0] / drawn[drawn > 0, None]
    ends = np.quantile(samples, [0.025, 0.975], axis=0)
    # Rounded, or float64 noise would decide on which side of 0 two equal ways fall.
    return np.round(np.vstack((totals.sum(axis=0) / counts.sum(), ends)), 12)


def overlap_rows(
    objects: Objects,
    measured: Mapping[str, Tensor],
    counts: Iterable[int],
    num_images: int,
    num_resamples: int = 1000,
    seed: int = 0,
) -> list[dict[str, object]]:
    """The means of measure_overlaps as rows: regions, N, size, objects, measure, mean, low, high (fractions).

    regions: a way to choose them, or "top - random" and "top - centre", the paired difference; size: "all" or of SIZES.
    counts: the N to tell. mean, low and high are NaN where there is nothing to measure.
    """
    ways = {**measured, **{f"top - {other}": measured["top"] - measured[other] for other in ("random", "centre")}}
    keys = [(way, count, measure) for way in ways for count in counts for measure in MEASURES]
    table = torch.stack([ways[way][:, count - 1, MEASURES.index(measure)] for way, count, measure in keys], dim=1)
    rows: list[dict[str, object]] = []
    for size, (low_end, high_end) in {"all": (0.0, float("inf")), **SIZES}.items():
        inside = (objects.sizes >= low_end) & (objects.sizes < high_end)
        means = mean_intervals(table[inside], objects.images[inside], num_images, num_resamples, seed)
        for (way, count, measure), found in zip(keys, means.T.tolist(), strict=True):
            row = {"regions": way, "N": count, "size": size, "objects": int(inside.sum()), "measure": measure}
            rows.append(row | dict(zip(ENDS, found, strict=True)))
    return rows


def pointing_rows(
    pointing: Pointing, num_regions: int, num_images: int, num_resamples: int = 1000, seed: int = 0
) -> list[dict[str, object]]:
    """Hit rates of the pointing game as rows: classes, pairs, point, mean, low, high (fractions).

    point: one of POINTS, or a paired difference: "peak", "cell" against "random pixel", "centre of the image".
    """
    names = (*POINTS, *(f"{a} - {b}" for a in ("peak", "cell") for b in ("random pixel", "centre of the image")))
    table = torch.cat((pointing.hits, pointing.hits[:, [0, 0, 1, 1]] - pointing.hits[:, [3, 2, 3, 2]]), dim=1)
    everything = torch.ones(len(table), dtype=torch.bool)
    rows: list[dict[str, object]] = []
    for classes, kept in {"present": everything, f"among the top {num_regions}": pointing.ranks < num_regions}.items():
        means = mean_intervals(table[kept], pointing.images[kept], num_images, num_resamples, seed)
        for point, found in zip(names, means.T.tolist(), strict=True):
            row = {"classes": classes, "pairs": int(kept.sum()), "point": point}
            rows.append(row | dict(zip(ENDS, found, strict=True)))
    return rows


def finding(difference: Mapping[str, float], if_above: str, if_below: str) -> str:
    """What the interval of a paired difference supports: one of the two sentences, or that none can be shown."""
    if np.isnan(difference["mean"]):
        return "nothing to compare"
    if difference["low"] > 0:
        return if_above
    return if_below if difference["high"] < 0 else NO_DIFFERENCE
