"""The ablations: which runs each of them compares, and what their records say.

A study is a list of settings (table rows) and of pairs of them that are compared. Scores of several seeds are pooled as
the mean of their mAPs; intervals and p-values come from a bootstrap over the test images, the same for both sides of a
pair, and the p-values of one study are adjusted by Holm's method.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from mcar_lib.config import Axis, Profile, RunConfig
from mcar_lib.errors import ConfigError, MCARError
from mcar_lib.experiment import (
    BASELINE,
    METHOD,
    STREAMS,
    Record,
    Scored,
    Workspace,
    comparison_key,
    content_id,
    current_record,
    evaluation_id,
    kept,
    read_records,
)
from mcar_lib.grid import failure_name, forget_failure, note_failure, read_failures, run_grid
from mcar_lib.localisation import NO_DIFFERENCE

if TYPE_CHECKING:
    import pandas as pd

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Setting:
    """A row of a study: the value that is varied, what it was varied in, and its scores, one a seed."""

    varied: str
    value: int | float | str
    model: str
    scores: tuple[Scored, ...]

    @property
    def name(self) -> str:
        return f"{self.model}, {self.varied} {self.value}"


@dataclass(frozen=True)
class Study:
    """What one ablation notebook compares; pairs: indices of two settings, the first minus the second."""

    name: str
    settings: tuple[Setting, ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def runs(self) -> list[RunConfig]:
        return [scored.config for setting in self.settings for scored in setting.scores]


@dataclass(frozen=True)
class Outcome:
    """A setting with what its runs gave: records, metrics and interval, or why there are none."""

    setting: Setting
    records: tuple[Record, ...]
    metrics: tuple[Mapping[str, Any], ...]
    costs: tuple[Mapping[str, Any], ...]
    interval: Mapping[str, Any] | None
    error: str = ""


@dataclass(frozen=True)
class Difference:
    """A pair of settings, the paired interval of their difference in mAP, and its p-value adjusted by Holm."""

    first: Setting
    second: Setting
    comparison: Mapping[str, Any]
    adjusted_p: float

    @property
    def name(self) -> str:
        """What differs between the two settings, then what they share."""
        if self.first.model != self.second.model:
            return f"{self.first.model} - {self.second.model}, {self.first.varied} {self.first.value}"
        return f"{self.first.varied} {self.first.value} - {self.second.value}, {self.first.model}"

    @property
    def finding(self) -> str:
        if self.adjusted_p >= SIGNIFICANT:
            return NO_DIFFERENCE
        return "higher" if self.comparison["difference"] > 0 else "lower"


@dataclass(frozen=True)
class StudyResult:
    """A study with everything that its records say."""

    profile: Profile
    study: Study
    outcomes: tuple[Outcome, ...]
    differences: tuple[Difference, ...]

    @property
    def is_complete(self) -> bool:
        """Whether every setting has its interval or failed, and every pair that can be compared is."""
        there = [bool(outcome.interval) for outcome in self.outcomes]
        compared = sum(there[a] and there[b] for a, b in self.study.pairs)
        told = all(outcome.interval or outcome.error.startswith("failed") for outcome in self.outcomes)
        return told and any(there) and len(self.differences) == compared

    @property
    def changed(self) -> dict[str, Any]:
        """What all runs of the study have otherwise than the profile's own run."""
        own, runs = self.profile.run.model_dump(), [run.model_dump() for run in self.study.runs]
        return {key: runs[0][key] for key in own if all(run[key] == runs[0][key] != own[key] for run in runs)}

    @property
    def title(self) -> str:
        """The profile, the length of the runs, and the data that they were tested on."""
        data = next(record.content["data"] for outcome in self.outcomes for record in outcome.records)
        caution = ", not comparable with the published figures" if data["subset"] else ""
        epochs = sorted({run.epochs for run in self.study.runs})
        return f"profile {self.profile.name}, {' or '.join(map(str, epochs))} epochs; {data['test']}{caution}"


# The studies ---------------------------------------------------------------------------------------------------------


def studies(profile: Profile) -> dict[str, Study]:
    """The ablations of a profile by name: pooling, input_size, backbone, num_regions, regions."""
    made = {
        "pooling": _both_models(profile, "pooling", "pooling", "pooling"),
        "input_size": _both_models(profile, "input_size", "image_size", "input size"),
        "backbone": _both_models(profile, "backbone", "backbone", "backbone"),
        "num_regions": _num_regions(profile),
        "regions": _regions(profile),
    }
    return {name: study for name, study in made.items() if study is not None}


def study_of(profile: Profile, name: str) -> Study:
    """One study; raises ConfigError if the profile has no values for it."""
    found = studies(profile)
    if name not in found:
        raise ConfigError(f"profile {profile.name} has no [ablations] for {name}; it has {', '.join(found) or 'none'}")
    return found[name]


def _runs(profile: Profile, axis: Axis, **values: object) -> list[RunConfig]:
    base = profile.run.vary(**axis.change)
    return [base.vary(seed=seed, **values) for seed in axis.seeds]


def _setting(varied: str, value: Any, configs: Sequence[RunConfig], **changes: Any) -> Setting:
    model = METHOD if configs[0].local_stream else BASELINE
    return Setting(varied, value, model, tuple(Scored(config, changes) for config in configs))


def _both_models(profile: Profile, name: str, key: str, varied: str) -> Study | None:
    """MCAR and its global baseline at each value: MCAR against the baseline, each value against the run's own."""
    axis = profile.ablations.get(key)  # type: ignore[call-overload]
    if axis is None:
        return None
    settings = [
        _setting(varied, value, _runs(profile, axis, **{key: value}, local_stream=local))
        for local in (False, True)
        for value in axis.values
    ]
    count, own = len(axis.values), axis.values.index(getattr(profile.run.vary(**axis.change), key))
    against_own = [(first + at, first + own) for first in (0, count) for at in range(count) if at != own]
    return Study(name, tuple(settings), tuple([(count + at, at) for at in range(count)] + against_own))


def _num_regions(profile: Profile) -> Study | None:
    """Trained with each N, one model tested with each N, and the global stream alone, which has none."""
    axis = profile.ablations.get("num_regions")
    if axis is None:
        return None
    own = profile.run.vary(**axis.change).num_regions
    trained = [_setting("trained with N =", n, _runs(profile, axis, num_regions=n)) for n in axis.values]
    tested = [
        _setting(f"trained with {own}, tested with N =", n, _runs(profile, axis), num_regions=n) for n in axis.values
    ]
    settings = [_setting("N =", 0, _runs(profile, axis, local_stream=False)), *trained, *tested]
    count = len(axis.values)
    pairs = [(1 + at, 0) for at in range(count)]
    for first in (1, 1 + count):
        pairs += [(first + at, first + axis.values.index(own)) for at in range(count) if axis.values[at] != own]
    return Study("num_regions", tuple(settings), tuple(pairs))


def _regions(profile: Profile) -> Study | None:
    """Which classes give the regions, the threshold tau, and the streams on their own."""
    selection, threshold = profile.ablations.get("selection"), profile.ablations.get("threshold")
    if selection is None or threshold is None:
        return None
    base = profile.run.vary(**selection.change)
    settings = [_setting("selection", value, _runs(profile, selection, selection=value)) for value in selection.values]
    pairs = [(at, selection.values.index(base.selection)) for at, value in enumerate(selection.values)]
    first = len(settings)
    for value in threshold.values:
        if threshold.tested_only:
            settings.append(_setting("tested with tau =", value, _runs(profile, threshold), threshold=value))
        else:
            settings.append(_setting("trained with tau =", value, _runs(profile, threshold, threshold=value)))
    own = threshold.values.index(profile.run.vary(**threshold.change).threshold)
    pairs += [(first + at, first + own) for at in range(len(threshold.values))]
    first = len(settings)
    runs = _runs(profile, selection)
    settings += [
        Setting("stream", stream, METHOD, tuple(Scored(config, stream=stream) for config in runs)) for stream in STREAMS
    ]
    pairs += [(first + 2, first), (first + 2, first + 1)]  # the fused score against either stream
    return Study("regions", tuple(settings), tuple((a, b) for a, b in pairs if a != b))


# Their results -------------------------------------------------------------------------------------------------------


def run_study(workspace: Workspace, study: Study) -> StudyResult:
    """Trains, tests and compares what has no record yet, then reads the study's result.

    Settings whose runs failed stand in the result with their error.
    """
    run_grid(workspace, study.runs)
    for setting in study.settings:
        for scored in setting.scores:
            if scored.differs and workspace.find(scored.config):
                _try_test(workspace, scored)
    folders = [workspace.folder, workspace.local_folder]
    result = load_study(folders, workspace.profile, study)
    if result is None:
        raise ConfigError(f"every run of the study {study.name} failed; see the messages above")
    is_there = [bool(outcome.records) for outcome in result.outcomes]
    for setting, there in zip(study.settings, is_there, strict=True):
        if there:
            workspace.compare(setting.scores)
    for a, b in study.pairs:
        if is_there[a] and is_there[b]:
            workspace.compare(study.settings[a].scores, study.settings[b].scores)
    result = load_study(folders, workspace.profile, study)
    assert result is not None
    return result


def _try_test(workspace: Workspace, scored: Scored) -> None:
    name = _test_name(scored)
    try:
        workspace.test(scored)
    except MCARError as error:
        note_failure(workspace.local_folder, name, f"{type(error).__name__}: {error}")
    else:
        forget_failure(workspace.local_folder, name)


def _test_name(scored: Scored) -> str:
    return "-".join(
        [failure_name(scored.config), "tested", *(f"{key}={value}" for key, value in scored.differs.items())]
    )


def load_study(folders: Sequence[Path], profile: Profile, study: Study) -> StudyResult | None:
    """A study's result from results/<profile> folders, the first that has a record wins; None if no run is there.

    Raises ResultsError when one of its records was made by other arithmetic than today's.
    """
    records = [record for folder in dict.fromkeys(folders) for record in read_records(folder)]
    failures = {label: error for folder in folders for label, error in read_failures(folder).items()}
    outcomes = [_outcome(folders, profile, records, failures, setting) for setting in study.settings]
    if not any(outcome.records for outcome in outcomes):
        return None
    pairs = [(outcomes[a], outcomes[b]) for a, b in study.pairs]
    found = [(a, b, _comparison(folders, profile, a, b)) for a, b in pairs if a.records and b.records]
    compared = [(a, b, comparison) for a, b, comparison in found if comparison is not None]
    adjusted = holm([comparison["p_value"] for _, _, comparison in compared])
    differences = [Difference(a.setting, b.setting, c, p) for (a, b, c), p in zip(compared, adjusted, strict=True)]
    return StudyResult(profile, study, tuple(outcomes), tuple(differences))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for how many there are, by Holm's step-down method (Scandinavian J. of Statistics 6, 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def _outcome(
    folders: Sequence[Path],
    profile: Profile,
    records: Sequence[Record],
    failures: Mapping[str, str],
    setting: Setting,
) -> Outcome:
    found = [current_record(records, scored.config) for scored in setting.scores]
    metrics, costs = [], []
    for scored, record in zip(setting.scores, found, strict=True):
        if record is None:
            failed = failures.get(failure_name(scored.config))
            return Outcome(setting, (), (), (), None, f"failed: {failed}" if failed else "not run")
        evaluation = _evaluation(folders, scored, record)
        if evaluation is None:
            failed = failures.get(_test_name(scored))
            return Outcome(setting, (), (), (), None, f"failed: {failed}" if failed else "not tested")
        metrics.append(evaluation["metrics"][scored.stream])
        costs.append(evaluation["cost"])
    present = tuple(record for record in found if record is not None)
    interval = _interval_record(
        folders, profile, [t.id(r.run_id) for t, r in zip(setting.scores, present, strict=True)], []
    )
    return Outcome(setting, present, tuple(metrics), tuple(costs), interval)


def _evaluation(folders: Sequence[Path], scored: Scored, record: Record) -> Mapping[str, Any] | None:
    """Metrics by stream, and the cost, of a run as it is tested here."""
    if scored.differs:
        content = kept(folders, "evaluations", evaluation_id(record.run_id, scored.differs))
        return content and {**content, "cost": {**record.content["cost"], **content["cost"]}}
    metrics, cost, data = record.metrics["last"], record.content["cost"], record.content["data"]
    tests = record.config.epochs * data["test_images"]
    milliseconds = 1000 * cost["test_seconds"] / tests
    return {"metrics": metrics, "cost": {**cost, "milliseconds_per_image": milliseconds}}


def _comparison(folders: Sequence[Path], profile: Profile, a: Outcome, b: Outcome) -> Mapping[str, Any] | None:
    ids = [[t.id(r.run_id) for t, r in zip(o.setting.scores, o.records, strict=True)] for o in (a, b)]
    return _interval_record(folders, profile, ids[0], ids[1])


def _interval_record(
    folders: Sequence[Path], profile: Profile, a: Sequence[str], b: Sequence[str]
) -> Mapping[str, Any] | None:
    return kept(folders, "comparisons", content_id(comparison_key(a, b, "last", profile.bootstrap_resamples)))


# Tables and findings -------------------------------------------------------------------------------------------------


def study_table(result: StudyResult) -> "pd.DataFrame":
    """One row a setting: mAP in percent (mean over its seeds) with its 95 % interval, and what it costs."""
    import pandas as pd

    rows = []
    for outcome in result.outcomes:
        setting = outcome.setting
        row: dict[str, Any] = {"varied": setting.varied, "value": setting.value, "model": setting.model}
        row |= {"seeds": len(setting.scores), "mAP": None, "low": None, "high": None}
        if outcome.records:
            row["mAP"] = 100 * fmean(metrics["mAP"] for metrics in outcome.metrics)
            row |= {end: 100 * outcome.interval[end] for end in ("low", "high") if outcome.interval}
            row["M parameters"] = outcome.costs[0]["parameters"] / 1e6
            row["GMACs an image"] = outcome.costs[0]["macs_per_image"] / 1e9
            row["ms an image"] = fmean(cost["milliseconds_per_image"] for cost in outcome.costs)
        row["note"] = outcome.error
        rows.append(row)
    table = pd.DataFrame(rows)
    return table if table["note"].any() else table.drop(columns="note")


def difference_rows(result: StudyResult) -> "pd.DataFrame":
    """One row a comparison: points of mAP with the paired 95 % interval, p, p adjusted by Holm, and the finding."""
    import pandas as pd

    rows = []
    for difference in result.differences:
        numbers = {key: 100 * difference.comparison[key] for key in ("difference", "low", "high")}
        p = {"p": difference.comparison["p_value"], "p (Holm)": difference.adjusted_p}
        rows.append({"compared": difference.name, **numbers, **p, "finding": difference.finding})
    return pd.DataFrame(rows, columns=["compared", "difference", "low", "high", "p", "p (Holm)", "finding"])


def study_finding(result: StudyResult) -> str:
    """What the numbers support, in sentences that they write themselves."""
    shown = [difference for difference in result.differences if difference.finding != NO_DIFFERENCE]
    count = len(result.differences)
    sentences = []
    for difference in shown:
        sentences.append(f"{difference.name}: {interval_text(difference.comparison)} points of mAP.")
    if not shown:
        sentences.append(f"In none of {count} comparisons is there a difference that this data can show.")
    elif len(shown) < count:
        sentences.append(f"The other {count - len(shown)} of {count} comparisons: {NO_DIFFERENCE}.")
    failed = [outcome.setting.name for outcome in result.outcomes if outcome.error]
    sentences += [f"Without a result: {', '.join(failed)}."] if failed else []
    return " ".join(sentences)


def interval_text(comparison: Mapping[str, Any]) -> str:
    """'+1.3 (+0.4 to +2.2)' in points of mAP."""
    numbers = [100 * comparison[key] for key in ("difference", "low", "high")]
    return "{:+.1f} ({:+.1f} to {:+.1f})".format(*numbers)
