"""Fetch the published data sets: VOC 2007, VOC 2012 and COCO 2014. Only `get_data_set` uses the network.

An archive comes into <data root>/downloads: FILE.part while it is under way, FILE when its checksum is right, FILE.json
with what is known of it (address, sha256). It is unpacked into the data root and, if it was fetched here, removed.
"""

import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING

from filelock import FileLock, Timeout

from mcar_lib.data.unpacking import DISK_FULL, require_space, unpack
from mcar_lib.data.voc import VOC_OFFICIAL_SIZES
from mcar_lib.errors import ConfigError, DataError
from mcar_lib.progress import Progress, say

if TYPE_CHECKING:
    from requests import Response, Session

DOWNLOADS = "downloads"
# Small enough that a broken connection loses little: what is under way in a chunk is not kept.
CHUNK_BYTES = 1 << 16
HASH_BYTES = 1 << 20
MEGABYTE = 1_000_000
ATTEMPTS = 4  # in a row without one more byte
TIMEOUT_SECONDS = (15.0, 60.0)  # to connect; without a byte


@dataclass(frozen=True)
class Archive:
    """One file of a published data set.

    urls: tried in this order; none for an archive that is served only after a login. size: bytes. md5: hex; None
    where no checksum is published. unpacked_size: bytes on disk. is_unpacked: data root -> whether all that the
    archive holds for us is there; raises DataError where something else is in its place. by_hand: how a person gets
    an archive without urls.
    """

    name: str
    urls: tuple[str, ...]
    size: int | None
    md5: str | None
    unpacked_size: int
    is_unpacked: Callable[[Path], bool]
    by_hand: str = ""


@dataclass(frozen=True)
class _Receipt:
    """What is known of an archive's bytes: where they come from (url "" for a file put here by hand), the strong ETag
    or date that the server gave them, their number, and the sha256 once they were complete."""

    url: str = ""
    validator: str = ""
    size: int | None = None
    sha256: str = ""


class _BrokenError(Exception):
    """The connection broke or the server is busy: the same address may go on later."""


class _NotServedError(Exception):
    """This address does not give the file; another one may."""


class _WrongError(Exception):
    """A complete file that is not the published one."""


def get_data_set(
    name: str,
    root: Path | str,
    archives: Sequence[Archive] | None = None,
    keep_archives: bool = False,
    verbose: bool = True,
    pause: Callable[[float], None] = time.sleep,
) -> list[str]:
    """Bring "voc2007", "voc2012" or "coco2014" below root in the official layout; returns the archives unpacked now.

    What is there and complete is not fetched again. An archive that was put into root or root/downloads by hand is
    checked and used, and never removed. A broken transfer goes on where it stopped, now or at the next call.
    archives: by default those of ARCHIVES. pause: waits that many seconds between attempts.
    Raises ConfigError for another name, DataError when an archive cannot be had, is not the published one (a wrong
    download is deleted), does not fit on the disk, or would change files that are there.
    """
    if archives is None:
        if name not in ARCHIVES:
            raise ConfigError(f"{name!r} is not a data set to fetch; choose one of {', '.join(ARCHIVES)}")
        archives = ARCHIVES[name]
    root = Path(root).expanduser()
    if root.name in ("VOCdevkit", "VOC2007", "VOC2012"):
        raise ConfigError(f"{root}: the data root is the folder that holds VOCdevkit; give {_above_devkit(root)}")
    if all(archive.is_unpacked(root) for archive in archives):
        say(f"{name} is complete in {root}: nothing to fetch")
        return []
    downloads = root / DOWNLOADS
    try:
        downloads.mkdir(parents=True, exist_ok=True)
        with FileLock(downloads / ".lock", timeout=0):
            return _get_missing(archives, root, keep_archives, verbose, pause)
    except Timeout as error:
        raise DataError(f"{root}: another mcar data get is at work here; wait for it") from error
    except OSError as error:
        raise DataError(f"{root}: cannot write here ({error}); choose another --data-root") from error


def _get_missing(
    archives: Sequence[Archive], root: Path, keep: bool, verbose: bool, pause: Callable[[float], None]
) -> list[str]:
    missing = []
    for archive in archives:
        if archive.is_unpacked(root):
            say(f"{archive.name}: its content is there")
        elif not archive.urls and _find(archive, root) is None:
            say(f"{archive.name} is not fetched: {_instructions(archive, root)}")
        else:
            missing.append(archive)
    if not missing:
        return []
    names = [archive.name for archive in missing]
    require_space(root, _peak_bytes(missing, root, keep), f"fetching and unpacking {', '.join(names)}")
    for archive in missing:
        placed = _find(archive, root)
        path = _accept(archive, placed, root, verbose) if placed else _download(archive, root, verbose, pause)
        count = unpack(path, root, verbose)
        if not archive.is_unpacked(root):
            raise DataError(f"{path} was unpacked ({count:,} files), but photos that its lists name are not in it")
        say(f"{archive.name}: {count:,} files unpacked into {root}")
        if placed is None and not keep:
            path.unlink()
        else:
            say(f"{path} is needed no more")
    return names


def _above_devkit(root: Path) -> Path:
    root = root.absolute()
    return root.parent if root.name == "VOCdevkit" or root.parent.name != "VOCdevkit" else root.parent.parent


def _find(archive: Archive, root: Path) -> Path | None:
    places = [root / DOWNLOADS / archive.name, root / archive.name]
    return next((path for path in places if path.is_file()), None)


def _peak_bytes(archives: Sequence[Archive], root: Path, keep: bool) -> int:
    """The most bytes that getting these archives one after the other adds to the disk at any one time."""
    added = peak = 0
    for archive in archives:
        rest = 0 if _find(archive, root) else (archive.size or 0) - _size(_part(archive, root))
        peak = max(peak, added + rest + archive.unpacked_size)
        added += archive.unpacked_size + (rest if keep else 0)
    return peak


# ---- checks


def _accept(archive: Archive, path: Path, root: Path, verbose: bool) -> Path:
    """An archive that is there whole, checked; one that is not the published archive is left as it is."""
    receipt = _read_receipt(archive, root)
    try:
        sha256 = _verify(archive, path, receipt, verbose)
    except _WrongError as error:
        raise DataError(
            f"{path} is not the published archive: {error}. It was left as it is; move it away to have it fetched, "
            f"or replace it.\n{_instructions(archive, root)}"
        ) from error
    _write_receipt(archive, root, _Receipt(size=_size(path), sha256=sha256))
    _part(archive, root).unlink(missing_ok=True)
    return path


def _verify(archive: Archive, path: Path, receipt: _Receipt, verbose: bool) -> str:
    """The sha256 of a file that is the published archive as far as that can be known; raises _WrongError."""
    size = path.stat().st_size
    if archive.size is not None and size != archive.size:
        raise _WrongError(f"{size:,} bytes, {archive.size:,} are right")
    md5, sha256 = _digests(path, f"checking {archive.name}", verbose)
    if archive.md5 is None:
        say(f"{archive.name}: no published checksum; its size and the archive's own checksums are used")
    elif md5 != archive.md5:
        raise _WrongError(f"md5 {md5}, {archive.md5} is right")
    if receipt.sha256 and sha256 != receipt.sha256:
        raise _WrongError(f"sha256 {sha256}, and {receipt.sha256} when it was fetched before")
    return sha256


def _digests(path: Path, title: str, verbose: bool) -> tuple[str, str]:
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file, Progress(title, size // MEGABYTE, unit="MB", enabled=verbose) as progress:
        while block := file.read(HASH_BYTES):
            md5.update(block)
            sha256.update(block)
            progress.update(file.tell() // MEGABYTE, size // MEGABYTE)
    return md5.hexdigest(), sha256.hexdigest()


# ---- transfer


def _download(archive: Archive, root: Path, verbose: bool, pause: Callable[[float], None]) -> Path:
    """The verified archive in root/downloads, from the first address that gives it."""
    import requests

    part, failures = _part(archive, root), []
    with requests.Session() as session:
        for url in archive.urls:
            try:
                _fetch(session, url, archive, root, verbose, pause)
                receipt = _read_receipt(archive, root)
                sha256 = _verify(archive, part, receipt, verbose)
            except _NotServedError as error:
                failures.append(f"{url}: {error}")
            except _WrongError as error:
                part.unlink()
                failures.append(f"{url}: {error}; what was fetched is deleted")
            else:
                _write_receipt(archive, root, replace(receipt, size=_size(part), sha256=sha256))
                return part.replace(root / DOWNLOADS / archive.name)
    kept = (
        f"\n{_size(part):,} bytes of it are here and stay: the same command goes on from there" if part.exists() else ""
    )
    tried = "".join(f"\n  {failure}" for failure in failures)
    raise DataError(f"{archive.name} could not be fetched:{tried}\n{_instructions(archive, root)}{kept}")


def _fetch(
    session: "Session", url: str, archive: Archive, root: Path, verbose: bool, pause: Callable[[float], None]
) -> None:
    """Brings FILE.part to its full length from one address, in as many goes as it takes while each adds something."""
    part, failed = _part(archive, root), 0
    while True:
        before = _size(part)
        try:
            return _transfer(session, url, archive, root, verbose)
        except _BrokenError as error:
            failed = 1 if _size(part) > before else failed + 1
            if failed == ATTEMPTS:
                raise _NotServedError(str(error)) from error
            if verbose:
                say(f"{url}: {error}; trying again in {2 ** (failed - 1)} s")
            pause(2 ** (failed - 1))


def _transfer(session: "Session", url: str, archive: Archive, root: Path, verbose: bool) -> None:
    """One request for what FILE.part lacks. Raises one of the two errors above; DataError when the disk is full."""
    import requests

    part, receipt = _part(archive, root), _read_receipt(archive, root)
    if archive.size is not None and _size(part) == archive.size:
        return  # only the check was missing
    try:
        with session.get(
            url, headers=_headers(url, archive, part, receipt), stream=True, timeout=TIMEOUT_SECONDS
        ) as response:
            start, total = _agree(response, archive, part, receipt)
            require_space(part.parent, (total or start) - start, f"fetching the rest of {archive.name}")
            known = replace(receipt, url=url, validator=_validator(response), size=total)
            _write_receipt(archive, root, known)
            _receive(response, part, start, total, verbose)
    except requests.RequestException as error:
        raise _BrokenError(_reason(error)) from error
    if total is not None and _size(part) != total:
        raise _BrokenError(f"the connection ended after {_size(part):,} of {total:,} bytes")


def _headers(url: str, archive: Archive, part: Path, receipt: _Receipt) -> dict[str, str]:
    """Asks for the rest of FILE.part; one that cannot be a part of what this address serves is deleted first."""
    headers = {"Accept-Encoding": "identity", "User-Agent": "mcar-lib"}
    have = _size(part)
    same = url == receipt.url and receipt.validator
    if archive.size is not None and have > archive.size:
        have = 0
    if have and not same and archive.md5 is None:
        have = 0  # no checksum would notice a mix of two files
    if have:
        headers["Range"] = f"bytes={have}-"
        if same:
            headers["If-Range"] = receipt.validator
    elif part.exists():
        part.unlink()
    return headers


def _agree(response: "Response", archive: Archive, part: Path, receipt: _Receipt) -> tuple[int, int | None]:
    """Where the response's bytes begin and how long the whole file is (None: the server does not say)."""
    status, have = response.status_code, _size(part)
    span = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", "").strip())
    length = response.headers.get("Content-Length", "")
    total: int | None
    if status == 206 and span and span[1] == str(have) and span[2] in (str(receipt.size), str(archive.size)):
        start, total = have, int(span[2])
    elif status == 200:  # no resume, or the file has changed
        start, total = 0, int(length) if length.isdigit() else None
    elif status in (206, 416):
        part.unlink(missing_ok=True)
        raise _BrokenError("the server does not go on where the transfer stopped; starting anew")
    elif status == 429 or status >= 500:
        raise _BrokenError(f"HTTP {status} {response.reason}")
    else:
        raise _NotServedError(f"HTTP {status} {response.reason}")
    if archive.size is not None and total != archive.size:  # a login page, say; what is here is not given up for it
        served = "an unknown number of" if total is None else f"{total:,}"
        raise _NotServedError(f"serves {served} bytes, {archive.size:,} are right")
    return start, total


def _receive(response: "Response", part: Path, start: int, total: int | None, verbose: bool) -> None:
    """Appends the response to FILE.part from byte `start` on; each chunk is in the file before the next is read."""
    from_there = f" from {start // MEGABYTE:,} MB on" if start else ""
    done, rest = 0, (total or start) - start
    title = f"fetching {part.stem}{from_there}"
    with (
        part.open("ab" if start else "wb", buffering=0) as file,
        Progress(title, rest // MEGABYTE, unit="MB", enabled=verbose) as progress,
    ):
        for chunk in response.iter_content(CHUNK_BYTES):
            try:
                _append(file, chunk)
            except OSError as error:
                if error.errno not in DISK_FULL:
                    raise
                have, free = _size(part), shutil.disk_usage(part.parent).free
                lacking = "" if total is None else f", {total - have:,} bytes more are needed"
                raise DataError(
                    f"{part}: the disk is full (free: {free:,} bytes{lacking}). The {have:,} bytes that are here stay; "
                    "make room and give the same command again: it goes on from there"
                ) from error
            done += len(chunk)
            progress.update(done // MEGABYTE, max(rest, done) // MEGABYTE)


def _append(file: IO[bytes], chunk: bytes) -> None:
    left = memoryview(chunk)
    while left:  # without a buffer, a write may take only some of the bytes
        left = left[file.write(left) :]


def _validator(response: "Response") -> str:
    """What the server names this version of the file by, if strong enough for If-Range (RFC 9110, section 13.1.5)."""
    tag = response.headers.get("ETag", "")
    return tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified", "")


def _reason(error: Exception) -> str:
    """The innermost cause, without the layers of the HTTP library around it."""
    cause: object = error
    while isinstance(cause, Exception) and (inner := getattr(cause, "reason", None) or (cause.args or (None,))[0]):
        if not isinstance(inner, Exception):
            break
        cause = inner
    return f"{type(error).__name__}: {cause}"


# ---- what is kept beside an archive


def _part(archive: Archive, root: Path) -> Path:
    return root / DOWNLOADS / f"{archive.name}.part"


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _receipt_path(archive: Archive, root: Path) -> Path:
    return root / DOWNLOADS / f"{archive.name}.json"


def _read_receipt(archive: Archive, root: Path) -> _Receipt:
    """An unreadable receipt is none: it only costs a transfer from the start, or a comparison with an earlier one."""
    try:
        return _Receipt(**json.loads(_receipt_path(archive, root).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return _Receipt()


def _write_receipt(archive: Archive, root: Path, receipt: _Receipt) -> None:
    path = _receipt_path(archive, root)
    written = path.with_name(path.name + ".tmp")
    written.write_text(json.dumps(asdict(receipt), indent=1) + "\n", encoding="utf-8")
    written.replace(path)


def _instructions(archive: Archive, root: Path) -> str:
    """How to bring an archive by hand."""
    first = f"To bring {archive.name} yourself, put it into the folder below and give the same command again:"
    lines = [
        archive.by_hand or first,
        *(f"  from    {url}" for url in archive.urls),
        f"  file    {archive.name}",
        f"  size    {f'{archive.size:,} bytes' if archive.size is not None else 'no published size'}",
        f"  md5     {archive.md5 or 'no published checksum'}",
        f"  folder  {root / DOWNLOADS}",
    ]
    return "\n".join(lines)


# ---- what is published


def voc_split_is_there(year: str, split: str, count: int, annotated: bool, root: Path) -> bool:
    """Whether root/VOCdevkit/VOC<year> has the list of a split with `count` images, and all that it names.

    Raises DataError for a list of another length: that is a selection of someone's own.
    """
    folder = root / "VOCdevkit" / f"VOC{year}"
    listed = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not listed.is_file():
        return False
    ids = listed.read_text(encoding="utf-8", errors="replace").split()
    if len(ids) != count:
        raise _own_data(listed, f"{len(ids):,} images, {count:,} are in the published list")
    photos = all((folder / "JPEGImages" / f"{image_id}.jpg").is_file() for image_id in ids)
    return photos and (not annotated or all((folder / "Annotations" / f"{name}.xml").is_file() for name in ids))


def photos_are_there(folder: str, count: int, root: Path) -> bool:
    """Whether root/folder holds at least `count` .jpg files."""
    return sum(1 for _ in (root / folder).glob("*.jpg")) >= count


def files_are_there(sizes: Mapping[str, int], root: Path) -> bool:
    """Whether all files (path below root -> bytes) are there; raises DataError for one of another size."""
    for name, size in sizes.items():
        if (root / name).is_file() and (root / name).stat().st_size != size:
            raise _own_data(root / name, f"{(root / name).stat().st_size:,} bytes, the published file has {size:,}")
    return all((root / name).is_file() for name in sizes)


def _own_data(path: Path, found: str) -> DataError:
    return DataError(
        f"{path}: {found}. This data root holds a selection or a version of its own, which is not changed here; "
        "choose another --data-root for the published data set"
    )


def _voc_archive(name: str, year: str, split: str, size: int, md5: str) -> Archive:
    official = f"robots.ox.ac.uk/pascal/VOC/voc{year}/{name}"
    urls = (f"https://thor.{official}", f"http://host.{official}", f"https://pjreddie.com/media/files/{name}")
    count = VOC_OFFICIAL_SIZES[year, split]
    return Archive(name, urls, size, md5, size, partial(voc_split_is_there, year, split, count, True))


def _coco_archive(path: str, size: int, md5: str, unpacked_size: int, is_unpacked: Callable[[Path], bool]) -> Archive:
    # The official host has no certificate of its own; the second address is the same store with one.
    host = "images.cocodataset.org"
    urls = (f"http://{host}/{path}", f"https://s3.amazonaws.com/{host}/{path}")
    return Archive(path.rpartition("/")[2], urls, size, md5, unpacked_size, is_unpacked)


VOC2012_TEST_BY_HAND = (
    "The photos of VOC2012 test are served only to people who log in at the PASCAL VOC evaluation server. Only "
    "mcar submit voc2012 needs them.\nRegister at http://host.robots.ox.ac.uk:8080, fetch VOC2012test.tar from "
    "http://host.robots.ox.ac.uk:8080/eval/downloads/VOC2012test.tar,\nput the file into the folder below and give the "
    "same command again:"
)
# Sizes are those that the servers state. md5: of VOC as in torchvision.datasets.voc; of VOC2012test.tar and COCO as
# other projects record them (COCO: PaddleDetection, LAVIS; that of the annotations is also the ETag in the official
# store), for their publishers state none. COCO counts are of all photos, with labels or without.
_COCO_LABELS = {"annotations/instances_train2014.json": 332_556_225, "annotations/instances_val2014.json": 160_682_675}
ARCHIVES: Mapping[str, tuple[Archive, ...]] = {
    "voc2007": (
        _voc_archive(
            "VOCtrainval_06-Nov-2007.tar", "2007", "trainval", 460_032_000, "c52e279531787c972589f7e41ab4ae64"
        ),
        _voc_archive("VOCtest_06-Nov-2007.tar", "2007", "test", 451_020_800, "b6e924de25625d8de591ea690078ad9f"),
    ),
    "voc2012": (
        _voc_archive(
            "VOCtrainval_11-May-2012.tar", "2012", "trainval", 1_999_639_040, "6cd6e144f989b92b3379bac3b3de84fd"
        ),
        Archive(
            name="VOC2012test.tar",
            urls=(),
            size=None,
            md5="9065beb292b6c291fad82b2725749fda",
            unpacked_size=1_850_000_000,
            is_unpacked=partial(voc_split_is_there, "2012", "test", VOC_OFFICIAL_SIZES["2012", "test"], False),
            by_hand=VOC2012_TEST_BY_HAND,
        ),
    ),
    "coco2014": (
        _coco_archive(
            "annotations/annotations_trainval2014.zip",
            252_872_794,
            "0a379cfc70b0e71301e0f377548639bd",
            844_813_048,
            partial(files_are_there, _COCO_LABELS),
        ),
        _coco_archive(
            "zips/val2014.zip",
            6_645_013_297,
            "a3d79f5ed8d289b7a7554ce06a5782b3",
            6_750_000_000,
            partial(photos_are_there, "val2014", 40504),
        ),
        _coco_archive(
            "zips/train2014.zip",
            13_510_573_713,
            "0da8c0bd3d6becc4dcb32757491aca88",
            13_700_000_000,
            partial(photos_are_there, "train2014", 82783),
        ),
    ),
}
