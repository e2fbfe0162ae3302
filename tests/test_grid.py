"""Grids: each run once, side by side where cores allow, and one that fails stops no other."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import joblib
import pytest

from mcar_lib import grid
from mcar_lib.config import Profile, RunConfig, load_profile
from mcar_lib.errors import TrainingError
from mcar_lib.experiment import Record, Workspace
from mcar_lib.grid import Failure, failure_name, read_failures, relative_cost, run_grid, runs_at_once

OpenWorkspace = Callable[..., Workspace]
TOO_MANY_REGIONS = 21  # of 20 classes: told when the run starts, not before


def ids(outcomes: list[Record | Failure]) -> list[str]:
    return [outcome.run_id for outcome in outcomes if isinstance(outcome, Record)]


def test_a_grid_gives_records_in_the_order_asked_for(workspace: Workspace, tiny_config: RunConfig) -> None:
    configs = [tiny_config.vary(num_regions=n) for n in (1, 3, 2)]
    outcomes = run_grid(workspace, configs)
    assert [outcome.config for outcome in outcomes if isinstance(outcome, Record)] == configs


def test_a_run_that_is_asked_for_twice_is_trained_once(workspace: Workspace, tiny_config: RunConfig) -> None:
    outcomes = run_grid(workspace, [tiny_config, tiny_config.vary(seed=1), tiny_config])
    assert ids(outcomes)[0] == ids(outcomes)[2]
    assert len(list((workspace.local_folder / "runs").glob("*.json"))) == 2


def test_a_deleted_record_repeats_that_run_only(open_workspace: OpenWorkspace, tiny_config: RunConfig) -> None:
    configs = [tiny_config.vary(seed=seed) for seed in range(3)]
    records = [outcome for outcome in run_grid(open_workspace(), configs) if isinstance(outcome, Record)]
    written = [record.path.stat().st_mtime_ns for record in records]
    records[1].path.unlink()
    run_grid(open_workspace(), configs)
    repeated = [record.path.stat().st_mtime_ns != when for record, when in zip(records, written, strict=True)]
    assert repeated == [False, True, False]


def test_a_run_that_fails_does_not_stop_the_others(workspace: Workspace, tiny_config: RunConfig) -> None:
    failing = tiny_config.vary(num_regions=TOO_MANY_REGIONS)
    first, second = run_grid(workspace, [failing, tiny_config])
    assert isinstance(first, Failure)
    assert "num_regions is 21" in first.error
    assert isinstance(second, Record)


def test_a_failure_is_noted_until_the_run_succeeds(
    workspace: Workspace, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(config: RunConfig) -> Record:
        raise TrainingError("the loss is nan")

    with monkeypatch.context() as patch:
        patch.setattr(workspace, "run", diverge)
        run_grid(workspace, [tiny_config])
    assert read_failures(workspace.local_folder) == {failure_name(tiny_config): "TrainingError: the loss is nan"}
    run_grid(workspace, [tiny_config])
    assert read_failures(workspace.local_folder) == {}


def test_an_unforeseen_error_is_a_failure_too(
    workspace: Workspace, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workspace, "run", lambda config: 1 / 0)
    assert run_grid(workspace, [tiny_config]) == [Failure(tiny_config.label, "ZeroDivisionError: division by zero")]


@pytest.mark.parametrize(("threads", "cores", "at_once"), [(1, 4, 4), (2, 5, 2), (4, 2, 1), (1, 64, 8), (0, 64, 1)])
def test_as_many_runs_at_once_as_cores_allow(
    tiny_profile: Profile, monkeypatch: pytest.MonkeyPatch, threads: int, cores: int, at_once: int
) -> None:
    monkeypatch.setattr(joblib, "cpu_count", lambda: cores)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert runs_at_once(tiny_profile.model_copy(update={"threads": threads})) == at_once


def test_a_gpu_trains_one_run_at_a_time(tiny_profile: Profile, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert runs_at_once(tiny_profile.model_copy(update={"threads": 1})) == 1


def test_more_regions_larger_inputs_and_more_epochs_cost_more(tiny_config: RunConfig) -> None:
    dearer = [{"num_regions": 3}, {"image_size": 96}, {"epochs": 5}]
    assert all(relative_cost(tiny_config.vary(**change)) > relative_cost(tiny_config) for change in dearer)
    assert relative_cost(tiny_config.vary(local_stream=False)) < relative_cost(tiny_config)


@pytest.mark.slow
def test_runs_side_by_side_give_the_same_numbers_and_report_what_fails(tmp_path: Path) -> None:
    """Real processes, real backbone: as tests' own backbone is not registered in them."""
    profile = load_profile("smoke")
    configs = [profile.run, profile.run.vary(local_stream=False), profile.run.vary(num_regions=TOO_MANY_REGIONS)]
    artifacts = tmp_path / "artifacts"
    side_by_side = run_grid(Workspace(profile, tmp_path / "two", artifacts=artifacts), configs, at_once=2)
    assert isinstance(side_by_side[2], Failure)
    alone = Workspace(profile, tmp_path / "one", artifacts=tmp_path / "others", verbose=False).run(configs[0])
    assert isinstance(side_by_side[0], Record)
    metrics = [json.dumps(record.content["metrics"]) for record in (side_by_side[0], alone)]  # as text, NaN equals NaN
    assert metrics[0] == metrics[1]


@pytest.mark.slow
def test_a_killed_process_fails_its_grid_s_runs_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "_train_in_worker", _die)
    profile = load_profile("smoke")
    workspace = Workspace(profile, tmp_path / "results", artifacts=tmp_path / "artifacts", verbose=False)
    outcomes = run_grid(workspace, [profile.run, profile.run.vary(seed=1)], at_once=2)
    assert [isinstance(outcome, Failure) and "was killed" in outcome.error for outcome in outcomes] == [True, True]


def _die(*task: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
