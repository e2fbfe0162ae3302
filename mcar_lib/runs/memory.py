"""How much memory a run takes, told before it is started, and how much is free: how many runs fit side by side."""

import functools
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch

from mcar_lib.backbones import build_backbone
from mcar_lib.data.squares import MEMORY_LIMIT
from mcar_lib.runs.config import RunConfig

GIB = 2**30
AT_REST = 1 * GIB  # Python, torch, the optimiser's buffers of a small network, a test batch
# The peak of a step over what its backward pass keeps: gradients and the convolutions' work space. On a CPU this comes
# out 10 to 30 % above what dry runs took, with MobileNet-v2 at 128 to 224 px, EfficientNet-Lite2 and ResNet-50 at 160.
PEAK_OVER_KEPT = 1.6
SHARE_OF_FREE = 0.9  # the rest is for what else grows meanwhile
COPIES = 4  # of the weights: they, gradients, momentum, a checkpoint that is written


def estimated_memory(config: RunConfig, images: int | None = None) -> int:
    """Bytes that a run takes at its peak, about. images: of both its splits, whose squares are kept up to 1 GiB."""
    squares = MEMORY_LIMIT if images is None else min(MEMORY_LIMIT, images * 3 * config.image_size**2)
    kept, weights = _kept(config.backbone, config.image_size)
    # The global pass is gone back through before the crops are looked at: one of them is kept at a time.
    views = config.batch_size * (config.num_regions if config.local_stream else 1)
    return round(AT_REST + squares + COPIES * weights + PEAK_OVER_KEPT * views * kept)


@functools.cache
def _kept(backbone: str, image_size: int) -> tuple[int, int]:
    """Bytes that a training pass of one image keeps for the way back, and of the weights; counted on tensors that have
    a shape and no content."""
    sizes: dict[int, tuple[torch.Tensor, int]] = {}  # by storage, which several may share; held, so that none is reused

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage._cdata] = tensor, storage.nbytes()
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        features = build_backbone(backbone, "none").features.train()
        weights = [*features.parameters(), *features.buffers()]
        held = features(torch.zeros(2, 3, image_size, image_size))  # two: batch statistics of one need a larger map
    for each in weights:
        sizes.pop(each.untyped_storage()._cdata, None)
    del held
    return sum(size for _, size in sizes.values()) // 2, sum(each.nbytes for each in weights)


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


def shortage(config: RunConfig, images: int) -> str | None:
    """What to say of a run that seems to need more memory than is free; None where it does not, and on a GPU, which has
    a way out (see Execution.recompute)."""
    if torch.cuda.is_available():
        return None
    needed, free = estimated_memory(config, images), free_memory()
    if needed <= free:
        return None
    return (
        f"{config.label} takes about {needed / GIB:.1f} GiB of memory, and {free / GIB:.1f} are free; a smaller "
        "image_size, batch_size or num_regions takes less"
    )


def side_by_side(needed: Sequence[int], free: int) -> int:
    """How many runs that need so many bytes each may be trained at once, whichever they are: one at least."""
    sums = itertools.accumulate(sorted(needed, reverse=True))
    return max(1, sum(total <= SHARE_OF_FREE * free for total in sums))
