"""MCAR: a global stream, the parameter-free region module, and a local stream that shares every weight with it.

Symbols of the paper: x images (B, 3, H, W); A = f(x) features (B, C, h, w) of stride 32; one 1x1 convolution (W, b)
with K outputs; g, l global and local scores (B, K), here as logits; N regions an image; tau the localisation threshold.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mcar_lib.backbones import IMAGENET_MEAN, IMAGENET_STD, STRIDE, Triple, build_backbone
from mcar_lib.errors import ConfigError
from mcar_lib.regions import (
    BOX_SOURCES,
    BoxSource,
    Regions,
    Selection,
    attentional_regions,
    check_num_regions,
    check_selection,
    check_threshold,
    control_boxes,
    crop_regions,
)
from mcar_lib.weights import load_release_checkpoint as load_release_checkpoint

Pooling = Literal["avg", "max", "gwp"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclass(frozen=True)
class Look:
    """Which regions the local stream looks at, and how closely, in evaluation mode; by default at all N, at the size
    of the input, as in training.

    floor: a region whose class has a global score (a probability) below it is not looked at; maybe none is, and the
    prediction is that of the global stream. share: of an image's regions the first ones are looked at, as few as make
    up this share of the scores of all N, at least one. local_size: side of the crops in pixels, a multiple of 32 that
    is not above the input's; None for the input's own.
    Raises ConfigError for a value out of range. Source: this project's; the paper looks at all.
    """

    floor: float = 0.0
    share: float = 1.0
    local_size: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise ConfigError(f"floor is {self.floor}; it must lie in 0 .. 1, below 1: a region's least global score")
        if not 0 < self.share <= 1:
            raise ConfigError(f"share is {self.share}; it must lie above 0, up to 1: of the scores of all regions")
        if self.local_size is not None:
            check_image_size((self.local_size,))

    def chosen(self, scores: Tensor) -> Tensor:
        """Which regions are looked at: scores of their classes (B, N), as Regions has them -> bool (B, N)."""
        chosen = scores >= self.floor
        if self.share < 1:
            before = scores.cumsum(dim=1) - scores  # of the regions before each
            enough = before >= self.share * scores.sum(dim=1, keepdim=True)
            enough[:, 0] = False
            chosen = chosen & ~enough
        return chosen


EVERYTHING = Look()


class Output(NamedTuple):
    """Logits of both streams (B, K) and the regions between them; the last two are None with the local stream off.

    The regions are all N, whatever the model's Look: Look.chosen(regions.scores) tells those that were looked at. The
    local logits of an image of which none was are -inf.
    """

    global_logits: Tensor
    local_logits: Tensor | None
    regions: Regions | None

    @property
    def scores(self) -> Tensor:
        """The prediction (B, K) in [0, 1] of both streams, or of the global one alone."""
        scores = torch.sigmoid(self.global_logits)
        return scores if self.local_logits is None else fuse(scores, torch.sigmoid(self.local_logits))


def fuse(global_scores: Tensor, local_scores: Tensor) -> Tensor:
    """The paper's prediction max(g, l), element by element; scores, or their logits, of any one shape."""
    return torch.maximum(global_scores, local_scores)


class MCAR(nn.Module):
    """The two-stream model. Over its backbone it has only the 1x1 convolution's C * K + K parameters.

    features: (B, 3, H, W) -> (B, num_features, H/32, W/32). local_stream=False is the global-only baseline: the same
    code with the second stream off. box_source: boxes other than the module's own (see regions.control_boxes).
    generator: for what is drawn at random only. mean, std: by channel, the normalisation
    of the images that the backbone was trained with (see data.transforms.network_input); they travel with the model.
    Raises ConfigError on a bad pooling, N, tau or selection.
    Autocast acts on the pass over the crops alone: in bf16 the global stream would place most boxes elsewhere.
    Source: the paper's method; logits in place of sigmoids (max and sigmoid commute), which is safe in bf16.
    """

    def __init__(
        self,
        features: nn.Module,
        num_features: int,
        num_classes: int,
        pooling: Pooling = "avg",
        num_regions: int = 4,
        threshold: float = 0.5,
        selection: Selection = "top",
        local_stream: bool = True,
        box_source: BoxSource = "maps",
        generator: torch.Generator | None = None,
        mean: Triple = IMAGENET_MEAN,
        std: Triple = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ConfigError(f"pooling is {pooling!r}; choose one of {', '.join(POOLINGS)}")
        if box_source not in BOX_SOURCES:
            raise ConfigError(f"box_source is {box_source!r}; choose one of {', '.join(BOX_SOURCES)}")
        check_selection(selection)
        check_num_regions(num_regions, num_classes)
        check_threshold(threshold)
        self.features = features
        self.convclass = nn.Conv2d(num_features, num_classes, kernel_size=1)
        self.pooling: Pooling = pooling
        self.num_regions = num_regions
        self.threshold = threshold
        self.selection: Selection = selection
        self.box_source: BoxSource = box_source
        self.local_stream = local_stream
        self.generator = generator
        self.mean, self.std = mean, std
        self.recompute = False  # of training: see pass_over_crops
        self.look = EVERYTHING  # of evaluation: see Look
        # Of evaluation without gradients: the same features computed quicker, of the weights as they are.
        self.local_features: Callable[[Tensor], Tensor] | None = None

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.convclass.weight.device

    def forward(self, images: Tensor, between: Callable[[Tensor], None] | None = None) -> Output:
        """images: (B, 3, H, W) normalised float, H and W multiples of 32. Returns Output.

        between: given the global logits before the pass over the crops, if there is one. Training goes back through the
        global stream there, so that its activations are freed first; the Output's global logits then have no graph.
        """
        check_image_size(images.shape[-2:])
        if self.training or torch.is_grad_enabled():
            self.local_features = None  # the weights may be about to change
        with _in_float32(images):
            global_logits, regions = self.pass_over_images(images)
            if regions is not None and between is not None:
                between(global_logits)
                global_logits = global_logits.detach()
        if regions is None:
            return Output(global_logits, None, None)
        looks_at_all = self.training or self.look == EVERYTHING
        local_logits = self.pass_over_crops(images, regions.boxes) if looks_at_all else self.look_at(images, regions)
        return Output(global_logits, local_logits, regions)

    def load_state_dict(self, *arguments: Any, **options: Any) -> Any:
        self.local_features = None
        return super().load_state_dict(*arguments, **options)

    def _apply(self, *arguments: Any, **options: Any) -> "MCAR":  # of .to, .cuda, .half and their like
        before = self.convclass.weight.data_ptr()
        super()._apply(*arguments, **options)
        if self.convclass.weight.data_ptr() != before:
            self.local_features = None
        return self

    def pass_over_images(self, images: Tensor) -> tuple[Tensor, Regions | None]:
        """The global stream: images (B, 3, H, W) -> logits of g (B, K), and regions if there is a local stream."""
        feature_map = self.features(images)  # A: (B, C, h, w)
        global_logits = self.classify(self.pool(feature_map))
        if not self.local_stream:
            return global_logits, None
        return global_logits, self.find_regions(feature_map, global_logits, images.shape[-2:])

    def pass_over_crops(self, images: Tensor, boxes: Tensor) -> Tensor:
        """The local stream: images (B, 3, H, W) and boxes (B, N, 4) in their pixels -> logits of l (B, K).

        With `recompute` the backward pass computes each block's activations again instead of keeping them: the same
        numbers for less memory and more time.
        """
        region_logits = self._logits_of_crops(crop_regions(images, boxes))  # (B*N, K)
        return region_logits.view(images.shape[0], self.num_regions, -1).amax(dim=1)

    def look_at(self, images: Tensor, regions: Regions) -> Tensor:
        """The local stream as `look` says, over the chosen crops alone: logits of l (B, K), -inf where none is chosen.

        Reads back how many are chosen. Raises ConfigError for a local size above that of the images (B, 3, H, W).
        """
        size = self.look.local_size
        if size is not None and size > min(images.shape[-2:]):
            raise ConfigError(
                f"local_size is {size}; it must not be above the {min(images.shape[-2:])} px of the input"
            )
        chosen = self.look.chosen(regions.scores)  # (B, N)
        local_logits = images.new_full((*chosen.shape, self.convclass.out_channels), -torch.inf, dtype=torch.float32)
        local_logits[chosen] = self.region_logits(images, regions.boxes, chosen, size)
        return local_logits.amax(dim=1)

    def region_logits(self, images: Tensor, boxes: Tensor, chosen: Tensor, size: int | None = None) -> Tensor:
        """Logits (M, K) of the M chosen (B, N) of the boxes (B, N, 4), each cropped to a square of `size`, or to that
        of the images (B, 3, H, W)."""
        if chosen.all():  # no image is copied for its crops
            crops = crop_regions(images, boxes, size)
        else:
            crops = crop_regions(images[chosen.nonzero()[:, 0]], boxes[chosen][:, None], size)
        if not len(crops):
            return images.new_empty((0, self.convclass.out_channels), dtype=torch.float32)
        return self._logits_of_crops(crops)

    def _logits_of_crops(self, crops: Tensor) -> Tensor:
        """(M, 3, H, W) -> (M, K)."""
        return self.classify(self.pool(self.features_of_crops(crops)))

    def features_of_crops(self, crops: Tensor) -> Tensor:
        """The local stream's features: (M, 3, H, W) -> (M, C, h, w)."""
        if self.training and self.recompute:
            return _recomputed(self.features)(crops)
        return (self.local_features or self.features)(crops)

    def pool(self, feature_map: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 1, 1): average, maximum, or their mean (gwp)."""
        if self.pooling == "avg":
            return feature_map.mean(dim=(2, 3), keepdim=True)
        if self.pooling == "max":
            return feature_map.amax(dim=(2, 3), keepdim=True)
        return (feature_map.mean(dim=(2, 3), keepdim=True) + feature_map.amax(dim=(2, 3), keepdim=True)) / 2

    def classify(self, pooled: Tensor) -> Tensor:
        """(B, C, 1, 1) -> logits (B, K)."""
        return self.class_logits(pooled).flatten(1)

    def class_logits(self, feature_map: Tensor) -> Tensor:
        """The shared 1x1 convolution, (B, C, h, w) -> (B, K, h, w), always in float32: under bf16 the attention maps
        would be too coarse to localise in."""
        with _in_float32(feature_map):
            return F.conv2d(feature_map.float(), self.convclass.weight, self.convclass.bias)

    @torch.no_grad()
    def find_regions(self, feature_map: Tensor, global_logits: Tensor, image_size: Sequence[int]) -> Regions:
        """The region module on features (B, C, h, w) and global logits (B, K); carries no gradient."""
        found = attentional_regions(
            self.class_logits(feature_map),
            global_logits,  # sigmoids saturate, and the lower of two classes at 1.0 would be chosen
            (int(image_size[0]), int(image_size[1])),
            self.num_regions,
            self.threshold,
            self.selection,
            self.generator,
        )
        boxes = control_boxes(found.boxes, self.box_source, (int(image_size[0]), int(image_size[1])), self.generator)
        return found._replace(boxes=boxes, scores=torch.sigmoid(found.scores))


def mcar_loss(output: Output, targets: Tensor) -> tuple[Tensor, Tensor | None]:
    """Global and local loss: BCE with logits, each the mean over batch and classes. Their sum is the paper's loss.

    targets: (B, K) float in {0, 1}. The second is None with the local stream off.
    """
    global_loss = F.binary_cross_entropy_with_logits(output.global_logits, targets)
    if output.local_logits is None:
        return global_loss, None
    return global_loss, F.binary_cross_entropy_with_logits(output.local_logits, targets)


def build_mcar(
    backbone: str, num_classes: int, weights: str = "imagenet", *, seed: int | None = None, **options: Any
) -> MCAR:
    """An MCAR model over a named backbone (see mcar_lib.backbones) with that backbone's mean and std.

    options: pooling, num_regions, threshold, selection, box_source, local_stream, generator, as MCAR takes them. seed:
    of all that is drawn; None leaves torch's own state. The classifier is drawn alike over any starting weights.
    """
    if seed is not None:
        torch.manual_seed(seed)  # weights "none" are drawn too
    built = build_backbone(backbone, weights)
    if seed is not None:
        torch.manual_seed(seed)  # the classifier's do not depend on how many numbers the backbone took
    if options.get("selection") == "random" or options.get("box_source") == "random boxes":
        options.setdefault("generator", torch.Generator())
    return MCAR(built.features, built.num_features, num_classes, mean=built.mean, std=built.std, **options)


def check_image_size(image_size: Sequence[int]) -> None:
    """Raises ConfigError unless every side is a positive multiple of 32."""
    if any(side < STRIDE or side % STRIDE for side in image_size):
        sides = " x ".join(str(int(side)) for side in image_size)
        raise ConfigError(f"image size {sides}: each side must be a positive multiple of {STRIDE}, the stride")


def _recomputed(features: nn.Module) -> Callable[[Tensor], Tensor]:
    """The same function, block by block, with activations that are computed again when gradients need them."""

    def compute(x: Tensor) -> Tensor:
        for block in blocks_of(features):
            contexts = functools.partial(_first_and_again, block)
            x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
        return x

    return compute


def blocks_of(module: nn.Module) -> Iterator[nn.Module]:
    """The parts that follow one another. Layers between them stay together: one may work in place on what another has
    made."""
    if not isinstance(module, nn.Sequential):
        yield module
        return
    for are_layers, parts in itertools.groupby(module, key=lambda part: not any(part.children())):
        if are_layers:
            yield nn.Sequential(*parts)
        else:
            yield from (block for part in parts for block in blocks_of(part))


def _first_and_again(block: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    return nullcontext(), _statistics_kept(block)


@contextmanager
def _statistics_kept(block: nn.Module) -> Iterator[None]:
    """Meanwhile batch normalisation adds to copies of its running statistics, as it has added to them before."""
    modules = [module for module in block.modules() if module._buffers]
    before = [dict(module._buffers) for module in modules]
    for module in modules:
        module._buffers.update({name: value.clone() for name, value in module._buffers.items() if value is not None})
    try:
        yield
    finally:
        for module, buffers in zip(modules, before, strict=True):
            module._buffers.update(buffers)


def _in_float32(values: Tensor) -> AbstractContextManager[object]:
    """Autocast off. A graph that is being exported runs without it, and torch.export.load cannot read the context."""
    return nullcontext() if torch.compiler.is_exporting() else torch.autocast(values.device.type, enabled=False)
