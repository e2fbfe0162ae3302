"""What makes a trained model quick to ask: batch normalisation folded into convolutions, freed memory kept."""

import contextlib
import copy
import ctypes

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
PROBE_SIDE = 64  # pixels of what a network is tried on
TOLERANCE = 1e-3  # of the features' largest value; a wrong fold is off by about all of it


def keep_freed_memory() -> None:
    """Lets glibc reuse large freed blocks instead of handing them back to the system after every layer; fetching
    them anew costs more than half of a CPU training step. Has no effect on numbers, nor where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(M_MMAP_THRESHOLD, 2**30)
        mallopt(M_TOP_PAD, 2**28)


@torch.no_grad()
def folded(network: nn.Module) -> nn.Module:
    """A copy of a network of images (B, 3, H, W) in evaluation mode that computes the same, up to rounding, without
    the batch normalisations that directly follow a convolution: their scale and shift are in its weights.

    The network itself where that cannot be had: it takes no square of 64 px, or its copy would compute something else,
    because what a convolution gives goes elsewhere too.
    """
    copied = copy.deepcopy(network).eval()
    weight = next(copied.parameters())
    probe = torch.randn(1, 3, PROBE_SIDE, PROBE_SIDE, generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        before = copied(probe)
        pairs = _followers(copied, probe)
        names = {module: name for name, module in copied.named_modules()}
        for convolution, normalisation in pairs:
            _fold(copied, convolution, normalisation, names[normalisation])
        after = copied(probe)
    except (RuntimeError, AssertionError):  # of a network that wants images of another size
        return network
    is_same = (after - before).abs().max() <= TOLERANCE * before.abs().max()
    return copied if is_same else network


def _followers(network: nn.Module, probe: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """Which batch normalisation is given what which convolution has made; those that work once a pass only."""
    made: list[tuple[nn.Conv2d, Tensor]] = []
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []

    def note(convolution: nn.Conv2d, _: object, output: Tensor) -> None:
        made.append((convolution, output))  # held, so that no other tensor takes its place

    def look(normalisation: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        pairs.extend((convolution, normalisation) for convolution, output in made if output is inputs[0])

    modules = list(network.modules())
    hooks = [each.register_forward_hook(note) for each in modules if isinstance(each, nn.Conv2d)]
    hooks += [each.register_forward_pre_hook(look) for each in modules if isinstance(each, nn.BatchNorm2d)]
    try:
        network(probe)
    finally:
        for hook in hooks:
            hook.remove()
    calls = [convolution for convolution, _ in made]
    return [(conv, norm) for conv, norm in pairs if calls.count(conv) == 1 and [n for _, n in pairs].count(norm) == 1]


def _fold(network: nn.Module, convolution: nn.Conv2d, normalisation: nn.BatchNorm2d, name: str) -> None:
    if normalisation.running_mean is None or normalisation.running_var is None:
        return  # it takes the statistics of each batch
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        normalisation.running_mean,
        normalisation.running_var,
        normalisation.eps,
        normalisation.weight,
        normalisation.bias,
    )
    # timm's batch normalisation goes on with an activation of its own.
    rest = [each for each in normalisation.children() if not isinstance(each, nn.Identity)]
    network.set_submodule(name, nn.Sequential(*rest) if rest else nn.Identity())
