"""Photos on disk: which files of a folder are some, and where a picture made of one goes."""

import itertools
from collections.abc import Sequence
from pathlib import Path

from mcar_lib.errors import DataError
from mcar_lib.files import user_path

ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".heic", ".heif", ".avif", ".jxl"),  # some of them are read here, others said to be what they are
)
MADE_HERE = ".mcar"  # before the ending of a picture that was made of a photo


def photos_in(folder: Path) -> list[Path]:
    """The files in a folder and below it whose name ends as a photo's does, in order; not hidden ones, such as those
    that a Mac leaves beside each photo, and not pictures that were made here. Raises DataError if there are none."""
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in ENDINGS and not path.name.startswith(".") and not path.stem.endswith(MADE_HERE)
    )
    if not found:
        raise DataError(f"{folder}: no photos in this folder; their names should end in {', '.join(ENDINGS)}")
    return found


def find_photos(places: Sequence[str | Path]) -> list[Path]:
    """Files, as they are named, and the photos of folders; none twice. Raises DataError for a folder without any."""
    found: dict[Path, None] = {}
    for place in map(user_path, places):
        found |= dict.fromkeys(photos_in(place) if place.is_dir() else [place])
    return list(found)


def picture_paths(photos: Sequence[Path], folder: Path) -> list[Path]:
    """A name of its own in a folder for the picture of each photo: IMG_1.mcar.jpg, and IMG_1-2.mcar.jpg for the second
    photo of that name. No photo is called so."""
    paths: dict[Path, None] = {}
    for photo in photos:
        numbers = itertools.chain([""], (f"-{number}" for number in itertools.count(2)))
        names = (f"{photo.stem}{number}{MADE_HERE}.jpg" for number in numbers)
        paths[next(folder / name for name in names if folder / name not in paths)] = None
    return list(paths)
