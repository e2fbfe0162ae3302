"""Trees as VOC has them, with any classes: Annotations/*.xml, or lists in ImageSets/Main, and JPEGImages."""

from collections.abc import Mapping
from pathlib import Path
from xml.etree import ElementTree

from mcar_lib.data.own.listing import SPELLINGS, TEST, TRAIN, VAL, Listed, Listing, Object, joined
from mcar_lib.data.photo_files import ENDINGS, visible
from mcar_lib.data.preparation import Problems
from mcar_lib.data.table import normalized
from mcar_lib.data.voc import TARGET_OF_LABEL, class_lists, read_corners, read_fields, read_ids, read_xml
from mcar_lib.errors import DataError

LISTS = {"train": TRAIN, "val": VAL, "test": TEST}


def find_tree(root: Path) -> Path | None:
    """The folder with Annotations or ImageSets/Main at root, or in VOCdevkit/VOC<year> there; None without one.

    Raises DataError where there are several.
    """
    if not root.is_dir():
        return None
    below = [each for top in (root, root / "VOCdevkit") for each in sorted(top.glob("VOC*")) if _is_tree(each)]
    found = [root] if _is_tree(root) else below
    if len(found) > 1:
        raise DataError(
            f"{root}: several VOC trees ({joined([each.name for each in found])}); name the one that is meant"
        )
    return found[0] if found else None


def list_tree(root: Path) -> Listing:
    """The photos of the tree at root: labels and boxes from the XML files where there are any, else labels from the
    lists of the classes. Raises one DataError that lists what is wrong in these files."""
    folder = find_tree(root)
    assert folder is not None  # recognised by it
    problems = Problems(str(folder))
    splits = _splits(folder, problems)
    has_boxes = (folder / "Annotations").is_dir()
    listed = _from_xml if has_boxes else _from_lists
    photos = listed(folder, splits, problems)
    problems.raise_if_any()
    classes = tuple(sorted({label for photo in photos for label in (*photo.labels, *photo.difficult)}))
    taken = (
        f"a VOC tree ({folder.name}), labels from {'Annotations' if has_boxes else 'ImageSets/Main'}: {joined(classes)}"
    )
    files = tuple(folder / "Annotations" / f"{name}.xml" for name in splits) if has_boxes else ()
    return Listing(taken, photos, classes, has_boxes, files=files)


def _is_tree(folder: Path) -> bool:
    if (folder / "ImageSets" / "Main").is_dir():
        return True
    annotations = folder / "Annotations"
    return annotations.is_dir() and any(path.suffix.lower() == ".xml" for path in visible(annotations))


def _splits(folder: Path, problems: Problems) -> dict[str, str]:
    """Photo -> its split, by the lists; trainval counts where there is no train. Without lists every XML file."""
    lists = folder / "ImageSets" / "Main"
    there = {name: lists / f"{name}.txt" for name in (*LISTS, "trainval") if (lists / f"{name}.txt").is_file()}
    if not there:
        return {path.stem: "" for path in visible(folder / "Annotations") if path.suffix.lower() == ".xml"}
    if "train" in there:
        there.pop("trainval", None)
    splits: dict[str, str] = {}
    for name, path in there.items():
        for image_id in read_ids(path, problems):
            if image_id in splits:
                problems.add(f"{path}: image {image_id} is in the list {splits[image_id]} too")
            splits.setdefault(image_id, SPELLINGS[name])
    return splits


def _from_xml(folder: Path, splits: Mapping[str, str], problems: Problems) -> tuple[Listed, ...]:
    photos = []
    for image_id, split in splits.items():
        path = folder / "Annotations" / f"{image_id}.xml"
        try:
            root = read_xml(path)
            objects = tuple(_object(item, path) for item in root.findall("object"))
        except DataError as error:
            problems.add(str(error))
            continue
        labels = tuple(dict.fromkeys(each.name for each in objects if not each.difficult))
        difficult = tuple(dict.fromkeys(each.name for each in objects if each.name not in labels))
        photo = _photo(folder, image_id, root.findtext("filename"))
        photos.append(Listed(image_id, photo, labels, split, difficult, objects, place=str(path)))
    return tuple(photos)


def _object(item: ElementTree.Element, path: Path) -> Object:
    name = normalized(item.findtext("name") or "")
    if not name:
        raise DataError(f"{path}: an object has no name")
    return Object(name, read_corners(item, path), (item.findtext("difficult") or "0").strip() == "1")


def _from_lists(folder: Path, splits: Mapping[str, str], problems: Problems) -> tuple[Listed, ...]:
    """Labels by the files <class>_<split>.txt of ImageSets/Main."""
    lists = folder / "ImageSets" / "Main"
    labels: dict[str, list[str]] = {image_id: [] for image_id in splits}
    difficult: dict[str, list[str]] = {image_id: [] for image_id in splits}
    for split in (*LISTS, "trainval"):
        for path in class_lists(lists, split):
            name = normalized(path.name.removesuffix(f"_{split}.txt"))
            for number, fields in read_fields(path):
                if len(fields) != 2 or fields[1] not in TARGET_OF_LABEL:
                    problems.add(f"{path}:{number}: expected '<image id> 1, 0 or -1', found {' '.join(fields)!r}")
                elif fields[0] in labels:
                    target = TARGET_OF_LABEL[fields[1]]
                    kept = {1: labels, -1: difficult}.get(target, {}).get(fields[0], [])
                    kept += [] if name in kept else [name]
    return tuple(
        Listed(each, _photo(folder, each), tuple(labels[each]), split, tuple(difficult[each]), place=str(lists))
        for each, split in splits.items()
    )


def _photo(folder: Path, image_id: str, named: str | None = None) -> Path:
    """The image file of that name, of any kind; JPEGImages/<id>.jpg where there is none, which the check then tells."""
    photos = folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else folder / "images"
    usual = photos / f"{image_id}.jpg"
    if usual.is_file():
        return usual
    names = [f"{image_id}{suffix}" for suffix in ENDINGS] + ([Path(named).name] if named else [])
    return next((photos / name for name in names if (photos / name).is_file()), usual)
