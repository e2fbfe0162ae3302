"""What records say beside one another: tests with other values, intervals, differences, and findings in words."""

import json
from collections.abc import Callable
from statistics import fmean, stdev

import pytest
import torch

from mcar_lib.data.transforms import normalise
from mcar_lib.errors import ConfigError, DataError
from mcar_lib.metrics import average_precision
from mcar_lib.runs import (
    NO_DIFFERENCE,
    ONE_SEED,
    STREAMS,
    Failure,
    Record,
    RunConfig,
    Runs,
    compare,
    comparisons,
    differences,
    find_or_train,
    interval,
    summarise,
    told,
)
from mcar_lib.runs.records import Prediction, evaluation_id

OpenRuns = Callable[..., Runs]
DIFFERENCE = comparisons.map_difference
Groups = tuple[list[Record], list[Record]]


@pytest.fixture
def record(runs: Runs, tiny_config: RunConfig) -> Record:
    return runs.run(tiny_config)


@pytest.fixture
def groups(runs: Runs, tiny_config: RunConfig) -> Groups:
    """MCAR and the global stream alone, two seeds each."""
    configs = [tiny_config.vary(seed=seed, local_stream=local) for local in (True, False) for seed in (0, 1)]
    made = [runs.run(config) for config in configs]
    return made[:2], made[2:]


@pytest.fixture
def failure(runs: Runs, tiny_config: RunConfig) -> Failure:
    """A run that has more regions than classes."""
    (failed,) = find_or_train(runs, [tiny_config.vary(num_regions=21)])
    assert isinstance(failed, Failure)
    return failed


# ---- tests with other values


def test_a_test_with_other_values_is_that_of_a_model_with_these_values(
    runs: Runs, record: Record, tiny_config: RunConfig
) -> None:
    mcar = runs.trained_model(tiny_config)
    mcar.num_regions = 1
    data = runs.data(tiny_config)
    squares = runs.splits.squares(data.test, tiny_config.image_size)
    with torch.no_grad():
        images = normalise(torch.stack([squares[i] for i in range(len(squares))]), mcar.mean, mcar.std)
        scores = mcar(images).scores
    expected = average_precision(scores, data.test.targets).nanmean().item()
    assert comparisons.tested(runs, record, num_regions=1).map() == pytest.approx(expected, abs=1e-3)


def test_a_test_with_fewer_regions_costs_fewer_operations(runs: Runs, record: Record) -> None:
    found = comparisons.tested(runs, record, num_regions=1).cost
    assert found["macs_per_image"] < record.content["cost"]["macs_per_image"]
    assert found["parameters"] == record.content["cost"]["parameters"]


def test_a_test_with_the_run_s_own_values_is_the_run(runs: Runs, record: Record, tiny_config: RunConfig) -> None:
    found = comparisons.tested(runs, record, num_regions=tiny_config.num_regions, threshold=tiny_config.threshold)
    assert (found.id, found.map()) == (record.run_id, record.map())
    assert not (runs.local_folder / "evaluations").exists()


def test_a_test_is_kept_as_a_record_under_the_run_s_id_and_its_values(runs: Runs, record: Record) -> None:
    comparisons.tested(runs, record, threshold=0.4, num_regions=record.config.num_regions)
    name = evaluation_id(record.run_id, {"threshold": 0.4})
    content = json.loads((runs.local_folder / "evaluations" / f"{name}.json").read_text())
    assert (content["run_id"], content["changes"]) == (record.run_id, {"threshold": 0.4})


def test_a_test_is_found_again(open_runs: OpenRuns, record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    first = comparisons.tested(open_runs(), record, threshold=0.4)
    monkeypatch.delattr(Runs, "evaluated")
    found = comparisons.tested(open_runs(), record, threshold=0.4)
    assert json.dumps(found.metrics) == json.dumps(first.metrics)  # as text, NaN equals NaN


def test_a_test_made_by_other_arithmetic_is_made_anew(runs: Runs, record: Record) -> None:
    comparisons.tested(runs, record, threshold=0.4)
    (path,) = (runs.local_folder / "evaluations").glob("*.json")
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "made_by": "other", "metrics": {"fused": {"mAP": 2.0}}}))
    assert comparisons.tested(runs, record, threshold=0.4).map() <= 1


def test_a_test_with_an_impossible_value_is_refused(runs: Runs, record: Record) -> None:
    with pytest.raises(ConfigError, match="threshold"):
        comparisons.tested(runs, record, threshold=2.0)


def test_other_values_and_other_streams_have_other_names(record: Record) -> None:
    variants = [
        Prediction(record),
        Prediction(record, stream="global"),
        Prediction(record, {"threshold": 0.4}),
        Prediction(record, {"threshold": 0.4}, "global"),
    ]
    assert len({variant.id for variant in variants}) == 4


# ---- comparisons


def test_a_comparison_is_the_difference_of_mean_maps(runs: Runs, groups: Groups) -> None:
    a, b = (fmean(record.map() for record in group) for group in groups)
    assert compare(runs, *groups)["difference"] == pytest.approx(a - b)


def test_a_comparison_has_an_interval_and_a_p_value(runs: Runs, groups: Groups) -> None:
    found = compare(runs, *groups)
    assert found["low"] <= found["difference"] <= found["high"]
    assert 0 < found["p_value"] <= 1
    assert (found["seeds"], found["paired"]) == ([2, 2], False)
    assert found["seed_error"] > 0
    assert found["degrees_of_freedom"] > 1


def test_the_same_runs_on_both_sides_are_pairs(runs: Runs, groups: Groups) -> None:
    streams = [[record.prediction(stream) for record in groups[0]] for stream in ("fused", "global")]
    scores = [
        torch.stack([getattr(runs.scores(record.config), name) for record in groups[0]])
        for name in ("fused", "global_scores")
    ]
    targets = runs.data(groups[0][0].config).test.targets
    found, pairs = compare(runs, *streams), DIFFERENCE(*scores, targets, 20, paired=True)
    assert (found["low"], found["p_value"], found["paired"]) == (pairs.low, pairs.p_value, True)
    assert not compare(runs, streams[0], streams[1][::-1])["paired"]  # in another order they are not each other's


def test_a_comparison_with_one_seed_has_no_p_value_in_its_record(
    runs: Runs, open_runs: OpenRuns, groups: Groups
) -> None:
    made = compare(runs, groups[0], groups[1][:1])
    (path,) = (runs.local_folder / "comparisons").glob("*.json")
    content = json.loads(path.read_text())
    assert [content[name] for name in ("p_value", "seed_error", "degrees_of_freedom")] == [None] * 3
    assert (content["seeds"], content["low"]) == ([2, 1], made["low"])
    assert str(compare(open_runs(), groups[0], groups[1][:1])["p_value"]) == str(made["p_value"]) == "nan"


def test_a_comparison_names_the_runs_of_both_groups(runs: Runs, groups: Groups) -> None:
    found = compare(runs, *groups)
    assert [found["a"], found["b"]] == [[record.run_id for record in group] for group in groups]
    assert [found["a_labels"], found["b_labels"]] == [[each.config.label for each in group] for group in groups]


def test_a_comparison_is_found_again(open_runs: OpenRuns, groups: Groups, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compare(open_runs(), *groups)
    monkeypatch.setattr(comparisons, "_scores", None)
    assert compare(open_runs(), *groups) == first


def test_a_comparison_read_by_other_definitions_is_made_anew(
    open_runs: OpenRuns, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    compare(open_runs(), *groups)
    monkeypatch.setattr(comparisons, "comparison_fingerprint", lambda: "another")
    computed: list[str] = []
    monkeypatch.setattr(
        comparisons,
        "map_difference",
        lambda *given, **options: computed.append("here") or DIFFERENCE(*given, **options),
    )
    compare(open_runs(), *groups)
    assert computed == ["here"]


def test_scores_that_are_not_those_of_the_record_are_told(
    runs: Runs, groups: Groups, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compare(runs, *groups)
    assert "they were made apart" not in capsys.readouterr().out
    others = runs.scores(groups[0][1].config)
    monkeypatch.setattr(runs, "scores", lambda config, epoch: others)
    compare(runs, groups[0][:1], groups[1])
    assert "they were made apart, and the interval is of these scores" in capsys.readouterr().out


def test_a_swapped_comparison_has_the_other_sign(runs: Runs, groups: Groups) -> None:
    there, back = compare(runs, *groups), compare(runs, *reversed(groups))
    found = [back[name] for name in ("difference", "low", "high", "p_value")]
    assert found == pytest.approx([-there["difference"], -there["high"], -there["low"], there["p_value"]])


def test_a_comparison_of_the_best_epochs_is_another_one(runs: Runs, groups: Groups) -> None:
    a, b = (fmean(record.map("fused", "best") for record in group) for group in groups)
    compare(runs, *groups)
    assert compare(runs, *groups, epoch="best")["difference"] == pytest.approx(a - b)


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_is_compared_by_its_own_scores(runs: Runs, record: Record, stream: str) -> None:
    assert interval(runs, [record.prediction(stream)])["mAP"] == pytest.approx(record.map(stream))


def test_tests_with_other_values_are_compared_by_their_own_scores(runs: Runs, record: Record) -> None:
    other = comparisons.tested(runs, record, num_regions=1)
    assert compare(runs, [other], [record])["difference"] == pytest.approx(other.map() - record.map())


def test_an_interval_holds_the_mean_map_of_its_runs(runs: Runs, groups: Groups) -> None:
    found = interval(runs, groups[0])
    assert found["mAP"] == pytest.approx(fmean(record.map() for record in groups[0]))
    assert found["low"] <= found["high"]
    assert "p_value" not in found


# ---- tables


def test_a_group_s_row_has_the_mean_of_its_seeds_with_the_interval_and_the_cost(runs: Runs, groups: Groups) -> None:
    group = groups[0]
    row, found = summarise(runs, group), interval(runs, group)
    assert (row["seeds"], row["mAP"]) == (2, pytest.approx(100 * fmean(record.map() for record in group)))
    assert [row["low"], row["high"]] == [100 * found["low"], 100 * found["high"]]
    assert row["M parameters"] == group[0].content["cost"]["parameters"] / 1e6
    assert row["GMACs an image"] == group[0].content["cost"]["macs_per_image"] / 1e9
    assert row["sd over seeds"] == pytest.approx(100 * stdev(record.map() for record in group))
    assert summarise(runs, group[:1])["sd over seeds"] is None


@pytest.mark.parametrize("stream", STREAMS)
def test_a_stream_s_row_has_that_stream_s_map(runs: Runs, record: Record, stream: str) -> None:
    assert summarise(runs, [record.prediction(stream)])["mAP"] == pytest.approx(100 * record.map(stream))


def test_a_table_is_made_from_records_alone(
    open_runs: OpenRuns, groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights and scores are not committed, and the data need not be there."""

    def made(runs: Runs) -> list[object]:
        others = [comparisons.tested(runs, record, threshold=0.4) for record in groups[0]]
        rows = [summarise(runs, group) for group in (*groups, others)]
        return [rows, differences(runs, {"MCAR - baseline": groups, "tau": (others, groups[0])})]

    def missing(config: RunConfig) -> None:
        raise DataError("no data here")

    first, later = made(open_runs()), open_runs()
    monkeypatch.setattr(later, "data", missing)
    assert made(later) == first


def test_a_run_that_failed_stands_in_its_row_with_its_error(runs: Runs, record: Record, failure: Failure) -> None:
    row = summarise(runs, [record, failure])
    assert "num_regions is 21" in row["note"]
    assert (row["seeds"], row["mAP"], row["low"], row["high"]) == (2, None, None, None)
    assert "note" not in summarise(runs, [record])


def test_a_pair_with_a_run_that_failed_is_left_out(runs: Runs, groups: Groups, failure: Failure) -> None:
    found = differences(runs, {"whole": groups, "broken": (groups[0], [failure])})
    assert [row["compared"] for row in found] == ["whole"]


def test_nothing_to_compare_gives_no_row(runs: Runs, record: Record, failure: Failure) -> None:
    assert differences(runs, {"broken": ([failure], [record])}) == []


def test_a_tampered_record_changes_the_table(open_runs: OpenRuns, record: Record) -> None:
    """So the drift check, which rebuilds tables from records, and nbval notice it."""
    before = summarise(open_runs(), [record])
    record.path.write_text(record.path.read_text().replace('"mAP": 0.', '"mAP": 0.9'))
    again = open_runs().find(record.config)
    assert again is not None
    assert summarise(open_runs(), [again]) != before


# ---- differences and findings


SEEDS = {"seeds": [5, 3], "paired": False}


def with_p_values(monkeypatch: pytest.MonkeyPatch, p_values: list[float]) -> None:
    """Comparisons whose p-values, adjusted, are these; every second difference is below zero."""
    found = iter(range(len(p_values)))

    def compared(*args: object) -> dict[str, object]:
        sign = 1 if next(found) % 2 == 0 else -1
        return {"difference": 0.012 * sign, "low": -0.004, "high": 0.03, "p_value": 0.001, **SEEDS}

    monkeypatch.setattr(comparisons, "compare", compared)
    monkeypatch.setattr(comparisons, "holm", lambda plain: p_values[: len(plain)])


PAIRS = {"one": ((), ()), "two": ((), ()), "three": ((), ())}


def test_a_difference_is_told_in_points_with_both_p_values(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    with_p_values(monkeypatch, [0.049, 0.5, 0.5])
    assert differences(runs, PAIRS)[0] == {
        "compared": "one",
        "difference": pytest.approx(1.2),
        "low": pytest.approx(-0.4),
        "high": pytest.approx(3.0),
        "p": 0.001,
        "p (Holm)": 0.049,
        "seeds": "5 and 3",
        "finding": "higher",
    }


def test_p_values_are_adjusted_for_the_pairs_of_one_table(runs: Runs, groups: Groups) -> None:
    rows = differences(runs, {"there": groups, "back": (groups[1], groups[0])})
    assert rows[0]["p (Holm)"] == pytest.approx(min(1, 2 * rows[0]["p"]))


def test_a_finding_has_the_direction_of_the_difference(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    with_p_values(monkeypatch, [0.01, 0.01, 0.05])
    found = [row["finding"] for row in differences(runs, PAIRS, names=("MCAR", "baseline"))]
    assert found == ["MCAR", "baseline", NO_DIFFERENCE]


def test_nothing_significant_is_said_so(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    with_p_values(monkeypatch, [0.05] * 3)
    found = told(differences(runs, PAIRS))
    assert found == "In none of 3 comparisons is there a difference that this data can show."


def test_a_significant_difference_is_told_with_its_interval_and_the_others_counted(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_p_values(monkeypatch, [0.049, 0.5, 0.5])
    found = told(differences(runs, PAIRS))
    assert found == f"one: +1.2 (-0.4 to +3.0) points of mAP. In 2 of 3 comparisons: {NO_DIFFERENCE}."


def test_when_all_are_significant_no_others_are_counted(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    with_p_values(monkeypatch, [0.01] * 3)
    assert "comparisons" not in told(differences(runs, PAIRS))


def test_one_seed_is_no_finding_and_does_not_count_in_holm(runs: Runs, groups: Groups) -> None:
    """However clear the difference looks."""
    pairs = {"whole": groups, "one": (groups[0], groups[1][:1]), "same run": (groups[0][:1], groups[0][:1])}
    rows = differences(runs, pairs)
    assert rows[0]["p (Holm)"] == rows[0]["p"]
    assert [row["seeds"] for row in rows] == ["2 and 2", "2 and 1", "1 pair"]
    assert [(row["p"], row["p (Holm)"], row["finding"]) for row in rows[1:]] == [(None, None, ONE_SEED)] * 2
    assert all(row["low"] <= row["difference"] <= row["high"] for row in rows)


def test_pairs_of_the_same_runs_are_counted_as_pairs(runs: Runs, groups: Groups) -> None:
    streams = tuple([record.prediction(stream) for record in groups[0]] for stream in ("fused", "global"))
    assert differences(runs, {"second look": streams})[0]["seeds"] == "2 pairs"  # type: ignore[dict-item]


@pytest.mark.parametrize(
    ("findings", "expected"),
    [
        ([ONE_SEED, ONE_SEED], f"2 of 2 comparisons have {ONE_SEED}."),
        (["higher", ONE_SEED], f"a: +1.0 (+0.0 to +2.0) points of mAP. 1 of 2 comparisons has {ONE_SEED}."),
        (
            [NO_DIFFERENCE, ONE_SEED],
            f"In 1 of 2 comparisons: {NO_DIFFERENCE}. 1 of 2 comparisons has {ONE_SEED}.",
        ),
    ],
)
def test_comparisons_of_one_seed_are_counted(findings: list[str], expected: str) -> None:
    ends = {"difference": 1.0, "low": 0.0, "high": 2.0}
    assert told([{"compared": "a", **ends, "finding": finding} for finding in findings]) == expected
