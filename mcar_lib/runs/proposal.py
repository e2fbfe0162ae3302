"""Image size, batch and epochs that fit this machine and a wish for minutes, from two measured passes of a few steps.

What was proposed once for the same data and settings is taken again: the same command finds its run.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass

from mcar_lib.errors import ConfigError, ResultsError
from mcar_lib.files import content_id, read_json, write_json
from mcar_lib.progress import format_seconds
from mcar_lib.runs.config import RunConfig
from mcar_lib.runs.environment import taken_memory
from mcar_lib.runs.memory import GIB, free_memory
from mcar_lib.runs.records import read_records
from mcar_lib.runs.runs import Runs
from mcar_lib.runs.trainer import DryRun, dry_run
from mcar_lib.training import processes

PROPOSED = ("image_size", "batch_size", "epochs")
SIZES, BATCHES = (224, 192, 160, 128, 96), (16, 8, 4)  # tried in this order
# Enough steps to learn from, not more looks at few photos than help. At equal cost a larger square with fewer epochs
# was better than more epochs at 96 px, down to some 11 of them (benchmarks/own_photos.md).
STEPS, LEAST_EPOCHS, MOST_EPOCHS = 136, 4, 20
ENOUGH = 0.65  # of the epochs that are wished, for a larger square
TOO_SHORT = 3  # epochs below which nothing is proposed, whatever the wish
MINUTES = 5.0
MEMORY_SHARE = 0.7  # of what is free: the prediction is coarse, and others need some


@dataclass(frozen=True)
class Cost:
    """What a run takes, from a measured one: seconds and bytes grow with the pixels of what is looked at.

    train_seconds, test_seconds: per photo and pixel of the square; memory: bytes per photo of a batch and pixel, None
    where this system does not tell; fixed_memory: what the process had taken before.
    """

    train_images: int
    test_images: int
    train_seconds: float
    test_seconds: float
    memory: float | None
    fixed_memory: int

    @classmethod
    def of(cls, measured: DryRun, fixed_memory: int) -> "Cost":
        """From a dry run whose first steps were not counted."""
        pixels, result = measured.config.image_size**2, measured.result
        batch, peak = min(measured.config.batch_size, measured.train_images), measured.peak_memory_bytes
        return cls(
            measured.train_total,
            measured.test_total,
            result.train_seconds / measured.train_images / pixels,
            result.test_seconds / measured.test_images / pixels,
            None if peak is None else max(peak - fixed_memory, 0) / (batch * pixels),
            fixed_memory,
        )

    def epoch_seconds(self, size: int) -> float:
        """Of an epoch and its test."""
        return size**2 * (self.train_seconds * self.train_images + self.test_seconds * self.test_images)

    def bytes(self, size: int, batch: int) -> int | None:
        """The peak memory of a run, without what the process had taken before."""
        return None if self.memory is None else round(self.memory * min(batch, self.train_images) * size**2)


def propose(
    runs: Runs, config: RunConfig, fixed: Collection[str] = (), minutes: float | None = None
) -> tuple[RunConfig, str]:
    """The configuration with what fits in place of those of PROPOSED that are not fixed, and a line that says so.

    minutes: a wish, 5 where there is none: what is cheapest is proposed where nothing is that short. Raises ConfigError
    where this machine has not the memory for any.
    """
    note = runs.artifacts / "proposals" / f"{_note_name(runs, config, fixed, minutes)}.json"

    def look() -> tuple[dict[str, int], str] | None:
        try:
            values = {name: int(read_json(note)[name]) for name in PROPOSED}
            return values, f"as proposed before for this data ({note})"
        except (ResultsError, LookupError, TypeError, ValueError):
            earlier = _earlier(runs, config, fixed) if minutes is None else None
            return None if earlier is None else (earlier, "as in the run of this data that is here")

    if found := processes.broadcast_from_main(look):
        values, why = found
        return config.vary(**values), f"{_told(values)}: {why}"
    cost = _measured(runs, config, fixed)

    def choose() -> tuple[dict[str, int], str]:
        free, allowed = free_memory(), runs.execution.memory
        free = free if allowed is None else min(free, round(allowed * GIB))
        chosen, line = _chosen(cost, config, fixed, 60 * (minutes or MINUTES), free)
        write_json(note, chosen)
        return chosen, line

    values, line = processes.broadcast_from_main(choose)
    return config.vary(**values), line


def _note_name(runs: Runs, config: RunConfig, fixed: Collection[str], minutes: float | None) -> str:
    rest = config.model_dump(mode="json", exclude=set(PROPOSED) - set(fixed))
    return content_id({**rest, **runs.data(config).keys, "minutes": minutes or MINUTES})


def _earlier(runs: Runs, config: RunConfig, fixed: Collection[str]) -> dict[str, int] | None:
    """The proposed values of a current record that has all others of this configuration."""
    keys = runs.keys(config)
    for folder in dict.fromkeys((runs.folder, runs.local_folder)):
        for record in read_records(folder):
            values = {name: getattr(record.config, name) for name in PROPOSED}
            same = {name: value for name, value in values.items() if name not in fixed}
            if record.is_current(keys) and record.config == config.vary(**same):
                return {**values}
    return None


def _measured(runs: Runs, config: RunConfig, fixed: Collection[str]) -> Cost:
    """By steps that cost little; the first ones, which are slower, are left out."""
    small = {"image_size": SIZES[-1], "batch_size": BATCHES[1] * processes.num_processes()}
    probe = config.vary(schedule="step", milestones=(), **{k: v for k, v in small.items() if k not in fixed})
    before = taken_memory()
    return Cost.of(dry_run(runs.splits, probe, runs.profile.threads, runs.execution, passes=2), before)


def _chosen(
    cost: Cost, config: RunConfig, fixed: Collection[str], seconds: float, free: int | None
) -> tuple[dict[str, int], str]:
    """The largest size, at its largest batch that the memory holds, whose run is short enough."""
    sizes: tuple[int, ...] = (config.image_size,) if "image_size" in fixed else SIZES
    wanted: tuple[int, ...] = (config.batch_size,) if "batch_size" in fixed else BATCHES
    batches = tuple(each for each in wanted if each % processes.num_processes() == 0) or (processes.num_processes(),)
    fitting = [
        (size, batch)
        for size in sizes
        if (batch := next((each for each in batches if _fits(cost.bytes(size, each), free)), None)) is not None
    ]
    if not fitting:
        needed = cost.bytes(sizes[-1], batches[-1]) or 0
        raise ConfigError(
            f"{sizes[-1]} px in batches of {batches[-1]} need about {_gib(needed)} and {_gib(free or 0)} are free; "
            "end other programs, or choose a smaller image_size or batch_size, or --recompute"
        )
    for size, batch in fitting:
        wished = config.epochs if "epochs" in fixed else _epochs(cost.train_images, batch)
        epochs = wished if "epochs" in fixed else min(wished, int(seconds / cost.epoch_seconds(size)))
        if epochs >= max(TOO_SHORT, ENOUGH * wished) and epochs * cost.epoch_seconds(size) <= seconds:
            break
    else:
        size, batch = fitting[-1]
        if "epochs" not in fixed:
            epochs = max(TOO_SHORT, min(epochs, int(seconds / cost.epoch_seconds(size))))
    if "epochs" not in fixed and math.isclose(config.warmup * epochs * -(-cost.train_images // batch), 1):
        epochs += 1  # a one-cycle schedule cannot warm up in a single step
    values = {"image_size": size, "batch_size": batch, "epochs": epochs}
    return values, f"proposed: {_told(values)}: {_told_cost(cost, values, seconds)}"


def _fits(needed: int | None, free: int | None) -> bool:
    return needed is None or free is None or needed <= MEMORY_SHARE * free


def _epochs(images: int, batch: int) -> int:
    return min(max(math.ceil(STEPS * batch / images), LEAST_EPOCHS), MOST_EPOCHS)


def _told(values: dict[str, int]) -> str:
    size, batch, epochs = (values[name] for name in PROPOSED)
    return f"{size} px, batch {batch}, {epochs} epoch{'' if epochs == 1 else 's'}"


def _told_cost(cost: Cost, values: dict[str, int], wished: float) -> str:
    seconds = values["epochs"] * cost.epoch_seconds(values["image_size"])
    time = f"about {format_seconds(seconds)}" + (f", more than {format_seconds(wished)}" if seconds > wished else "")
    peak = cost.bytes(values["image_size"], values["batch_size"])
    return time if peak is None else f"{time}, {_gib(peak + cost.fixed_memory)}"


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB"
