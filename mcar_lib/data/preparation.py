"""Check a data set before a long run: every image, every box, one report of problems, one fingerprint."""

import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mcar_lib.data.image_set import ImageSet, decode_image, read_content
from mcar_lib.errors import DataError

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
        if not self.found:
            return
        count = len(self.found)
        plural = "s" if count > 1 else ""
        lines = [f"{self.subject}: {count:,} problem{plural} found; mend the files and run again"]
        lines += [f"  {problem}" for problem in self.found[:SHOWN_PROBLEMS]]
        if count > SHOWN_PROBLEMS:
            lines.append(f"  ... and {count - SHOWN_PROBLEMS:,} more")
        raise DataError("\n".join(lines))


def prepare(
    image_set: ImageSet, cache_dir: Path | None = None, progress: Callable[[int, int], None] | None = None
) -> str:
    """Decode every listed image, read every box file, and return the fingerprint of what was read.

    The fingerprint is 16 hex characters over name, split, classes, ids, targets, upright and the bytes of every image;
    the place and the dates of the files do not enter it. Raises one DataError that lists missing, broken and
    repeated images, an empty split and unreadable boxes. A passed check leaves a stamp in `cache_dir`; while
    sizes and modification times stay the same, the next call takes the fingerprint from there and decodes
    nothing.
    `progress` is called with (images done, images in all).
    """
    stamp = None if cache_dir is None else Path(cache_dir) / f"checked-{_listing_digest(image_set)}.json"
    known = None if stamp is None else _read_stamp(stamp)
    if known is not None:
        return known
    problems = Problems(image_set.title)
    _check_list(image_set, problems)
    digest = _labels_digest(image_set)
    for done, (content_digest, found) in enumerate(_check_images(image_set), start=1):
        digest.update(content_digest)
        for problem in found:
            problems.add(problem)
        if progress is not None:
            progress(done, len(image_set))
    problems.raise_if_any()
    fingerprint = digest.hexdigest()[:16]
    if stamp is not None:
        _write_stamp(stamp, fingerprint)
    return fingerprint


def _check_list(image_set: ImageSet, problems: Problems) -> None:
    if len(image_set) == 0:
        problems.add("the split has no images")
    for path, count in Counter(image_set.paths).items():
        if count > 1:
            problems.add(f"{path}: listed {count} times")


def _check_images(image_set: ImageSet) -> Iterator[tuple[bytes, list[str]]]:
    def check(index: int) -> tuple[bytes, list[str]]:
        return _check_one(image_set, index)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield from pool.map(check, range(len(image_set)))


def _check_one(image_set: ImageSet, index: int) -> tuple[bytes, list[str]]:
    path = image_set.paths[index]
    found = []
    content = b""
    try:
        content = read_content(path)
        decode_image(content, path, image_set.upright)
    except DataError as error:
        found.append(str(error))
    if image_set.has_boxes:
        try:
            image_set.boxes(index)
        except DataError as error:
            found.append(str(error))
    return hashlib.sha256(content).digest(), found


def _labels_digest(image_set: ImageSet) -> "hashlib._Hash":
    described: list[object] = [image_set.name, image_set.split, image_set.classes, image_set.ids]
    described += ["upright"] if image_set.upright else []  # the same bytes are then other pixels
    digest = hashlib.sha256(json.dumps(described).encode())
    digest.update(image_set.targets.contiguous().numpy().tobytes())
    return digest


def _listing_digest(image_set: ImageSet) -> str:
    files = [path.absolute() for path in (*image_set.paths, *image_set.annotation_files)]
    top = os.path.commonpath([path.parent for path in files]) if files else ""
    digest = _labels_digest(image_set)
    for path in files:
        try:
            status = path.stat()
            state = [status.st_size, status.st_mtime_ns]
        except OSError:
            state = []
        digest.update(json.dumps([os.path.relpath(path, top), *state]).encode())
    return digest.hexdigest()[:32]


def _read_stamp(stamp: Path) -> str | None:
    try:
        fingerprint = json.loads(stamp.read_text())["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return fingerprint if isinstance(fingerprint, str) and len(fingerprint) == 16 else None


def _write_stamp(stamp: Path, fingerprint: str) -> None:
    """The stamp only saves time, so a cache folder that cannot be written is no error."""
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=stamp.parent, suffix=".tmp", delete=False) as file:
            json.dump({"fingerprint": fingerprint}, file)
        Path(file.name).replace(stamp)
    except OSError:
        return
