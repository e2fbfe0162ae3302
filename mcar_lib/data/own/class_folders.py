"""A folder for each class, as ImageFolder has it; a photo that lies in several of them has all their labels."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from mcar_lib.data.image_set import read_content
from mcar_lib.data.own.listing import SPELLINGS, Listed, Listing, joined
from mcar_lib.data.photo_files import has_photos, photos_in, visible
from mcar_lib.data.table import normalized
from mcar_lib.errors import DataError


def class_folders(root: Path) -> dict[Path, str]:
    """The folders of classes with the split that each is in: those directly in root, or in train, val and test there.
    Empty where root has no folder with photos."""
    if not root.is_dir():
        return {}
    folders = [path for path in visible(root) if path.is_dir()]
    splits = {path: SPELLINGS[path.name.lower()] for path in folders if path.name.lower() in SPELLINGS}
    if splits and any(each.is_dir() for path in splits for each in visible(path)):
        return {each: split for path, split in splits.items() for each in visible(path) if each.is_dir()}
    return dict.fromkeys((path for path in folders if has_photos(path)), "")


def list_class_folders(root: Path) -> Listing:
    """The photos of the class folders below root, each once. Raises DataError for photos that lie in no class."""
    photos, empty = list[Listed](), list[str]()
    for folder, split in class_folders(root).items():
        found = photos_in(folder)
        empty += [] if found else [str(folder.relative_to(root))]
        label = normalized(folder.name)
        photos += [
            Listed(path.relative_to(root).as_posix(), path, (label,), split, place=str(folder)) for path in found
        ]
    if not photos:
        raise DataError(f"{root}: no photos in any folder of a class")
    listed, merged = _each_once(photos)
    doubts = [f"{root}: no photos in {joined(empty)}, which is no class here"] if empty else []
    several = f"; {merged:,} files are the same photo as another, whose labels are joined" if merged else ""
    classes = tuple(sorted({label for photo in listed for label in photo.labels}))
    return Listing(f"folders, one a class: {joined(classes)}{several}", listed, classes, doubts=tuple(doubts))


def _each_once(photos: Sequence[Listed]) -> tuple[tuple[Listed, ...], int]:
    """Photos of one split that are the same byte for byte become the first of them with the labels of all."""
    groups: dict[tuple[str, str], list[Listed]] = defaultdict(list)
    for photo, content in zip(photos, contents(photo.path for photo in photos), strict=True):
        groups[photo.split, content].append(photo)
    joined_photos = (
        replace(same[0], labels=tuple(sorted({label for photo in same for label in photo.labels})))
        for same in groups.values()
    )
    return tuple(joined_photos), len(photos) - len(groups)


def contents(paths: Iterable[Path]) -> list[str]:
    """For each file a text that only files of the same bytes share. Only files of equal sizes are read; one that is
    not there is like no other."""
    paths = list(paths)
    sizes = [path.stat().st_size if path.is_file() else None for path in paths]
    shared = {size for size, count in Counter(sizes).items() if size is not None and count > 1}
    return [
        hashlib.sha256(read_content(path)).hexdigest() if size in shared else f"{size} {path}"
        for path, size in zip(paths, sizes, strict=True)
    ]
