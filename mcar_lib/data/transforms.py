"""From a stored photo to the network input, as in the release: square resize, flip, jitter."""

import hashlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from mcar_lib.backbones import IMAGENET_MEAN, IMAGENET_STD
from mcar_lib.data.image_set import ImageSet, read_in_threads
from mcar_lib.model import MCAR


def resize_square(image: Tensor, size: int) -> Tensor:
    """Resize the whole photo to a square, without a crop: the aspect ratio is not kept (release behaviour).

    image: uint8 (3, H, W) -> uint8 (3, size, size). Bilinear with antialias, as PIL does it.
    """
    return functional.resize(image, [size, size], interpolation=InterpolationMode.BILINEAR, antialias=True)


def augment(
    image: Tensor, generator: torch.Generator, flip: bool = True, jitter: float = 0.3, crop_area: float = 1.0
) -> Tensor:
    """Random horizontal flip (p = 0.5), colour jitter and random resized crop of one training image.

    image: uint8 (3, S, S) -> uint8 (3, S, S). Brightness, contrast and saturation are each scaled by a factor
    that is uniform in [max(0, 1 - jitter), 1 + jitter], in random order, as torchvision's ColorJitter does. With
    crop_area below 1 a window of crop_area to all of the area, uniform, and of an aspect of 3/4 to 4/3, uniform in its
    logarithm, is resized to the square, as torchvision's RandomResizedCrop does; a side that would be too long is cut.
    Every random number comes from `generator`; flip and jitter do not depend on one another or on the crop.
    """
    coin = torch.rand((), generator=generator).item()
    order = torch.randperm(3, generator=generator).tolist()
    uniform = torch.rand(3, generator=generator).tolist()
    if crop_area < 1:
        image = functional.resized_crop(image, *_window(image.shape[-1], crop_area, generator), list(image.shape[-2:]))
    if flip and coin < 0.5:
        image = functional.horizontal_flip(image)
    if jitter == 0:
        return image
    adjusts = (functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation)
    low, high = max(0.0, 1.0 - jitter), 1.0 + jitter
    for which in order:
        image = adjusts[which](image, low + (high - low) * uniform[which])
    return image


def _window(size: int, crop_area: float, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a random window of a square."""
    area, aspect, down, right = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
    area, ratio = crop_area + (1 - crop_area) * area, (3 / 4) ** (1 - 2 * aspect)
    height, width = (min(size, max(1, round(size * math.sqrt(area * each)))) for each in (1 / ratio, ratio))
    return round(down * (size - height)), round(right * (size - width)), height, width


def sample_generator(seed: int, epoch: int, index: int) -> torch.Generator:
    """A CPU generator for one image in one epoch; it depends on these three numbers and on nothing else.

    So an image is augmented alike for any number of workers and after any resume.
    """
    digest = hashlib.sha256(f"{seed}/{epoch}/{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def normalise(images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """(image / 255 - mean) / std, by channel; uint8 (B, 3, S, S) -> float32 (B, 3, S, S), device kept."""
    shift = torch.tensor(mean, dtype=torch.float32, device=images.device).view(3, 1, 1)
    scale = torch.tensor(std, dtype=torch.float32, device=images.device).view(3, 1, 1)
    return (images.to(torch.float32) / 255.0 - shift) / scale


def network_input(model: MCAR, images: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) on any device -> float32 in channels_last on the model's device, normalised as it wants."""
    images = images.to(model.convclass.weight.device)
    return normalise(images, model.mean, model.std).contiguous(memory_format=torch.channels_last)


class ResizedImages(Dataset[Tensor]):
    """The photos of an image set as squares: item i is uint8 (3, size, size).

    Each photo is decoded and resized once and the squares are kept in memory when all of them fit into
    `memory_limit_bytes`; otherwise each access reads its file. Both ways give the same pixels.
    `progress` is called with (photos done, photos in all) while the memory is filled.
    """

    def __init__(
        self,
        image_set: ImageSet,
        size: int,
        memory_limit_bytes: int = 1 << 30,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self.image_set = image_set
        self.size = size
        self.kept: Tensor | None = None
        if len(image_set) * 3 * size * size <= memory_limit_bytes:
            self.kept = torch.empty((len(image_set), 3, size, size), dtype=torch.uint8)
            for index, square in enumerate(read_in_threads(self._read, len(image_set), progress)):
                self.kept[index] = square

    def __len__(self) -> int:
        return len(self.image_set)

    def __getitem__(self, index: int) -> Tensor:
        return self._read(index) if self.kept is None else self.kept[index]

    def _read(self, index: int) -> Tensor:
        return resize_square(self.image_set.image(index), self.size)
