"""YOLO data sets: a data.yaml with the names, images beside labels; a photo shows the classes of its boxes."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mcar_lib.data.own.listing import PARTS, SPELLINGS, TEST, TRAIN, VAL, Listed, Listing, Object, joined
from mcar_lib.data.photo_files import photos_in, visible
from mcar_lib.data.preparation import Problems
from mcar_lib.data.table import normalized
from mcar_lib.errors import DataError

KEYS = {"train": TRAIN, "val": VAL, "valid": VAL, "test": TEST}


def find_description(root: Path) -> Path | None:
    """The .yaml with the names of the classes that a path stands for, or classes.txt beside images and
    labels; None where there is none."""
    if root.is_file():
        return root if root.suffix.lower() in (".yaml", ".yml") else None
    described = [path for path in visible(root) if path.suffix.lower() in (".yaml", ".yml")]
    if found := next((path for path in described if "names" in _values(path)), None):
        return found
    lists = [root / name for name in ("classes.txt", "labels/classes.txt")]
    has_both = (root / "images").is_dir() and (root / "labels").is_dir()
    return next((path for path in lists if has_both and path.is_file()), None)


def list_yolo(root: Path) -> Listing:
    """The photos of a YOLO data set. A photo without a label file, or with an empty one, shows none of the classes.

    Raises one DataError that lists the wrong lines of label files.
    """
    described = find_description(root)
    assert described is not None  # recognised by it
    names, parts = _described(described)
    problems = Problems(str(described))
    photos = []
    for split, folder in parts:
        for path in _photos_of(folder, described, problems):
            objects = tuple(_objects(_label_file(path), names, problems))
            labels = tuple(dict.fromkeys(each.name for each in objects))
            name = path.relative_to(described.parent) if path.is_relative_to(described.parent) else path
            photos.append(Listed(name.as_posix(), path, labels, split, objects=objects, place=str(_label_file(path))))
    problems.raise_if_any()
    if not photos:
        raise DataError(
            f"{described}: no photos where it says that they are ({joined([str(each) for _, each in parts])})"
        )
    taken = f"YOLO ({described.name}), names {joined(names)}"
    files = (described, *(path for photo in photos if (path := _label_file(photo.path)).is_file()))
    return Listing(taken, tuple(photos), names, True, files=files)


def _values(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{path}: cannot read this file as YAML ({str(error).splitlines()[0]})") from error
    return content if isinstance(content, dict) else {}


def _described(path: Path) -> tuple[tuple[str, ...], list[tuple[str, Path]]]:
    """The names of the classes, and the folders or lists of photos with their splits."""
    if path.suffix == ".txt":
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        top = path.parent.parent if path.parent.name == "labels" else path.parent
        splits = [(SPELLINGS[each.name], each) for each in visible(top / "images") if each.name in SPELLINGS]
        return tuple(map(normalized, names)), splits or [("", top / "images")]
    values = _values(path)
    names = values.get("names") or []
    if isinstance(names, dict) and all(str(key).isdecimal() for key in names):
        by_number = {int(key): name for key, name in names.items()}
        names = [by_number.get(number, str(number)) for number in range(max(by_number, default=-1) + 1)]
    if not isinstance(names, list) or not names or not all(isinstance(name, str | int) for name in names):
        raise DataError(f"{path}: names should list the classes, found {str(names)[:100]!r}")
    given = [(KEYS[key], value) for key, value in values.items() if key in KEYS and value]
    parts = [
        (split, _place(str(each), values.get("path"), path))
        for split, value in given
        for each in (value if isinstance(value, list) else [value])
    ]
    classes = tuple(normalized(str(name)) for name in names)
    if len(set(classes)) != len(classes):
        raise DataError(f"{path}: names lists one class twice; give each a name of its own")
    return classes, sorted(parts, key=lambda part: PARTS.index(part[0])) or [("", path.parent / "images")]


def _place(text: str, top: object, path: Path) -> Path:
    """A folder or list of data.yaml: below its `path`, or else below the folder that the file lies in now."""
    below = Path(text.replace("\\", "/"))
    places = [Path(str(top or ".")).expanduser() / below, path.parent / str(top or ".") / below, path.parent / below]
    places += [path.parent / re.sub(r"^(\.\./)+", "", below.as_posix())]  # exports say ../train for train beside it
    return next((place for place in places[0 if top else 1 :] if place.exists()), places[2])


def _photos_of(place: Path, described: Path, problems: Problems) -> list[Path]:
    if place.is_dir():
        return photos_in(place)
    if not place.is_file():
        problems.add(f"{place}: no such folder or list of photos")
        return []
    lines = [line.strip() for line in place.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    beside = [(described.parent / line, place.parent / line) for line in lines]
    return [first if first.is_file() else second for first, second in beside]


def _label_file(photo: Path) -> Path:
    """The last folder images of the path is labels there; a file beside the photo where there is no such folder."""
    parts = list(photo.parent.parts)
    places = [number for number, part in enumerate(parts) if part == "images"]
    if places:
        parts[places[-1]] = "labels"
    return Path(*parts) / f"{photo.stem}.txt"


def _objects(path: Path, names: tuple[str, ...], problems: Problems) -> Iterator[Object]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        problems.add(f"{path}: cannot read this label file ({error})")
        return
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            kind, *places = map(float, line.split())
            corners = _corners(places)
        except ValueError:
            problems.add(f"{path}:{number}: expected a class and the middle and sides of its box, found {line[:60]!r}")
            continue
        if kind != int(kind) or not 0 <= kind < len(names):
            problems.add(f"{path}:{number}: class {kind:g} is none of the {len(names)} names, which count from 0")
        elif min(corners) < -0.01 or max(corners) > 1.01 or corners[0] >= corners[2] or corners[1] >= corners[3]:
            problems.add(f"{path}:{number}: expected a box in fractions of the photo's sides, found {line[:60]!r}")
        else:
            yield Object(names[int(kind)], corners, in_fractions=True)


def _corners(places: list[float]) -> tuple[float, float, float, float]:
    """x y width height of the middle of a box, or the points of an outline; raises ValueError for anything else."""
    if len(places) in (4, 5):  # a fifth is a score
        x, y, width, height = places[:4]
        return x - width / 2, y - height / 2, x + width / 2, y + height / 2
    if len(places) < 6 or len(places) % 2:
        raise ValueError(places)
    return min(places[::2]), min(places[1::2]), max(places[::2]), max(places[1::2])
