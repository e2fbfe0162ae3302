"""How much memory a run takes, told before it is started, and how much is free: how many runs fit side by side."""

import functools
import itertools
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from mcar_lib.backbones import build_backbone
from mcar_lib.data.squares import MEMORY_LIMIT
from mcar_lib.errors import ConfigError
from mcar_lib.model import blocks_of
from mcar_lib.runs.config import RunConfig
from mcar_lib.training import Execution

GIB = 2**30
AT_REST = 1 * GIB  # Python, torch, the optimiser's buffers of a small network, a test batch
# The peak of a step over what its backward pass keeps: gradients and the convolutions' work space. On a CPU this comes
# out 10 to 30 % above what dry runs took, with MobileNet-v2 at 128 to 224 px, EfficientNet-Lite2 and ResNet-50 at 160.
PEAK_OVER_KEPT = 1.6
PEAK_OVER_RECOMPUTED = 4.5  # the same of the block that is computed again, with what it is computed from
SHARE_OF_FREE = 0.9  # the rest is for what else grows meanwhile
COPIES = 4  # of the weights: they, gradients, momentum, a checkpoint that is written


def estimated_memory(config: RunConfig, images: int | None = None, recompute: bool = False) -> int:
    """Bytes that a run takes at its peak, about. images: of both its splits, whose squares are kept up to 1 GiB.
    recompute: see Execution."""
    squares = MEMORY_LIMIT if images is None else min(MEMORY_LIMIT, images * 3 * config.image_size**2)
    kept = _kept(config.backbone, config.image_size)
    # The global pass is gone back through before the crops are looked at: one of them is kept at a time. The first is
    # always in float32 and keeps all.
    steps = [PEAK_OVER_KEPT * kept.all]
    if config.local_stream:
        of_crop = PEAK_OVER_RECOMPUTED * kept.block + kept.inputs if recompute else PEAK_OVER_KEPT * kept.all
        steps.append(config.num_regions * of_crop / (1 if config.precision == "fp32" else 2))
    return round(AT_REST + squares + COPIES * kept.weights + config.batch_size * max(steps))


class _Kept(NamedTuple):
    """Bytes that a training pass of one image keeps for the way back: of the whole backbone; of the one of its blocks
    that keeps the most; of what all blocks are given. And those of the weights."""

    all: int
    block: int
    inputs: int
    weights: int


@functools.cache
def _kept(backbone: str, image_size: int) -> _Kept:
    """Counted on tensors with a shape and no content, for two images: batch statistics of one need a larger map."""
    with torch.device("meta"):
        features = build_backbone(backbone, "none").features.train()
        images = torch.zeros(2, 3, image_size, image_size)
        weights = {each.untyped_storage()._cdata: each.nbytes for each in (*features.parameters(), *features.buffers())}
        _, everything = _pass(features, images, weights)
        blocks, inputs = [], []
        for block in blocks_of(features):
            inputs.append(images.nbytes)
            images, kept = _pass(block, images.detach().requires_grad_(), weights)
            blocks.append(kept)
    return _Kept(everything // 2, max(blocks) // 2, sum(inputs) // 2, sum(weights.values()))


def _pass(module: torch.nn.Module, x: torch.Tensor, weights: Container[int]) -> tuple[torch.Tensor, int]:
    """What a module makes of x, and the bytes that it keeps for the way back, its weights left out."""
    sizes: dict[int, tuple[torch.Tensor, int]] = {}  # by storage, which several may share; held, so that none is reused

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = tensor, storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        made = module(x)
    return made, sum(size for storage, (_, size) in sizes.items() if storage not in weights)


def free_memory() -> int:
    """Bytes that are free: of the GPU where there is one, else of this machine, or what a container or job may still
    take."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return min([psutil.virtual_memory().available, *left_by_limits()])


def left_by_limits(groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")) -> Iterator[int]:
    """What each limit of Linux's control groups (version 2) on this process leaves of itself, in bytes; none elsewhere.

    What is cached of files does not count: it makes room.
    """
    try:
        (line,) = (line for line in groups.read_text(encoding="utf-8").splitlines() if line.startswith("0::"))
    except (OSError, ValueError):
        return
    folder = mounted / line.removeprefix("0::").strip("/")
    for each in (folder, *folder.parents):
        if not each.is_relative_to(mounted):
            return
        try:
            limit = int((each / "memory.max").read_text(encoding="ascii"))
            taken = int((each / "memory.current").read_text(encoding="ascii"))
            rows = (each / "memory.stat").read_text(encoding="ascii").splitlines()
        except (OSError, ValueError):  # the group has no limit ("max"), or there is no such group here
            continue
        cached = sum(int(row.split()[1]) for row in rows if row.split()[0] in ("inactive_file", "active_file"))
        yield max(0, limit - taken + cached)


def within(config: RunConfig, images: int, execution: Execution) -> tuple[Execution, list[str]]:
    """How a run is carried out in the memory that it may take, or that is free: with `recompute`, which changes no
    number, where it does not fit without it. And what to say of that. On a GPU only where an amount is named.

    Raises ConfigError where an amount is named that does not do.
    """
    if torch.cuda.is_available() and execution.memory is None:
        return execution, []
    limit = free_memory() if execution.memory is None else round(execution.memory * GIB)
    needed = estimated_memory(config, images, execution.recompute)
    if needed <= limit:
        return execution, []
    leaner = estimated_memory(config, images, recompute=True)
    takes = f"{config.label} takes about {needed / GIB:.1f} GiB of memory, and {limit / GIB:.1f} are "
    takes += "free" if execution.memory is None else "allowed"
    again = f"the backward pass computes activations again: {leaner / GIB:.1f} GiB, the same numbers, more time"
    if leaner <= limit:
        return replace(execution, recompute=True), [f"{takes}; {again}"]
    ways = f"a smaller image_size, batch_size or num_regions{', or precision bf16,' * (config.precision == 'fp32')}"
    if execution.memory is not None:
        but = f" ({leaner / GIB:.1f} with --recompute)" if leaner < needed else ""
        raise ConfigError(f"{takes}{but}; {ways} takes less")
    if leaner < needed:
        return replace(execution, recompute=True), [f"{takes}; {again}; {ways} takes less"]
    return execution, [f"{takes}; {ways} takes less"]


def in_half_precision(config: RunConfig, images: int, memory: float) -> RunConfig:
    """The configuration in bf16, which has other numbers, where it fits into so many GiB only so; else as it is."""
    halved = config.vary(precision="bf16")
    needed, leaner = (estimated_memory(each, images, recompute=True) for each in (config, halved))
    return halved if leaner <= memory * GIB < needed else config


def told_of_precision(config: RunConfig) -> list[str]:
    """What to say of a run in half precision on a processor that has no instructions for it."""
    if config.precision == "fp32" or torch.cuda.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX2":
        return []
    return [f"this processor has no AVX-512: {config.precision} takes less memory and several times longer than fp32"]


def side_by_side(needed: Sequence[int], free: int) -> int:
    """How many runs that need so many bytes each may be trained at once, whichever they are: one at least."""
    sums = itertools.accumulate(sorted(needed, reverse=True))
    return max(1, sum(total <= SHARE_OF_FREE * free for total in sums))
