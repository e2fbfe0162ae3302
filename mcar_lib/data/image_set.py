"""What every data set looks like to the rest of the library: images, labels, ids, and boxes if any."""

import dataclasses
import io
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset

from mcar_lib.errors import DataError

T = TypeVar("T")


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
        return read_image(self.paths[index], self.upright)

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


def read_image(path: Path | str, upright: bool = False) -> Tensor:
    """Read one photo as RGB, uint8 (3, H, W); raises DataError when it is missing, truncated or no image.

    The EXIF orientation is deliberately not applied to VOC, COCO and scenes: their boxes refer to the pixels as
    stored, and the release reads them so. `upright` applies it, for photos of one's own (a table has no boxes): a
    phone stores the sensor's pixels, and a photo held sideways would be seen lying on its side.
    """
    path = Path(path)
    return decode_image(read_content(path), path, upright)


def read_content(path: Path) -> bytes:
    """The bytes of an image file; raises DataError when it is missing."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: cannot read the image file ({error.strerror or error}); put it there, or fetch the data again"
        ) from error


def decode_image(content: bytes, path: Path, upright: bool = False) -> Tensor:
    """Decode the bytes of the image file `path` (named in errors) as `read_image` does."""
    try:
        with Image.open(io.BytesIO(content)) as image:
            pixels = np.array(_to_rgb(ImageOps.exif_transpose(image) if upright else image))
    except Exception as error:  # a broken file makes Pillow raise almost anything, even struct.error
        raise DataError(f"{path}: not a complete image file ({error}); fetch it again") from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def is_blank(pixels: Tensor) -> bool:
    """Whether a photo uint8 (3, H, W) is of one colour."""
    return bool((pixels == pixels[:, :1, :1]).all())


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grayscale, which Pillow would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    if image.mode in ("P", "PA"):  # by way of RGBA, so that a transparent palette entry keeps its colour
        image = image.convert("RGBA")
    return image.convert("RGB")
