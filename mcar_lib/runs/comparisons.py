"""What runs say beside one another: tests with other values, intervals of mAP, paired differences, and their finding.

A group is the runs of one setting, one a seed; its mAP is the mean over them. Intervals and p-values hold seeds and
test images together, the same images for both sides of a difference (mcar_lib.intervals). All that is computed from
scores is kept as a record, so it can be shown where there are no scores.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean, stdev
from typing import Any

import torch

from mcar_lib.files import content_id
from mcar_lib.intervals import MapDifference, MapInterval, holm, map_difference, map_interval
from mcar_lib.metrics import average_precision
from mcar_lib.progress import say
from mcar_lib.runs.config import RunConfig
from mcar_lib.runs.environment import describe_environment
from mcar_lib.runs.fingerprints import fingerprint
from mcar_lib.runs.measures import by_stream, count_macs, stream_metrics
from mcar_lib.runs.outcome import Outcome
from mcar_lib.runs.records import RECORD_FORMAT, Failure, Prediction, Record, Value, evaluation_id
from mcar_lib.runs.runs import Runs
from mcar_lib.runs.trainer import arithmetic_fingerprint, build_model
from mcar_lib.training import StreamScores

SIGNIFICANT = 0.05
SAME_MAP = 1e-6  # difference in mAP, a fraction, that the scores of a record may have from it
NO_DIFFERENCE = "no difference that this data can show"
ONE_SEED = "one seed: no finding"
Found = Record | Prediction | Failure


def tested(runs: Runs, record: Record, **changes: Value) -> Prediction:
    """A run tested with another num_regions, threshold or selection than it was trained with; kept as a record."""
    config = record.config
    differing = {name: value for name, value in changes.items() if getattr(config, name) != value}
    if not differing:
        return record.prediction()

    def evaluated() -> dict[str, Any]:
        scores = _scores_with(runs, config, differing)
        images = runs.data(config).test
        mcar = build_model(config.vary(**differing), len(images.classes), weights="none")
        return {
            "format": RECORD_FORMAT,
            "run_id": record.run_id,
            "label": config.label,
            "changes": differing,
            "metrics": {"epoch": config.epochs, **stream_metrics(scores, images)},
            "cost": {"macs_per_image": count_macs(mcar, config.image_size)},
            "environment": describe_environment(runs.profile.threads),
        }

    name = evaluation_id(record.run_id, differing)
    return Prediction(record, differing, evaluation=runs.keep("evaluations", name, arithmetic_fingerprint(), evaluated))


def _scores_with(runs: Runs, config: RunConfig, changes: Mapping[str, Value]) -> StreamScores:
    """Test scores of a run with other values than its own; made once and kept."""

    def score() -> StreamScores:
        return runs.evaluated(config, runs.trained_model(config, **changes))

    shape = tuple(runs.data(config).test.targets.shape)
    return runs.outcome(config).scores_of(evaluation_id("", changes), shape, score)


def scores_of(runs: Runs, prediction: Prediction, epoch: str = "last") -> StreamScores:
    """The test scores of a prediction, found on this machine or made from the run's weights."""
    if prediction.changes:
        return _scores_with(runs, prediction.config, prediction.changes)
    return runs.scores(prediction.config, epoch)


def interval(runs: Runs, group: Sequence[Record | Prediction], epoch: str = "last") -> Mapping[str, Any]:
    """mAP of a group and its 95 % interval, as fractions: the fields of MapInterval."""
    return compare(runs, group, (), epoch)


def compare(
    runs: Runs, a: Sequence[Record | Prediction], b: Sequence[Record | Prediction], epoch: str = "last"
) -> Mapping[str, Any]:
    """mAP(a) - mAP(b), each the mean over its runs, with its 95 % interval and p-value, as fractions: the fields of
    MapDifference; with an empty b as interval. Paired where both sides are the same runs in the same order. Kept as a
    record that is found again by the runs' ids; what there is no number for is NaN in it."""
    sides = [[each.prediction() if isinstance(each, Record) else each for each in side] for side in (a, b)]
    resamples = runs.profile.bootstrap_resamples
    ids = [[each.id for each in side] for side in sides]
    key = {"a": ids[0], "b": ids[1], "epoch": epoch, "num_resamples": resamples}

    def computed() -> dict[str, Any]:
        targets = runs.data(sides[0][0].config).test.targets
        scores = [torch.stack([_scores(runs, each, epoch, targets) for each in side]) for side in sides if side]
        paired = [each.record.run_id for each in sides[0]] == [each.record.run_id for each in sides[1]]
        found = (
            map_difference(scores[0], scores[1], targets, resamples, paired=paired)
            if b
            else map_interval(scores[0], targets, resamples)
        )
        labels = {
            f"{name}_labels": [each.config.label for each in side] for name, side in zip("ab", sides, strict=True)
        }
        of_runs = sorted({each.record.run_id for side in sides for each in side})
        return {"format": RECORD_FORMAT, **key, "runs": of_runs, **labels, "confidence": 0.95, **numbers_of(found)}

    return runs.keep("comparisons", content_id(key), comparison_fingerprint(), computed)


def numbers_of(found: MapDifference | MapInterval) -> dict[str, Any]:
    """The fields of an interval, as a record that was read again has them: JSON knows no infinity."""

    def plain(value: Any) -> Any:
        return math.nan if value == math.inf else list(value) if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in asdict(found).items()}


def comparison_fingerprint() -> str:
    """What a comparison computes with: from the files of scores to intervals."""
    return fingerprint(Outcome.scores, Outcome.scores_of, StreamScores, by_stream, map_interval, map_difference)


def _scores(runs: Runs, prediction: Prediction, epoch: str, targets: torch.Tensor) -> torch.Tensor:
    """Scores (n, K) of a prediction, held against its record: they are not committed, and made anew on another machine
    they are a little others."""
    config = prediction.config
    scores = by_stream(scores_of(runs, prediction, epoch))[prediction.stream]
    recorded = prediction.map() if prediction.changes else prediction.record.map(prediction.stream, epoch)
    here = average_precision(scores, targets).nanmean().item()
    if abs(here - recorded) > SAME_MAP:
        say(
            f"{config.label}: its scores on this machine give an mAP of {100 * here:.2f}, its record says "
            f"{100 * recorded:.2f}: they were made apart, and the interval is of these scores"
        )
    return scores


# In percent, for tables -----------------------------------------------------------------------------------------------


def grouped(found: Iterable[Record | Failure], *names: str) -> dict[tuple[Any, ...], list[Record | Failure]]:
    """The runs of each setting, in order: values of these properties of their configurations -> runs, one a seed."""
    groups: dict[tuple[Any, ...], list[Record | Failure]] = {}
    for each in found:
        groups.setdefault(tuple(getattr(each.config, name) for name in names), []).append(each)
    return groups


def summarise(runs: Runs, group: Sequence[Found]) -> dict[str, Any]:
    """A group as cells of a table: seeds, mAP in percent with its 95 % interval (low, high), the sample standard
    deviation over seeds in points (None for one), and what it costs.

    Where a run of the group could not be had, the numbers are None and `note` says why.
    """
    cells: dict[str, Any] = {"seeds": len(group), "mAP": None, "low": None, "high": None, "sd over seeds": None}
    failed = [each.error for each in group if isinstance(each, Failure)]
    if failed:
        return {**cells, "note": failed[0]}
    there = [each.prediction() if isinstance(each, Record) else each for each in group if not isinstance(each, Failure)]
    maps = [100 * each.map() for each in there]
    cells["mAP"], cells["sd over seeds"] = fmean(maps), stdev(maps) if len(maps) > 1 else None
    found = interval(runs, there)
    cells |= {end: 100 * found[end] for end in ("low", "high")}
    cells["M parameters"] = there[0].cost["parameters"] / 1e6
    cells["GMACs an image"] = there[0].cost["macs_per_image"] / 1e9
    return cells


def differences(
    runs: Runs,
    pairs: Mapping[str, tuple[Sequence[Found], Sequence[Found]]],
    names: tuple[str, str] = ("higher", "lower"),
) -> list[dict[str, Any]]:
    """Each pair of groups as a row: what is compared, points of mAP with the 95 % interval, p, p adjusted by Holm for
    the number of pairs that have one, seeds ("5 and 3", or "5 pairs" of the same runs), and the finding: one of
    `names`, NO_DIFFERENCE, or ONE_SEED where a side has but one, and p is None.

    A pair in which a run could not be had is left out.
    """
    whole = {
        name: pair
        for name, pair in pairs.items()
        if not any(isinstance(each, Failure) for each in (*pair[0], *pair[1]))
    }
    found = {name: compare(runs, a, b) for name, (a, b) in whole.items()}  # type: ignore[arg-type]
    adjusted = holm([each["p_value"] for each in found.values()])
    rows = []
    for (name, each), p in zip(found.items(), adjusted, strict=True):
        points = {key: 100 * each[key] for key in ("difference", "low", "high")}
        a, b = each["seeds"]
        seeds = (f"{a} pair" if a == 1 else f"{a} pairs") if each["paired"] else f"{a} and {b}"
        tested: dict[str, Any]
        if math.isnan(p):
            tested = {"p": None, "p (Holm)": None, "seeds": seeds, "finding": ONE_SEED}
        else:
            finding = names[each["difference"] <= 0] if p < SIGNIFICANT else NO_DIFFERENCE
            tested = {"p": each["p_value"], "p (Holm)": p, "seeds": seeds, "finding": finding}
        rows.append({"compared": name, **points, **tested})
    return rows


def is_finding(row: Mapping[str, Any]) -> bool:
    """Whether a row of differences says that there is one."""
    return row["finding"] not in (NO_DIFFERENCE, ONE_SEED)


def told(rows: Iterable[Mapping[str, Any]]) -> str:
    """What differences support, in sentences that they write themselves."""
    rows = list(rows)
    one_seed = sum(row["finding"] == ONE_SEED for row in rows)
    shown = [row for row in rows if is_finding(row)]
    rest = len(rows) - one_seed - len(shown)
    sentences = [f"{row['compared']}: {points(row)} points of mAP." for row in shown]
    if rest == len(rows):
        sentences.append(f"In none of {len(rows)} comparisons is there a difference that this data can show.")
    elif rest:
        sentences.append(f"In {rest} of {len(rows)} comparisons: {NO_DIFFERENCE}.")
    if one_seed:
        sentences.append(f"{one_seed} of {len(rows)} comparisons {'has' if one_seed == 1 else 'have'} {ONE_SEED}.")
    return " ".join(sentences)


def points(row: Mapping[str, Any]) -> str:
    """'+1.3 (+0.4 to +2.2)' from a row of differences."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(row[key] for key in ("difference", "low", "high")))
