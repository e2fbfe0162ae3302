"""What every data set looks like to the rest of the library: images, labels, ids, and boxes if any."""

import contextlib
import dataclasses
import importlib
import io
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset

from mcar_lib.errors import DataError, reason_of
from mcar_lib.lean_torchvision import decode_jpeg

T = TypeVar("T")
Photo = str | os.PathLike[str] | Image.Image | np.ndarray | Tensor
"""What read_image takes."""

# EXIF and TIFF tags, and the turn that each EXIF orientation asks for.
ORIENTATION, BITS_PER_SAMPLE = 0x0112, 258
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SIDEWAYS = [TURNS[orientation] for orientation in (5, 6, 7, 8)]
# By way of RGBA a transparent palette entry keeps its colour; the others convert to nothing else.
BY_WAY_OF = {"P": "RGBA", "PA": "RGBA", "RGBa": "RGBA", "La": "LA"}
HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"heif")
# How files start that are often taken for photos, and how those do that Pillow reads.
UNSUPPORTED = {
    rb"....ftyp(avi[fs]|mi|ms)": "an AVIF photo",
    rb"\xff\x0a|\0\0\0\x0cJXL ": "a JPEG XL photo",
    rb"....ftypcrx": "a camera's raw photo",
    rb"....ftyp": "a video",
    rb"%PDF": "a PDF document",
    rb"\s*(<\?xml|<svg)": "an SVG drawing or other XML",
    rb"(?i)\s*<(!doctype html|html)": "a web page",
}
KNOWN_STARTS = (b"\xff\xd8", b"\x89PNG", b"GIF8", b"RIFF", b"BM", b"II*\0", b"MM\0*")
# A photo above Pillow's own limit is read at reduced size, one above LARGEST not at all: 4 bytes a pixel in memory.
REDUCED_SIDE, LARGEST = 4096, 500_000_000


@dataclass(frozen=True, eq=False)
class Boxes:
    """The m annotated objects of one image, in pixels of the stored image.

    xyxy: int64 (m, 4), half-open [x1, x2) x [y1, y2). classes: int64 (m,). difficult: bool (m,); COCO crowds
    count as difficult here. doubts: what is odd in the file that they were read from.
    """

    xyxy: Tensor
    classes: Tensor
    difficult: Tensor
    doubts: tuple[str, ...] = dataclasses.field(default=(), repr=False)

    @classmethod
    def of(
        cls,
        corners: Sequence[Sequence[int]],
        classes: Sequence[int],
        difficult: Sequence[bool],
        doubts: Sequence[str] = (),
    ) -> "Boxes":
        """From plain numbers, one row of `corners`, one class and one flag an object."""
        return cls(
            torch.tensor(corners, dtype=torch.int64).reshape(-1, 4),
            torch.tensor(classes, dtype=torch.int64),
            torch.tensor(difficult, dtype=torch.bool),
            tuple(doubts),
        )

    def __len__(self) -> int:
        return len(self.classes)


class PhotoRead(NamedTuple):
    """A photo as read_image reads it, pixels uint8 (3, H, W), and the width and height of the whole: larger where it
    was read at reduced size. is_first_frame: whether its file has more."""

    pixels: Tensor
    size: tuple[int, int]
    is_first_frame: bool = False


@dataclass(frozen=True, eq=False)
class ImageSet(Dataset[tuple[Tensor, Tensor, str]]):
    """One split of one data set. Item i is (uint8 (3, H, W), int8 (K,), image id).

    targets: int8 (n, K), 1 positive, 0 negative, -1 only difficult instances (as VOC says it).
    read_boxes: image index -> Boxes; None where the data set has no boxes.
    official_size: number of images of the published split; None where nothing is published.
    annotation_files: the files that boxes are read from (`prepare` looks again when one of them changes).
    labelled: False where nobody has published labels; targets are then all 0 and mean nothing.
    upright: whether photos are turned as their EXIF orientation says; see `read_image`.
    doubts: what is odd in the files of the labels, though it may be meant so.
    """

    name: str
    split: str
    classes: tuple[str, ...]
    ids: tuple[str, ...]
    paths: tuple[Path, ...]
    targets: Tensor
    read_boxes: Callable[[int], Boxes] | None = None
    official_size: int | None = None
    annotation_files: tuple[Path, ...] = ()
    labelled: bool = True
    upright: bool = False
    doubts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        size = (len(self.ids), len(self.classes))
        if len(self.paths) != len(self.ids) or tuple(self.targets.shape) != size:
            shape = tuple(self.targets.shape)
            raise ValueError(f"{size[0]} ids, {len(self.paths)} paths and targets {shape} do not fit together")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, str]:
        return self.image(index), self.targets[index], self.ids[index]

    def image(self, index: int) -> Tensor:
        """The photo at `index`, uint8 (3, H, W); raises DataError when it cannot be read."""
        return read_photo(self.paths[index], self.upright).pixels

    def boxes(self, index: int) -> Boxes:
        """The annotated objects of the image at `index`; raises DataError when there are none to read."""
        if self.read_boxes is None:
            raise DataError(f"{self.title} has no boxes; VOC needs its folder Annotations for them, a table has none")
        return self.read_boxes(index)

    @property
    def has_boxes(self) -> bool:
        return self.read_boxes is not None

    @property
    def is_subset(self) -> bool:
        """Whether images of the published split are missing: scores then do not compare to the paper's."""
        return self.official_size is not None and len(self) < self.official_size

    @property
    def title(self) -> str:
        """For captions: "VOC2007 test", or "VOC2007 test, subset of 400 of 4,952 images"."""
        subset = f", subset of {len(self):,} of {self.official_size:,} images" if self.is_subset else ""
        return f"{self.name} {self.split}{'' if self.labelled else ' without labels'}{subset}"

    def select(self, indices: Sequence[int]) -> "ImageSet":
        """The images at `indices`, in that order. Its title says of how many images it is a subset."""
        chosen = tuple(range(len(self))[index] for index in indices)
        return dataclasses.replace(
            self,
            ids=tuple(self.ids[index] for index in chosen),
            paths=tuple(self.paths[index] for index in chosen),
            targets=self.targets[list(chosen)],
            read_boxes=None if self.read_boxes is None else partial(_read_chosen, self.read_boxes, chosen),
            official_size=len(self) if self.official_size is None else self.official_size,
        )


def _read_chosen(read_boxes: Callable[[int], Boxes], chosen: tuple[int, ...], index: int) -> Boxes:
    return read_boxes(chosen[index])


def read_in_threads(
    read: Callable[[int], T], count: int, progress: Callable[[int, int], None] | None = None
) -> Iterator[T]:
    """read(0), read(1), ... up to `count` of them, in order; `progress` is called with (done, count) after each."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for done, result in enumerate(pool.map(read, range(count)), start=1):
            yield result
            if progress is not None:
                progress(done, count)


def read_image(photo: Photo, upright: bool = False) -> Tensor:
    """One photo as RGB, uint8 (3, H, W), from its file or from what a program holds of it.

    photo: a path; a PIL image; or a NumPy array or tensor, (H, W), or with 1 to 4 channels (gray, gray and alpha, RGB,
    RGBA) first or last. Where both ends could be channels, a tensor has them first and an array last. Alpha is left
    out. Values are uint8; floats in [0, 1], times 255 and rounded; or uint16, as 16-bit files are read: gray divided
    by 257, rounded down, colours by their high byte. The same picture gives the same pixels in every form.
    The EXIF orientation is deliberately not applied to VOC, COCO and scenes: their boxes refer to the pixels as
    stored, and the release reads them so. `upright` applies it, for photos of one's own (a table has no boxes): a
    phone stores the sensor's pixels, and a photo held sideways would be seen lying on its side.
    Of a file with several frames the first is taken. One above Pillow's limit (179 million pixels) is read at a reduced
    size of at least 4096 pixels along its longer side.
    Raises DataError when a file is missing, broken, too large or of a format or depth that is not read (more than 16
    bits, floats), and for arrays of any other shape, type or range.
    """
    return read_photo(photo, upright).pixels.contiguous()


def read_photo(photo: Photo, upright: bool = True) -> PhotoRead:
    """As read_image, with what a reader of the photo may want to know of it; in memory channels may be last, as a
    photo is decoded and is resized fastest."""
    if isinstance(photo, str | os.PathLike):
        path = Path(photo)
        return _decode(read_content(path), path, upright)
    if isinstance(photo, Image.Image):
        try:
            return _as_read(photo, upright)
        except DataError:
            raise
        except Exception as error:  # it may still have to be decoded
            raise DataError(f"the PIL image cannot be decoded ({_reason(error)}); open it again") from error
    if isinstance(photo, np.ndarray | Tensor):
        pixels = _pixels_of_array(photo)
        return PhotoRead(pixels, (pixels.shape[2], pixels.shape[1]))
    raise DataError(f"a photo is a path, a PIL image, a NumPy array or a tensor, found {type(photo).__name__}")


def is_blank(pixels: Tensor) -> bool:
    """Whether a photo, uint8 (3, H, W), is of one colour: no contrast at all."""
    return bool((pixels == pixels[:, :1, :1]).all())


def read_content(path: Path) -> bytes:
    """The bytes of an image file; raises DataError when it is missing."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise DataError(
            f"{path}: cannot read the image file ({getattr(error, 'strerror', None) or error}); put it there, or fetch "
            "the data again"
        ) from error


def decode_image(content: bytes, path: Path, upright: bool = False) -> Tensor:
    """Decode the bytes of the image file `path` (named in errors) as `read_image` does."""
    return _decode(content, path, upright).pixels


def _decode(content: bytes, path: Path, upright: bool) -> PhotoRead:
    try:
        try:
            image = _opened(content)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            image = _opened_large(content)
        with image:
            return _quickly_read(image, content, upright) or _as_read(image, upright)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    except Exception as error:  # a broken file makes Pillow raise almost anything, even struct.error
        raise DataError(f"{path}: not a complete image file ({_reason(error)}); fetch it again") from error


def _quickly_read(image: Image.Image, content: bytes, upright: bool) -> PhotoRead | None:
    """A JPEG of three colours by torchvision, which gives Pillow's pixels in two thirds of the time; None where Pillow
    is to read it or to say what is wrong with it."""
    if decode_jpeg is None or image.format != "JPEG" or image.mode != "RGB" or _is_large(image):
        return None
    try:
        pixels = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    except RuntimeError:  # it is broken, or this torchvision was built without a JPEG reader
        return None
    if pixels.shape != (3, image.height, image.width):
        return None
    turn = _turn(image) if upright else None
    if turn is not None:
        pixels = _pixels_of(Image.fromarray(pixels.permute(1, 2, 0).numpy()).transpose(turn))
    return PhotoRead(pixels, (pixels.shape[2], pixels.shape[1]))


def _opened(content: bytes) -> Image.Image:
    """The image, not decoded yet; raises DataError where no reader knows its format."""
    try:
        return Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        if _is_heic(content):
            with contextlib.suppress(ImportError):
                importlib.import_module("pillow_heif").register_heif_opener()
                return Image.open(io.BytesIO(content))
            raise DataError("a HEIC photo; convert it to JPEG, or install pillow-heif") from None
        for pattern, what in UNSUPPORTED.items():
            if re.match(pattern, content, re.DOTALL):
                raise DataError(f"{what} that cannot be read here; convert it to JPEG or PNG") from None
        if content.strip(b"\0") and not content.startswith(KNOWN_STARTS):
            raise DataError("not an image file of any known format; give a JPEG or PNG") from None
        raise


def _opened_large(content: bytes) -> Image.Image:
    """As Pillow opens it, without its limit, which is one for the whole program."""
    for factory, accepts in Image.OPEN.values():
        if not accepts or accepts(content[:16]) is True:
            with contextlib.suppress(SyntaxError):  # so Pillow's readers say that it is of another format
                image = factory(io.BytesIO(content), "")
                if math.prod(image.size) <= LARGEST:
                    return image
                found, limit = math.prod(image.size) / 1e6, LARGEST / 1e6
                raise DataError(f"too large ({found:.0f} million pixels, the limit is {limit:.0f}); make it smaller")
    raise UnidentifiedImageError


def _is_heic(content: bytes) -> bool:
    brand = content[8:12]
    if content[4:8] != b"ftyp" or brand in (b"avif", b"avis"):
        return False
    return brand in HEIC_BRANDS or (brand in (b"mif1", b"msf1") and b"avif" not in content[16:64])


def _reason(error: Exception) -> str:
    """Why an image could not be read, in one line; Pillow names the buffer that it was given, which says nothing."""
    if isinstance(error, UnidentifiedImageError):
        return "its first bytes are damaged, or it is empty"
    return reason_of(error)


def _as_read(image: Image.Image, upright: bool) -> PhotoRead:
    size, is_first_frame, is_large = image.size, _has_more_frames(image), _is_large(image)
    if is_large and max(size) > REDUCED_SIDE:
        image.draft("RGB", (REDUCED_SIDE, REDUCED_SIDE))  # JPEG's decoder halves it as often as that allows
    image.load()  # some formats have the orientation behind the pixels
    turn = _turn(image) if upright else None
    if is_large and (factor := max(image.size) // REDUCED_SIDE) > 1:
        image = (image if image.mode in ("L", "RGB") else _to_rgb(image)).reduce(factor)
    image = image if turn is None else image.transpose(turn)
    return PhotoRead(_pixels_of(_to_rgb(image)), size[::-1] if turn in SIDEWAYS else size, is_first_frame)


def _is_large(image: Image.Image) -> bool:
    """Whether it is above Pillow's own limit, and read at reduced size."""
    return Image.MAX_IMAGE_PIXELS is not None and math.prod(image.size) > 2 * Image.MAX_IMAGE_PIXELS


def _pixels_of(image: Image.Image) -> Tensor:
    """An RGB image as uint8 (3, H, W), not copied into another order."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _has_more_frames(image: Image.Image) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # the frames behind the first may be damaged
        return False


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What sets an image upright. ImageOps.exif_transpose also writes the other EXIF fields anew, and fails on odd
    ones."""
    try:
        return TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # EXIF that cannot be read says nothing
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    bits = set(getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE) or ())
    if image.mode.startswith("I;16") and bits - {16}:
        raise DataError(f"a photo of {max(bits)} bits a pixel; convert it to 8 bits")
    # Netpbm's and, by some versions of Pillow, PNG's 16 bits are in 32; others' range is anybody's guess.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        kind = "floats" if image.mode == "F" else "integers"
        raise DataError(f"a photo of 32-bit {kind}, whose black and white are not known; convert it to 8 bits")
    if image.mode.startswith("I"):  # 16-bit grayscale, which Pillow would clip at 255 instead of scaling
        image = Image.fromarray(_gray_of_16_bits(np.asarray(image)))
    if image.mode in BY_WAY_OF:
        image = image.convert(BY_WAY_OF[image.mode])
    return image.convert("RGB")


def _gray_of_16_bits(values: np.ndarray) -> np.ndarray:
    return (values.clip(0, 65535) // 257).astype(np.uint8)


def _pixels_of_array(photo: np.ndarray | Tensor) -> Tensor:
    first = isinstance(photo, Tensor)  # where channels are if both ends could be
    if isinstance(photo, Tensor):
        photo = photo.detach().cpu()
        values = (photo.float() if photo.dtype == torch.bfloat16 else photo).numpy()
    else:
        values = np.asarray(photo, dtype=photo.dtype.newbyteorder("="))
    shape, channels = values.shape, range(1, 5)
    if values.ndim == 2:
        values = values[:, :, None]
    elif values.ndim != 3 or not (shape[0] in channels or shape[2] in channels):
        raise DataError(
            f"an array of shape {shape} is no photo; give (H, W), (H, W, C) or (C, H, W) with C of 1 to 4 channels"
        )
    elif shape[0] in channels and (first or shape[2] not in channels):
        values = values.transpose(1, 2, 0)
    if values.size == 0:
        raise DataError(f"an array of shape {shape} has no pixels")
    values = _eight_bits(values, gray=values.shape[2] == 1)
    values = values[:, :, :1] if values.shape[2] < 3 else values[:, :, :3]  # without alpha
    return torch.from_numpy(np.array(np.broadcast_to(values, (*values.shape[:2], 3)).transpose(2, 0, 1), order="C"))


def _eight_bits(values: np.ndarray, gray: bool) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.uint16:
        return _gray_of_16_bits(values) if gray else (values >> 8).astype(np.uint8)
    if values.dtype.kind != "f":
        raise DataError(f"a photo of {values.dtype} values; give uint8 in 0 to 255, or floats in 0 to 1")
    rounded = np.rint(values.astype(np.float64) * 255)
    if not (rounded.min() >= 0 and rounded.max() <= 255):  # so is NaN
        raise DataError(
            f"a photo of floats from {values.min():.4g} to {values.max():.4g}, wanted 0 to 1; divide 0 to 255 by 255, "
            "and give it before it is normalised"
        )
    return rounded.astype(np.uint8)
