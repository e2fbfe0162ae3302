"""From a stored photo to the network input, as in the release: square resize, flip, jitter."""

import functools
import hashlib
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mcar_lib.backbones import IMAGENET_MEAN, IMAGENET_STD
from mcar_lib.model import MCAR


def resize_square(image: Tensor, size: int) -> Tensor:
    """Resize the whole photo to a square, without a crop: the aspect ratio is not kept (release behaviour).

    image: uint8 (3, H, W) -> uint8 (3, size, size). Bilinear with antialias, as PIL does it.
    """
    return F.interpolate(image[None], (size, size), mode="bilinear", antialias=True)[0].contiguous()


class Colours(NamedTuple):
    """What the jitter of one image is to be: its three kinds in order, int64 (3,), and the factor of each, (3,)."""

    kinds: Tensor
    factors: Tensor


def crop_and_flip(
    image: Tensor, generator: torch.Generator, flip: bool = True, jitter: float = 0.3, crop_area: float = 1.0
) -> tuple[Tensor, Colours]:
    """One training image, uint8 (3, S, S), cropped and flipped at random, and the colour jitter that was drawn for it.

    With crop_area below 1 a window of crop_area to all of the area, uniform, and of an aspect of 3/4 to 4/3, uniform in
    its logarithm, is resized to the square, as torchvision's RandomResizedCrop does; a side that would be too long is
    cut. Factors are uniform in [max(0, 1 - jitter), 1 + jitter]. Every random number comes from `generator`; flip and
    jitter do not depend on one another or on the crop.
    """
    coin = torch.rand((), generator=generator).item()
    kinds = torch.randperm(3, generator=generator)
    uniform = torch.rand(3, generator=generator)
    if crop_area < 1:
        top, left, height, width = _window(image.shape[-1], crop_area, generator)
        image = resize_square(image[:, top : top + height, left : left + width], image.shape[-1])
    if flip and coin < 0.5:
        image = image.flip(-1)
    low, high = max(0.0, 1.0 - jitter), 1.0 + jitter
    return image, Colours(kinds, low + (high - low) * uniform[kinds])


def jitter_colours(images: Tensor, kinds: Tensor, factors: Tensor) -> Tensor:
    """Brightness (0), contrast (1) and saturation (2) of each image, in its own order, on whatever device it is.

    images: uint8 (B, 3, S, S); kinds: int64 (B, 3); factors: (B, 3), of the kinds. Each step blends the image with what
    it would be at factor 0 (black, its mean gray, its grays) and rounds down to whole levels, as torchvision's
    ColorJitter does on uint8; a level may differ from torchvision's by rounding.
    """
    for kind, factor in zip(kinds.view(-1, 3, 1, 1, 1).unbind(1), factors.view(-1, 3, 1, 1, 1).unbind(1), strict=True):
        red, green, blue = images.float().split(1, dim=1)
        grays = (red * 0.2989 + green * 0.587 + blue * 0.114).floor_()  # (B, 1, S, S)
        others = torch.where(kind == 1, grays.mean(dim=(1, 2, 3), keepdim=True), grays) * (kind > 0)
        images = (images * factor + others * (1 - factor)).clamp_(0, 255).to(torch.uint8)
    return images


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
    shift, scale = (_by_channel(tuple(values), images.device) for values in (mean, std))
    return (images.to(torch.float32) / 255.0 - shift) / scale


@functools.lru_cache(maxsize=32)
def _by_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Made once: a copy from pageable memory makes a GPU wait."""
    return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)


def network_input(model: MCAR, images: Tensor) -> Tensor:
    """uint8 (B, 3, S, S) on any device -> float32 in channels_last on the model's device, normalised as it wants."""
    images = images.to(model.device, non_blocking=True)
    return normalise(images, model.mean, model.std).contiguous(memory_format=torch.channels_last)
