"""Photos of one's own in the formats that people have: recognised, divided into train, val and test, and told."""

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from mcar_lib.data.image_set import Boxes, ImageSet
from mcar_lib.data.own.class_folders import class_folders, contents, list_class_folders
from mcar_lib.data.own.coco_json import find_instances, list_instances
from mcar_lib.data.own.csv_tables import find_tables, list_tables
from mcar_lib.data.own.listing import PARTS, TRAIN, VAL, Listed, Listing, Object, joined
from mcar_lib.data.own.voc_tree import find_tree, list_tree
from mcar_lib.data.own.yolo import find_description, list_yolo
from mcar_lib.data.preparation import Checked, Problems, counted, doubts_together, first_of, without_positives
from mcar_lib.data.table import alike, normalized
from mcar_lib.errors import DataError

__all__ = ["FORMATS", "Own", "class_counts", "load_own", "overview", "read_own"]

HELD_OUT = 0.2  # the share of the training photos that is val where nobody has chosen a val split
RARE = 10  # a class with fewer training photos is told


@dataclass(frozen=True)
class Format:
    """How one format is known and read. finds: path -> something where it is this format; lists: path, options."""

    finds: Callable[[Path], object]
    lists: Callable[[Path, Mapping[str, object]], Listing]
    needs: str  # in words


# In the order in which they are tried: a YOLO or VOC folder may hold a table too, and folders of photos.
FORMATS: Mapping[str, Format] = {
    "yolo": Format(find_description, lambda root, _: list_yolo(root), "a data.yaml with names"),
    "voc": Format(find_tree, lambda root, _: list_tree(root), "Annotations or ImageSets/Main"),
    "coco": Format(find_instances, list_instances, "a COCO instances .json"),
    "csv": Format(find_tables, list_tables, "a .csv with a column of images and labels"),
    "folders": Format(class_folders, lambda root, _: list_class_folders(root), "a folder of photos for each class"),
}


@dataclass(frozen=True)
class Own:
    """A data set of one's own. parts: "train", "val" and, where there is one, "test" -> its images; told: what was
    taken for what, and how the photos were divided, a line each."""

    format: str
    parts: Mapping[str, ImageSet]
    told: tuple[str, ...]


def read_own(root: Path | str, **options: object) -> Own:
    """The data set at a path, a file or a folder, in the format that `format` names, else in the one it looks like.

    options: format; classes, the names in order, others being errors; without, ids of photos that are left out; for
    tables image_root, image_column, label_columns, separator. Where no val split is there, a fifth of the training
    photos is held out, always the same ones. Raises DataError where no format fits, and for what is wrong in its files.
    """
    root = Path(root).expanduser()
    name, others = _recognised(root, str(options.get("format") or ""))
    listing = FORMATS[name].lists(root, options)
    problems = Problems(str(root))
    given = options.get("classes")
    classes = tuple(map(normalized, given)) if isinstance(given, list | tuple) and given else listing.classes
    photos = _wanted(listing.photos, classes, options.get("without"), problems)
    if len(set(classes)) != len(classes):
        problems.add("the list of classes names one class twice")
    problems.raise_if_any()
    divided, how = _divided(photos, root)
    parts = {part: _image_set(listing, part, divided[part], classes) for part in PARTS if divided.get(part)}
    doubts = [f"{root}: {doubt}" for doubt in alike(classes)] + list(listing.doubts)
    parts[TRAIN] = replace(parts[TRAIN], doubts=tuple(doubts))
    if not (parts[TRAIN].targets == 1).any():
        raise DataError(f"{root}: no photo for training shows any of the {len(classes)} classes; give them labels")
    force = f"it could be {' or '.join(others)} too" if others else "if it is something else"
    told = f"{root}: taken for {listing.taken}; {force}: --set data_options.format={'|'.join(FORMATS)}"
    return Own(name, parts, (told, *how))


def load_own(root: Path, split: str, **options: object) -> ImageSet:
    """The split "train", "val", "test", or "trainval", the first two together; DataError where there is none."""
    parts = read_own(root, **options).parts
    if split == "trainval":
        return _together(parts[TRAIN], parts[VAL]) if VAL in parts else parts[TRAIN]
    if split not in parts:
        raise DataError(
            f"{root}: no {split} split here, there are {' and '.join(parts)}; --set scored_on=val scores the val split"
        )
    return parts[split]


def class_counts(own: Own) -> dict[str, Sequence[object]]:
    """Columns of a table: the classes, and how many photos of each part show each."""
    counts = {part: (images.targets == 1).sum(dim=0).tolist() for part, images in own.parts.items()}
    return {"class": own.parts[TRAIN].classes, **counts}


def overview(own: Own, checked: Mapping[str, Checked]) -> list[str]:
    """Lines before a training: photos of each part, classes that are rare or never there, photos that are there twice
    or in two parts, doubts. checked: what the check of each part found."""
    train = own.parts[TRAIN]
    lines = [", ".join(f"{counted(images.ids, 'photo')} for {part}" for part, images in own.parts.items())]
    unseen = without_positives(train)
    counts = (train.targets == 1).sum(dim=0).tolist()
    rare = [f"{name} ({count})" for name, count in zip(train.classes, counts, strict=True) if 0 < count < RARE]
    if rare:
        lines.append(f"rare, with fewer than {RARE} training photos, so hardly learnt: {joined(rare)}")
    if unseen:
        lines.append(f"no training photo shows {joined(unseen)}: kept, but not learnt; their scores mean nothing")
    for part, images in own.parts.items():
        if not (images.targets == 1).any(dim=1).all():
            none = int((~(images.targets == 1).any(dim=1)).sum())
            lines.append(f"{none:,} of {len(images):,} photos of {part} have no label and count as showing no class")
    found = [(own.parts[part], each) for part, each in checked.items()]
    doubts = [*doubts_together(found), *(line for images, each in found for line in _twice(images, each))]
    told = [doubt for doubt in doubts if ": no image shows " not in doubt]
    if told:
        lines += [f"{counted(told, 'doubt')}, which may be meant so:", *first_of(told)]
    return lines


# Recognition ----------------------------------------------------------------------------------------------------------


def _recognised(root: Path, asked: str) -> tuple[str, list[str]]:
    """The format of a path, and others that it could have too."""
    if not root.exists():
        raise DataError(f"{root}: no such file or folder; name the place of the photos")
    if asked and asked not in FORMATS:
        raise DataError(f"format {asked!r}: choose one of {', '.join(FORMATS)}")
    if asked and not FORMATS[asked].finds(root):
        raise DataError(f"{root}: not of the format {asked}, which needs {FORMATS[asked].needs}")
    if asked:
        return asked, []
    found = [name for name, known in FORMATS.items() if name != "folders" and known.finds(root)]
    found = found or [name for name in ("folders",) if FORMATS[name].finds(root)]
    if not found:
        empty = root.is_dir() and not any(root.iterdir())
        needs = "; ".join(f"{name}: {known.needs}" for name, known in FORMATS.items())
        raise DataError(
            f"{root}: {'the folder is empty' if empty else 'no data set that is known here'}. Known are {needs}"
        )
    return found[0], found[1:]


def _wanted(
    photos: Sequence[Listed], classes: Sequence[str], without: object, problems: Problems
) -> tuple[Listed, ...]:
    """The photos that are not left out; labels that are no classes are problems."""
    left_out = set(without) if isinstance(without, list | tuple) else set()
    known = set(classes)
    for photo in photos:
        for label in dict.fromkeys((*photo.labels, *photo.difficult)):
            if label not in known:
                problems.add(f"{photo.place}: unknown label {label!r}; the classes are {joined(classes)}")
    if not photos:
        problems.add("no photos are listed")
    if not classes:
        problems.add("no labels at all")
    return tuple(photo for photo in photos if photo.id not in left_out)


# Division -------------------------------------------------------------------------------------------------------------


def _divided(photos: Sequence[Listed], root: Path) -> tuple[dict[str, list[Listed]], list[str]]:
    """The photos of each part, and how they came there, in words. Photos of no split are for training."""
    parts: dict[str, list[Listed]] = defaultdict(list)
    for photo in photos:
        parts[photo.split or TRAIN].append(photo)
    if not parts[TRAIN]:
        raise DataError(f"{root}: no photos for training, only for {' and '.join(sorted(parts.keys() - {TRAIN}))}")
    if parts.get(VAL):
        return parts, []
    held = _held_out(parts[TRAIN])
    if not held:
        raise DataError(
            f"{root}: {counted(parts[TRAIN], 'photo')} for training and none for val; there are too few to hold some "
            "out, give more photos or a val split"
        )
    parts[VAL] = [photo for photo in parts[TRAIN] if photo.id in held]
    parts[TRAIN] = [photo for photo in parts[TRAIN] if photo.id not in held]
    how = f"no val split here: {len(held):,} of {len(held) + len(parts[TRAIN]):,} training photos are held out for it"
    return parts, [f"{how}, the same ones each time"]


def _held_out(photos: Sequence[Listed]) -> set[str]:
    """The ids of about a fifth of the photos, of each class too, the rarest first; the same file under two names stays
    together, and each class keeps a photo for training. Which ones follows from their ids alone."""
    groups: dict[str, list[Listed]] = defaultdict(list)
    for photo, content in zip(photos, contents(photo.path for photo in photos), strict=True):
        groups[content].append(photo)
    order = sorted(groups.values(), key=lambda group: hashlib.sha256(group[0].id.encode()).digest())
    labels = [{label for photo in group for label in photo.labels} for group in order]
    left: dict[str, int] = defaultdict(int)
    for each in labels:
        for label in each:
            left[label] += 1
    wanted = {label: max(1, round(HELD_OUT * count)) for label, count in left.items() if count > 1}
    held: set[int] = set()

    def hold(number: int) -> None:
        held.add(number)
        for label in labels[number]:
            left[label] -= 1
            wanted[label] = wanted.get(label, 0) - 1

    for label in sorted(wanted, key=lambda name: (left[name], name)):
        for number, each in enumerate(labels):
            if wanted[label] <= 0:
                break
            if label in each and number not in held and all(left[other] > 1 for other in each):
                hold(number)
    unlabelled = [number for number, each in enumerate(labels) if not each]
    for number in unlabelled[: round(HELD_OUT * len(unlabelled))]:
        hold(number)
    return {photo.id for number in held for photo in order[number]}


def _twice(images: ImageSet, checked: Checked) -> list[str]:
    """Doubts: photos of one part that are the same file."""
    first: dict[str, Path] = {}
    same = (
        (path, first.setdefault(content, path)) for path, content in zip(images.paths, checked.contents, strict=True)
    )
    return [f"{path}: the same photo as {other}" for path, other in same if path != other]


# Images ---------------------------------------------------------------------------------------------------------------


def _image_set(listing: Listing, part: str, photos: Sequence[Listed], classes: tuple[str, ...]) -> ImageSet:
    """Photos without boxes are turned upright; boxes refer to the photo as it is stored."""
    targets = torch.zeros((len(photos), len(classes)), dtype=torch.int8)
    for row, photo in enumerate(photos):
        for names, value in ((photo.difficult, -1), (photo.labels, 1)):
            targets[row, [classes.index(name) for name in names]] = value
    paths = tuple(photo.path for photo in photos)
    objects = tuple(photo.objects for photo in photos)
    return ImageSet(
        name="own",
        split=part,
        classes=classes,
        ids=tuple(photo.id for photo in photos),
        paths=paths,
        targets=targets,
        read_boxes=partial(_boxes, objects, paths, classes) if listing.has_boxes else None,
        annotation_files=listing.files,
        upright=not listing.has_boxes,
    )


def _boxes(
    objects: tuple[tuple[Object, ...], ...], paths: tuple[Path, ...], classes: tuple[str, ...], index: int
) -> Boxes:
    found = objects[index]
    size = _size_of(paths[index]) if any(each.in_fractions for each in found) else (1, 1)
    corners = [_whole_pixels(each.corners, size) if each.in_fractions else _rounded(each.corners) for each in found]
    return Boxes.of(corners, [classes.index(each.name) for each in found], [each.difficult for each in found])


def _size_of(path: Path) -> tuple[int, int]:
    try:
        with Image.open(path) as image:
            return image.size
    except Exception as error:  # Pillow raises almost anything
        raise DataError(f"{path}: not an image file, so its boxes have no place ({type(error).__name__})") from error


def _rounded(corners: Sequence[float]) -> tuple[int, int, int, int]:
    x1, y1, x2, y2 = corners
    return math.floor(x1), math.floor(y1), math.ceil(x2), math.ceil(y2)


def _whole_pixels(corners: Sequence[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """The pixels that a box in fractions of the sides touches."""
    width, height = size
    x1, y1, x2, y2 = corners
    left, top = min(max(math.floor(x1 * width), 0), width - 1), min(max(math.floor(y1 * height), 0), height - 1)
    return (
        left,
        top,
        max(min(math.ceil(x2 * width), width), left + 1),
        max(min(math.ceil(y2 * height), height), top + 1),
    )


def _together(one: ImageSet, other: ImageSet) -> ImageSet:
    """Two parts as one, "trainval"."""
    return replace(
        one,
        split="trainval",
        ids=one.ids + other.ids,
        paths=one.paths + other.paths,
        targets=torch.cat([one.targets, other.targets]),
        read_boxes=None if one.read_boxes is None else partial(_boxes_of_two, one, other),
    )


def _boxes_of_two(one: ImageSet, other: ImageSet, index: int) -> Boxes:
    return one.boxes(index) if index < len(one) else other.boxes(index - len(one))
