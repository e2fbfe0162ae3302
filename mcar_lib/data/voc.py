"""Pascal VOC 2007 and 2012, and trees of that layout: labels from ImageSets/Main, boxes from the XML."""

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Literal
from xml.etree import ElementTree

import torch
from torch import Tensor

from mcar_lib.data.image_set import Boxes, ImageSet
from mcar_lib.data.preparation import Problems
from mcar_lib.errors import DataError

VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person"),
    *("pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
VOC_OFFICIAL_SIZES: Mapping[tuple[str, str], int] = {
    ("2007", "train"): 2501,
    ("2007", "val"): 2510,
    ("2007", "trainval"): 5011,
    ("2007", "test"): 4952,
    ("2012", "train"): 5717,
    ("2012", "val"): 5823,
    ("2012", "trainval"): 11540,
    ("2012", "test"): 10991,
}
# Label files say "only difficult instances" with 0.
TARGET_OF_LABEL = {"1": 1, "+1": 1, "-1": 0, "0": -1}


def load_voc(
    root: Path | str,
    year: str,
    split: str,
    name: str | None = None,
    classes: Sequence[str] = VOC_CLASSES,
    official_size: int | Literal["published"] | None = "published",
    labelled: bool = True,
) -> ImageSet:
    """Read one split ("train", "val", "trainval", "test") of a VOC tree, images in the order of <split>.txt.

    root holds VOCdevkit/VOC<year> or VOC<year>, or is that folder. `name` is "VOC<year>" unless given;
    `official_size` is None for scenes or own data, where nothing was published. With `labelled` False no label or
    XML file is read and targets are all 0: VOC2012 test, which is scored by the PASCAL server. Raises one DataError
    that lists everything wrong with the label files; images and XML files are checked by `prepare`.
    """
    name, classes = name or f"VOC{year}", tuple(classes)
    folder = find_voc_folder(Path(root), year)
    lists = folder / "ImageSets" / "Main"
    _require_lists(lists, split, year, labelled)
    problems = Problems(f"{name} {split}")
    ids = read_ids(lists / f"{split}.txt", problems)
    targets = torch.zeros((len(ids), len(classes)), dtype=torch.int8)
    if labelled:
        _fill_targets(targets, lists, split, classes, ids, problems)
    problems.raise_if_any()
    annotations: tuple[Path, ...] = ()
    if labelled and (folder / "Annotations").is_dir():
        annotations = tuple(folder / "Annotations" / f"{image_id}.xml" for image_id in ids)
    return ImageSet(
        name=name,
        split=split,
        classes=classes,
        ids=ids,
        paths=tuple(folder / "JPEGImages" / f"{image_id}.jpg" for image_id in ids),
        targets=targets,
        read_boxes=partial(_read_boxes, annotations, classes, targets) if annotations else None,
        official_size=VOC_OFFICIAL_SIZES.get((year, split)) if official_size == "published" else official_size,
        annotation_files=annotations,
        labelled=labelled,
    )


def find_voc_folder(root: Path, year: str) -> Path:
    """The folder with ImageSets/Main of that year, at or below root; raises DataError when there is none."""
    candidates = [root / "VOCdevkit" / f"VOC{year}", root / f"VOC{year}"]
    if root.name not in {f"VOC{other}" for other, _ in VOC_OFFICIAL_SIZES if other != year}:
        candidates.append(root)
    for folder in candidates:
        if (folder / "ImageSets" / "Main").is_dir():
            return folder
    raise DataError(
        f"{root}: no VOC{year} here. Expected {candidates[0]} with JPEGImages, Annotations and "
        "ImageSets/Main in it. Name the folder that holds VOCdevkit with --data-root or MCAR_DATA"
    )


def class_lists(lists: Path, split: str) -> list[Path]:
    """The label files of a split in ImageSets/Main; what other systems leave beside files (._name) is none."""
    return sorted(lists.glob(f"[!.]*_{split}.txt"))


def _require_lists(lists: Path, split: str, year: str, labelled: bool) -> None:
    if labelled and year == "2012" and split == "test" and not class_lists(lists, split):
        raise DataError(
            f"{lists}: VOC2012 test has no public labels (the PASCAL server holds them), so it cannot be "
            "scored here; use the split trainval, or VOC2007 test. mcar submit voc2012 writes what that server scores"
        )
    if not (lists / f"{split}.txt").is_file():
        there = ", ".join(sorted(path.stem for path in lists.glob("[!.]*.txt") if "_" not in path.stem))
        raise DataError(
            f"{lists / split}.txt: no such image list; lists in this folder: {there or 'none'}. Put it there, or fetch "
            "the data again"
        )


def read_ids(path: Path, problems: Problems) -> tuple[str, ...]:
    """The image ids of a list, one a line, each once."""
    ids: dict[str, int] = {}
    for number, fields in read_fields(path):
        if len(fields) != 1:
            problems.add(f"{path}:{number}: expected one image id, found {' '.join(fields)!r}")
        elif fields[0] in ids:
            problems.add(f"{path}:{number}: image {fields[0]} is already listed in line {ids[fields[0]]}")
        else:
            ids[fields[0]] = number
    if not ids:
        problems.add(f"{path}: the split has no images")
    return tuple(ids)


def _fill_targets(
    targets: Tensor, lists: Path, split: str, classes: tuple[str, ...], ids: tuple[str, ...], problems: Problems
) -> None:
    ending = f"_{split}.txt"
    for path in class_lists(lists, split):
        if path.name.removesuffix(ending) not in classes:
            problems.add(f"{path}: labels of a class that is not among the {len(classes)} classes")
    position = {image_id: row for row, image_id in enumerate(ids)}
    for column, name in enumerate(classes):
        path = lists / (name + ending)
        if not path.is_file():
            problems.add(f"{path}: the label file of class {name} is missing")
            continue
        for row, target in _read_labels(path, position, problems).items():
            targets[row, column] = target


def _read_labels(path: Path, position: dict[str, int], problems: Problems) -> dict[int, int]:
    labels: dict[int, int] = {}
    for number, fields in read_fields(path):
        if len(fields) != 2 or fields[1] not in TARGET_OF_LABEL:
            problems.add(f"{path}:{number}: expected '<image id> 1, 0 or -1', found {' '.join(fields)!r}")
            continue
        row = position.get(fields[0])
        if row is None:
            problems.add(f"{path}:{number}: image {fields[0]} is not in the split")
        elif row in labels:
            problems.add(f"{path}:{number}: image {fields[0]} is labelled twice")
        else:
            labels[row] = TARGET_OF_LABEL[fields[1]]
    missed = [image_id for image_id, row in position.items() if row not in labels]
    if missed:
        count = f"{len(missed):,} of {len(position):,}"
        problems.add(f"{path}: no label for {count} images, the first is {missed[0]}")
    return labels


def read_fields(path: Path) -> list[tuple[int, list[str]]]:
    """The fields of every line that is not blank, with its line number from 1."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: editors of other systems write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot read this label file as text in UTF-8 ({error})") from error
    if "\0" in text:
        raise DataError(f"{path}: cannot read this label file as text in UTF-8 (it holds a NUL)")
    return [(number, line.split()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]


def _read_boxes(annotations: tuple[Path, ...], classes: tuple[str, ...], targets: Tensor, index: int) -> Boxes:
    path = annotations[index]
    root = read_xml(path)
    # Direct children only: a person's <part> (head, hand, foot) has a name and a box as well.
    objects = root.findall("object")
    if deeper := sum(1 for _ in root.iter("object")) - len(objects):
        raise DataError(f"{path}: {deeper} objects stand in other tags; expected each directly in <{root.tag}>")
    names = [(item.findtext("name") or "").strip() for item in objects]
    for name in names:
        if name not in classes:
            raise DataError(f"{path}: object of the unknown class {name!r}")
    corners = [read_corners(item, path) for item in objects]
    difficult = [(item.findtext("difficult") or "0").strip() == "1" for item in objects]
    labels = {name: 1 for name, flag in zip(names, difficult, strict=True) if not flag}
    labels = dict.fromkeys(names, -1) | labels
    doubts = []
    for name, target in zip(classes, targets[index].tolist(), strict=True):
        found = labels.get(name, 0)
        if (found == 0) != (target == 0):
            here, there = ("an object", "none") if found else ("no object", "one")
            raise DataError(
                f"{path}: {here} of the class {name}, and the list of that class says that there is {there}"
            )
        if found != target:
            here, there = ("only difficult", "others too") if found < 0 else ("not only difficult", "only such")
            doubts.append(f"{path}: {here} objects of the class {name}, and the list of that class says {there}")
    return Boxes.of(corners, [classes.index(name) for name in names], difficult, doubts)


def read_xml(path: Path) -> ElementTree.Element:
    """The root of an XML file, also of one in an encoding that Python knows and expat does not (gb2312, shift_jis)."""
    try:
        content = path.read_bytes()
        declared = re.match(rb"""<\?xml[^>]*?encoding\s*=\s*["']([\w.:-]+)["']""", content)
        try:
            return ElementTree.fromstring(content)
        except (ValueError, LookupError):
            if declared is None:
                raise
            return ElementTree.fromstring(content.decode(declared[1].decode()))
    except Exception as error:  # expat and the codecs raise almost anything for a broken file
        raise DataError(
            f"{path}: cannot read the annotation ({error}); put it there, or fetch the data again"
        ) from error


def read_corners(item: ElementTree.Element, path: Path) -> tuple[int, int, int, int]:
    """VOC counts pixels from 1 and includes the last; the few fractions in VOC2012 are rounded outward."""
    keys = ("xmin", "ymin", "xmax", "ymax")
    try:
        x1, y1, x2, y2 = (float(item.findtext(f"bndbox/{key}", "")) for key in keys)
        corners = (max(math.floor(x1) - 1, 0), max(math.floor(y1) - 1, 0), math.ceil(x2), math.ceil(y2))
    except (ValueError, OverflowError) as error:
        raise DataError(f"{path}: an object has no complete bndbox ({error})") from error
    if corners[0] >= corners[2] or corners[1] >= corners[3]:
        raise DataError(f"{path}: an object has an empty box: {x1:g} to {x2:g} by {y1:g} to {y2:g}")
    if max(x2, y2) <= 1 and min(x1, y1) < 1:
        raise DataError(
            f"{path}: the box {x1:g} to {x2:g} by {y1:g} to {y2:g} is in fractions of the photo; expected pixels from 1"
        )
    return corners
