"""What a cheaper look at the regions costs in mAP: regions left out, fewer by image, crops at a lower resolution.

One pass keeps the logits of every region at every local size; what a Look would predict follows from them exactly, for
it only leaves regions out. Its values are chosen on val, by the tuning run; the tests of the reported runs tell of the
chosen ones. n images, N regions each, K classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mcar_lib.data.squares import ResizedImages
from mcar_lib.errors import ResultsError
from mcar_lib.files import OTHER_ARTIFACTS, check_zip, content_id, reading, write_atomically
from mcar_lib.intervals import holm, map_difference
from mcar_lib.metrics import average_precision
from mcar_lib.model import EVERYTHING, MCAR, Look, fuse
from mcar_lib.progress import say
from mcar_lib.runs.comparisons import NO_DIFFERENCE, ONE_SEED, SIGNIFICANT, numbers_of
from mcar_lib.runs.config import Cheaper, RunConfig
from mcar_lib.runs.environment import describe_environment
from mcar_lib.runs.fingerprints import fingerprint
from mcar_lib.runs.measures import count_macs
from mcar_lib.runs.records import RECORD_FORMAT
from mcar_lib.runs.runs import Runs
from mcar_lib.runs.trainer import build_model, cpu_threads
from mcar_lib.runs.tuning import tune, tuning_run
from mcar_lib.training import EVALUATION_BATCH, network_input
from mcar_lib.training.loop import check_settings

ALLOWED = 0.005  # of mAP, a fraction: what a value may cost on val and be chosen
ALL, FEWER, FLOOR, SHARE, SIZE, TOGETHER = "all regions", "N", "floor", "share", "local size", "together"


class Way(NamedTuple):
    """One way to look: its name, its value, and what that means. num_regions: only the first ones are found at all;
    None for all of the run's."""

    name: str
    value: float | None = None
    look: Look = EVERYTHING
    num_regions: int | None = None

    @property
    def told(self) -> str:
        """'floor 0.1'"""
        return self.name if self.value is None else f"{self.name} {self.value:g}"


DEFAULT = Way(ALL)


def ways_of(values: Cheaper, config: RunConfig) -> list[Way]:
    """All regions, then every value of each way, those that a profile names, and every N below the run's."""
    return [
        DEFAULT,
        *(Way(FEWER, number, num_regions=number) for number in range(1, config.num_regions)),
        *(Way(FLOOR, value, Look(floor=value)) for value in values.floors),
        *(Way(SHARE, value, Look(share=value)) for value in values.shares),
        *(Way(SIZE, value, Look(local_size=value)) for value in values.local_sizes),
    ]


def together(chosen: Sequence[Way]) -> Way:
    """The chosen floor, share and local size, those that there are, in one Look."""
    looks = {way.name: way.look for way in chosen}
    floor, share, size = (looks.get(name, EVERYTHING) for name in (FLOOR, SHARE, SIZE))
    return Way(TOGETHER, look=Look(floor.floor, share.share, size.local_size))


# What a model says of every region -----------------------------------------------------------------------------------


class Looks(NamedTuple):
    """global_logits (n, K); scores (n, N), of the regions' classes, as probabilities; region_logits: local size in
    pixels -> (n, N, K). All float32, on the CPU."""

    global_logits: Tensor
    scores: Tensor
    region_logits: Mapping[int, Tensor]

    def through(self, way: Way, image_size: int) -> tuple[Tensor, Tensor]:
        """What the model would predict this way: fused logits (n, K), and which regions it would look at (n, N)."""
        number = way.num_regions or self.scores.shape[1]
        chosen = way.look.chosen(self.scores[:, :number])
        logits = self.region_logits[way.look.local_size or image_size][:, :number]
        local = logits.masked_fill(~chosen[..., None], -torch.inf).amax(dim=1)
        return fuse(self.global_logits, local), chosen


@torch.no_grad()
def look_at_all(model: MCAR, squares: ResizedImages, local_sizes: Sequence[int]) -> Looks:
    """The logits of every region of all images, at each of the local sizes. model: in evaluation mode."""
    parts: list[tuple[Tensor, ...]] = []
    for first in range(0, len(squares), EVALUATION_BATCH):
        images = network_input(model, squares.batch(range(len(squares))[first : first + EVALUATION_BATCH]))
        global_logits, regions = model.pass_over_images(images)
        assert regions is not None
        everything = torch.ones_like(regions.classes, dtype=torch.bool)
        of_sizes = (model.region_logits(images, regions.boxes, everything, size) for size in local_sizes)
        by_image = (each.view(*everything.shape, -1).cpu() for each in of_sizes)
        parts.append((global_logits.cpu(), regions.scores.cpu(), *by_image))
    global_logits, scores, *region_logits = (torch.cat(column) for column in zip(*parts, strict=True))
    return Looks(global_logits, scores, dict(zip(local_sizes, region_logits, strict=True)))


def looks_of(runs: Runs, config: RunConfig) -> Looks:
    """look_at_all of a run on the images that it scores, at its own size and the profile's; made once on this
    machine."""
    sizes = sorted({*runs.profile.cheaper_values().local_sizes, config.image_size})
    run_id = runs.run(config).run_id
    name = content_id({"run": run_id, "sizes": sizes, "made_by": fingerprint(look_at_all)})
    path = runs.artifacts / "looks" / f"{run_id}-{name}.npz"
    if found := _read(path):
        return found
    check_settings()
    squares = runs.splits.squares(runs.data(config).test, config.image_size)
    with cpu_threads(runs.profile.threads):
        looks = look_at_all(runs.trained_model(config), squares, sizes)
    _write(path, looks)
    return looks


def _write(path: Path, looks: Looks) -> None:
    arrays = {"global_logits": looks.global_logits, "scores": looks.scores}
    arrays |= {str(size): logits for size, logits in looks.region_logits.items()}

    def write(partial: Path) -> None:
        with partial.open("wb") as stream:
            np.savez(stream, **{name: each.numpy() for name, each in arrays.items()})  # type: ignore[arg-type]

    write_atomically(path, write, advice=OTHER_ARTIFACTS)


def _read(path: Path) -> Looks | None:
    if not path.exists():
        return None
    try:
        with reading(path, "what a run says of its regions"):
            check_zip(path)
            with np.load(path, allow_pickle=False) as stored:
                arrays = {name: torch.from_numpy(stored[name]) for name in stored.files}
            first, scores = arrays.pop("global_logits"), arrays.pop("scores")
            return Looks(first, scores, {int(size): logits for size, logits in arrays.items()})
    except ResultsError as error:
        say(f"{error}; it is made again")
        return None


# Records -------------------------------------------------------------------------------------------------------------


def measure_ways(runs: Runs, config: RunConfig, ways: Sequence[Way]) -> Mapping[str, Any]:
    """The record of a run's ways on the images that it scores, made once. `ways`: for each the name and the value, mAP,
    regions looked at and multiply-accumulates, the last two an image."""
    run_id = runs.run(config).run_id

    def measured() -> dict[str, Any]:
        looks, test = looks_of(runs, config), runs.data(config).test
        names = {"format": RECORD_FORMAT, "run_id": run_id, "label": config.label, "data": test.title}
        costs = _Costs(config, len(test.classes))
        rows = [_row(looks, way, config, costs, test.targets) for way in ways]
        environment = describe_environment(runs.profile.threads)
        return {**names, "images": len(test), "ways": rows, "environment": environment}

    name = content_id({"run": run_id, "ways": _as_key(ways)})
    return runs.keep("cheaper", name, cheaper_fingerprint(), measured)


def cheaper_fingerprint() -> str:
    """What a record of ways computes with."""
    return fingerprint(looks_of, _row)


def _row(looks: Looks, way: Way, config: RunConfig, costs: "_Costs", targets: Tensor) -> dict[str, Any]:
    fused, chosen = looks.through(way, config.image_size)
    regions = chosen.sum(dim=1).double().mean().item()
    macs = costs.without_regions + regions * costs.of_region(way.look.local_size or config.image_size)
    found = {"mAP": average_precision(fused, targets).nanmean().item(), "regions": regions}
    value = math.nan if way.value is None else way.value  # as a record that was read again has it
    return {"way": way.name, "value": value, **found, "macs_per_image": round(macs)}


class _Costs:
    """Multiply-accumulates of a run's model, of an image without regions and of one region."""

    def __init__(self, config: RunConfig, num_classes: int) -> None:
        self._alone = build_model(config.vary(local_stream=False), num_classes, weights="none")
        both = build_model(config, num_classes, weights="none")
        of_all = config.num_regions * self.of_region(config.image_size)
        self.without_regions = count_macs(both, config.image_size) - of_all  # the maps of all classes among them

    def of_region(self, size: int) -> int:
        """Of one crop of this size: it goes where an image goes that has no regions."""
        return count_macs(self._alone, size)


def _as_key(ways: Sequence[Way]) -> list[dict[str, Any]]:
    return [{"name": way.name, "look": asdict(way.look), "num_regions": way.num_regions} for way in ways]


# Chosen on val -------------------------------------------------------------------------------------------------------


def val_record(runs: Runs, config: RunConfig, ways: Sequence[Way]) -> Mapping[str, Any] | None:
    """The record of the tuning run at this configuration's tuned rate, which chooses; None without a tuning."""
    if runs.profile.tuning is None:
        return None
    return measure_ways(runs, tuning_run(tune(runs, [config])[0], runs.profile.tuning), ways)


def choose_ways(ways: Sequence[Way], val: Mapping[str, Any] | None) -> list[Way]:
    """Of each way the value with the fewest operations whose mAP on val is at most ALLOWED below that of all regions;
    none of a way where no value is. Without a record of val, the first value of each way."""
    by_name = dict.fromkeys(way.name for way in ways if way.name != ALL)
    if val is None:
        return [next(way for way in ways if way.name == name) for name in by_name]
    least = next(row["mAP"] for row in val["ways"] if row["way"] == ALL) - ALLOWED
    rows = list(zip(ways, val["ways"], strict=True))
    good = {name: [pair for pair in rows if pair[0].name == name and pair[1]["mAP"] >= least] for name in by_name}
    return [min(pairs, key=lambda pair: pair[1]["macs_per_image"])[0] for pairs in good.values() if pairs]


# Several seeds -------------------------------------------------------------------------------------------------------


def way_differences(runs: Runs, configs: Sequence[RunConfig], ways: Sequence[Way]) -> list[dict[str, Any]]:
    """Each way - all regions, one run a seed, as rows like those of mcar_lib.runs.differences: points of mAP with the
    two-level interval of the pairs, p, p adjusted (Holm), finding."""
    found = [_compared(runs, configs, way) for way in ways]
    adjusted = holm([each["p_value"] for each in found])
    rows = []
    for way, each, p in zip(ways, found, adjusted, strict=True):
        points = {key: 100 * each[key] for key in ("difference", "low", "high")}
        count = each["seeds"][0]
        seeds = f"{count} pair{'s' * (count > 1)}"
        told: dict[str, Any] = {"p": None, "p (Holm)": None, "seeds": seeds, "finding": ONE_SEED}
        if count > 1:
            direction = "higher" if each["difference"] > 0 else "lower"
            told |= {"p": each["p_value"], "p (Holm)": p, "finding": direction if p < SIGNIFICANT else NO_DIFFERENCE}
        rows.append({"compared": f"{way.told} - {ALL}", **points, **told})
    return rows


def _compared(runs: Runs, configs: Sequence[RunConfig], way: Way) -> Mapping[str, Any]:
    """The record of mAP(way) - mAP(all regions), paired."""
    ids, resamples = [runs.run(config).run_id for config in configs], runs.profile.bootstrap_resamples
    key = {"a": [f"{run_id} {way.told}" for run_id in ids], "b": ids, "num_resamples": resamples}

    def computed() -> dict[str, Any]:
        targets = runs.data(configs[0]).test.targets
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        for config in configs:
            looks = looks_of(runs, config)
            for side, each in zip(sides, (way, DEFAULT), strict=True):
                side.append(looks.through(each, config.image_size)[0])
        found = map_difference(torch.stack(sides[0]), torch.stack(sides[1]), targets, resamples, paired=True)
        return {"format": RECORD_FORMAT, **key, "runs": ids, "confidence": 0.95, **numbers_of(found)}

    name = content_id({**key, "way": _as_key([way])})
    return runs.keep("comparisons", name, fingerprint(looks_of, Looks.through, map_difference), computed)
