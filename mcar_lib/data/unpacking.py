"""Unpack a data set's archive: no path leaves the data root, nothing half-made stays, no file that is there changes."""

import errno
import filecmp
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO

from mcar_lib.data.preparation import Problems
from mcar_lib.errors import DataError
from mcar_lib.progress import Progress

COPY_BYTES = 1 << 20
DISK_FULL = {errno.ENOSPC, errno.EDQUOT}
# What a damaged or encrypted archive makes the two libraries raise.
DAMAGED = (tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError)
# A split is there when its list is: lists are moved into place after the photos that they name.
LISTS = ("ImageSets", "annotations")


@dataclass(frozen=True)
class _Member:
    """One regular file of an archive: its path below the root, its size in bytes, and how it is opened."""

    path: PurePosixPath
    size: int
    open: Callable[[], IO[bytes]]


def unpack(archive: Path, root: Path, verbose: bool = True) -> int:
    """Unpack a .zip or .tar (also compressed) into the existing folder root; returns the number of files in it.

    Every member's name and kind is looked at before the first byte is written. Files are made in a neighbour
    folder of root's entries and renamed into place at the end. Raises DataError, and leaves root as it was, for
    an absolute path, a "..", a link or a device, a damaged archive (zip: by the CRC of each file), a disk that
    is too small, and a file that is there already with other content.
    """
    made = root / f".unpacking-{archive.name}"
    try:
        _remove(made)  # what a killed run left
        with _open_members(archive) as members:
            require_space(root, sum(member.size for member in members), f"unpacking {archive.name}")
            _write_members(members, made, f"unpacking {archive.name}" if verbose else "")
        _refuse_to_overwrite(made, root, archive.name)
        for entry in _lists_last(made):
            _move(entry, root / entry.name)
        return len(members)
    except DAMAGED as error:
        raise DataError(f"{archive}: damaged or not an archive ({error}); delete it and fetch it again") from error
    except OSError as error:
        if error.errno in DISK_FULL:
            free = shutil.disk_usage(root).free
            raise DataError(
                f"{root}: the disk is full while unpacking {archive.name} (free: {free:,} bytes). The archive stays; "
                "make room and give the same command again"
            ) from error
        raise DataError(f"{archive}: cannot be unpacked into {root} ({error})") from error
    finally:
        _remove(made)


def require_space(folder: Path, needed: int, purpose: str) -> None:
    """Raise DataError with both numbers when the disk of the existing `folder` has not `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise DataError(
            f"{purpose} needs {needed:,} bytes ({needed / 1e9:.2f} GB) on the disk of {folder}, and {free:,} bytes "
            f"({free / 1e9:.2f} GB) are free; make room there or choose another --data-root"
        )


@contextmanager
def _open_members(archive: Path) -> Iterator[list[_Member]]:
    """The regular files of an archive; folders come into being with them."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as zipped:
            yield [_zip_member(zipped, info, archive) for info in zipped.infolist() if not info.is_dir()]
    else:
        with tarfile.open(archive) as tar:
            yield [_tar_member(tar, info, archive) for info in tar.getmembers() if not info.isdir()]


def _zip_member(zipped: zipfile.ZipFile, info: zipfile.ZipInfo, archive: Path) -> _Member:
    kind = stat.S_IFMT(info.external_attr >> 16)  # 0 where the zip was not made on Unix
    if kind not in (0, stat.S_IFREG):
        raise _refusal(archive, info.filename, "is a link or a device")
    return _Member(_checked_path(info.filename, archive), info.file_size, partial(zipped.open, info))


def _tar_member(tar: tarfile.TarFile, info: tarfile.TarInfo, archive: Path) -> _Member:
    if not info.isreg():
        raise _refusal(archive, info.name, "is a link or a device")

    def open_member() -> IO[bytes]:
        opened = tar.extractfile(info)
        assert opened is not None  # only what is no file has no content
        return opened

    return _Member(_checked_path(info.name, archive), info.size, open_member)


def _checked_path(name: str, archive: Path) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or not path.parts:
        raise _refusal(archive, name, "would land outside the data root")
    return path


def _refusal(archive: Path, name: str, reason: str) -> DataError:
    return DataError(
        f"{archive}: the member {name!r} {reason}, so this is not the published archive; nothing was unpacked. "
        "Delete it and fetch it again"
    )


def _write_members(members: Sequence[_Member], folder: Path, title: str) -> None:
    folder.mkdir()
    with Progress(title, len(members), unit="files", enabled=bool(title)) as progress:
        for member in members:
            target = folder / member.path
            target.parent.mkdir(parents=True, exist_ok=True)
            with member.open() as source, target.open("wb") as file:
                shutil.copyfileobj(source, file, COPY_BYTES)
            progress.advance()


def _refuse_to_overwrite(made: Path, root: Path, name: str) -> None:
    problems = Problems(f"unpacking {name} into {root}")
    for path in sorted(made.rglob("*")):
        there = root / path.relative_to(made)
        if path.is_file() and there.exists() and not (there.is_file() and filecmp.cmp(path, there, shallow=False)):
            problems.add(f"{there}: is there already and differs; move it away, or choose another --data-root")
    problems.raise_if_any()


def _move(source: Path, target: Path) -> None:
    """Renames what is not there yet, whole folders where that is possible; equal files are replaced by equal ones."""
    if source.is_dir() and target.is_dir():
        for entry in _lists_last(source):
            _move(entry, target / entry.name)
    else:
        source.replace(target)


def _lists_last(folder: Path) -> list[Path]:
    return sorted(folder.iterdir(), key=lambda path: (path.name in LISTS, path.name))


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)
