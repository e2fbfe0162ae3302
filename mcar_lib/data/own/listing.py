"""What every format of own data is read into: photos with labels, objects and split, and what was taken for what."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mcar_lib.errors import DataError

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".heic", ".heif", ".avif"),
    *(".ppm", ".pgm"),
)
TRAIN, VAL, TEST = "train", "val", "test"
PARTS = (TRAIN, VAL, TEST)
SPELLINGS = {
    **dict.fromkeys(("train", "training", "trainval"), TRAIN),
    **dict.fromkeys(("val", "valid", "validation", "dev"), VAL),
    **dict.fromkeys(("test", "testing"), TEST),
}
"""What others call the three splits, in lower case -> our name."""


@dataclass(frozen=True)
class Object:
    """An annotated object: box x1 y1 x2 y2, half-open, in pixels of the stored photo, or in fractions of its sides."""

    name: str
    corners: tuple[float, float, float, float]
    difficult: bool = False
    in_fractions: bool = False


@dataclass(frozen=True)
class Listed:
    """One photo. id: what its owner calls it, the same wherever the data lies. labels: of the classes that it shows;
    difficult: of those of which it shows only objects that are hard to recognise. split: one of PARTS, "" where nobody
    has divided the photos. place: where it is listed, for messages."""

    id: str
    path: Path
    labels: tuple[str, ...]
    split: str = ""
    difficult: tuple[str, ...] = ()
    objects: tuple[Object, ...] = ()
    place: str = ""


@dataclass(frozen=True)
class Listing:
    """All photos of a data set, as its files list them. taken: what was taken for what, in a few words. classes: in
    the order of the targets. has_boxes: whether objects have boxes."""

    taken: str
    photos: tuple[Listed, ...]
    classes: tuple[str, ...]
    has_boxes: bool = False
    doubts: tuple[str, ...] = ()
    files: tuple[Path, ...] = field(default=(), repr=False)


def photos_in(folder: Path) -> list[Path]:
    """The image files in a folder and the folders in it, in order of their paths; what systems hide is none."""
    return [path for path in _files_in(folder) if path.suffix.lower() in IMAGE_SUFFIXES]


def has_photos(folder: Path) -> bool:
    """Whether a folder, or one in it, holds an image file; looks no further than the first."""
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in _files_in(folder))


def _files_in(folder: Path) -> Iterator[Path]:
    for path in visible(folder):
        if path.is_dir() and not path.is_symlink():  # a link may lead back here
            yield from _files_in(path)
        elif path.is_file():
            yield path


def visible(folder: Path) -> list[Path]:
    """What a folder holds, in order; not what systems hide or leave beside files (.DS_Store, ._name, __MACOSX)."""
    try:
        return sorted(path for path in folder.iterdir() if not path.name.startswith((".", "__")))
    except OSError as error:
        raise DataError(f"{folder}: cannot look into this folder ({error.strerror or error})") from error


def joined(names: Sequence[str], most: int = 8) -> str:
    """Names for a message: the first ones, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")
