"""Check a data set before a long run: every image and box, one report of problems, one of doubts, one fingerprint."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from mcar_lib.data.image_set import ImageSet, decode_image, is_blank, read_content, read_in_threads
from mcar_lib.errors import DataError, ResultsError
from mcar_lib.files import content_id, read_json, write_json

SHOWN_PROBLEMS = 10


class Problems:
    """Collects what is wrong with a data set, so that the reader can mend all of it in one go."""

    def __init__(self, subject: str) -> None:
        self.subject = subject
        self.found: list[str] = []

    def add(self, problem: str) -> None:
        self.found.append(problem)

    def raise_if_any(self) -> None:
        """Raise one DataError with the first 10 problems and their total number."""
        if self.found:
            headline = f"{self.subject}: {counted(self.found, 'problem')} found; mend the files and run again"
            raise DataError("\n".join([headline, *first_of(self.found)]))


def counted(found: Sequence[object], what: str) -> str:
    """ "1 problem", "1,200 problems"."""
    return f"{len(found):,} {what}{'' if len(found) == 1 else 's'}"


def first_of(found: Sequence[str]) -> Iterator[str]:
    """Indented lines: the first 10, and how many more there are."""
    yield from (f"  {line}" for line in found[:SHOWN_PROBLEMS])
    if len(found) > SHOWN_PROBLEMS:
        yield f"  ... and {len(found) - SHOWN_PROBLEMS:,} more"


@dataclass(frozen=True)
class Checked:
    """What the check of a split found.

    fingerprint: see `prepare`. doubts: what is odd and may yet be meant so, with the file and the place in it.
    contents: for each image a hash of its bytes.
    """

    fingerprint: str
    doubts: tuple[str, ...]
    contents: tuple[str, ...]


def prepare(
    image_set: ImageSet, cache_dir: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> str:
    """Check a split as `check_images` does and return the fingerprint of what was read.

    The fingerprint is 16 hex characters over name, split, classes, ids, targets, upright and the bytes of every image;
    the place and the dates of the files do not enter it.
    """
    return check_images(image_set, cache_dir, progress).fingerprint


def check_images(
    image_set: ImageSet, cache_dir: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> Checked:
    """Decode every listed image, read every box file, and tell what is odd; what is wrong is an error.

    Raises one DataError that lists missing, broken and repeated images, an empty split, unreadable boxes and boxes that
    lie outside their photo. A passed check leaves a stamp in `cache_dir`; while sizes and modification times stay the
    same, the next call takes everything from there and decodes nothing.
    `progress` is called with (images done, images in all).
    """
    stamp = None if cache_dir is None else Path(cache_dir) / f"checked-{_listing_digest(image_set)}.json"
    told = (*image_set.doubts, *_unseen_classes(image_set))
    known = None if stamp is None else _read_stamp(stamp, image_set)
    if known is not None:
        return replace(known, doubts=told + known.doubts)
    problems, doubts, contents = Problems(image_set.title), [], []
    if len(image_set) == 0:
        problems.add("the split has no images")
    for path, count in Counter(image_set.paths).items():
        if count > 1:
            problems.add(f"{path}: listed {count} times")
    digest = _labels_digest(image_set)
    for content_digest, wrong, odd in read_in_threads(partial(_check_one, image_set), len(image_set), progress):
        digest.update(content_digest)
        contents.append(content_digest.hex()[:16])
        problems.found += wrong
        doubts += odd
    problems.raise_if_any()
    checked = Checked(digest.hexdigest()[:16], tuple(doubts), tuple(contents))
    if stamp is not None:
        content = {"place": _place(image_set), **asdict(checked)}
        with suppress(ResultsError):  # the stamp only saves time: a cache folder that cannot be written is no error
            write_json(stamp, {"checked": content, "sum": content_id(content)})
    return replace(checked, doubts=told + checked.doubts)


def unreadable(image_set: ImageSet, progress: Callable[[int, int], None] | None = None) -> dict[str, str]:
    """The ids of the images that are missing or cannot be decoded, each with the reason, which names the file."""

    def read(index: int) -> str:
        try:
            image_set.image(index)
        except (DataError, ValueError) as error:  # ValueError: what the system raises for a NUL in a name
            return str(error)
        return ""

    reasons = zip(image_set.ids, read_in_threads(read, len(image_set), progress), strict=True)
    return {image_id: reason for image_id, reason in reasons if reason}


def doubts_together(splits: Sequence[tuple[ImageSet, Checked]]) -> tuple[str, ...]:
    """The doubts of the splits of one data set, each once, and the photos that two of the splits share by content."""
    doubts = [doubt for _, checked in splits for doubt in checked.doubts]
    seen: dict[str, tuple[ImageSet, Path]] = {}
    for images, checked in splits:
        for path, content in zip(images.paths, checked.contents, strict=True):
            other, first = seen.setdefault(content, (images, path))
            if other is not images:
                doubts.append(f"{path}: the same photo is in the split {other.split}: {first}")
    return tuple(dict.fromkeys(doubts))


def without_positives(image_set: ImageSet) -> list[str]:
    """The classes that no image of a labelled split shows, so that their AP is not a number."""
    shown = (image_set.targets == 1).any(dim=0).tolist()
    return [name for name, any_image in zip(image_set.classes, shown, strict=True) if not any_image]


def share_inside(box: Sequence[float], width: int, height: int) -> float:
    """The share of a box x1 y1 x2 y2 that lies in a photo of width x height pixels, up to a pixel's overhang."""
    x1, y1, x2, y2 = box
    if -1 <= x1 < width and -1 <= y1 < height and 0 < x2 <= width + 1 and 0 < y2 <= height + 1:
        return 1.0
    area = (x2 - x1) * (y2 - y1)
    inside = max(min(x2, width) - max(x1, 0), 0) * max(min(y2, height) - max(y1, 0), 0)
    return inside / area if area > 0 else 0.0


def _read_stamp(path: Path, image_set: ImageSet) -> Checked | None:
    """What a former check left, or None: nothing there, of another form, damaged, or with doubts elsewhere."""
    with suppress(ResultsError, LookupError, TypeError):
        stamp = read_json(path)
        content = stamp["checked"]
        if stamp["sum"] == content_id(content) and (not content["doubts"] or content["place"] == _place(image_set)):
            return Checked(content["fingerprint"], tuple(content["doubts"]), tuple(content["contents"]))
    return None


def _place(image_set: ImageSet) -> str:
    """Where the photos are, which the name of a stamp does not say."""
    return str(image_set.paths[0].absolute()) if len(image_set) else ""


def _unseen_classes(image_set: ImageSet) -> list[str]:
    names = without_positives(image_set) if image_set.labelled and len(image_set) else []
    if not names:
        return []
    rest = len(image_set.classes) - len(names)
    means = f"mAP is over the {rest} others" if rest else "every mAP is not a number"
    return [f"{image_set.title}: no image shows {', '.join(names)}; where this split is scored, {means}"]


def _check_one(image_set: ImageSet, index: int) -> tuple[bytes, list[str], list[str]]:
    """The hash of an image's bytes, what is wrong with it, and what is odd."""
    path = image_set.paths[index]
    wrong: list[str] = []
    odd: list[str] = []
    content, size = b"", None
    try:
        content = read_content(path)
        pixels = decode_image(content, path, image_set.upright)
        size = int(pixels.shape[2]), int(pixels.shape[1])
        if is_blank(pixels[:, ::16, ::16]) and is_blank(pixels):  # few pixels first: all take a third of a decode
            odd.append(f"{path}: the photo is of one colour")
    except DataError as error:
        wrong.append(str(error))
    except ValueError as error:  # what the system raises for a NUL in a name
        wrong.append(f"{str(path)!r}: no file can have this name ({error})")
    if image_set.has_boxes:
        try:
            boxes = image_set.boxes(index)
        except DataError as error:
            return hashlib.sha256(content).digest(), [*wrong, str(error)], odd
        odd += boxes.doubts
        for box, number in zip(boxes.xyxy.tolist(), boxes.classes.tolist(), strict=True):
            place = f"{path}: the box {box} of class {image_set.classes[number]}"
            if size is None or (share := share_inside(box, *size)) == 1:
                continue
            if share < 0.5:
                wrong.append(f"{place} lies outside the photo, which has {size[0]} x {size[1]} pixels; was it resized?")
            else:
                odd.append(f"{place} reaches out of the photo, which has {size[0]} x {size[1]} pixels")
    return hashlib.sha256(content).digest(), wrong, odd


def _labels_digest(image_set: ImageSet) -> "hashlib._Hash":
    described: list[object] = [image_set.name, image_set.split, image_set.classes, image_set.ids]
    described += ["upright"] if image_set.upright else []  # the same bytes are then other pixels
    digest = hashlib.sha256(json.dumps(described).encode())
    digest.update(image_set.targets.contiguous().numpy().tobytes())
    return digest


def _listing_digest(image_set: ImageSet) -> str:
    """Of all that a check depends on: labels, and the size and date of every file."""
    files = [path.absolute() for path in (*image_set.paths, *image_set.annotation_files)]
    top = os.path.commonpath([path.parent for path in files]) if files else ""
    digest = _labels_digest(image_set)
    for path in files:
        try:
            status = path.stat()
            state = [status.st_size, status.st_mtime_ns]
        except (OSError, ValueError):
            state = []
        digest.update(json.dumps([os.path.relpath(path, top), *state]).encode())
    return digest.hexdigest()[:32]
