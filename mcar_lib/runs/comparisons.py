"""What runs say beside one another: tests with other values, intervals of mAP, paired differences, and their finding.

A group is the runs of one setting, one a seed; its mAP is the mean over them. Intervals and p-values come from a
bootstrap over the test images, the same for both sides of a difference (mcar_lib.intervals). All that is computed from
scores is kept as a record, so it can be shown where there are no scores.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch

from mcar_lib.files import content_id
from mcar_lib.intervals import bootstrap_interval, holm, paired_bootstrap
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
        scores, seconds = _scores_with(runs, config, differing)
        images = runs.data(config).test
        mcar = build_model(config.vary(**differing), len(images.classes), weights="none")
        return {
            "format": RECORD_FORMAT,
            "run_id": record.run_id,
            "label": config.label,
            "changes": differing,
            "metrics": {"epoch": config.epochs, **stream_metrics(scores, images)},
            "cost": {
                "macs_per_image": count_macs(mcar, config.image_size),
                "milliseconds_per_image": 1000 * seconds / len(images),
            },
            "environment": describe_environment(runs.profile.threads),
        }

    name = evaluation_id(record.run_id, differing)
    return Prediction(record, differing, evaluation=runs.keep("evaluations", name, arithmetic_fingerprint(), evaluated))


def _scores_with(runs: Runs, config: RunConfig, changes: Mapping[str, Value]) -> tuple[StreamScores, float]:
    """Test scores of a run with other values than its own, and the seconds they took; made once and kept."""

    def score() -> tuple[StreamScores, float]:
        mcar = runs.trained_model(config, **changes)
        runs.splits.squares(runs.data(config).test, config.image_size)  # read before the clock starts
        started = time.monotonic()
        return runs.evaluated(config, mcar), time.monotonic() - started

    shape = tuple(runs.data(config).test.targets.shape)
    return runs.outcome(config).scores_of(evaluation_id("", changes), shape, score)


def scores_of(runs: Runs, prediction: Prediction, epoch: str = "last") -> StreamScores:
    """The test scores of a prediction, found on this machine or made from the run's weights."""
    if prediction.changes:
        return _scores_with(runs, prediction.config, prediction.changes)[0]
    return runs.scores(prediction.config, epoch)


def interval(runs: Runs, group: Sequence[Record | Prediction], epoch: str = "last") -> Mapping[str, Any]:
    """mAP of a group and its 95 % interval over test images, as fractions."""
    return compare(runs, group, (), epoch)


def compare(
    runs: Runs, a: Sequence[Record | Prediction], b: Sequence[Record | Prediction], epoch: str = "last"
) -> Mapping[str, Any]:
    """mAP(a) - mAP(b), each the mean over its runs, with a paired 95 % interval and its p-value, as fractions; with an
    empty b as interval. Kept as a record that is found again by the runs' ids."""
    sides = [[each.prediction() if isinstance(each, Record) else each for each in side] for side in (a, b)]
    resamples = runs.profile.bootstrap_resamples
    ids = [[each.id for each in side] for side in sides]
    key = {"a": ids[0], "b": ids[1], "epoch": epoch, "num_resamples": resamples}

    def computed() -> dict[str, Any]:
        targets = runs.data(sides[0][0].config).test.targets
        scores = [torch.stack([_scores(runs, each, epoch, targets) for each in side]) for side in sides if side]
        found = (
            paired_bootstrap(scores[0], scores[1], targets, resamples)
            if b
            else bootstrap_interval(scores[0], targets, resamples)
        )
        labels = {
            f"{name}_labels": [each.config.label for each in side] for name, side in zip("ab", sides, strict=True)
        }
        of_runs = sorted({each.record.run_id for side in sides for each in side})
        return {"format": RECORD_FORMAT, **key, "runs": of_runs, **labels, "confidence": 0.95, **asdict(found)}

    return runs.keep("comparisons", content_id(key), comparison_fingerprint(), computed)


def comparison_fingerprint() -> str:
    """What a comparison computes with: from the files of scores to intervals."""
    return fingerprint(Outcome.scores, Outcome.scores_of, StreamScores, by_stream, bootstrap_interval, paired_bootstrap)


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
    """A group as cells of a table: seeds, mAP in percent with its 95 % interval (low, high), and what it costs.

    Where a run of the group could not be had, the numbers are None and `note` says why.
    """
    cells: dict[str, Any] = {"seeds": len(group), "mAP": None, "low": None, "high": None}
    failed = [each.error for each in group if isinstance(each, Failure)]
    if failed:
        return {**cells, "note": failed[0]}
    there = [each.prediction() if isinstance(each, Record) else each for each in group if not isinstance(each, Failure)]
    cells["mAP"] = 100 * fmean(each.map() for each in there)
    found = interval(runs, there)
    cells |= {end: 100 * found[end] for end in ("low", "high")}
    cells["M parameters"] = there[0].cost["parameters"] / 1e6
    cells["GMACs an image"] = there[0].cost["macs_per_image"] / 1e9
    cells["ms an image"] = fmean(each.cost["milliseconds_per_image"] for each in there)
    return cells


def differences(
    runs: Runs,
    pairs: Mapping[str, tuple[Sequence[Found], Sequence[Found]]],
    names: tuple[str, str] = ("higher", "lower"),
) -> list[dict[str, Any]]:
    """Each pair of groups as a row: what is compared, points of mAP with the paired 95 % interval, p, p adjusted by
    Holm for the number of pairs, and the finding (one of `names`, or that the data can show no difference).

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
        finding = names[each["difference"] <= 0] if p < SIGNIFICANT else NO_DIFFERENCE
        rows.append({"compared": name, **points, "p": each["p_value"], "p (Holm)": p, "finding": finding})
    return rows


def told(rows: Iterable[Mapping[str, Any]]) -> str:
    """What differences support, in sentences that they write themselves."""
    rows = list(rows)
    shown = [row for row in rows if row["finding"] != NO_DIFFERENCE]
    if not shown:
        return f"In none of {len(rows)} comparisons is there a difference that this data can show."
    sentences = [f"{row['compared']}: {points(row)} points of mAP." for row in shown]
    if len(shown) < len(rows):
        sentences.append(f"In {len(rows) - len(shown)} of {len(rows)} comparisons: {NO_DIFFERENCE}.")
    return " ".join(sentences)


def points(row: Mapping[str, Any]) -> str:
    """'+1.3 (+0.4 to +2.2)' from a row of differences."""
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*(row[key] for key in ("difference", "low", "high")))
