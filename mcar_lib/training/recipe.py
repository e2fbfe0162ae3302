"""The arithmetic of training: optimiser, schedule, the order of images, one step, and the scores of a data set.

Every random number is derived from (seed, epoch, image), never from how a run was started, stopped or resumed.
"""

import math
from collections.abc import Callable, Sequence
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, MultiStepLR, OneCycleLR
from torch.utils.data import default_collate

from mcar_lib.data.squares import ResizedImages
from mcar_lib.data.transforms import Colours, crop_and_flip, sample_generator
from mcar_lib.errors import ConfigError, TrainingError
from mcar_lib.model import MCAR, Output, fuse, mcar_loss
from mcar_lib.training import processes

Positive = Annotated[float, Field(gt=0)]

# Streams of random numbers that do not belong to one image take indices that no image has.
ORDER, EPOCH, EVALUATION, INITIALISATION = -1, -2, -3, -4


class Recipe(BaseModel):
    """How a model is trained; the defaults are the release's. Unknown keys and wrong types are errors.

    learning_rate is the 1x1 convolution's (the peak of a one-cycle schedule), backbone_factor times it the backbone's.
    milestones (epochs) and gamma belong to schedule "step"; warmup (fraction of all steps) to "onecycle".
    statistics_batch: how many images, with their crops, share batch statistics; 0 is the whole batch, the release's
    four GPUs had 4 each. crop_area: the least share of a photo's area that random resized crops keep; 1 crops nothing.
    evaluate_every: the test set is scored after every so many epochs, and after the last one in any case; the "best"
    epoch is the best of those that were scored.
    precision: "bf16", or on older GPUs "fp16" with a scaled loss, is that of the pass over the crops; the global
    stream, which places their boxes, is in float32. average_decay: of an exponential average of the weights over the
    steps, which is what is tested and kept; 0 is no average, as in the release.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    epochs: Annotated[int, Field(ge=1)] = 60
    batch_size: Annotated[int, Field(ge=1)] = 16
    learning_rate: Positive = 0.01
    backbone_factor: Positive = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    schedule: Literal["step", "onecycle"] = "step"
    milestones: tuple[int, ...] = (30, 50)
    gamma: Positive = 0.1
    warmup: Annotated[float, Field(gt=0, lt=1)] = 0.2
    statistics_batch: Annotated[int, Field(ge=0)] = 0
    flip: bool = True
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.3
    crop_area: Annotated[float, Field(gt=0, le=1)] = 1.0
    evaluate_every: Annotated[int, Field(ge=1)] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    average_decay: Annotated[float, Field(ge=0, lt=1)] = 0.0
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _milestones_ascend(self) -> "Recipe":
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"milestones must ascend, not {self.milestones}")
        return self


def parameter_groups(model: MCAR, recipe: Recipe) -> list[dict[str, object]]:
    """Two groups: the classifier at the learning rate, the backbone at backbone_factor (a tenth) of it."""
    return [
        {"params": list(model.convclass.parameters()), "lr": recipe.learning_rate},
        {"params": list(model.features.parameters()), "lr": recipe.learning_rate * recipe.backbone_factor},
    ]


def build_optimizer(model: MCAR, recipe: Recipe) -> torch.optim.SGD:
    return torch.optim.SGD(
        parameter_groups(model, recipe),
        lr=recipe.learning_rate,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
    )


def build_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> LRScheduler:
    """A schedule that is stepped after every batch; raises ConfigError on a one-cycle warm-up of a single step."""
    if recipe.schedule == "step":
        return MultiStepLR(optimizer, [epoch * steps_per_epoch for epoch in recipe.milestones], recipe.gamma)
    peaks = [group["lr"] for group in optimizer.param_groups]
    total = recipe.epochs * steps_per_epoch
    if math.isclose(recipe.warmup * total, 1):  # torch would divide by zero
        raise ConfigError(
            f"warmup {recipe.warmup:g} of {total} steps is a single step, which a one-cycle schedule cannot have; "
            "change warmup, epochs or batch_size"
        )
    return OneCycleLR(optimizer, peaks, total_steps=total, pct_start=recipe.warmup, cycle_momentum=False)


class TrainingBatch(NamedTuple):
    """Training images as they are read: uint8 (b, 3, S, S), float targets (b, K), where difficult counts as positive,
    and the colour jitter of each (see data.transforms.Colours)."""

    images: Tensor
    targets: Tensor
    kinds: Tensor
    factors: Tensor


class TrainingImages:
    """The batches of an epoch: what is drawn for an image depends on seed, epoch and the image only."""

    def __init__(self, images: ResizedImages, recipe: Recipe) -> None:
        self.images = images
        self.targets = (images.image_set.targets != 0).float()
        self.recipe = recipe

    def __len__(self) -> int:
        return len(self.images)

    def order(self, epoch: int) -> list[int]:
        """All images once, in an order that depends on seed and epoch only."""
        generator = sample_generator(self.recipe.seed, epoch, ORDER)
        order: list[int] = torch.randperm(len(self), generator=generator).tolist()
        return order

    def batch(self, task: tuple[int, Sequence[int]]) -> TrainingBatch:
        """Those images of an epoch, cropped and flipped; task: (epoch, indices)."""
        epoch, indices = task
        drawn = [self._drawn(epoch, index) for index in indices]
        images, (kinds, factors) = default_collate(drawn)  # a worker's are in shared memory
        return TrainingBatch(images, self.targets[list(indices)], kinds, factors)

    def _drawn(self, epoch: int, index: int) -> tuple[Tensor, Colours]:
        recipe, generator = self.recipe, sample_generator(self.recipe.seed, epoch, index)
        return crop_and_flip(self.images[index], generator, recipe.flip, recipe.jitter, recipe.crop_area)


def seed_everything(model: MCAR, seed: int, epoch: int, stream: int) -> None:
    """Seeds what draws from a global stream (dropout, random region selection) at the start of an epoch or test.

    No two processes draw the same numbers: each has its own streams, of which INITIALISATION is the last.
    """
    number = sample_generator(seed, epoch, stream + INITIALISATION * processes.rank()).initial_seed()
    torch.manual_seed(number)
    if model.generator is not None:
        model.generator.manual_seed(number)


class StepLoss(NamedTuple):
    """Both parts of a step's loss, () on the device; local is 0 with the local stream off."""

    global_loss: Tensor
    local_loss: Tensor


def forward_in_groups(model: nn.Module, images: Tensor, size: int) -> Output:
    """The model's logits for a batch, each group of `size` images on its own batch statistics; 0 is one group."""
    outputs = [model(group) for group in images.split(size or len(images))]
    local_logits = None if outputs[0].local_logits is None else torch.cat([output.local_logits for output in outputs])
    return Output(torch.cat([output.global_logits for output in outputs]), local_logits, None)


def training_step(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    statistics_batch: int = 0,
    backward: Callable[[Tensor], None] = Tensor.backward,
) -> StepLoss:
    """Forward and backward pass of one batch: adds to the gradients; returns both parts of the loss.

    The global stream is gone back through before the crops are looked at, so that one pass's activations are kept at a
    time; gradients are those of the sum, bit for bit. Groups of a batch are gone back through together: more than two
    terms in another order would round differently. Nothing is read back from the device.
    """

    def back_through_global_stream(logits: Tensor) -> None:
        # This is within DDP's forward pass. It averages over the processes in the backward pass after that.
        backward(F.binary_cross_entropy_with_logits(logits, targets))

    if 0 < statistics_batch < len(images):
        output = forward_in_groups(model, images, statistics_batch)
    else:
        output = model(images, back_through_global_stream)
    global_loss, local_loss = mcar_loss(output, targets)
    backward(global_loss if local_loss is None else global_loss + local_loss)
    local_part = torch.zeros_like(global_loss) if local_loss is None else local_loss
    return StepLoss(global_loss.detach(), local_part.detach())


def check_loss(losses: Tensor) -> None:
    """Raises TrainingError where a loss, or a sum of losses, is NaN or infinite. Reads it back from the device."""
    if not torch.isfinite(losses).all():
        raise TrainingError(
            f"the loss is {losses.sum().item()}; lower learning_rate, or look for broken images or weights"
        )


class StreamScores(NamedTuple):
    """Scores of each stream, float32 (n, K), as logits: sigmoids saturate, and make ties of what differs.

    Local is the global one with the local stream off.
    """

    global_scores: Tensor
    local_scores: Tensor

    @property
    def fused(self) -> Tensor:
        """The paper's prediction, the maximum of both streams."""
        return fuse(self.global_scores, self.local_scores)


@torch.no_grad()
def batch_scores(model: nn.Module, images: Tensor) -> StreamScores:
    """Scores of one normalised batch (B, 3, S, S), on the CPU."""
    output = model(images)
    local_logits = output.global_logits if output.local_logits is None else output.local_logits
    return StreamScores(output.global_logits.float().cpu(), local_logits.float().cpu())
