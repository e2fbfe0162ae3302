"""COCO 2014 as a multi-label data set: which of the 80 classes are in the image, and where."""

import contextlib
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mcar_lib.data.image_set import Boxes, ImageSet
from mcar_lib.data.preparation import Problems, share_inside
from mcar_lib.errors import DataError

# The 80 classes by name, the order of the release's outputs (airplane = 0, person = 49, zebra = 79).
COCO_CLASSES = (
    *("airplane", "apple", "backpack", "banana", "baseball bat", "baseball glove", "bear", "bed", "bench", "bicycle"),
    *("bird", "boat", "book", "bottle", "bowl", "broccoli", "bus", "cake", "car", "carrot", "cat", "cell phone"),
    *("chair", "clock", "couch", "cow", "cup", "dining table", "dog", "donut", "elephant", "fire hydrant", "fork"),
    *("frisbee", "giraffe", "hair drier", "handbag", "horse", "hot dog", "keyboard", "kite", "knife", "laptop"),
    *("microwave", "motorcycle", "mouse", "orange", "oven", "parking meter", "person", "pizza", "potted plant"),
    *("refrigerator", "remote", "sandwich", "scissors", "sheep", "sink", "skateboard", "skis", "snowboard", "spoon"),
    *("sports ball", "stop sign", "suitcase", "surfboard", "teddy bear", "tennis racket", "tie", "toaster", "toilet"),
    *("toothbrush", "traffic light", "train", "truck", "tv", "umbrella", "vase", "wine glass", "zebra"),
)
# Images with at least one label.
COCO_OFFICIAL_SIZES = {"train2014": 82081, "val2014": 40137}


def load_coco(root: Path | str, split: str, classes: Sequence[str] = COCO_CLASSES) -> ImageSet:
    """Read "train2014" or "val2014" from root/annotations/instances_<split>.json and root/<split>/.

    Column k of the targets is classes[k], whatever order the file lists its categories in; a class that the file
    lacks has no positives. Images are ordered by their number; those without labels are dropped. Crowds (iscrowd)
    count as labels, as in the release, which takes the category of every annotation; among the boxes they are
    flagged difficult. Boxes are rounded outward to whole pixels inside the image. Raises DataError for a
    missing file, a category that is not among the classes, an annotation of an unknown category or image, or a box
    that is no box or lies outside its image; boxes without area and those that reach out are doubts. Images are checked
    by `prepare`.
    """
    root = Path(root)
    path = root / "annotations" / f"instances_{split}.json"
    coco = read_instances(path)
    problems = Problems(f"COCO2014 {split} ({path})")
    column = _column_of_category(coco, tuple(classes), problems)
    annotations = group_by_image(coco, problems)
    problems.raise_if_any()
    doubts = doubts_of_boxes(annotations, coco, problems)
    problems.raise_if_any()
    found = [annotation for group in annotations.values() for annotation in group]
    objects = Boxes.of(
        [round_outward(annotation["bbox"], coco.imgs[annotation["image_id"]]) for annotation in found],
        [column[annotation["category_id"]] for annotation in found],
        [bool(annotation.get("iscrowd", 0)) for annotation in found],
    )
    counts = torch.tensor([len(group) for group in annotations.values()])
    targets = torch.zeros((len(annotations), len(classes)), dtype=torch.int8)
    targets[torch.arange(len(annotations)).repeat_interleave(counts), objects.classes] = 1
    return ImageSet(
        name="COCO2014",
        split=split,
        classes=tuple(classes),
        ids=tuple(str(number) for number in annotations),
        paths=tuple(root / split / coco.imgs[number]["file_name"] for number in annotations),
        targets=targets,
        read_boxes=partial(_read_boxes, objects, counts.cumsum(0)),
        official_size=COCO_OFFICIAL_SIZES.get(split),
        annotation_files=(path,),
        doubts=tuple(f"{path}: {doubt}" for doubt in doubts),
    )


def read_instances(path: Path) -> Any:
    """The file as pycocotools' COCO, indexed and of the right shape; raises DataError where it is none."""
    if not path.is_file():
        raise DataError(
            f"{path}: no such annotation file. Expected annotations/{path.name} and the folder of the images "
            "beside annotations. Name the folder that holds both with --data-root or MCAR_DATA"
        )
    try:
        from pycocotools.coco import COCO
    except ImportError as error:
        raise DataError("COCO is read with the package pycocotools: pip install pycocotools") from error
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: not a COCO instances file ({error!r}); fetch it again") from error
    parts = ("images", "annotations", "categories")
    missing = [key for key in parts if not isinstance(content, dict) or not content.get(key)]
    if missing:
        raise DataError(f"{path}: no {', '.join(missing)} in this file, so it is not a COCO instances file")
    _check_shape(content, path, parts)
    coco = COCO()
    coco.dataset = content
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools reports its progress with print
        coco.createIndex()
    return coco


def _check_shape(content: Mapping[str, Any], path: Path, parts: Sequence[str]) -> None:
    """Raises DataError unless each part is a list of objects with the ids by which they refer to each other."""
    problems = Problems(f"{path}, a COCO instances file")
    for part in parts:
        keys = ("id", "image_id", "category_id") if part == "annotations" else ("id",)
        for index, item in enumerate(content[part] if isinstance(content[part], list) else [content[part]]):
            if not isinstance(item, dict):
                problems.add(f"{part}[{index}]: expected an object, found {str(item)[:60]}")
            elif wrong := [key for key in keys if not isinstance(item.get(key), int | str)]:
                values = ", ".join(f"{key} {str(item.get(key))[:60]}" for key in wrong)
                problems.add(f"{part}[{index}]: {', '.join(keys)} should be ids, found {values}")
    problems.raise_if_any()


def _column_of_category(coco: Any, classes: tuple[str, ...], problems: Problems) -> dict[int, int]:
    column = {}
    for number, category in coco.cats.items():
        if category.get("name") in classes:
            column[number] = classes.index(category["name"])
        else:
            problems.add(
                f"category {number}: {category.get('name')!r} is not among the {len(classes)} classes; fetch the "
                "published file again, or describe images of your own in a table"
            )
    return column


def group_by_image(coco: Any, problems: Problems) -> dict[int, list[dict[str, Any]]]:
    """The annotations of each image that has any, ordered by image; what is wrong with them or the images is added."""
    grouped: dict[int, list[dict[str, Any]]] = {}
    for annotation in coco.dataset["annotations"]:
        place = f"annotation {annotation.get('id')}"
        box = annotation.get("bbox")
        if annotation.get("category_id") not in coco.cats:
            problems.add(f"{place}: unknown category id {annotation.get('category_id')}")
        elif annotation.get("image_id") not in coco.imgs:
            problems.add(f"{place}: unknown image id {annotation.get('image_id')}")
        elif not isinstance(box, list) or len(box) != 4 or not all(map(_is_number, box)) or min(box[2:]) < 0:
            problems.add(f"{place}: bbox should be [x, y, width, height], found {str(box)[:100]}")
        else:
            grouped.setdefault(annotation["image_id"], []).append(annotation)
    for number, count in Counter(image["id"] for image in coco.dataset["images"]).items():
        if count > 1:
            problems.add(f"image {number}: listed {count} times")
        missing = [key for key in ("file_name", "width", "height") if key not in coco.imgs[number]]
        if missing:
            problems.add(f"image {number}: no {', '.join(missing)}")
            continue
        name, *size = (coco.imgs[number][key] for key in ("file_name", "width", "height"))
        if not isinstance(name, str) or not name or "\0" in name:
            problems.add(f"image {number}: file_name should be the name of a file, found {name!r}")
        if not all(_is_number(length) and length >= 1 and length == int(length) for length in size):
            problems.add(
                f"image {number}: width and height should be whole numbers of pixels, found {size[0]!r}, {size[1]!r}"
            )
    return dict(sorted(grouped.items(), key=lambda item: (isinstance(item[0], str), item[0])))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e9  # not so NaN


def doubts_of_boxes(annotations: Mapping[int, list[dict[str, Any]]], coco: Any, problems: Problems) -> list[str]:
    """Boxes outside their image are problems; those without area, reaching out or perhaps in fractions are doubts."""
    doubts, in_fractions = [], 0
    for number, group in annotations.items():
        width, height = coco.imgs[number]["width"], coco.imgs[number]["height"]
        for annotation in group:
            place, box = f"annotation {annotation['id']}: bbox {annotation['bbox']}", annotation["bbox"]
            x, y, w, h = box
            if w == 0 or h == 0:
                doubts.append(f"{place} has no area; it counts as a pixel")
                continue
            if (share := share_inside((x, y, x + w, y + h), width, height)) < 0.5:
                problems.add(f"{place} lies outside image {number}, which has {width} x {height} pixels")
            elif share < 1:
                doubts.append(f"{place} reaches out of image {number}, which has {width} x {height} pixels")
            if max(x + w, y + h) <= 1 < min(width, height):
                in_fractions += 1
                doubts.append(f"{place} lies in the first pixel of image {number}; are these fractions of its sides?")
    if in_fractions and in_fractions == sum(map(len, annotations.values())):
        problems.add("every bbox is in fractions of the image's sides; expected pixels")
    return doubts


def round_outward(bbox: list[float], image: Mapping[str, int]) -> tuple[int, int, int, int]:
    """The whole pixels that the box touches, at least one of them: COCO holds a few boxes without area."""
    x, y, w, h = bbox
    width, height = image["width"], image["height"]
    x1, y1 = min(max(math.floor(x), 0), width - 1), min(max(math.floor(y), 0), height - 1)
    return x1, y1, max(min(math.ceil(x + w), width), x1 + 1), max(min(math.ceil(y + h), height), y1 + 1)


def _read_boxes(objects: Boxes, ends: Tensor, index: int) -> Boxes:
    """Of all objects, one image after the other, those of the image at `index`, which end at ends[index]."""
    owned = slice(int(ends[index - 1]) if index else 0, int(ends[index]))
    return Boxes(objects.xyxy[owned], objects.classes[owned], objects.difficult[owned])
