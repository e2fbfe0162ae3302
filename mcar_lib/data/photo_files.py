"""Photos on disk: which files of a folder are some, and where a picture made of one goes."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from mcar_lib.errors import DataError
from mcar_lib.files import user_path

ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm"),
    *(".heic", ".heif", ".avif", ".jxl"),  # some of them are read here, others said to be what they are
)
MADE_HERE = ".mcar"  # before the ending of a picture that was made of a photo


def photos_in(folder: Path) -> list[Path]:
    """The image files in a folder and the folders in it, in order of their paths; no picture that was made here."""
    return list(_photos(folder))


def has_photos(folder: Path) -> bool:
    """Whether a folder, or one in it, holds an image file; looks no further than the first."""
    return any(True for _ in _photos(folder))


def _photos(folder: Path) -> Iterator[Path]:
    for path in visible(folder):
        if path.is_dir() and not path.is_symlink():  # a link may lead back here
            yield from _photos(path)
        elif path.suffix.lower() in ENDINGS and not path.stem.endswith(MADE_HERE) and path.is_file():
            yield path


def visible(folder: Path) -> list[Path]:
    """What a folder holds, in order; not what systems hide or leave beside files (.DS_Store, ._name, __MACOSX)."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__")))
    except OSError as error:
        raise DataError(f"{folder}: cannot look into this folder ({error.strerror or error})") from error


def find_photos(places: Sequence[str | Path]) -> list[Path]:
    """Files, as they are named, and the photos of folders; none twice. Raises DataError for a folder without any."""
    found: dict[Path, None] = {}
    for place in map(user_path, places):
        photos = photos_in(place) if place.is_dir() else [place]
        if not photos:
            raise DataError(f"{place}: no photos in this folder; their names should end in {', '.join(ENDINGS)}")
        found |= dict.fromkeys(photos)
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
