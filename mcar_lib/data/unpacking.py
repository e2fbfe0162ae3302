"""Unpack a data set's archive: no path leaves the data root, nothing half-made stays, no file that is there changes."""

import errno
import filecmp
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from mcar_lib.data.preparation import Problems
from mcar_lib.errors import DataError, reason_of
from mcar_lib.progress import say

# A split is there when its list is: lists are moved into place after the photos that they name.
LISTS = ("ImageSets", "annotations")


def unpack(archive: Path, root: Path) -> int:
    """Unpack a .zip or .tar (also compressed) into the existing folder root; returns the number of files in it.

    Every member's name and kind is looked at before the first byte is written. Files are made in a neighbour
    folder of root's entries and renamed into place at the end. Raises DataError, and leaves root as it was, for
    an absolute path, a "..", a link or a device, a damaged archive (zip: by the CRC of each file), a full disk,
    and a file that is there already with other content.
    """
    made, title = root / f".unpacking-{archive.name}", f"unpacking {archive.name}"
    say(title)
    try:
        with full_disk_is_told(root, title):
            shutil.rmtree(made, ignore_errors=True)  # what a killed run left
            made.mkdir()
            count = _extract(archive, made)
            _refuse_to_overwrite(made, root, title)
            _move(made, root)
        return count
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"{archive}: cannot be unpacked into {root} ({error})") from error
    except Exception as error:  # what a damaged or encrypted archive makes the two libraries raise is anybody's guess
        raise DataError(
            f"{archive}: damaged or not an archive ({reason_of(error)}); delete it and fetch it again"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise DataError with both numbers when the disk of the existing `folder` has not `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{purpose} needs {needed:,} bytes ({needed / 1e9:.2f} GB) on the disk of {folder}, and {free:,} bytes "
            f"({free / 1e9:.2f} GB) are free; make room there or choose another --data-root"
        )


@contextmanager
def full_disk_is_told(folder: Path, doing: str) -> Iterator[None]:
    """Makes a DataError that says what to do of the system's error for a full disk or a quota that is used up."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"{folder}: the disk is full while {doing} (free: {shutil.disk_usage(folder).free:,} bytes). What was "
            "fetched stays; make room and give the same command again: it goes on from there"
        ) from error


def _extract(archive: Path, folder: Path) -> int:
    """Writes the files of an archive, all of which are safe; folders come into being with them."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            infos = [info for info in zipped.infolist() if not info.is_dir()]
            for info in infos:
                kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the zip was not made on Unix
                _refuse_unsafe(info.filename, kind in (0, stat.S_IFREG), archive)
            zipped.extractall(folder, infos)
            return len(infos)
    with tarfile.open(archive) as tar:
        members = [member for member in tar if not member.isdir()]
        for member in members:
            _refuse_unsafe(member.name, member.isreg(), archive)
        tar.extractall(folder, members, filter="data")
        return len(members)


def _refuse_unsafe(name: str, is_file: bool, archive: Path) -> None:
    """Stricter than the two libraries, which make a safe path of an absolute one and let links within pass."""
    path = PurePosixPath(name)
    leaves = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts
    if leaves or not is_file:
        reason = "would land outside the data root" if leaves else "is a link or a device"
        raise DataError(
            f"{archive}: the member {name!r} {reason}, so this is not the published archive; nothing was unpacked. "
            "Delete it and fetch it again"
        )


def _refuse_to_overwrite(made: Path, root: Path, title: str) -> None:
    problems = Problems(f"{title} into {root}")
    for path in sorted(made.rglob("*")):
        there = root / path.relative_to(made)
        if path.is_file() and there.exists() and not (there.is_file() and filecmp.cmp(path, there, shallow=False)):
            problems.add(f"{there}: is there already and differs; move it away, or choose another --data-root")
    problems.raise_if_any()


def _move(source: Path, target: Path) -> None:
    """Renames what is not there yet, whole folders where that is possible; equal files are replaced by equal ones."""
    if source.is_dir() and target.is_dir():
        for entry in sorted(source.iterdir(), key=lambda path: (path.name in LISTS, path.name)):
            _move(entry, target / entry.name)
    else:
        source.replace(target)
