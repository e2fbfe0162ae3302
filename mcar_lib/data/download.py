"""Fetch the published data sets: VOC 2007, VOC 2012 and COCO 2014. Only `get_data_set` uses the network.

An archive comes into <data root>/downloads: FILE.part while it is under way, FILE when its checksum is right, FILE.json
with what is known of it (address, sha256). It is unpacked into the data root and, if it was fetched here, removed.
"""

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import requests
from filelock import FileLock, Timeout

from mcar_lib.data.unpacking import full_disk_is_told, require_space, unpack
from mcar_lib.data.voc import VOC_OFFICIAL_SIZES
from mcar_lib.errors import ConfigError, DataError, ResultsError
from mcar_lib.files import read_json, write_bytes
from mcar_lib.progress import Progress, say

DOWNLOADS = "downloads"
CHUNK_BYTES = 1 << 16  # what has come of a chunk is lost when the connection breaks
MEGABYTE = 1_000_000
ATTEMPTS = 4  # in a row without one more byte
TIMEOUT_SECONDS = (15.0, 60.0)  # to connect; without a byte


@dataclass(frozen=True)
class Archive:
    """One file of a published data set."""

    name: str
    urls: tuple[str, ...]  # tried in this order; none for an archive that is served only after a login
    size: int | None  # bytes
    md5: str | None  # hex; None where no checksum is published
    unpacked_size: int  # bytes on disk
    # Data root -> whether all that the archive holds for us is there; DataError where something else is in its place.
    is_unpacked: Callable[[Path], bool]
    by_hand: str = ""  # how a person gets an archive without urls


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
    archives: by default those of ARCHIVES. verbose: with a bar. pause: waits that many seconds between attempts.
    Raises ConfigError for another name, DataError when an archive cannot be had, is not the published one (a wrong
    download is deleted), does not fit on the disk, or would change files that are there.
    """
    if archives is None:
        if name not in ARCHIVES:
            raise ConfigError(f"{name!r} is not a data set to fetch; choose one of {', '.join(ARCHIVES)}")
        archives = ARCHIVES[name]
    root = Path(root).expanduser()
    above = root.absolute()
    while above.name in ("VOCdevkit", "VOC2007", "VOC2012"):
        above = above.parent
    if above != root.absolute():
        raise ConfigError(f"{root}: the data root is the folder that holds VOCdevkit; give {above}")
    missing = [_Place(archive, root, verbose) for archive in archives if not archive.is_unpacked(root)]
    if not missing:
        say(f"{name} is complete in {root}: nothing to fetch")
        return []
    places = [place for place in missing if place.archive.urls or place.whole]
    for place in missing:
        if place not in places:
            say(f"{place.archive.name} is not fetched: {_by_hand(place.archive, place.folder)}")
    names = [place.archive.name for place in places]
    try:
        (root / DOWNLOADS).mkdir(parents=True, exist_ok=True)
        with FileLock(root / DOWNLOADS / ".lock", timeout=0):
            require_space(root, _peak_bytes(places, keep_archives), f"fetching and unpacking {', '.join(names)}")
            for place in places:
                place.get(keep_archives, pause)
    except Timeout as error:
        raise DataError(f"{root}: another mcar data get is at work here; wait for it") from error
    except OSError as error:
        raise DataError(f"{root}: cannot write here ({error}); choose another --data-root") from error
    return names


def _peak_bytes(places: Sequence["_Place"], keep: bool) -> int:
    """The most bytes that getting these archives one after the other adds to the disk at any one time."""
    added = peak = 0
    for place in places:
        rest = 0 if place.whole else (place.archive.size or 0) - place.have
        peak = max(peak, added + rest + place.archive.unpacked_size)
        added += place.archive.unpacked_size + (rest if keep else 0)
    return peak


def _by_hand(archive: Archive, folder: Path) -> str:
    """How to bring an archive by hand."""
    first = f"To bring {archive.name} yourself, put it into the folder below and give the same command again:"
    sources = "".join(f"\n  from    {url}" for url in archive.urls)
    return (
        f"{archive.by_hand or first}{sources}\n  file    {archive.name}\n"
        f"  size    {'no published size' if archive.size is None else f'{archive.size:,} bytes'}\n"
        f"  md5     {archive.md5 or 'no published checksum'}\n  folder  {folder}"
    )


class _Place:
    """One archive in one data root: the file itself, its part while under way, and its receipt.

    The receipt is what is known of the bytes: url and validator of the last transfer (the strong ETag or the date that
    the server gave the file), size, and sha256 once they were complete.
    """

    def __init__(self, archive: Archive, root: Path, verbose: bool) -> None:
        self.archive, self.root, self.verbose = archive, root, verbose
        self.folder = root / DOWNLOADS
        self.fetched = self.folder / archive.name
        self.part = self.folder / f"{archive.name}.part"
        self.receipt_path = self.folder / f"{archive.name}.json"

    @property
    def whole(self) -> Path | None:
        return next((path for path in (self.fetched, self.root / self.archive.name) if path.is_file()), None)

    @property
    def have(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    @property
    def receipt(self) -> dict[str, Any]:
        """What is known of the archive's bytes. An unreadable receipt is none: it costs a transfer from the start."""
        with contextlib.suppress(ResultsError):
            return read_json(self.receipt_path)
        return {}

    def validator_of(self, url: str) -> str | None:
        """What the part came under from an address, if it can stand in a header: a damaged receipt has anything."""
        known = self.receipt
        value = known.get("validator")
        fits = isinstance(value, str) and value.isascii() and value.isprintable() and value == value.strip()
        return value if fits and known.get("url") == url else None

    def note(self, **known: Any) -> None:
        text = json.dumps(self.receipt | known, indent=1) + "\n"
        write_bytes(self.receipt_path, text.encode(), DataError, "choose another --data-root")

    def get(self, keep: bool, pause: Callable[[float], None]) -> None:
        """Unpacks the archive, fetched if need be; one that was here stays, right or wrong."""
        here = self.whole
        if here and (wrong := self.check(here)):
            raise DataError(
                f"{here} is not the published archive: {wrong}. It was left as it is; move it away to have it "
                f"fetched, or replace it.\n{_by_hand(self.archive, self.folder)}"
            )
        path = here or self.download(pause)
        self.part.unlink(missing_ok=True)
        count = unpack(path, self.root)
        if not self.archive.is_unpacked(self.root):
            raise DataError(f"{path} was unpacked ({count:,} files), but photos that its lists name are not in it")
        say(f"{self.archive.name}: {count:,} files unpacked into {self.root}")
        if not here and not keep:
            path.unlink()
        else:
            say(f"{path} is needed no more")

    def check(self, path: Path) -> str:
        """What is wrong with a complete file, as far as can be known; "" and a note of its sha256 if nothing is."""
        archive, before, size = self.archive, self.receipt.get("sha256"), path.stat().st_size
        if archive.size is not None and size != archive.size:
            return f"{size:,} bytes, {archive.size:,} are right"
        say(f"checking {archive.name}")
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            file.seek(0)
            md5 = hashlib.file_digest(file, partial(hashlib.md5, usedforsecurity=False)).hexdigest()
        if archive.md5 not in (None, md5):
            return f"md5 {md5}, {archive.md5} is right"
        if archive.md5 is None:
            say(f"{archive.name}: no published checksum; its size and the archive's own checksums are used")
            if before and sha256 != before:
                return f"sha256 {sha256}, and {before} when it was fetched before"
        self.note(size=size, sha256=sha256)
        return ""

    def download(self, pause: Callable[[float], None]) -> Path:
        """The checked archive, from the first address that gives it; DataError with what to do if none does."""
        report = f"{self.archive.name} could not be fetched:"
        with requests.Session() as session:
            session.headers.update({"Accept-Encoding": "identity", "User-Agent": "mcar-lib"})
            for url in self.archive.urls:
                try:
                    self.fetch(session, url, pause)
                    wrong = self.check(self.part)
                    if not wrong:
                        return self.part.replace(self.fetched)
                    self.part.unlink()
                    report += f"\n  {url}: {wrong}; what was fetched is deleted"
                except requests.RequestException as error:
                    report += f"\n  {url}: {_first_cause(error)}"
        kept = f"\n{self.have:,} bytes of it are here and stay: the same command goes on from there"
        raise DataError(f"{report}\n{_by_hand(self.archive, self.folder)}{kept if self.have else ''}")

    def fetch(self, session: requests.Session, url: str, pause: Callable[[float], None]) -> None:
        """Brings the part to its full length, in as many goes as it takes while they come further than any before."""
        failed, furthest = 0, self.have
        while True:
            try:
                return self.transfer(session, url)
            except requests.RequestException as error:
                failed = 1 if self.have > furthest else failed + 1
                furthest = max(furthest, self.have)
                if failed == ATTEMPTS or isinstance(error, requests.HTTPError):
                    raise
                seconds = 2 ** (failed - 1)
                say(f"{url}: {_first_cause(error)}; trying again in {seconds} s")
                pause(seconds)

    def transfer(self, session: requests.Session, url: str) -> None:
        """One request for the rest of the part. HTTPError: this address does not give it; others: asking again may."""
        size = self.archive.size
        if self.have == size:
            return  # only the check was missing
        validator = self.validator_of(url)
        too_long = size is not None and self.have > size
        if too_long or not (self.archive.md5 or validator):  # no checksum would notice a mix of two files
            self.part.unlink(missing_ok=True)
        headers = {"Range": f"bytes={self.have}-"} if self.have else {}
        if self.have and validator:
            headers["If-Range"] = validator
        with session.get(url, headers=headers, stream=True, timeout=TIMEOUT_SECONDS) as response:
            status, span = response.status_code, response.headers.get("Content-Range", "")
            goes_on = status == 206 and span.startswith(f"bytes {self.have}-")
            start = self.have if goes_on else 0
            length = span.rpartition("/")[2] if goes_on else response.headers.get("Content-Length", "")
            total = int(length) if length.isdecimal() else None
            if status in (206, 416) and not (goes_on and size in (None, total)):
                self.part.unlink(missing_ok=True)
                raise requests.ConnectionError("the server does not go on where the transfer stopped; starting anew")
            if status not in (200, 206):
                busy = status == 429 or status >= 500
                raise (requests.ConnectionError if busy else requests.HTTPError)(f"HTTP {status} {response.reason}")
            if (coding := response.headers.get("Content-Encoding", "identity")) != "identity":
                raise requests.HTTPError(f"sends the file compressed ({coding}), which it was asked not to")
            if size not in (None, total):  # a login page, say; what is here is not given up for it
                served = "an unknown number of" if total is None else f"{total:,}"
                raise requests.HTTPError(f"serves {served} bytes, {size:,} are right")
            tag = response.headers.get("ETag", "W/")  # a weak one is no good in If-Range (RFC 9110, section 13.1.5)
            validator = response.headers.get("Last-Modified", "") if tag.startswith("W/") else tag
            self.note(url=url, validator=validator, size=total)
            self.receive(response, start, total)
        if total not in (None, self.have):
            raise requests.ConnectionError(f"the connection ended after {self.have:,} of {total:,} bytes")

    def receive(self, response: requests.Response, start: int, total: int | None) -> None:
        """Writes what comes to the part, from byte `start` on; HTTPError before a byte too many."""
        title = f"fetching {self.archive.name}" + (f" from {start // MEGABYTE:,} MB on" if start else "")
        rest = ((total or start) - start) // MEGABYTE
        with (
            full_disk_is_told(self.folder, title),
            self.part.open("ab" if start else "wb") as file,
            Progress(title, rest, unit="MB", enabled=self.verbose) as progress,
        ):
            for chunk in response.iter_content(CHUNK_BYTES):
                if total is not None and file.tell() + len(chunk) > total:
                    raise requests.HTTPError(f"sends more than the {total:,} bytes that it states")
                file.write(chunk)
                progress.update((file.tell() - start) // MEGABYTE, rest)


def _first_cause(error: BaseException) -> BaseException:
    """Without the layers of the HTTP library around it."""
    while cause := error.__cause__ or error.__context__:
        error = cause
    return error


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
    paths = [f"JPEGImages/{name}.jpg" for name in ids] + [f"Annotations/{name}.xml" for name in ids if annotated]
    return all((folder / path).is_file() for path in paths)


def photos_are_there(folder: str, count: int, root: Path) -> bool:
    """Whether root/folder holds at least `count` .jpg files."""
    return sum(1 for _ in (root / folder).glob("*.jpg")) >= count


def files_are_there(sizes: Mapping[str, int], root: Path) -> bool:
    """Whether all files (path below root -> bytes) are there; raises DataError for one of another size."""
    for path, size in ((root / name, size) for name, size in sizes.items()):
        if path.is_file() and path.stat().st_size != size:
            raise _own_data(path, f"{path.stat().st_size:,} bytes, the published file has {size:,}")
    return all((root / name).is_file() for name in sizes)


def _own_data(path: Path, found: str) -> DataError:
    return DataError(
        f"{path}: {found}. This data root holds a selection or a version of its own, which is not changed here; "
        "choose another --data-root for the published data set"
    )


def _voc(year: str, split: str, name: str, size: int, md5: str) -> Archive:
    official = f"robots.ox.ac.uk/pascal/VOC/voc{year}/{name}"
    urls = (f"https://thor.{official}", f"http://host.{official}", f"https://pjreddie.com/media/files/{name}")
    is_unpacked = partial(voc_split_is_there, year, split, VOC_OFFICIAL_SIZES[year, split], True)
    return Archive(name, urls, size, md5, size, is_unpacked)


def _coco(path: str, size: int, unpacked_size: int, md5: str, is_unpacked: Callable[[Path], bool]) -> Archive:
    # The official host has no certificate of its own; the second address is the same store with one.
    host = "images.cocodataset.org"
    urls = (f"http://{host}/{path}", f"https://s3.amazonaws.com/{host}/{path}")
    return Archive(path.rpartition("/")[2], urls, size, md5, unpacked_size, is_unpacked)


def _coco_photos(split: str, count: int, size: int, unpacked_size: int, md5: str) -> Archive:
    return _coco(f"zips/{split}.zip", size, unpacked_size, md5, partial(photos_are_there, split, count))


VOC2012_TEST_BY_HAND = (
    "The photos of VOC2012 test are served only to people who log in at the PASCAL VOC evaluation server. Only "
    "mcar submit voc2012 needs them.\nRegister at http://host.robots.ox.ac.uk:8080, fetch VOC2012test.tar from "
    "http://host.robots.ox.ac.uk:8080/eval/downloads/VOC2012test.tar,\nput the file into the folder below and give the "
    "same command again:"
)
VOC2012_TEST_MD5 = "9065beb292b6c291fad82b2725749fda"
VOC2012_TEST = partial(voc_split_is_there, "2012", "test", VOC_OFFICIAL_SIZES["2012", "test"], False)
COCO_LABELS = {"annotations/instances_train2014.json": 332_556_225, "annotations/instances_val2014.json": 160_682_675}
# Sizes are those that the servers state. md5: of VOC as in torchvision.datasets.voc; of VOC2012test.tar and COCO as
# other projects record them (COCO: PaddleDetection, LAVIS; that of the annotations is also the ETag in the official
# store), for their publishers state none. COCO counts are of all photos, with labels or without.
ARCHIVES: Mapping[str, tuple[Archive, ...]] = {
    "voc2007": (
        _voc("2007", "trainval", "VOCtrainval_06-Nov-2007.tar", 460_032_000, "c52e279531787c972589f7e41ab4ae64"),
        _voc("2007", "test", "VOCtest_06-Nov-2007.tar", 451_020_800, "b6e924de25625d8de591ea690078ad9f"),
    ),
    "voc2012": (
        _voc("2012", "trainval", "VOCtrainval_11-May-2012.tar", 1_999_639_040, "6cd6e144f989b92b3379bac3b3de84fd"),
        Archive("VOC2012test.tar", (), None, VOC2012_TEST_MD5, 1_850_000_000, VOC2012_TEST, VOC2012_TEST_BY_HAND),
    ),
    "coco2014": (
        _coco(
            "annotations/annotations_trainval2014.zip",
            252_872_794,
            844_813_048,
            "0a379cfc70b0e71301e0f377548639bd",
            partial(files_are_there, COCO_LABELS),
        ),
        _coco_photos("val2014", 40504, 6_645_013_297, 6_750_000_000, "a3d79f5ed8d289b7a7554ce06a5782b3"),
        _coco_photos("train2014", 82783, 13_510_573_713, 13_700_000_000, "0da8c0bd3d6becc4dcb32757491aca88"),
    ),
}
