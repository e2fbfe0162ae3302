"""What every format of own data is read into: photos with labels, objects and split, and what was taken for what."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

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


def joined(names: Sequence[str], most: int = 8) -> str:
    """Names for a message: the first ones, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest:,} more" if rest > 0 else "")
