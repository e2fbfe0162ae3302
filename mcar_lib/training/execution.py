"""How a run is carried out, and what it says of itself meanwhile: nothing here changes a number of it."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

Cache = Literal["auto", "memory", "disk", "none"]


@dataclass(frozen=True)
class Execution:
    """workers: processes that read photos; None: as many as the cores allow, 0: this one.

    cache: where photos are kept once they are resized. checkpoint_minutes: between two checkpoints within an epoch;
    there is one after each epoch in any case. trackers: accelerate's names of what scalars are sent to ("tensorboard").
    """

    workers: int | None = None
    cache: Cache = "auto"
    checkpoint_minutes: float = 10.0
    trackers: tuple[str, ...] = ()


class Standing(NamedTuple):
    """Where a run is: the epoch that is trained (from 1), photos of it that are done, photos a second, seconds left to
    the run's end (None: not known yet), and the mAP that was measured last."""

    epoch: int
    epochs: int
    images: int
    images_of_epoch: int
    images_per_second: float | None
    seconds_left: float | None
    last_map: float | None
