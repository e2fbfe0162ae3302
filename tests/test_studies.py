"""What the ablation notebooks share: the table of tuned rates, tests with other values, the first line of a study."""

from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from mcar_lib.runs import NO_DIFFERENCE, ONE_SEED, Axis, Failure, RunConfig, Runs, tune
from mcar_lib.runs.config import Tuning
from mcar_lib.studies import answer_of, changed, each_tested, tuning_table


def found(*findings: str) -> pd.DataFrame:
    """Rows as of differences: "a - b", "b - c" and so on."""
    rows = [
        {
            "compared": f"{'abcd'[at]} - {'bcde'[at]}",
            "difference": at + 1.25,
            "low": 0.5,
            "high": 9.0,
            "finding": finding,
        }
        for at, finding in enumerate(findings)
    ]
    return pd.DataFrame(rows)


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkout whose photos have a finding."""
    monkeypatch.setattr("mcar_lib.studies.project_root", lambda: tmp_path)
    tables = tmp_path / "results" / "photos" / "tables"
    tables.mkdir(parents=True)
    found("higher").to_csv(tables / "ablation_x_differences.csv", index=False)


TUNING = Tuning(rates=(0.001, 0.05), seed=100, widenings=0)


def test_an_arm_is_a_row_with_what_each_rate_came_to(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    tried = [("b", 0.05, 7.0, "yes"), ("b", 0.001, 6.0, ""), ("a", 0.05, None, ""), ("a", 0.1, 8.0, "yes")]
    columns = ("arm", "learning rate", "mAP on val", "chosen")
    rows = [dict(zip(columns, each, strict=True)) for each in tried]
    monkeypatch.setattr("mcar_lib.studies.tuning_rows", lambda *_: rows)
    runs.profile = runs.profile.model_copy(update={"tuning": TUNING})
    table = tuning_table(runs, [])
    assert list(table) == ["arm", "chosen rate", "val mAP at 0.001", "val mAP at 0.05", "val mAP at 0.1"]
    assert table.fillna(-1.0).to_numpy().tolist() == [["b", 0.05, 6.0, 7.0, -1.0], ["a", 0.1, -1.0, -1.0, 8.0]]


def test_the_rate_of_an_arm_is_the_one_its_runs_get(runs: Runs, tiny_config: RunConfig) -> None:
    runs.profile = runs.profile.model_copy(update={"tuning": TUNING})
    configs = [tiny_config.vary(epochs=1, local_stream=False, seed=seed) for seed in (0, 1)]
    table = tuning_table(runs, configs)
    assert table.filter(like="val mAP").idxmax(axis=1).tolist() == [f"val mAP at {table['chosen rate'][0]:g}"]
    assert [config.learning_rate for config in tune(runs, configs)] == [table["chosen rate"][0]] * 2


def test_a_profile_that_fixes_its_rates_shows_them(runs: Runs, tiny_config: RunConfig) -> None:
    table = tuning_table(
        runs, [tiny_config.vary(pooling=each, seed=seed) for each in ("avg", "max") for seed in (0, 1)]
    )
    assert table.to_dict("list") == {
        "arm": ["scenes-tiny-64px-avg-N2", "scenes-tiny-64px-max-N2"],
        "chosen rate": [tiny_config.learning_rate] * 2,
    }


def test_what_an_axis_changes_is_told() -> None:
    assert changed(Axis(values=(1,), change={"image_size": 160, "epochs": 2})) == "image_size = 160, epochs = 2"
    assert changed(Axis(values=(1,))) == "nothing"


def test_runs_are_tested_with_other_values_and_those_that_could_not_be_had_stay_so(
    open_runs: Callable[..., Runs], tiny_config: RunConfig
) -> None:
    runs = open_runs()
    record, failure = runs.run(tiny_config), Failure(tiny_config, "out of memory")
    again, still, (own,) = (
        *each_tested(runs, [record, failure], num_regions=1),
        *[each_tested(runs, [record], num_regions=2)],
    )
    assert again.changes == {"num_regions": 1}
    assert still is failure
    assert own.changes == {}


def test_a_test_that_cannot_be_made_is_a_failure_that_says_why(
    open_runs: Callable[..., Runs], tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = open_runs()
    record = runs.run(tiny_config)
    monkeypatch.setattr(
        "mcar_lib.studies.tested", lambda *_, **__: runs.data(tiny_config.vary(dataset="voc2007", data_options={}))
    )
    (failure,) = each_tested(runs, [record], threshold=0.4)
    assert isinstance(failure, Failure)
    assert failure.config == tiny_config
    assert "DataError" in failure.error


def test_the_first_line_says_what_holds() -> None:
    table = found("higher", NO_DIFFERENCE, "lower")
    assert answer_of("ablation_x", {"mine": table}, {"mine": "a 1, b 2"}) == (
        "**Answer.** mine: a 1, b 2; 2 of 3 differences hold: a - b +1.2; c - d +3.2."
    )
    assert answer_of("ablation_x", {"mine": found(NO_DIFFERENCE)}, {"mine": "a 1"}).endswith("0 of 1 differences hold.")


@pytest.mark.usefixtures("committed")
def test_one_seed_makes_no_finding_and_shows_that_of_the_photos() -> None:
    line = answer_of("ablation_x", {"mini": found(ONE_SEED, ONE_SEED)}, {"mini": "a 1, b 2"})
    assert line == (
        "**Answer.** mini: one seed a setting, so no finding of its own. "
        "On the photos (committed): a - b: +1.2 (+0.5 to +9.0) points of mAP."
    )


@pytest.mark.usefixtures("committed")
@pytest.mark.parametrize("shown", [{"photos": found("higher")}, {"scenes": found("lower")}])
def test_the_committed_finding_stands_only_where_no_other_does(shown: dict[str, pd.DataFrame]) -> None:
    compared = shown | {"mini": found(ONE_SEED)}
    assert "(committed)" not in answer_of("ablation_x", compared, dict.fromkeys(compared, "a 1"))


def test_a_study_without_its_runs_says_so() -> None:
    assert answer_of("ablation_y", {"mini": pd.DataFrame()}, {"mini": ""}).endswith(
        "mini: runs are missing, so nothing is compared."
    )
