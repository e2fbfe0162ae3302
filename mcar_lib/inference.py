"""What makes a trained model quick to ask: batch normalisation folded into convolutions, these as oneDNN computes them
quickest, freed memory kept."""

import collections
import contextlib
import copy
import ctypes
from collections.abc import Callable
from typing import Any, TypeGuard

import torch
import torch.backends.mkldnn
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3  # malloc.h
PROBE_SIDE = 64  # pixels of what a network is tried on
TOLERANCE = 1e-3  # of the features' largest value; a wrong fold is off by about all of it


def keep_freed_memory(kept: bool = True) -> None:
    """Lets glibc reuse large freed blocks instead of handing them back to the system after every layer; fetching
    them anew costs more than half of a CPU training step. What is kept in pieces that nothing fits into is lost: not
    kept, a step takes more time and, where it holds little at once, far less memory. Has no effect on numbers, nor
    where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1 if kept else 2**26)  # what glibc comes to by itself
        mallopt(M_MMAP_THRESHOLD, 2**30 if kept else 2**25)
        mallopt(M_TOP_PAD, 2**28 if kept else 2**17)


def folded(network: nn.Module) -> nn.Module:
    """A copy of a network of images (B, 3, H, W) in evaluation mode that computes the same, up to rounding, without
    the batch normalisations that directly follow a convolution: their scale and shift are in its weights.

    The network itself where that cannot be had: it takes no square of 64 px, or its copy would compute something else,
    because what a convolution gives goes elsewhere too.
    """
    return _changed(network, _fold_all)


def packed(network: nn.Module) -> nn.Module:
    """A copy of such a network, for the CPU and without gradients, that computes the same: oneDNN keeps the weights of
    each convolution in the order that it reads them in, in place of sorting them in every pass, and applies the ReLU
    that directly follows one while it writes.

    The network itself where that cannot be had; these operations are torch's own, but torch.compile is what they are
    for, so that another version may lack them.
    """
    return _changed(network, _pack_all) if torch.backends.mkldnn.is_available() else network


@torch.no_grad()
def _changed(network: nn.Module, change: Callable[[nn.Module, Tensor], None]) -> nn.Module:
    """A changed copy that shares the weights that stay; the network itself where the copy computes something else."""
    shared = {id(each): each for each in (*network.parameters(), *network.buffers())}
    copied = copy.deepcopy(network, shared).eval()
    weight = next(copied.parameters())
    probe = torch.randn(1, 3, PROBE_SIDE, PROBE_SIDE, generator=torch.Generator().manual_seed(0)).to(weight)
    try:
        before = copied(probe)
        change(copied, probe)
        after = copied(probe)
    # It wants images of another size, or torch has other operations.
    except (RuntimeError, AssertionError, AttributeError, TypeError):
        return network
    is_same = (after - before).abs().max() <= TOLERANCE * before.abs().max()
    return copied if is_same else network


def _followers(network: nn.Module, probe: Tensor, kinds: type | tuple[type, ...]) -> list[tuple[nn.Conv2d, nn.Module]]:
    """Which module of these kinds is given what which convolution has made; those that work once a pass only."""
    made: list[tuple[nn.Conv2d, Tensor]] = []
    pairs: list[tuple[nn.Conv2d, nn.Module]] = []
    worked: collections.Counter[nn.Module] = collections.Counter()

    def note(convolution: nn.Conv2d, _: object, output: Tensor) -> None:
        worked[convolution] += 1
        made.append((convolution, output))  # held, so that no other tensor takes its place

    def look(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        worked[module] += 1
        pairs.extend((convolution, module) for convolution, output in made if output is inputs[0])

    modules = list(network.modules())
    hooks = [each.register_forward_hook(note) for each in modules if isinstance(each, nn.Conv2d)]
    hooks += [each.register_forward_pre_hook(look) for each in modules if isinstance(each, kinds)]
    try:
        network(probe)
    finally:
        for hook in hooks:
            hook.remove()
    return [pair for pair in pairs if all(worked[each] == 1 for each in pair)]


def _fold_all(network: nn.Module, probe: Tensor) -> None:
    names = {module: name for name, module in network.named_modules()}
    for convolution, normalisation in _followers(network, probe, nn.BatchNorm2d):
        assert isinstance(normalisation, nn.BatchNorm2d)
        _fold(network, convolution, normalisation, names[normalisation])


def _fold(network: nn.Module, convolution: nn.Conv2d, normalisation: nn.BatchNorm2d, name: str) -> None:
    if normalisation.running_mean is None or normalisation.running_var is None:
        return  # it takes the statistics of each batch
    # In double precision, so that weights are rounded once: half the error of the scores.
    fused = fuse_conv_bn_eval(copy.deepcopy(convolution).double(), copy.deepcopy(normalisation).double())
    fused = fused.to(convolution.weight.dtype)
    convolution.weight, convolution.bias = fused.weight, fused.bias
    # timm's batch normalisation goes on with an activation of its own.
    rest = [each for each in normalisation.children() if not isinstance(each, nn.Identity)]
    network.set_submodule(name, nn.Sequential(*rest) if rest else nn.Identity())


def _pack_all(network: nn.Module, probe: Tensor) -> None:
    names = {module: name for name, module in network.named_modules()}
    behind = dict(_followers(network, probe, (nn.ReLU, nn.ReLU6)))
    for convolution in filter(_is_plain, list(names)):
        activation = behind.get(convolution)
        network.set_submodule(names[convolution], _Packed(convolution, activation))
        if activation is not None:
            network.set_submodule(names[activation], nn.Identity())


def _is_plain(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    """Whether it is a convolution that pads by numbers of zeros, and nothing else."""
    return type(module) is nn.Conv2d and module.padding_mode == "zeros" and not isinstance(module.padding, str)


class _Packed(nn.Module):
    """A convolution by oneDNN, with the ReLU or ReLU6 behind it. Weights are sorted when the shape of the input is
    another than before: which order is quickest depends on it."""

    def __init__(self, convolution: nn.Conv2d, activation: nn.Module | None) -> None:
        super().__init__()
        self.bias = convolution.bias
        self.weight = convolution.weight
        geometry = (convolution.padding, convolution.stride, convolution.dilation)
        self.geometry: tuple[Any, ...] = (*map(list, geometry), convolution.groups)
        limited = isinstance(activation, nn.ReLU6)
        name = "none" if activation is None else "hardtanh" if limited else "relu"
        self.activation = (name, [0.0, 6.0] if limited else [], "")
        self.last: tuple[torch.Size, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": None}  # a sorted tensor can be neither copied nor pickled

    def forward(self, x: Tensor) -> Tensor:
        last = self.last  # taken once: threads may share the network
        if last is None or last[0] != x.shape:
            reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
            last = self.last = x.shape, reorder(self.weight.detach().to_mkldnn(), *self.geometry, x.shape)
        compute = torch.ops.mkldnn._convolution_pointwise
        made: Tensor = compute(x, last[1], self.bias, *self.geometry, *self.activation)
        return made
