"""How a run is carried out, and what it says of itself meanwhile: nothing here changes a number of it."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

from mcar_lib.errors import ConfigError

Cache = Literal["auto", "memory", "disk", "none"]
CACHES: tuple[Cache, ...] = get_args(Cache)


@dataclass(frozen=True)
class Execution:
    """workers: processes that read photos; None: as many as the cores allow and are of use, 0: this one.

    cache: where photos are kept once they are resized; "auto": in memory up to 1 GiB, else on disk where there is room
    for twice as much, else nowhere. checkpoint_minutes: between two checkpoints within an epoch; there is one after
    each epoch in any case. trackers: accelerate's names of what scalars are sent to ("tensorboard"). recompute:
    activations of the pass over the crops are computed again in the backward pass instead of kept: less memory, more
    time; a GPU that has too little memory without it turns it on. memory: GiB that a run may take, by which it is
    turned on; None: what is free (a GPU finds out in the first step).
    Raises ConfigError on any other value.
    """

    workers: int | None = None
    cache: Cache = "auto"
    checkpoint_minutes: float = 10.0
    trackers: tuple[str, ...] = ()
    recompute: bool = False
    memory: float | None = None

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 0:
            raise ConfigError(f"workers is {self.workers}; give a number of processes, 0 for none")
        if self.cache not in CACHES:
            raise ConfigError(f"cache is {self.cache!r}; choose one of {', '.join(CACHES)}")
        if not self.checkpoint_minutes >= 0:
            raise ConfigError(f"checkpoint_minutes is {self.checkpoint_minutes}; give a number of minutes, 0 or more")
        if self.memory is not None and not self.memory > 0:
            raise ConfigError(f"memory is {self.memory}; give a number of GiB above 0")

    @classmethod
    def of_environment(cls, environment: Mapping[str, str] = os.environ) -> "Execution":
        """What MCAR_WORKERS, MCAR_CACHE, MCAR_CHECKPOINT_MINUTES, MCAR_TRACKERS, MCAR_RECOMPUTE (1) and MCAR_MEMORY
        say: notebooks have no options."""
        found: dict[str, object] = {}
        kinds: dict[str, Callable[[str], object]] = {
            "workers": int,
            "cache": str,
            "checkpoint_minutes": float,
            "trackers": _names,
            "recompute": lambda text: bool(int(text)),
            "memory": float,
        }
        for name, kind in kinds.items():
            if text := environment.get(f"MCAR_{name.upper()}"):
                try:
                    found[name] = kind(text)
                except ValueError:
                    raise ConfigError(f"MCAR_{name.upper()} is {text!r} in the environment; give a number") from None
        return cls(**found)  # type: ignore[arg-type]


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


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
