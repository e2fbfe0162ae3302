"""One step of what is timed: training or inference, by MCAR, by its backbone alone, and the release's way."""

import copy
from collections.abc import Callable

import released_way
import torch
from torch import Tensor

from mcar_lib.inference import keep_freed_memory
from mcar_lib.model import MCAR, build_mcar
from mcar_lib.training import Recipe, build_optimizer, network_input, training_step

Step = Callable[[], object]
BACKBONE, CLASSES, REGIONS = "mobilenet_v2", 80, 4
LABELS_PER_IMAGE = 2.9  # of COCO
OURS, ALONE, RELEASED = "MCAR", "backbone alone", "release's way"
PLAIN, BF16 = "float32", "bf16"
RECOMPUTED = f"{PLAIN}, recomputed"
WAYS = {  # to train -> precision, whether activations of the crops are computed again
    PLAIN: ("fp32", False),
    RECOMPUTED: ("fp32", True),
    BF16: ("bf16", False),
    f"{BF16}, recomputed": ("bf16", True),
}


def ways() -> tuple[str, ...]:
    """The WAYS that this processor takes seconds for: without instructions for bf16 a step of it takes minutes."""
    is_quick = "AVX512" in torch.backends.cpu.get_cpu_capability()
    return tuple(way for way, (precision, _) in WAYS.items() if is_quick or precision == "fp32")


def built(num_regions: int = REGIONS, num_classes: int = CLASSES, local_stream: bool = True) -> MCAR:
    """A model in channels_last, as training and prediction hold it; weights are drawn, always the same."""
    model = build_mcar(
        BACKBONE, num_classes, "none", seed=0, pooling="gwp", num_regions=num_regions, local_stream=local_stream
    )
    made: MCAR = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return made


def random_images(count: int, size: int) -> Tensor:
    """(count, 3, size, size) uint8, always the same."""
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def random_targets(count: int, classes: int = CLASSES) -> Tensor:
    """(count, classes) float of 0 and 1, always the same."""
    drawn = torch.rand(count, classes, generator=torch.Generator().manual_seed(1))
    return (drawn < LABELS_PER_IMAGE / classes).float()


def training(model: MCAR, images: Tensor, precision: str = "fp32") -> Step:
    """One training step on uint8 images (B, 3, S, S)."""
    targets = random_targets(len(images), model.convclass.out_channels).to(images.device)
    optimizer = build_optimizer(model.train(), Recipe())
    autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16")
    model.forward = autocast(model.forward)  # type: ignore[method-assign]

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        training_step(model, network_input(model, images), targets)
        optimizer.step()

    return step


def training_so(way: str, images: Tensor) -> Step:
    """As training, one of the WAYS, with memory kept or handed back as `mcar train` does it."""
    precision, recompute = WAYS[way]
    model = built()
    model.recompute = recompute
    step = training(model, images, precision)

    def all_of_it() -> None:
        keep_freed_memory(not recompute)
        step()

    return all_of_it


def inference(model: MCAR, images: Tensor, precision: str = "fp32") -> Step:
    """Scores of uint8 images (B, 3, S, S)."""
    model.eval()

    @torch.no_grad()
    def step() -> Tensor:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            return model(network_input(model, images)).scores.float().cpu()

    return step


def released_inference(model: MCAR, images: Tensor) -> Step:
    """As inference, the release's way, in the memory layout that the release had."""
    model = _contiguous(model).eval()

    @torch.no_grad()
    def step() -> Tensor:
        found = released_way.two_streams(model, _contiguous_input(model, images))
        return torch.maximum(found.global_scores, found.local_scores)

    return step


def released_training(model: MCAR, images: Tensor) -> Step:
    """As training, the release's way, in the memory layout that the release had."""
    model, targets = _contiguous(model).train(), random_targets(len(images))
    optimizer = build_optimizer(model, Recipe())
    return lambda: released_way.training_step(model, optimizer, _contiguous_input(model, images), targets)


@torch.no_grad()
def check_same_boxes(model: MCAR, images: Tensor) -> None:
    """Raises AssertionError unless the release's way finds the boxes that the module finds."""
    model = _contiguous(model).eval()
    inputs = _contiguous_input(model, images)
    ours, theirs = model(inputs).regions.boxes, released_way.two_streams(model, inputs).boxes
    assert torch.equal(ours, theirs), f"{(ours != theirs).any(dim=-1).sum()} of {theirs[..., 0].numel()} boxes differ"


def _contiguous(model: MCAR) -> MCAR:
    made: MCAR = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
    return made


def _contiguous_input(model: MCAR, images: Tensor) -> Tensor:
    return network_input(model, images).contiguous()
