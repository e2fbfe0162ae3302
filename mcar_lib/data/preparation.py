"""Check a data set before a long run: every image, every box, one report of problems, one fingerprint."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

from mcar_lib.data.image_set import ImageSet, decode_image, read_content, read_in_threads
from mcar_lib.errors import DataError, ResultsError
from mcar_lib.files import read_json, write_json

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
    if stamp is not None:
        with suppress(ResultsError):  # never checked before
            known = read_json(stamp).get("fingerprint")
            if isinstance(known, str) and len(known) == 16:
                return known
    problems = Problems(image_set.title)
    if len(image_set) == 0:
        problems.add("the split has no images")
    for path, count in Counter(image_set.paths).items():
        if count > 1:
            problems.add(f"{path}: listed {count} times")
    digest = _labels_digest(image_set)
    for content_digest, found in read_in_threads(partial(_check_one, image_set), len(image_set), progress):
        digest.update(content_digest)
        problems.found += found
    problems.raise_if_any()
    fingerprint = digest.hexdigest()[:16]
    if stamp is not None:
        with suppress(ResultsError):  # the stamp only saves time: a cache folder that cannot be written is no error
            write_json(stamp, {"fingerprint": fingerprint})
    return fingerprint


def _check_one(image_set: ImageSet, index: int) -> tuple[bytes, list[str]]:
    path = image_set.paths[index]
    found, content = [], b""
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
