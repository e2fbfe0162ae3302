"""Maps of every class of an image: what the region module is given, and an attribution baseline in its place.

n images, B of them a batch, K classes, S the side of the square network input.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mcar_lib.data.squares import ResizedImages
from mcar_lib.errors import ConfigError
from mcar_lib.model import MCAR
from mcar_lib.training import network_input

OCCLUSION_CELLS = 6  # patches on a side, next to one another


class ClassMaps(NamedTuple):
    """Maps of every class of every image: scores (n, K) float32, global, as logits; cells (n, K, h, w) float32, whose
    sigmoid is the map before upsampling; size: S."""

    scores: Tensor
    cells: Tensor
    size: int


@torch.no_grad()
def class_maps(model: MCAR, images: Tensor) -> tuple[Tensor, Tensor]:
    """What the region module is given: global scores (B, K) and the maps (B, K, h, w) of all classes, both before the
    sigmoid, of images uint8 (B, 3, S, S)."""
    feature_map = model.features(network_input(model, images))
    return model.classify(model.pool(feature_map)), model.class_logits(feature_map)


@torch.no_grad()
def maps_of(model: MCAR, squares: ResizedImages, batch_size: int = 32) -> ClassMaps:
    """class_maps of all images, on the CPU. Raises ConfigError for a model in training mode."""
    _check_evaluates(model)
    parts = []
    for first in range(0, len(squares), batch_size):
        images = torch.stack([squares[index] for index in range(first, min(first + batch_size, len(squares)))])
        parts.append([part.cpu() for part in class_maps(model, images)])
    scores, cells = (torch.cat(column) for column in zip(*parts, strict=True))
    return ClassMaps(scores, cells, squares.size)


def _check_evaluates(model: MCAR) -> None:
    if model.training:
        raise ConfigError("the model is in training mode, where batches change its statistics; call model.eval()")


@torch.no_grad()
def occlusion(model: MCAR, image: Tensor) -> Tensor:
    """How much each class's global logit falls where a patch of the image is covered with the mean colour.

    image: uint8 (3, S, S). Returns (K, 6, 6) float32, a cell for each patch of a sixth of the side; 36 passes of the
    global stream serve all classes. Patches do not overlap: captum gives a cell the mean of the patches over it, and at
    the border, where these are fewer, a cell beside an object would be as high as one on it.
    Source: Zeiler and Fergus 2014, as captum computes it, on a mask of cells in place of pixels.
    """
    from captum.attr import Occlusion

    inputs = network_input(model, image[None])

    def logits(mask: Tensor) -> Tensor:
        scores: Tensor = model.classify(model.pool(model.features(inputs * F.interpolate(mask, inputs.shape[-2:]))))
        return scores

    mask = torch.ones(1, 1, OCCLUSION_CELLS, OCCLUSION_CELLS, device=inputs.device)
    found: Tensor = Occlusion(logits).attribute(mask, sliding_window_shapes=(1, 1, 1))
    return found[:, 0].float()


def occlusion_maps(model: MCAR, squares: ResizedImages, scores: Tensor) -> ClassMaps:
    """Occlusion of all images as maps that the module's own steps take: negative values cut, the highest of a map 1.

    scores: (n, K) global scores of these images, which choose the classes as they do for the model's maps.
    """
    _check_evaluates(model)
    found = torch.stack([occlusion(model, squares[index]).cpu() for index in range(len(squares))]).clamp(min=0)
    highest = found.amax(dim=(-2, -1), keepdim=True)
    return ClassMaps(scores, torch.logit(found / highest.clamp(min=torch.finfo(found.dtype).tiny)), squares.size)
