"""Grids: each run once, side by side where cores allow, and one that fails stops no other."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import joblib
import pytest
import torch
from filelock import FileLock, Timeout

from mcar_lib.errors import RESUMABLE, ConfigError, TrainingError
from mcar_lib.runs import Failure, Profile, Record, RunConfig, Runs, find_or_train, grid, load_profile, memory
from mcar_lib.runs.grid import JOBS, asked_at_once, relative_cost, runs_at_once
from mcar_lib.runs.memory import GIB, estimated_memory, left_by_limits, side_by_side

OpenRuns = Callable[..., Runs]
ROOT = Path(__file__).resolve().parent.parent
TOO_MANY_REGIONS = 21  # of 20 classes: told when the run starts, not before


def ids(outcomes: list[Record | Failure]) -> list[str]:
    return [outcome.run_id for outcome in outcomes if isinstance(outcome, Record)]


def test_a_grid_gives_records_in_the_order_asked_for(runs: Runs, tiny_config: RunConfig) -> None:
    configs = [tiny_config.vary(num_regions=n) for n in (1, 3, 2)]
    outcomes = find_or_train(runs, configs)
    assert [outcome.config for outcome in outcomes if isinstance(outcome, Record)] == configs


def test_a_run_that_is_asked_for_twice_is_trained_once(runs: Runs, tiny_config: RunConfig) -> None:
    outcomes = find_or_train(runs, [tiny_config, tiny_config.vary(seed=1), tiny_config])
    assert ids(outcomes)[0] == ids(outcomes)[2]
    assert len(list((runs.local_folder / "runs").glob("*.json"))) == 2


def test_a_deleted_record_repeats_that_run_only(open_runs: OpenRuns, tiny_config: RunConfig) -> None:
    configs = [tiny_config.vary(seed=seed) for seed in range(3)]
    records = [outcome for outcome in find_or_train(open_runs(), configs) if isinstance(outcome, Record)]
    written = [record.path.stat().st_mtime_ns for record in records]
    records[1].path.unlink()
    find_or_train(open_runs(), configs)
    repeated = [record.path.stat().st_mtime_ns != when for record, when in zip(records, written, strict=True)]
    assert repeated == [False, True, False]


def test_a_run_that_fails_does_not_stop_the_others(runs: Runs, tiny_config: RunConfig) -> None:
    failing = tiny_config.vary(num_regions=TOO_MANY_REGIONS)
    first, second = find_or_train(runs, [failing, tiny_config])
    assert isinstance(first, Failure)
    assert "num_regions is 21" in first.error
    assert isinstance(second, Record)


def test_a_failure_stands_in_the_run_s_place_until_it_succeeds(
    runs: Runs, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(config: RunConfig) -> Record:
        raise TrainingError("the loss is nan")

    with monkeypatch.context() as patch:
        patch.setattr(runs, "run", diverge)
        assert find_or_train(runs, [tiny_config]) == [Failure(tiny_config, "TrainingError: the loss is nan")]
    (outcome,) = find_or_train(runs, [tiny_config])
    assert isinstance(outcome, Record)


def test_a_failure_is_told_when_it_happens(
    runs: Runs, tiny_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    failing = tiny_config.vary(num_regions=TOO_MANY_REGIONS)
    find_or_train(runs, [failing, tiny_config])
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("run ")]
    assert told[0].startswith("run 1 of 2, ")
    assert f"{failing.label}: failed: ConfigError: num_regions is 21; scenes trainval has 20 classes" in told[0]
    assert told[1].startswith("run 2 of 2, ")
    assert f"{tiny_config.label}: mAP " in told[1]


def test_the_longest_run_is_trained_first(runs: Runs, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[int] = []

    def noted(config: RunConfig) -> None:
        order.append(config.epochs)
        raise TrainingError("not now")

    monkeypatch.setattr(runs, "run", noted)
    find_or_train(runs, [tiny_config.vary(epochs=epochs) for epochs in (1, 3, 2)])
    assert order == [3, 2, 1]


def test_an_unforeseen_error_is_a_failure_too(
    runs: Runs, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "run", lambda config: 1 / 0)
    assert find_or_train(runs, [tiny_config]) == [Failure(tiny_config, "ZeroDivisionError: division by zero")]


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


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many runs at once each grid takes; none is trained."""
    asked: list[int] = []

    def train_none(runs: Runs, configs: list[RunConfig], at_once: int) -> list[tuple[RunConfig, str | None]]:
        asked.append(at_once)
        return [(config, "not now") for config in configs]

    monkeypatch.setattr(grid, "_train_all", train_none)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv(JOBS, raising=False)
    return asked


@pytest.mark.parametrize(("free", "at_once"), [(100, 3), (14, 2), (7, 1), (1, 1)])
def test_no_more_runs_at_once_than_memory_holds(
    free: int,
    at_once: int,
    started: list[int],
    runs: Runs,
    tiny_config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(grid, "free_memory", lambda: free * GIB)
    monkeypatch.setattr(grid, "estimated_memory", lambda config, images: 6 * GIB)
    find_or_train(runs, [tiny_config.vary(seed=seed) for seed in range(4)], at_once=3)
    assert started == [at_once]
    told = f"3 runs at once would take about 18 GiB, and {free} are free: {at_once} at once"
    assert (told in capsys.readouterr().out) == (at_once < 3)


def test_runs_whose_memory_cannot_be_told_are_trained_all_the_same(
    started: list[int], runs: Runs, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "free_memory", lambda: 10 * GIB)
    runs.splits.data_root = None
    elsewhere = tiny_config.vary(dataset="voc2007", data_options={})
    find_or_train(runs, [elsewhere, elsewhere.vary(seed=1)], at_once=2)
    assert started == [2]


def test_the_environment_says_how_many_runs_a_notebook_trains_at_once(
    started: list[int], runs: Runs, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(JOBS, "3")
    runs.profile = runs.profile.model_copy(update={"threads": 1})
    find_or_train(runs, [tiny_config.vary(seed=seed) for seed in range(4)])
    assert started == [3]


def test_runs_whose_threads_are_open_are_trained_one_by_one(
    tiny_profile: Profile, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(JOBS, "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert asked_at_once(tiny_profile.model_copy(update={"threads": 0})) == 1
    assert "has no number of threads" in capsys.readouterr().out


@pytest.mark.parametrize("text", ["many", "0", "-1", "1.5"])
def test_a_number_of_runs_that_is_none_is_refused(
    text: str, tiny_profile: Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(JOBS, text)
    with pytest.raises(ConfigError, match=f"{JOBS} is '{text}'"):
        asked_at_once(tiny_profile)


def test_memory_is_that_of_the_largest_runs_together() -> None:
    assert [side_by_side([1, 6, 3], free) for free in (1, 7, 10, 12)] == [1, 1, 2, 3]


def test_an_estimate_grows_with_what_a_step_holds(tiny_config: RunConfig) -> None:
    more = [{"image_size": 96}, {"num_regions": 3}, {"batch_size": 16}, {"backbone": "mobilenet_v2"}]
    assert all(estimated_memory(tiny_config.vary(**each), 40) > estimated_memory(tiny_config, 40) for each in more)
    assert estimated_memory(tiny_config.vary(local_stream=False), 40) < estimated_memory(tiny_config, 40)
    assert estimated_memory(tiny_config, 10**6) == estimated_memory(tiny_config)  # as many squares as memory may hold


def test_an_estimate_is_near_what_was_measured() -> None:
    """Dry runs over 911 photos: 5.6, 2.3 and 2.0 GiB."""
    run = load_profile("photos").run
    measured = {5.6: run, 2.3: run.vary(image_size=128), 2.0: run.vary(local_stream=False)}
    for gib, config in measured.items():
        assert gib < estimated_memory(config, 911) / GIB < 1.35 * gib


def test_a_run_that_seems_too_large_is_told_before_it_is_trained(
    runs: Runs, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(memory, "free_memory", lambda: GIB)
    runs.verbose = True
    runs.run(tiny_config)
    told = capsys.readouterr().out
    assert re.search(r"takes about 1\.[0-9] GiB of memory, and 1\.0 are free; .*a smaller image_size", told)
    monkeypatch.setattr(memory, "free_memory", lambda: 4 * GIB)
    runs.run(tiny_config.vary(seed=1))
    assert "of memory" not in capsys.readouterr().out


def test_a_container_s_limit_leaves_what_it_leaves(tmp_path: Path) -> None:
    groups, job = tmp_path / "cgroup", tmp_path / "mounted" / "slurm" / "job"
    job.mkdir(parents=True)
    groups.write_text("0::/slurm/job\n")
    content = {"memory.max": f"{8 * GIB}\n", "memory.current": f"{5 * GIB}\n"}
    content["memory.stat"] = f"anon 9\ninactive_file {GIB}\n"
    for name, text in content.items():
        (job / name).write_text(text)
        (job.parent / name).write_text("max\n" if name == "memory.max" else text)
    assert list(left_by_limits(groups, tmp_path / "mounted")) == [4 * GIB]
    assert list(left_by_limits(tmp_path / "none")) == []


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
    side_by_side = find_or_train(Runs(profile, tmp_path / "two", artifacts=artifacts), configs, at_once=2)
    assert isinstance(side_by_side[2], Failure)
    alone = Runs(profile, tmp_path / "one", artifacts=tmp_path / "others", verbose=False).run(configs[0])
    assert isinstance(side_by_side[0], Record)
    metrics = [json.dumps(record.content["metrics"]) for record in (side_by_side[0], alone)]  # as text, NaN equals NaN
    assert metrics[0] == metrics[1]


def test_data_that_is_missing_fails_its_runs_before_any_process_is_started(runs: Runs, tiny_config: RunConfig) -> None:
    runs.splits.data_root = None
    elsewhere = tiny_config.vary(dataset="voc2007", data_options={})
    outcomes = find_or_train(runs, [elsewhere, elsewhere.vary(seed=1)], at_once=2)
    assert ["voc2007 needs a data root" in each.error for each in outcomes if isinstance(each, Failure)] == [True] * 2


@pytest.mark.slow
def test_a_killed_process_fails_its_grid_s_runs_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grid, "_train_in_worker", _die)
    profile = load_profile("smoke")
    runs = Runs(profile, tmp_path / "results", artifacts=tmp_path / "artifacts", verbose=False)
    outcomes = find_or_train(runs, [profile.run, profile.run.vary(seed=1)], at_once=2)
    assert [isinstance(outcome, Failure) and "was killed" in outcome.error for outcome in outcomes] == [True, True]


def _die(*task: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


TWO_LONG_RUNS = """
name = "two"
title = "two"
seeds = [0]
bootstrap_resamples = 20
threads = 1

[run]
dataset = "scenes"
data_options = { num_train = 24, num_test = 8, side = 64, seed = 3 }
backbone = "mobilenet_v2"
weights = "none"
image_size = 32
num_regions = 2
epochs = 12
batch_size = 8
learning_rate = 0.05
jitter = 0.0
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_a_grid_that_is_stopped_leaves_a_checkpoint_of_each_run(tmp_path: Path, number: signal.Signals) -> None:
    """Also where its own process is killed: the workers see that it is gone."""
    (tmp_path / "two.toml").write_text(TWO_LONG_RUNS)
    folders = ["--results", str(tmp_path / "results"), "--artifacts", str(tmp_path / "artifacts")]
    command = [sys.executable, "-m", "mcar_lib", "grid", "--profile", str(tmp_path / "two.toml"), *folders]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "LOKY_MAX_CPU_COUNT": "2"}
    environment.pop("MCAR_CHECKPOINT_MINUTES", None)

    def logs() -> list[Path]:
        return list((tmp_path / "artifacts" / "runs").glob("*/log.jsonl"))

    def handled() -> None:
        for each in (signal.SIGINT, signal.SIGTERM):  # a shell may have left them ignored
            signal.signal(each, signal.SIG_DFL)

    with subprocess.Popen(command, cwd=tmp_path, env=environment, preexec_fn=handled) as process:
        wait_until(lambda: len(logs()) == 2)
        os.kill(process.pid, number)
        code = process.wait(timeout=120)
    assert code == (-signal.SIGKILL if number is signal.SIGKILL else RESUMABLE)
    locks = [FileLock(log.with_name("lock")) for log in logs()]
    wait_until(lambda: all(not _is_held(lock) for lock in locks))
    for log in logs():
        content = torch.load(log.with_name("checkpoint.pt"), weights_only=True)
        assert content["position"] is not None
        assert len(content["history"]) < 12


def wait_until(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def _is_held(lock: FileLock) -> bool:
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True
