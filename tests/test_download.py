"""Fetching data sets: broken transfers, wrong and malicious archives, full disks; from a server on this machine."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import re
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mutations import mutated
from test_data import write_coco, write_photo, write_voc
from torchvision.datasets.voc import DATASET_YEAR_DICT
from typer.testing import CliRunner, Result

from mcar_lib.cli import app
from mcar_lib.data import download, load_coco, load_image_set, load_voc, prepare, published
from mcar_lib.data.download import (
    ARCHIVES,
    Archive,
    files_are_there,
    get_data_set,
    photos_are_there,
    voc_split_is_there,
)
from mcar_lib.data.published import PUBLISHED, PublishedSplit
from mcar_lib.data.unpacking import unpack
from mcar_lib.errors import ConfigError, DataError

ROOT = Path(__file__).resolve().parent.parent
TRAIN = {"b1": {"dog": 1, "cat": 0}, "a2": {"train": 1}, "c3": {"person": 1}}
TEST = {"t1": {"dog": 1}, "t2": {"person": 1}}
TRAIN_TAR, TEST_TAR = "VOCtrainval_06-Nov-2007.tar", "VOCtest_06-Nov-2007.tar"
CUT = 300_000  # bytes; more than one chunk of the transfer, less than an archive

# ---- a server


@dataclass
class Server:
    """Serves `files`; notes each request; can cut transfers, ignore or refuse ranges, state other headers, and fail."""

    files: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str | None, str | None]] = field(default_factory=list)
    cut_after: list[int] = field(default_factory=list)  # bytes, for one response after the other
    ranges: bool = True
    refuses_ranges: bool = False
    headers: dict[str, str] = field(default_factory=dict)  # instead of or beside the right ones
    more: bytes = b""  # sent after what was asked for
    status: int = 200
    address: str = ""

    def url(self, name: str) -> str:
        return f"{self.address}/{name}"

    @property
    def asked(self) -> list[str | None]:
        """The Range header of each request."""
        return [ranges for _, ranges, _ in self.requests]


def answer(server: Server, request: BaseHTTPRequestHandler) -> None:
    name, wanted, version = request.path[1:], request.headers["Range"], request.headers["If-Range"]
    server.requests.append((name, wanted, version))
    content = server.files.get(name)
    if content is None or server.status != 200:
        request.send_error(404 if content is None else server.status)
        return
    etag = f'"{hashlib.md5(content).hexdigest()}"'
    start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
    if version is not None and version != etag:
        start = 0
    if start >= len(content) or (start and server.refuses_ranges):
        request.send_response(416)
        request.send_header("Content-Range", f"bytes */{len(content)}")
        request.send_header("Content-Length", "0")
        request.end_headers()
        return
    request.send_response(206 if start else 200)
    headers = {"Content-Length": str(len(content) - start + len(server.more)), "ETag": etag}
    if start:
        headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
    for named, value in {**headers, **server.headers}.items():
        request.send_header(named, value)
    request.end_headers()
    cut = server.cut_after.pop(0) if server.cut_after else len(content)
    with contextlib.suppress(ConnectionError):  # the client may hang up
        request.wfile.write(content[start : start + cut] + server.more)
    request.close_connection = True


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    served = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(served, self)

        def log_message(self, *_: object) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=partial(http.serve_forever, poll_interval=0.01))
    thread.start()
    served.address = f"http://127.0.0.1:{http.server_port}"
    yield served
    http.shutdown()
    thread.join()
    http.server_close()


# ---- archives in the official layouts


def tar_of(folder: Path, *more: tuple[tarfile.TarInfo, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, path.name)
        for member, content in more:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


def zip_of(folder: Path, *more: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as zipped:
        for path in sorted(folder.rglob("*")):
            zipped.write(path, path.relative_to(folder))
        for name, content in more:
            zipped.writestr(name, content)
    return packed.getvalue()


def voc_tar(folder: Path, labels: dict[str, dict[str, int]], split: str, year: str = "2007") -> bytes:
    write_voc(folder, labels, split, year)
    for seed, image_id in enumerate(labels):
        write_photo(folder / "VOCdevkit" / f"VOC{year}" / "JPEGImages" / f"{image_id}.jpg", seed, side=600)
    return tar_of(folder)


def archive_of(server: Server, name: str, content: bytes, is_unpacked: Any, **changes: Any) -> Archive:
    """Puts an archive on the server, and says what the table of archives says of it."""
    server.files[name] = content
    md5 = hashlib.md5(content).hexdigest()
    return replace(Archive(name, (server.url(name),), len(content), md5, len(content), is_unpacked), **changes)


class Voc(NamedTuple):
    train: Archive
    test: Archive
    server: Server
    root: Path

    def get(self, *archives: Archive, **options: Any) -> list[str]:
        """As mcar data get voc2007, of these archives or both; never waits."""
        pauses: list[float] = []
        chosen = archives or (self.train, self.test)
        return get_data_set("voc2007", self.root, chosen, verbose=False, pause=pauses.append, **options)

    @property
    def downloads(self) -> list[str]:
        return sorted(path.name for path in (self.root / "downloads").glob("[!.]*"))


def is_there(split: str, count: int, year: str = "2007", annotated: bool = True) -> Any:
    return partial(voc_split_is_there, year, split, count, annotated)


@pytest.fixture(scope="session")
def voc_tars(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    folder = tmp_path_factory.mktemp("published")
    return voc_tar(folder / "train", TRAIN, "trainval"), voc_tar(folder / "test", TEST, "test")


@pytest.fixture
def voc(server: Server, voc_tars: tuple[bytes, bytes], tmp_path: Path) -> Voc:
    train = archive_of(server, TRAIN_TAR, voc_tars[0], is_there("trainval", 3))
    test = archive_of(server, TEST_TAR, voc_tars[1], is_there("test", 2))
    assert min(len(content) for content in voc_tars) > 1.5 * CUT
    return Voc(train, test, server, tmp_path / "data")


def tree(root: Path) -> list[str]:
    """What a data root holds but for what is kept of downloads."""
    return sorted(str(path.relative_to(root)) for path in root.glob("[!d]*/**/*") if path.is_file())


def hidden(root: Path) -> list[str]:
    return [path.name for path in root.glob(".*")]


# ---- what comes out


def test_voc2007_is_fetched_and_read(voc: Voc) -> None:
    assert voc.get() == [TRAIN_TAR, TEST_TAR]
    for split, labels in (("trainval", TRAIN), ("test", TEST)):
        images = load_voc(voc.root, "2007", split)
        assert images.ids == tuple(labels)
        assert len(prepare(images)) == 16
    assert voc.downloads == [f"{TEST_TAR}.json", f"{TRAIN_TAR}.json"]
    assert hidden(voc.root) == []


def test_coco2014_is_fetched_and_read(server: Server, tmp_path: Path) -> None:
    archives, made = [], tmp_path / "made"
    for split in ("train2014", "val2014"):
        listed = write_coco(made / "labels")
        listed.rename(listed.with_name(f"instances_{split}.json"))
        for number in (30, 4, 7):
            write_photo(made / split / split / f"{number}.jpg", number)
        photos = partial(photos_are_there, split, 3)
        archives.append(archive_of(server, f"{split}.zip", zip_of(made / split), photos))
    sizes = {f"annotations/{path.name}": path.stat().st_size for path in (made / "labels/annotations").iterdir()}
    labels = zip_of(made / "labels")
    archives.append(archive_of(server, "annotations_trainval2014.zip", labels, partial(files_are_there, sizes)))
    root = tmp_path / "data"
    assert len(get_data_set("coco2014", root, archives, verbose=False)) == 3
    for split in ("train2014", "val2014"):
        images = load_coco(root, split)
        assert images.ids == ("4", "30")
        assert prepare(replace(images, read_boxes=None))
    assert get_data_set("coco2014", root, archives, verbose=False) == []


def test_what_is_there_is_not_fetched_again(voc: Voc) -> None:
    voc.get()
    before = len(voc.server.requests)
    assert voc.get() == []
    assert len(voc.server.requests) == before


def test_a_complete_tree_from_elsewhere_is_taken_as_it_is(voc: Voc) -> None:
    write_voc(voc.root, TRAIN, "trainval")
    assert voc.get() == [TEST_TAR]
    assert [name for name, _, _ in voc.server.requests] == [TEST_TAR]


def test_a_tree_that_lacks_one_photo_gets_it_back(voc: Voc) -> None:
    voc.get()
    photo = voc.root / "VOCdevkit/VOC2007/JPEGImages/t2.jpg"
    content = photo.read_bytes()
    photo.unlink()
    assert voc.get() == [TEST_TAR]
    assert photo.read_bytes() == content


def test_fetched_archives_can_be_kept(voc: Voc) -> None:
    voc.get(voc.test, keep_archives=True)
    assert voc.downloads == [TEST_TAR, f"{TEST_TAR}.json"]


def test_the_sha256_of_what_was_fetched_is_noted(voc: Voc) -> None:
    voc.get(voc.test)
    receipt = json.loads((voc.root / "downloads" / f"{TEST_TAR}.json").read_text())
    assert receipt["sha256"] == hashlib.sha256(voc.server.files[TEST_TAR]).hexdigest()
    assert receipt["url"] == voc.server.url(TEST_TAR)


# ---- transfers


def test_a_broken_transfer_goes_on_with_the_rest_only(voc: Voc) -> None:
    voc.server.cut_after = [CUT]
    voc.get(voc.test)
    first, second = voc.server.asked
    assert first is None
    start = int(re.fullmatch(r"bytes=(\d+)-", second or "")[1])  # type: ignore[index]
    assert CUT - download.CHUNK_BYTES < start <= CUT
    assert voc.server.requests[1][2] == f'"{voc.test.md5}"'


def test_a_transfer_goes_on_in_a_later_call(voc: Voc) -> None:
    voc.server.cut_after = [CUT, 0, 0, 0]
    with pytest.raises(DataError, match=r"bytes of it are here and stay: the same command goes on from there"):
        voc.get(voc.test)
    have = (voc.root / "downloads" / f"{TEST_TAR}.part").stat().st_size
    assert have > 0
    assert tree(voc.root) == []
    voc.server.requests.clear()
    voc.server.cut_after.clear()
    assert voc.get(voc.test) == [TEST_TAR]
    assert voc.server.asked == [f"bytes={have}-"]


def test_a_transfer_that_always_adds_something_is_never_given_up(voc: Voc) -> None:
    voc.server.cut_after = [70_000] * 20
    assert voc.get(voc.test) == [TEST_TAR]
    assert len(voc.server.requests) > download.ATTEMPTS + 2


@pytest.mark.parametrize("refuses", [True, False], ids=["refused", "ignored"])
def test_a_server_that_always_breaks_off_and_takes_no_range_is_given_up(refuses: bool, voc: Voc) -> None:
    voc.server.refuses_ranges, voc.server.ranges = refuses, refuses
    voc.server.cut_after = [CUT] * 50
    with pytest.raises(DataError, match="could not be fetched"):
        voc.get(voc.test)
    assert len(voc.server.requests) <= 2 * download.ATTEMPTS


def part_of(voc: Voc, content: bytes, **receipt: object) -> Path:
    """A part of the test archive that an earlier call has left, with a receipt."""
    part = voc.root / "downloads" / f"{TEST_TAR}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(content)
    part.with_suffix(".json").write_text(json.dumps({"url": voc.server.url(TEST_TAR), **receipt}), encoding="utf-8")
    return part


@pytest.mark.parametrize("validator", [5, None, ["x"], "a\nb", " a", "\u2603"], ids=repr)
def test_a_damaged_receipt_costs_no_more_than_its_validator(validator: object, voc: Voc) -> None:
    part_of(voc, voc.server.files[TEST_TAR][:CUT], validator=validator, sha256=["of", 7])
    assert voc.get(voc.test) == [TEST_TAR]
    assert voc.server.requests == [(TEST_TAR, f"bytes={CUT}-", None)]


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00"], ids=repr)
def test_a_receipt_that_is_no_json_object_is_passed_over(text: str, voc: Voc) -> None:
    part_of(voc, voc.server.files[TEST_TAR][:CUT]).with_suffix(".json").write_text(text, encoding="utf-8")
    assert voc.get(voc.test) == [TEST_TAR]


def test_a_receipt_that_does_not_fit_on_the_disk_is_told(voc: Voc, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(DataError, match=r"the disk is full, .*; make room"):
        voc.get(voc.test)


def test_a_compressed_transfer_is_refused_and_nothing_is_written(voc: Voc) -> None:
    voc.server.headers = {"Content-Encoding": "gzip"}
    with pytest.raises(DataError, match=r"sends the file compressed \(gzip\)"):
        voc.get(voc.test)
    assert voc.downloads == []


def test_a_rest_that_is_longer_than_the_file_is_never_written(voc: Voc) -> None:
    part = part_of(voc, voc.server.files[TEST_TAR][:CUT])
    voc.server.more = bytes(3 * download.CHUNK_BYTES)
    with pytest.raises(DataError, match=rf"sends more than the {voc.test.size:,} bytes"):
        voc.get(voc.test)
    assert part.stat().st_size <= voc.test.size


@pytest.mark.parametrize("span", ["bytes 7-", "bytes", "items 0-1/2", "bytes {start}-9/\u00b2", "bytes {start}-9/*"])
def test_another_range_than_the_one_asked_for_is_not_mixed_in(span: str, voc: Voc) -> None:
    part_of(voc, voc.server.files[TEST_TAR][:CUT])
    voc.server.headers = {"Content-Range": span.format(start=CUT)}
    assert voc.get(voc.test) == [TEST_TAR]
    assert voc.server.asked == [f"bytes={CUT}-", None]


@pytest.mark.parametrize("length", ["-1", "12x", "\u00b2"])
def test_a_length_that_is_no_number_is_told(length: str, voc: Voc) -> None:
    voc.server.headers = {"Content-Length": length}
    with pytest.raises(DataError, match="could not be fetched"):
        voc.get(voc.test)


def test_a_part_that_cannot_be_written_is_told(voc: Voc) -> None:
    (voc.root / "downloads" / f"{TEST_TAR}.part").mkdir(parents=True)  # a folder, which root cannot write either
    with pytest.raises(DataError, match="choose another --data-root"):
        voc.get(voc.test)


def test_a_server_without_ranges_starts_anew(voc: Voc) -> None:
    voc.server.ranges = False
    voc.server.cut_after = [CUT]
    assert voc.get(voc.test) == [TEST_TAR]
    assert len(voc.server.requests) == 2


def test_a_file_that_changed_on_the_server_starts_anew(voc: Voc) -> None:
    part = voc.root / "downloads" / f"{TEST_TAR}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"old" * 1000)
    receipt = {"url": voc.server.url(TEST_TAR), "validator": '"old"', "size": 5000, "sha256": ""}
    part.with_suffix(".json").write_text(json.dumps(receipt))
    assert voc.get(voc.test) == [TEST_TAR]
    assert voc.server.requests == [(TEST_TAR, "bytes=3000-", '"old"')]


def test_a_part_that_is_longer_than_the_file_starts_anew(voc: Voc) -> None:
    part = voc.root / "downloads" / f"{TEST_TAR}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(len(voc.server.files[TEST_TAR]) + 1))
    assert voc.get(voc.test) == [TEST_TAR]
    assert voc.server.asked == [None]


def test_a_range_that_the_server_refuses_starts_anew(voc: Voc) -> None:
    unknown = replace(voc.test, size=None)
    part = voc.root / "downloads" / f"{TEST_TAR}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(len(voc.server.files[TEST_TAR]) + 1))
    assert voc.get(unknown) == [TEST_TAR]
    assert voc.server.asked == [f"bytes={len(voc.server.files[TEST_TAR]) + 1}-", None]


def test_the_next_address_goes_on_where_the_first_broke(voc: Voc) -> None:
    voc.server.files["mirror"] = voc.server.files[TEST_TAR]
    voc.server.cut_after = [CUT, 0, 0, 0]
    assert voc.get(replace(voc.test, urls=(voc.server.url(TEST_TAR), voc.server.url("mirror")))) == [TEST_TAR]
    name, wanted, version = voc.server.requests[-1]
    assert (name, version) == ("mirror", None)
    assert wanted is not None


def test_without_a_checksum_two_addresses_are_not_mixed(voc: Voc) -> None:
    voc.server.files["mirror"] = voc.server.files[TEST_TAR]
    voc.server.cut_after = [CUT, 0, 0, 0]
    urls = (voc.server.url(TEST_TAR), voc.server.url("mirror"))
    assert voc.get(replace(voc.test, urls=urls, md5=None)) == [TEST_TAR]
    assert voc.server.requests[-1] == ("mirror", None, None)


def test_a_missing_file_is_looked_for_at_the_next_address_at_once(voc: Voc) -> None:
    assert voc.get(replace(voc.test, urls=(voc.server.url("gone"), *voc.test.urls))) == [TEST_TAR]
    assert [name for name, _, _ in voc.server.requests] == ["gone", TEST_TAR]


def test_a_busy_server_is_asked_again_after_growing_pauses(voc: Voc) -> None:
    voc.server.status = 503
    pauses: list[float] = []
    with pytest.raises(DataError, match="HTTP 503"):
        get_data_set("voc2007", voc.root, [voc.test], verbose=False, pause=pauses.append)
    assert pauses == [1, 2, 4]
    assert len(voc.server.requests) == download.ATTEMPTS


def test_no_connection_says_what_to_do_by_hand(voc: Voc) -> None:
    nowhere = "http://127.0.0.1:9/" + TEST_TAR
    with pytest.raises(DataError) as caught:
        voc.get(replace(voc.test, urls=(nowhere,)))
    report = str(caught.value)
    size = f"{len(voc.server.files[TEST_TAR]):,} bytes"
    for named in (nowhere, size, voc.test.md5, str(voc.root / "downloads"), "give the same command again", "refused"):
        assert str(named) in report, named


def test_another_size_on_the_server_is_refused_before_the_transfer(voc: Voc) -> None:
    with pytest.raises(DataError, match=r"serves [\d,]+ bytes, 17 are right"):
        voc.get(replace(voc.test, size=17))
    assert voc.downloads == []


def test_a_page_instead_of_the_file_costs_nothing_of_what_is_here(voc: Voc) -> None:
    part = voc.root / "downloads" / f"{TEST_TAR}.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(voc.server.files[TEST_TAR][:CUT])
    voc.server.files["page"] = b"<html>log in first</html>" * CUT
    voc.server.ranges = False
    with pytest.raises(DataError, match=f"{CUT:,} bytes of it are here and stay"):
        voc.get(replace(voc.test, urls=(voc.server.url("page"),)))
    assert part.stat().st_size == CUT


# ---- wrong and malicious archives


def test_a_wrong_checksum_is_deleted_and_leaves_nothing(voc: Voc) -> None:
    with pytest.raises(DataError, match=f"md5 {voc.test.md5}, {'0' * 32} is right; what was fetched is deleted"):
        voc.get(replace(voc.test, md5="0" * 32))
    assert voc.downloads == [f"{TEST_TAR}.json"]
    assert tree(voc.root) == []


def test_a_wrong_file_at_the_first_address_is_fetched_from_the_next(voc: Voc) -> None:
    voc.server.files["wrong"] = bytes(len(voc.server.files[TEST_TAR]))
    assert voc.get(replace(voc.test, urls=(voc.server.url("wrong"), *voc.test.urls))) == [TEST_TAR]


def test_without_a_checksum_the_second_fetch_is_held_to_the_first(voc: Voc, tmp_path: Path) -> None:
    unsigned = replace(voc.test, md5=None)
    voc.get(unsigned)
    shutil.rmtree(voc.root / "VOCdevkit")
    voc.server.files[TEST_TAR] = voc_tar(tmp_path / "other", {"t2": {"dog": 1}, "t1": {}}, "test")
    size = len(voc.server.files[TEST_TAR])
    with pytest.raises(DataError, match="when it was fetched before"):
        voc.get(replace(unsigned, size=size))
    assert tree(voc.root) == []


def test_a_missing_checksum_is_said(voc: Voc, capsys: pytest.CaptureFixture[str]) -> None:
    voc.get(replace(voc.test, md5=None))
    assert f"{TEST_TAR}: no published checksum" in capsys.readouterr().out


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    made = tarfile.TarInfo(name)
    made.type, made.linkname = kind, link
    return made


@pytest.mark.parametrize(
    "bad",
    [
        member("../outside.txt"),
        member("VOCdevkit/../../outside.txt"),
        member("/tmp/outside.txt"),
        member("VOCdevkit/link", tarfile.SYMTYPE, "../.."),
        member("VOCdevkit/hard", tarfile.LNKTYPE, "VOCdevkit/VOC2007/JPEGImages/t1.jpg"),
        member("VOCdevkit/device", tarfile.CHRTYPE),
        member("VOCdevkit/pipe", tarfile.FIFOTYPE),
        member("C:\\outside.txt"),
    ],
    ids=lambda bad: bad.name,
)
def test_a_tar_with_a_path_or_kind_that_is_unsafe_is_refused_whole(
    bad: tarfile.TarInfo, server: Server, tmp_path: Path
) -> None:
    made, root = tmp_path / "made", tmp_path / "up" / "data"
    write_voc(made, TEST, "test")
    content = b"" if bad.type != tarfile.REGTYPE else b"outside"
    archive = archive_of(server, TEST_TAR, tar_of(made, (bad, content)), is_there("test", 2))
    with pytest.raises(DataError, match=re.escape(repr(bad.name))):
        get_data_set("voc2007", root, [archive], verbose=False)
    assert tree(root) == hidden(root) == []
    assert list(tmp_path.rglob("outside.txt")) == []


def symbolic_link(name: str) -> zipfile.ZipInfo:
    made = zipfile.ZipInfo(name)
    made.external_attr = 0o120777 << 16
    return made


@pytest.mark.parametrize(
    "bad", ["../outside.txt", "/outside.txt", "val2014/..\\outside.txt", symbolic_link("val2014/x")]
)
def test_a_zip_with_a_path_or_kind_that_is_unsafe_is_refused_whole(
    bad: str | zipfile.ZipInfo, server: Server, tmp_path: Path
) -> None:
    made, root = tmp_path / "made", tmp_path / "up" / "data"
    write_photo(made / "val2014" / "4.jpg")
    content = zip_of(made, (bad, b"../../outside.txt"))
    archive = archive_of(server, "val2014.zip", content, partial(photos_are_there, "val2014", 1))
    with pytest.raises(DataError, match="nothing was unpacked"):
        get_data_set("coco2014", root, [archive], verbose=False)
    assert tree(root) == hidden(root) == []
    assert list(tmp_path.rglob("outside.txt")) == []


def test_a_zip_whose_content_does_not_fit_its_crc_is_refused(server: Server, tmp_path: Path) -> None:
    made, root = tmp_path / "made", tmp_path / "data"
    write_photo(made / "val2014" / "4.jpg")
    photo = (made / "val2014" / "4.jpg").read_bytes()
    content = zip_of(made).replace(photo, photo[:-1] + b"\0")
    archive = archive_of(server, "val2014.zip", content, partial(photos_are_there, "val2014", 1), md5=None)
    with pytest.raises(DataError, match=r"val2014\.zip: damaged .*CRC"):
        get_data_set("coco2014", root, [archive], verbose=False)
    assert tree(root) == hidden(root) == []


def test_a_truncated_tar_is_refused(voc: Voc) -> None:
    content = voc.server.files[TEST_TAR][:CUT]
    archive = archive_of(voc.server, TEST_TAR, content, is_there("test", 2))
    with pytest.raises(DataError, match=f"{TEST_TAR}: damaged"):
        voc.get(archive)
    assert tree(voc.root) == hidden(voc.root) == []


def test_a_file_that_is_there_with_other_content_is_not_overwritten(voc: Voc) -> None:
    photo = voc.root / "VOCdevkit/VOC2007/JPEGImages/t1.jpg"
    write_photo(photo, seed=7)
    mine = photo.read_bytes()
    with pytest.raises(DataError, match=r"1 problem(.|\n)*t1\.jpg: is there already and differs"):
        voc.get(voc.test)
    assert photo.read_bytes() == mine
    assert tree(voc.root) == ["VOCdevkit/VOC2007/JPEGImages/t1.jpg"]
    assert hidden(voc.root) == []


def test_a_selection_of_ones_own_is_told_before_anything_is_fetched(voc: Voc) -> None:
    write_voc(voc.root, {"t1": {"dog": 1}}, "test")
    with pytest.raises(DataError, match=r"test\.txt: 1 images, 2 are in the published list"):
        voc.get()
    assert voc.server.requests == []


def test_what_a_killed_unpacking_left_is_cleared(voc: Voc) -> None:
    left = voc.root / f".unpacking-{TEST_TAR}" / "VOCdevkit"
    left.mkdir(parents=True)
    (left / "half.jpg").write_bytes(b"half")
    assert voc.get(voc.test) == [TEST_TAR]
    assert hidden(voc.root) == []
    assert not any("half" in name for name in tree(voc.root))


@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_a_damaged_archive_is_one_sentence_and_changes_nothing(kind: str, tmp_path: Path) -> None:
    made, root, archive = tmp_path / "made", tmp_path / "data", tmp_path / f"small.{kind}"
    for name in ("VOCdevkit/a.txt", "VOCdevkit/ImageSets/b.txt"):
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(name * 20)
    good = zip_of(made) if kind == "zip" else tar_of(made)
    root.mkdir()
    (root / "mine.txt").write_text("mine")
    said = []
    for content in mutated(good):
        archive.write_bytes(content)
        try:
            unpack(archive, root)
        except DataError as error:
            said.append(str(error))
        else:
            shutil.rmtree(root)
            root.mkdir()
            (root / "mine.txt").write_text("mine")
        assert [path.name for path in root.iterdir()] == ["mine.txt"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "made", archive.name]
    assert len(said) > 100
    assert [text for text in said if str(archive) not in text or len(text.splitlines()) > 1] == []


# ---- archives brought by hand


@pytest.mark.parametrize("below", [".", "downloads"])
def test_an_archive_put_there_by_hand_is_used_and_stays(below: str, voc: Voc) -> None:
    path = voc.root / below / TEST_TAR
    path.parent.mkdir(parents=True)
    path.write_bytes(voc.server.files[TEST_TAR])
    assert voc.get(voc.test) == [TEST_TAR]
    assert voc.server.requests == []
    assert path.exists()
    assert len(load_voc(voc.root, "2007", "test")) == 2


@pytest.mark.parametrize("content", [b"too short", None])
def test_a_wrong_archive_put_there_by_hand_is_named_and_left(content: bytes | None, voc: Voc) -> None:
    path = voc.root / TEST_TAR
    path.parent.mkdir(parents=True)
    path.write_bytes(content or bytes(len(voc.server.files[TEST_TAR])))
    with pytest.raises(DataError, match=re.escape(f"{path} is not the published archive")):
        voc.get(voc.test)
    assert path.exists()
    assert voc.server.requests == []


def test_an_archive_behind_a_login_is_explained_and_taken_when_it_is_there(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made, root = tmp_path / "made", tmp_path / "data"
    trainval = archive_of(
        server, "trainval.tar", voc_tar(made / "a", TRAIN, "trainval", "2012"), is_there("trainval", 3, "2012")
    )
    write_voc(made / "b", TEST, "test", "2012")
    for path in (made / "b/VOCdevkit/VOC2012/ImageSets/Main").glob("*_test.txt"):
        path.unlink()
    shutil.rmtree(made / "b/VOCdevkit/VOC2012/Annotations")
    content = tar_of(made / "b")
    hand = replace(
        ARCHIVES["voc2012"][1], md5=hashlib.md5(content).hexdigest(), is_unpacked=is_there("test", 2, "2012", False)
    )
    assert get_data_set("voc2012", root, [trainval, hand], verbose=False) == ["trainval.tar"]
    said = capsys.readouterr().out
    assert "VOC2012test.tar is not fetched" in said
    assert "log in" in said
    assert f"folder  {root / 'downloads'}" in said
    (root / "downloads" / hand.name).write_bytes(content)
    assert get_data_set("voc2012", root, [trainval, hand], verbose=False) == [hand.name]
    assert load_voc(root, "2012", "test", labelled=False).ids == tuple(TEST)


# ---- disks


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_too_small_a_disk_is_told_before_anything_is_fetched(voc: Voc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, 1000))
    # The archive of the training photos is removed before the test photos come.
    needed = max(2 * (voc.train.size or 0), (voc.train.size or 0) + 2 * (voc.test.size or 0))
    with pytest.raises(DataError, match=f"needs {needed:,} bytes .*, and 1,000 bytes .* are free"):
        voc.get()
    assert voc.server.requests == []


def test_a_full_disk_leaves_a_part_that_goes_on(voc: Voc, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, part = Path.open, voc.root / "downloads" / f"{TEST_TAR}.part"

    class FullDisk(io.FileIO):
        def write(self, chunk: Any) -> int:
            if self.tell() == CUT:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(memoryview(chunk)[: CUT - self.tell()])  # the last write takes what still fits

    def open_there(path: Path, mode: str = "r", *rest: Any, **named: Any) -> Any:
        if path == part and mode in ("ab", "wb"):
            return io.BufferedWriter(FullDisk(path, mode))
        return opened(path, mode, *rest, **named)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", open_there)
        with pytest.raises(DataError, match=r"the disk is full .*give the same command again"):
            voc.get(voc.test)
    assert part.stat().st_size == CUT
    assert len(voc.server.requests) == 1
    assert voc.get(voc.test) == [TEST_TAR]
    assert voc.server.asked == [None, f"bytes={CUT}-"]


def test_a_disk_that_fills_while_unpacking_leaves_the_archive_and_no_files(
    voc: Voc, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tarfile, "copyfileobj", fill)
        with pytest.raises(DataError, match=f"the disk is full while unpacking {TEST_TAR}"):
            voc.get(voc.test)
    assert tree(voc.root) == hidden(voc.root) == []
    assert TEST_TAR in voc.downloads
    assert voc.get(voc.test) == [TEST_TAR]
    assert len(voc.server.requests) == 1


def test_two_gets_in_one_folder_do_not_mix(voc: Voc) -> None:
    (voc.root / "downloads").mkdir(parents=True)
    with (
        download.FileLock(voc.root / "downloads" / ".lock"),
        pytest.raises(DataError, match="another mcar data get is at work"),
    ):
        voc.get()


# ---- the table of archives


def test_voc_checksums_are_those_of_torchvision() -> None:
    theirs = {entry["filename"]: entry["md5"] for key, entry in DATASET_YEAR_DICT.items() if key != "2008"}
    ours = {archive.name: archive.md5 for name in ("voc2007", "voc2012") for archive in ARCHIVES[name] if archive.urls}
    assert ours == {name: theirs[name] for name in ours}
    assert len(ours) == 3


def test_the_first_address_is_the_publishers() -> None:
    for archives in ARCHIVES.values():
        for archive in archives:
            assert archive.urls or archive.by_hand
            assert all(url.endswith(archive.name) for url in archive.urls)
            assert not archive.urls or re.match(
                r"https?://[a-z]+\.(robots\.ox\.ac\.uk|cocodataset\.org)/", archive.urls[0]
            )


@pytest.mark.parametrize("name", ["scenes", "table", "imagenet"])
def test_only_published_data_sets_can_be_fetched(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="choose one of voc2007, voc2012, coco2014"):
        get_data_set(name, tmp_path)


@pytest.mark.parametrize("below", ["VOCdevkit", "VOCdevkit/VOC2007"])
def test_a_root_inside_the_devkit_is_told(below: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"give {tmp_path}") + "$"):
        get_data_set("voc2007", tmp_path / below)


# ---- the official counts


def test_counts_are_those_of_the_published_table() -> None:
    rows = list(csv.DictReader((ROOT / "results" / "published" / "official_counts.csv").open()))
    splits = {"trainval": "train", "train2014": "train", "test": "test", "val2014": "test"}
    theirs = {(row["dataset"], splits[row["split"]]): (int(row["images"]), row["objects"]) for row in rows}
    ours = {key: (split.images, str(split.objects or "")) for key, split in PUBLISHED.items()}
    assert ours == theirs


def mcar(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def check(root: Path, *arguments: object) -> Result:
    return mcar("data", "check", *arguments, "--data-root", root, "--artifacts", root / "artifacts")


def lines_of(done: Result, count: int) -> list[str]:
    return [re.sub(r"fingerprint [0-9a-f]{16}", "fingerprint", line) for line in done.stdout.splitlines()[:count]]


def test_check_says_what_is_missing_of_each_split(tmp_path: Path) -> None:
    write_voc(tmp_path, TRAIN, "trainval")
    done = check(tmp_path, "voc2007")
    assert done.exit_code == 0, done.output
    assert lines_of(done, 3) == [
        "VOC2007 trainval, subset of 3 of 5,011 images: 3 images, fingerprint",
        "  5,008 of 5,011 published images are missing",
        "VOC2007 test: not here, all 4,952 published images are missing",
    ]
    assert re.search(r"^ *person +1 +0$", done.stdout, re.MULTILINE)


def test_check_of_a_complete_split_counts_its_objects(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_voc(tmp_path, TRAIN, "trainval")
    write_voc(tmp_path, TEST, "test")
    for split, images, objects in (("train", 3, 3), ("test", 2, 4)):
        monkeypatch.setitem(published.PUBLISHED, ("voc2007", split), PublishedSplit("", images, objects))
    done = check(tmp_path, "--dataset", "voc2007")
    assert done.exit_code == 0, done.output
    assert lines_of(done, 6)[1:3] == ["  all 3 published images", "  3 objects that are not difficult, as published"]
    assert lines_of(done, 6)[4:] == ["  all 2 published images", "  2 objects that are not difficult, published are 4"]


def test_check_of_voc2012_takes_test_photos_without_labels(tmp_path: Path) -> None:
    write_voc(tmp_path, TRAIN, "trainval", "2012")
    lists = write_voc(tmp_path, TEST, "test", "2012")
    for path in lists.glob("*_test.txt"):
        path.unlink()
    for name in TEST:
        (tmp_path / "VOCdevkit/VOC2012/Annotations" / f"{name}.xml").unlink()
    done = check(tmp_path, "voc2012")
    assert done.exit_code == 0, done.output
    assert "VOC2012 test without labels, subset of 2 of 10,991 images: 2 images" in done.stdout
    assert re.search(r"^ *class +train +train difficult$", done.stdout, re.MULTILINE)


def test_check_of_coco_with_one_split(tmp_path: Path) -> None:
    write_coco(tmp_path)
    for number in (30, 4):
        write_photo(tmp_path / "val2014" / f"{number}.jpg")
    done = check(tmp_path, "coco2014")
    assert done.exit_code == 0, done.output
    assert lines_of(done, 3) == [
        "COCO2014 train2014: not here, all 82,081 published images are missing",
        "COCO2014 val2014, subset of 2 of 40,137 images: 2 images, fingerprint",
        "  40,135 of 40,137 published images are missing",
    ]


def test_check_of_a_half_unpacked_tree_names_the_photos(tmp_path: Path) -> None:
    write_voc(tmp_path, TRAIN, "trainval")
    (tmp_path / "VOCdevkit/VOC2007/JPEGImages/a2.jpg").unlink()
    done = check(tmp_path, "voc2007")
    assert done.exit_code == 3
    assert re.search(r"a2\.jpg: cannot read the image file", done.stderr)


def test_check_of_an_empty_root_is_an_error(tmp_path: Path) -> None:
    done = check(tmp_path, "voc2007")
    assert done.exit_code == 3
    assert "no VOC2007 here" in done.stderr


# ---- the command


def test_mcar_data_get_fetches_and_names_the_check(voc: Voc, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(download.ARCHIVES, "voc2007", (voc.train, voc.test))  # type: ignore[arg-type]
    done = mcar("data", "get", "voc2007", "--data-root", voc.root)
    assert done.exit_code == 0, done.output
    assert f"mcar data check voc2007 --data-root {voc.root}" in done.stdout
    assert len(load_image_set("voc2007", "test", voc.root)) == 2
    again = mcar("data", "get", "--dataset", "voc2007", "--data-root", voc.root)
    assert again.exit_code == 0
    assert "nothing to fetch" in again.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("get",), 2, "which data set?"),
        (("get", "voc2007", "--dataset", "voc2012"), 2, "two data sets"),
        (("get", "voc2007"), 3, "--data-root"),
        (("get", "scenes"), 2, "not a data set to fetch"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_wrong_call_says_what_is_wrong(
    arguments: Sequence[str], code: int, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MCAR_DATA", raising=False)
    done = mcar("data", *arguments)
    assert done.exit_code == code
    assert named in done.stderr
