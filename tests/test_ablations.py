"""The ablations: what they compare, that their tables follow from records, and that findings follow from tables."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mcar_lib import report
from mcar_lib.ablations import (
    NO_DIFFERENCE,
    Study,
    StudyResult,
    difference_rows,
    holm,
    load_study,
    run_study,
    studies,
    study_finding,
    study_of,
    study_table,
)
from mcar_lib.config import Axis, Profile, RunConfig, load_profile
from mcar_lib.data.transforms import normalise
from mcar_lib.errors import ConfigError, ResultsError
from mcar_lib.experiment import BASELINE, METHOD, Scored, Workspace
from mcar_lib.metrics import average_precision

OpenWorkspace = Callable[..., Workspace]
NAMES = ["pooling", "input_size", "backbone", "num_regions", "regions"]


@pytest.fixture(scope="module")
def profile(tiny_profile: Profile) -> Profile:
    axes = {
        "pooling": Axis(values=("avg", "gwp"), seeds=(0, 1)),
        "image_size": Axis(values=(32, 64), change={"epochs": 1}),
        "num_regions": Axis(values=(1, 2)),
        "selection": Axis(values=("top", "random")),
        "threshold": Axis(values=(0.4, 0.5), tested_only=True),
    }
    return tiny_profile.model_copy(update={"ablations": axes})


@pytest.fixture
def workspace(open_workspace: OpenWorkspace, profile: Profile) -> Workspace:
    made = open_workspace()
    made.profile = profile
    return made


# ---- what is compared


@pytest.mark.parametrize("name", ["smoke", "mini", "photos", "paper"])
def test_every_shipped_profile_has_every_study(name: str) -> None:
    assert list(studies(load_profile(name))) == NAMES


@pytest.mark.parametrize("name", ["mini", "photos", "paper"])
def test_a_study_compares_what_the_paper_varies(name: str) -> None:
    found = studies(load_profile(name))
    assert [setting.value for setting in found["pooling"].settings] == ["avg", "max", "gwp"] * 2
    assert len({setting.value for setting in found["input_size"].settings}) >= 3
    assert len({setting.value for setting in found["backbone"].settings}) == 3
    assert {setting.value for setting in found["num_regions"].settings} == {0, 1, 2, 4, 6, 8}
    values = {setting.value for setting in found["regions"].settings}
    assert values == {"top", "bottom", "random", 0.3, 0.4, 0.5, 0.6, 0.7, "global", "local", "fused"}


def test_the_paper_profile_has_the_paper_s_backbones() -> None:
    found = {setting.value for setting in study_of(load_profile("paper"), "backbone").settings}
    assert found == {"mobilenet_v2", "resnet50", "resnet101"}


@pytest.mark.parametrize("name", NAMES)
def test_a_pair_is_two_settings_of_the_study_that_differ(name: str) -> None:
    study = studies(load_profile("mini"))[name]
    pairs = [(study.settings[a], study.settings[b]) for a, b in study.pairs]
    assert all(a.scores != b.scores for a, b in pairs)
    assert len(set(study.pairs)) == len(study.pairs)


def test_mcar_is_held_against_the_baseline_at_each_value_and_each_value_against_the_own(profile: Profile) -> None:
    study = study_of(profile, "pooling")
    named = [(study.settings[a], study.settings[b]) for a, b in study.pairs]
    found = {(a.model, a.value, b.model, b.value) for a, b in named}
    assert found == {
        (METHOD, "avg", BASELINE, "avg"),
        (METHOD, "gwp", BASELINE, "gwp"),
        (BASELINE, "gwp", BASELINE, "avg"),
        (METHOD, "gwp", METHOD, "avg"),
    }


def test_studies_share_the_runs_they_can_share() -> None:
    found = studies(load_profile("mini"))
    shared = [{run.model_dump_json() for run in found[name].runs} for name in NAMES[1:]]
    assert set.intersection(*shared)


def test_a_profile_without_the_axis_is_told(tiny_profile: Profile) -> None:
    with pytest.raises(ConfigError, match=r"profile tiny has no \[ablations\] for pooling; it has none"):
        study_of(tiny_profile, "pooling")


# ---- Holm


def test_holm_on_a_worked_example() -> None:
    """Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, never below the one before."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_the_plain_and_the_bonferroni_p(p_values: list[float]) -> None:
    for plain, adjusted in zip(p_values, holm(p_values), strict=True):
        assert plain <= adjusted <= min(1, plain * len(p_values)) + 1e-12 or adjusted == max(holm(p_values))
        assert adjusted <= 1


# ---- tests with other values


def test_a_test_with_other_values_is_that_of_a_model_with_these_values(
    workspace: Workspace, tiny_config: RunConfig
) -> None:
    found = workspace.test(Scored(tiny_config, {"num_regions": 1}))
    model, mean_std = workspace.trained_model(tiny_config)
    model.num_regions = 1
    data = workspace.data(tiny_config)
    squares = workspace.resized(data.test, tiny_config.image_size)
    with torch.no_grad():
        scores = model(normalise(torch.stack([squares[i] for i in range(len(squares))]), *mean_std)).scores
    expected = average_precision(scores, data.test.targets).nanmean().item()
    assert found["metrics"]["fused"]["mAP"] == pytest.approx(expected, abs=1e-3)
    assert found["cost"]["macs_per_image"] < workspace.run(tiny_config).content["cost"]["macs_per_image"]


def test_a_test_with_the_run_s_own_values_is_the_run(workspace: Workspace, tiny_config: RunConfig) -> None:
    tested = Scored(tiny_config, {"num_regions": tiny_config.num_regions})
    assert tested.id("abc") == "abc"
    assert workspace.test(tested)["metrics"]["fused"]["mAP"] == pytest.approx(workspace.run(tiny_config).map())


def test_other_values_and_other_streams_have_other_names(tiny_config: RunConfig) -> None:
    variants = [
        Scored(tiny_config),
        Scored(tiny_config, stream="global"),
        Scored(tiny_config, {"threshold": 0.4}),
        Scored(tiny_config, {"threshold": 0.4}, "global"),
    ]
    assert len({tested.id("abc") for tested in variants}) == 4


# ---- results


def test_a_study_s_table_has_a_row_a_setting_with_the_mean_of_its_seeds(workspace: Workspace, profile: Profile) -> None:
    study = study_of(profile, "pooling")
    table = study_table(run_study(workspace, study))
    assert list(table["value"]) == ["avg", "gwp", "avg", "gwp"]
    runs = [workspace.run(tested.config).map() for tested in study.settings[3].scores]
    assert table["mAP"][3] == pytest.approx(100 * sum(runs) / 2)
    assert (table["low"] <= table["high"]).all()


@pytest.mark.parametrize("name", ["pooling", "input_size", "num_regions", "regions"])
def test_a_study_is_read_back_from_its_records_alone(workspace: Workspace, profile: Profile, name: str) -> None:
    made = run_study(workspace, study_of(profile, name))
    read = load_study([workspace.local_folder], profile, study_of(profile, name))
    assert read is not None
    assert study_table(read).equals(study_table(made))
    assert difference_rows(read).equals(difference_rows(made))
    assert len(made.differences) == len(made.study.pairs)
    assert report.study_figure(made).axes


def test_a_stream_s_row_has_that_stream_s_map(workspace: Workspace, profile: Profile) -> None:
    table = study_table(run_study(workspace, study_of(profile, "regions")))
    streams = table[table["varied"] == "stream"].set_index("value")["mAP"]
    record = workspace.run(profile.run)
    for name in ("global", "local", "fused"):
        assert streams[name] == pytest.approx(100 * record.map(name))


def test_a_run_that_failed_stands_in_the_table_with_its_error(workspace: Workspace, profile: Profile) -> None:
    broken = Axis(values=(1, 2, 21))
    study = study_of(profile.model_copy(update={"ablations": {"num_regions": broken}}), "num_regions")
    result = run_study(workspace, study)
    table = study_table(result).set_index(["varied", "value"])
    assert "num_regions is 21" in table["note"]["trained with N =", 21]
    assert table["mAP"]["trained with N =", 1] > 0
    assert "MCAR, trained with N = 21" in study_finding(result)


def test_a_study_without_runs_is_none(profile: Profile, tmp_path: Path) -> None:
    assert load_study([tmp_path], profile, study_of(profile, "pooling")) is None


def test_a_study_of_other_arithmetic_is_refused(
    workspace: Workspace, profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(profile, "pooling")
    run_study(workspace, study)
    monkeypatch.setattr("mcar_lib.experiment.arithmetic_fingerprint", lambda: "other")
    with pytest.raises(ResultsError, match="made by other arithmetic than today's"):
        load_study([workspace.local_folder], profile, study)


# ---- findings


@pytest.fixture
def result(workspace: Workspace, profile: Profile) -> StudyResult:
    return run_study(workspace, study_of(profile, "input_size"))


def with_p_values(result: StudyResult, p_values: list[float]) -> StudyResult:
    pairs = zip(result.differences, p_values, strict=True)
    return replace(result, differences=tuple(replace(difference, adjusted_p=p) for difference, p in pairs))


def test_nothing_significant_is_said_so(result: StudyResult) -> None:
    count = len(result.differences)
    found = study_finding(with_p_values(result, [0.05] * count))
    assert found == f"In none of {count} comparisons is there a difference that this data can show."


def test_a_significant_difference_is_told_with_its_interval_and_the_others_counted(result: StudyResult) -> None:
    count = len(result.differences)
    changed = with_p_values(result, [0.049] + [0.5] * (count - 1))
    found = study_finding(changed)
    assert found.startswith(f"{changed.differences[0].name}: ")
    assert f"The other {count - 1} of {count} comparisons: {NO_DIFFERENCE}." in found


def test_a_finding_has_the_direction_of_the_difference(result: StudyResult) -> None:
    for difference in with_p_values(result, [0.01] * len(result.differences)).differences:
        assert difference.finding == ("higher" if difference.comparison["difference"] > 0 else "lower")


def test_a_tampered_record_changes_the_table(workspace: Workspace, profile: Profile) -> None:
    """So the drift check, which rebuilds tables from records, and nbval notice it."""
    study: Study = study_of(profile, "pooling")
    before = study_table(run_study(workspace, study))
    path = workspace.run(study.runs[0]).path
    path.write_text(path.read_text().replace('"mAP": 0.', '"mAP": 0.9'))
    after = load_study([workspace.local_folder], profile, study)
    assert after is not None
    assert not study_table(after).equals(before)
