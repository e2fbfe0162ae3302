"""The one gate for pixels: a photo in any form gives the same pixels as its file, or one sentence."""

import io
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mutations import mutated
from PIL import Image, ImageOps, TiffImagePlugin

from mcar_lib.data import read_image
from mcar_lib.data.image_set import is_blank, read_photo
from mcar_lib.errors import DataError

PICTURE = np.random.default_rng(1).integers(0, 256, (7, 9, 3), dtype=np.uint8)
EXPECTED = torch.from_numpy(PICTURE).permute(2, 0, 1)
TURNED: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {
    1: lambda x: x,
    2: lambda x: x.flip(2),
    3: lambda x: x.flip(1, 2),
    4: lambda x: x.flip(1),
    5: lambda x: x.transpose(1, 2),
    6: lambda x: x.transpose(1, 2).flip(2),
    7: lambda x: x.transpose(1, 2).flip(1, 2),
    8: lambda x: x.transpose(1, 2).flip(1),
}


def with_alpha(pixels: np.ndarray) -> np.ndarray:
    return np.concatenate([pixels, np.full_like(pixels[..., :1], 7)], axis=-1)


def stored(tmp_path: Path, image: Image.Image, name: str = "photo.png", **options: Any) -> Path:
    image.save(tmp_path / name, **options)
    return tmp_path / name


FORMS: dict[str, Callable[[np.ndarray], Any]] = {
    "array": lambda x: x,
    "array, channels first": lambda x: x.transpose(2, 0, 1),
    "array of floats": lambda x: x / 255,
    "array of half floats": lambda x: (x / 255).astype(np.float16),
    "array of 16 bits": lambda x: x.astype(np.uint16) * 257,
    "array of 16 bits, other byte order": lambda x: (x.astype(np.uint16) * 257).astype(">u2"),
    "array with alpha": with_alpha,
    "array backwards in memory": lambda x: x[:, ::-1].copy()[:, ::-1],
    "read-only array": lambda x: np.frombuffer(x.tobytes(), np.uint8).reshape(x.shape),
    "tensor": lambda x: torch.from_numpy(x).permute(2, 0, 1),
    "tensor, channels last": torch.from_numpy,
    "tensor of floats": lambda x: torch.from_numpy(x).permute(2, 0, 1) / 255,
    "tensor of 16 bits": lambda x: (torch.from_numpy(x).permute(2, 0, 1).int() * 257).to(torch.uint16),
    "tensor that is trained": lambda x: (torch.from_numpy(x) / 255).requires_grad_(),
    "PIL image": Image.fromarray,
    "PIL image with alpha": lambda x: Image.fromarray(with_alpha(x)),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=list(FORMS))
def test_a_photo_in_every_form_has_the_pixels_of_its_file(form: Callable[[np.ndarray], Any], tmp_path: Path) -> None:
    path = stored(tmp_path, Image.fromarray(PICTURE))
    assert torch.equal(read_image(path), EXPECTED)
    assert torch.equal(read_image(str(path)), EXPECTED)
    found = read_image(form(PICTURE))
    assert found.is_contiguous()
    assert torch.equal(found, EXPECTED)


@pytest.mark.parametrize("shape", [(7, 9), (1, 7, 9), (7, 9, 1)])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_gray_photos_are_gray_in_three_channels(shape: tuple[int, ...], kind: Callable[[np.ndarray], Any]) -> None:
    gray = PICTURE[..., 0]
    assert torch.equal(read_image(kind(gray.reshape(shape))), torch.from_numpy(gray).expand(3, 7, 9))
    alpha = np.stack([gray, gray // 2], axis=-1)
    assert torch.equal(read_image(kind(alpha)), torch.from_numpy(gray).expand(3, 7, 9))


def test_gray_of_16_bits_is_scaled_as_its_file_is(tmp_path: Path) -> None:
    values = np.arange(0, 65536, 997, dtype=np.uint16).reshape(6, 11)
    expected = torch.from_numpy((values // 257).astype(np.uint8)).expand(3, 6, 11)
    path = stored(tmp_path, Image.fromarray(values))
    for photo in (path, values, torch.from_numpy(values), Image.fromarray(values)):
        assert torch.equal(read_image(photo), expected)


def test_where_both_ends_could_be_channels_tensors_have_them_first_and_arrays_last() -> None:
    values = np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3)
    assert torch.equal(read_image(torch.from_numpy(values)), torch.from_numpy(values))
    assert torch.equal(read_image(values), torch.from_numpy(values).permute(2, 0, 1))


def test_pixels_are_a_copy_of_the_array_s() -> None:
    mine = PICTURE.transpose(2, 0, 1).copy()
    read_image(torch.from_numpy(mine))[:] = 0
    assert np.array_equal(mine, PICTURE.transpose(2, 0, 1))


@pytest.mark.parametrize(
    ("photo", "words"),
    [
        (PICTURE.astype(np.float32), "floats from 2 to 255, wanted 0 to 1; divide"),
        (torch.full((3, 4, 4), torch.nan), "floats from nan"),
        (torch.full((3, 4, 4), torch.inf), "floats from inf"),
        (torch.randn(3, 40, 40, generator=torch.Generator().manual_seed(0)), "before it is normalised"),
        (PICTURE.astype(np.int64), "int64 values; give uint8"),
        (PICTURE > 9, "bool values"),
        (torch.zeros(3, 4, 4, dtype=torch.complex64), "complex64 values"),
        (torch.zeros(5, 7, 9, dtype=torch.uint8), r"shape \(5, 7, 9\) is no photo"),
        (torch.zeros(2, 3, 7, 9, dtype=torch.uint8), "is no photo"),
        (np.zeros((0, 9, 3), np.uint8), "no pixels"),
        (io.BytesIO(), "found BytesIO"),
        (None, "found NoneType"),
        (Image.new("F", (4, 4)), "32-bit floats.*convert it to 8 bits"),
        (Image.new("I", (4, 4)), "32-bit integers.*convert it to 8 bits"),
        ("a\0b.png", "cannot read the image file"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
def test_what_is_no_photo_is_refused_by_a_sentence(photo: Any, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_image(photo)
    assert "\n" not in str(caught.value)


# ---- files of unusual depth


@pytest.mark.parametrize("mode", ["F", "I"])
def test_files_of_32_bits_are_refused_by_name(mode: str, tmp_path: Path) -> None:
    path = stored(tmp_path, Image.fromarray(np.full((4, 5), 200, np.float32 if mode == "F" else np.int32)), "x.tif")
    with pytest.raises(DataError, match=r"x\.tif: a photo of 32-bit (floats|integers).*convert it to 8 bits"):
        read_image(path)


def test_16_bits_of_netpbm_are_scaled(tmp_path: Path) -> None:
    path = tmp_path / "x.pgm"
    path.write_bytes(b"P5 2 1 65535\n" + struct.pack(">HH", 257 * 200, 65535))
    assert read_image(path)[0].tolist() == [[200, 255]]


def test_12_bits_are_refused_by_name(tmp_path: Path) -> None:
    entries = [(256, 2), (257, 2), (258, 12), (259, 1), (262, 1), (273, 122), (277, 1), (278, 2), (279, 6)]
    directory = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in entries)
    header = b"II*\0" + struct.pack("<IH", 8, len(entries))
    (tmp_path / "x.tif").write_bytes(header + directory + bytes(4) + bytes(range(6)))
    with pytest.raises(DataError, match="12 bits a pixel"):
        read_image(tmp_path / "x.tif")


# ---- orientation


def oriented(value: object) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("orientation", TURNED)
@pytest.mark.parametrize("form", [Path, Image.open], ids=["path", "PIL image"])
def test_each_orientation_is_set_upright(orientation: int, form: Callable[[Path], Any], tmp_path: Path) -> None:
    path = stored(tmp_path, Image.fromarray(PICTURE), exif=oriented(orientation))
    expected = TURNED[orientation](EXPECTED)
    assert torch.equal(read_image(form(path), upright=True), expected)
    assert torch.equal(read_image(form(path)), EXPECTED)


def test_odd_fields_beside_the_orientation_do_not_matter(tmp_path: Path) -> None:
    ifd = TiffImagePlugin.ImageFileDirectory_v2()
    ifd[0x0112] = 6
    ifd.tagtype[0x011A] = 2  # a resolution as text
    ifd[0x011A] = "seventy-two"
    raw = b"Exif\0\0II*\0\x08\0\0\0" + ifd.tobytes(8)
    with pytest.raises(Exception, match="str"):
        ImageOps.exif_transpose(Image.open(stored(tmp_path, Image.fromarray(PICTURE), "x.jpg", exif=raw)))
    path = stored(tmp_path, Image.fromarray(PICTURE), "x.jpg", exif=raw)
    assert read_image(path, upright=True).shape == (3, 9, 7)


@pytest.mark.parametrize("value", [0, 9, 77])
def test_an_orientation_that_is_none_turns_nothing(value: int, tmp_path: Path) -> None:
    path = stored(tmp_path, Image.fromarray(PICTURE), exif=oriented(value))
    assert torch.equal(read_image(path, upright=True), EXPECTED)


# ---- what kind of file it is


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "a HEIC photo; convert it to JPEG, or install pillow-heif"),
        (b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic", "a HEIC photo"),
        (b"\xff\x0a" + bytes(40), "a JPEG XL photo"),
        (b"\0\0\0\x18ftypisom\0\0\0\0isommp42", "a video"),
        (b"<!DOCTYPE html><html></html>", "a web page"),
        (b"%PDF-1.7", "a PDF document"),
        (b"<svg xmlns=''/>", "an SVG drawing"),
        (b"path,labels\n", "not an image file of any known format"),
        (b"", "not a complete image file.*fetch it again"),
        (b"\xff\xd8\xff\xe0" + bytes(10), "not a complete image file.*fetch it again"),
        (b"\x89PNG\r\n\x1a\n", "not a complete image file.*fetch it again"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_file_that_is_not_read_says_what_it_is(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"x\.jpg: {words}") as caught:
        read_image(path)
    assert "BytesIO" not in str(caught.value)


def test_an_installed_reader_of_heic_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Reader:
        @staticmethod
        def register_heif_opener() -> None:
            monkeypatch.setattr(Image, "open", lambda _: Image.fromarray(PICTURE))

    monkeypatch.setattr("importlib.import_module", lambda name: {"pillow_heif": Reader}[name])
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    assert torch.equal(read_image(tmp_path / "x.heic"), EXPECTED)


@pytest.mark.filterwarnings("ignore")
def test_a_large_photo_that_is_only_warned_of_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = stored(tmp_path, Image.fromarray(PICTURE))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    assert torch.equal(read_image(path), EXPECTED)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
def test_damaged_photos_are_read_or_named(name: str, tmp_path: Path) -> None:
    path = stored(tmp_path, Image.fromarray(PICTURE), name, exif=oriented(6))
    for index, content in enumerate(mutated(path.read_bytes())):
        path.write_bytes(content)
        try:
            assert read_image(path, upright=index % 2 == 0).shape[0] == 3
        except DataError as error:
            assert str(error).startswith(f"{path}: ")  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017


def test_only_a_photo_of_one_colour_is_blank() -> None:
    pixels = torch.tensor([10, 200, 30], dtype=torch.uint8).view(3, 1, 1).repeat(1, 4, 5)
    assert is_blank(pixels)
    pixels[1, 3, 4] += 1
    assert not is_blank(pixels)


def jpeg(tmp_path: Path, mode: str = "RGB", **options: Any) -> Path:
    picture = Image.fromarray(np.random.default_rng(2).integers(0, 256, (9, 13, 3), dtype=np.uint8)).resize((201, 131))
    return stored(tmp_path, picture.convert(mode), "photo.jpg", **options)


JPEGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all colours": {"subsampling": 0},
    "half colours": {"subsampling": 1},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "colours as they are": {"keep_rgb": True},
    "gray": {"mode": "L"},
    "print": {"mode": "CMYK"},
    **{f"orientation {number}": {"exif": oriented(number)} for number in range(10)},
}


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("options", JPEGS.values(), ids=list(JPEGS))
def test_a_jpeg_has_the_pixels_that_pillow_gives_it(
    options: dict[str, Any], upright: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jpeg(tmp_path, **options)
    quick = read_photo(path, upright)
    monkeypatch.setattr("mcar_lib.data.image_set.decode_jpeg", None)
    plain = read_photo(path, upright)
    assert quick.size == plain.size
    assert torch.equal(quick.pixels, plain.pixels)


@pytest.mark.parametrize("damage", [lambda x: x[:-2], lambda x: x[: len(x) // 2], lambda x: x + bytes(99)])
def test_a_damaged_jpeg_is_read_or_refused_as_pillow_does(
    damage: Callable[[bytes], bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = jpeg(tmp_path)
    path.write_bytes(damage(path.read_bytes()))

    def outcome() -> Any:
        try:
            return read_image(path).tolist()
        except DataError as error:
            return str(error)

    quick = outcome()
    monkeypatch.setattr("mcar_lib.data.image_set.decode_jpeg", None)
    assert quick == outcome()
