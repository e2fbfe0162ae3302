"""Own data as COCO instances files, with any categories: one file, or one a split, as annotation tools export it."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mcar_lib.data.coco import doubts_of_boxes, group_by_image, read_instances, round_outward
from mcar_lib.data.own.listing import SPELLINGS, Listed, Listing, Object, joined
from mcar_lib.data.photo_files import visible
from mcar_lib.data.preparation import Problems
from mcar_lib.data.table import normalized

NO_INSTANCES = ("captions_", "image_info_", "panoptic_", "person_keypoints_", "stuff_")  # other files of COCO
KEYS = ("images", "annotations", "categories")


def find_instances(root: Path) -> dict[Path, str]:
    """The COCO files that a path stands for, with the split that the name of each, or of its folder, says: the file
    itself, or those in root, its folder annotations, and its folders of splits. Empty where there is none."""
    if root.is_file():
        return {root: ""} if root.suffix.lower() == ".json" else {}
    folders = [root, *(path for path in visible(root) if path.is_dir() and _is_place(path.name))]
    files = [path for folder in folders for path in visible(folder) if path.suffix.lower() == ".json"]
    named = [path for path in files if path.name.startswith("instances_")]
    chosen = named or [path for path in files if not path.name.startswith(NO_INSTANCES) and _is_instances(path)]
    if len(chosen) == 1:  # nobody has divided the photos, whatever the file is called
        return {chosen[0]: ""}
    return {path: _split_of(path.stem) or _split_of(path.relative_to(root).parent.name) for path in chosen}


def list_instances(root: Path, options: Mapping[str, object]) -> Listing:
    """The photos of the COCO files below root. options: image_root.

    Images without an annotation show none of the classes; crowds count as labels and as difficult boxes. Raises
    DataError as load_coco does.
    """
    files = find_instances(root)
    photos, classes, doubts = list[Listed](), set[str](), list[str]()
    for path, split in files.items():
        coco = read_instances(path)
        problems = Problems(str(path))
        annotations = group_by_image(coco, problems)
        names = {number: normalized(str(category.get("name", number))) for number, category in coco.cats.items()}
        problems.raise_if_any()
        doubts += [f"{path}: {doubt}" for doubt in doubts_of_boxes(annotations, coco, problems)]
        problems.raise_if_any()
        classes |= set(names.values())
        folder = _folder(path, root, coco, options)
        for image in sorted(coco.dataset["images"], key=lambda image: str(image["file_name"])):
            found = annotations.get(image["id"], [])
            objects = tuple(_object(annotation, names, image) for annotation in found)
            labels = tuple(dict.fromkeys(each.name for each in objects))
            name = image["file_name"]
            place = f"image {image['id']} of {path.name}"
            photos.append(Listed(_id_of(name, split), folder / name, labels, split, objects=objects, place=place))
    taken = f"COCO annotations ({', '.join(path.name for path in files)}), categories {joined(sorted(classes))}"
    return Listing(taken, tuple(photos), tuple(sorted(classes)), True, tuple(doubts), tuple(files))


def _id_of(name: str, split: str) -> str:
    """Two files may each have an image 1.jpg."""
    return f"{split}/{name}" if split else name


def _object(annotation: Mapping[str, Any], names: Mapping[int, str], image: Mapping[str, int]) -> Object:
    corners = round_outward(annotation["bbox"], image)
    return Object(names[annotation["category_id"]], corners, bool(annotation.get("iscrowd", 0)))


def _is_place(name: str) -> bool:
    return name.lower() == "annotations" or bool(_split_of(name))


def _split_of(name: str) -> str:
    """ "instances_val2017" -> "val"; "" where a name says none."""
    words = re.split(r"[^a-z]+", name.lower())
    return next((SPELLINGS[word] for word in words if word in SPELLINGS), "")


def _is_instances(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in KEYS)


def _folder(path: Path, root: Path, coco: Any, options: Mapping[str, object]) -> Path:
    """Where the photos of a file are: the folder that was named, or the first of the usual ones with one of them."""
    if asked := options.get("image_root"):
        return Path(str(asked)).expanduser()
    top = root if root.is_dir() else path.parent
    tops = dict.fromkeys([path.parent, top, path.parent.parent])
    part = path.stem.removeprefix("instances_")
    inner = ("", "images", part, f"images/{part}", "data", "JPEGImages", _split_of(path.stem))
    places = [above / name for above in tops for name in inner]
    names = [image["file_name"] for image in coco.dataset["images"][:20]]
    return next((place for place in places if any((place / name).is_file() for name in names)), path.parent)
