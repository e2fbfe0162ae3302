"""Grids on a cluster: jobs of submitit's local executor, and what a Slurm of a few shell scripts is told."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_processes import processes_of
from typer.testing import CliRunner

from mcar_lib.cli import app
from mcar_lib.errors import ConfigError, MCARError
from mcar_lib.runs import Failure, Record, Runs, cluster, find_or_train
from mcar_lib.runs.cluster import Resources, submit, wait
from mcar_lib.runs.plan import NamedRun, named_runs
from mcar_lib.status import all_runs

submitit = pytest.importorskip("submitit")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="has no SIGUSR2")

ROOT = Path(__file__).resolve().parent.parent
PROFILE = """
name = "grid"
title = "grid"
seeds = [0]
bootstrap_resamples = 20
threads = 1
[run]
dataset = "scenes"
data_options = { num_train = 24, num_test = 16, side = 64, seed = 3 }
backbone = "mobilenet_v2"
weights = "none"
image_size = 32
num_regions = 2
epochs = 2
batch_size = 8
learning_rate = 0.05
schedule = "onecycle"
jitter = 0.0
[rows.both]
[rows.global]
local_stream = false
[rows.broken]
num_regions = 21
"""
# Notes that it was started; waits for SIGTERM as often as it is told to, and is done the next time.
STUB = """
import pathlib, signal, sys, time
folder, often = pathlib.Path(sys.argv[1]), int(sys.argv[2])
count = len(list(folder.glob("started-*")))
def stop(number, frame):
    (folder / f"stopped-{count}").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
(folder / f"started-{count}").touch()
if count < often:
    time.sleep(120)
"""
FAST = Resources(gpus=0, memory=1, hours=0.1)


def opened(folder: Path) -> tuple[Runs, str]:
    """Runs of the profile above in a folder of their own, and its file."""
    (folder / "grid.toml").write_text(PROFILE, encoding="utf-8")
    file = str(folder / "grid.toml")
    return Runs(file, folder / "results", artifacts=folder / "artifacts", verbose=False), file


def until(condition: Callable[[], Any], seconds: float = 60) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, "it did not come to that in time"
        time.sleep(0.1)


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "SECONDS_BETWEEN_LOOKS", 0.2)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# ---- runs in jobs


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record | Failure]:
    """What three jobs made of the three rows, by name."""
    runs, file = opened(tmp_path_factory.mktemp("jobs"))
    asked = named_runs(runs.profile)
    runs.data()  # the scenes
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        jobs = submit(runs, asked, file, FAST, "local")
        outcomes = wait(runs, asked, jobs, "local")
    return {each.name: outcome for each, outcome in zip(asked, outcomes, strict=True)}


@pytest.mark.parametrize("row", ["both", "global"])
def test_a_job_makes_the_record_that_one_process_makes(
    row: str, trained: dict[str, Record | Failure], tmp_path: Path
) -> None:
    runs, _ = opened(tmp_path)
    (alone,) = find_or_train(runs, [runs.profile.row(row)])
    there = trained[row]
    assert isinstance(alone, Record)
    assert isinstance(there, Record)
    assert there.run_id == alone.run_id
    assert json.dumps(there.metrics) == json.dumps(alone.metrics)


def test_a_job_that_fails_fails_alone_and_says_why(trained: dict[str, Record | Failure]) -> None:
    assert isinstance(trained["global"], Record)
    failed = trained["broken"]
    assert isinstance(failed, Failure)
    assert failed.error.startswith("error: num_regions is 21; scenes trainval has 20 classes")
    log = failed.error.rpartition(" (")[2].rstrip(")")
    assert "num_regions is 21" in Path(log).read_text(encoding="utf-8")


# ---- jobs that are stopped


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Runs, dict[str, str]]]:
    """Hands one run to a job, whose command is a program of the test."""
    runs, file = opened(tmp_path)
    (tmp_path / "stub.py").write_text(STUB, encoding="utf-8")
    asked = named_runs(runs.profile, ["both"])

    def start(*command: str) -> tuple[Runs, dict[str, str]]:
        given = [sys.executable, *(command or (str(tmp_path / "stub.py"), str(tmp_path), "1"))]
        monkeypatch.setattr(cluster, "_command", lambda *_: given)
        return runs, submit(runs, asked, file, FAST, "local")

    return start


def job_process(jobs: dict[str, str]) -> psutil.Process:
    """The process of a job that submitit's controller has started."""
    (task,) = processes_of(int(jobs["both"]))
    return task


def result(runs: Runs, jobs: dict[str, str]) -> Path:
    return runs.artifacts / "slurm" / f"{jobs['both']}_0_result.pkl"


def why(runs: Runs, jobs: dict[str, str]) -> str:
    (outcome,) = wait(runs, named_runs(runs.profile, ["both"]), jobs, "local")
    assert isinstance(outcome, Failure)
    return outcome.error


def test_a_preempted_job_stops_its_run_and_goes_on_as_often_as_it_takes(
    tmp_path: Path, start: Callable[..., Any]
) -> None:
    """Four times: submitit gives a job up after three, by default."""
    runs, jobs = start(str(tmp_path / "stub.py"), str(tmp_path), "4")
    for count in range(4):
        until((tmp_path / f"started-{count}").exists)
        job_process(jobs).send_signal(signal.SIGUSR2)
        until((tmp_path / f"stopped-{count}").exists)
    assert why(runs, jobs).startswith("its job ended without a record")  # the stub's end is good
    assert (tmp_path / "started-4").exists()
    assert not (tmp_path / "stopped-4").exists()


def test_a_run_that_is_told_to_stop_by_another_is_queued_again(tmp_path: Path, start: Callable[..., Any]) -> None:
    runs, jobs = start()
    until((tmp_path / "started-0").exists)
    (child,) = processes_of(job_process(jobs).pid)
    child.send_signal(signal.SIGTERM)
    until((tmp_path / "started-1").exists)
    until(result(runs, jobs).exists)


def test_a_job_passes_on_one_request_to_stop_however_many_it_gets(tmp_path: Path, start: Callable[..., Any]) -> None:
    """Training that is told again, later, ends without a checkpoint."""
    (tmp_path / "slow.py").write_text(STUB.replace("    sys.exit(75)", "    time.sleep(3)\n    sys.exit(75)"))
    runs, jobs = start(str(tmp_path / "slow.py"), str(tmp_path), "1")
    until((tmp_path / "started-0").exists)
    job_process(jobs).send_signal(signal.SIGTERM)
    until((tmp_path / "stopped-0").exists)
    first = (tmp_path / "stopped-0").stat().st_mtime_ns
    job_process(jobs).send_signal(signal.SIGUSR2)
    until(result(runs, jobs).exists)
    assert (tmp_path / "started-1").exists()
    assert (tmp_path / "stopped-0").stat().st_mtime_ns == first


def test_the_signal_of_a_preemption_does_not_end_training_when_all_processes_get_it(
    tmp_path: Path, start: Callable[..., Any]
) -> None:
    runs, jobs = start()
    until((tmp_path / "started-0").exists)
    task = job_process(jobs)
    (child,) = processes_of(task.pid)
    child.send_signal(signal.SIGUSR2)
    task.send_signal(signal.SIGUSR2)
    until((tmp_path / "stopped-0").exists)
    until(result(runs, jobs).exists)


def test_a_job_fails_with_the_last_words_of_its_command(start: Callable[..., Any]) -> None:
    runs, jobs = start("-c", "import sys; print('before', file=sys.stderr); sys.exit('no more room')")
    assert why(runs, jobs).startswith("no more room (")


def test_a_run_whose_job_is_alive_is_not_handed_over_again(
    tmp_path: Path, start: Callable[..., Any], capsys: pytest.CaptureFixture[str]
) -> None:
    runs, jobs = start()
    until((tmp_path / "started-0").exists)
    assert start()[1] == jobs
    assert capsys.readouterr().out.endswith(f"both: job {jobs['both']}, which still waits or runs\n")
    job_process(jobs).send_signal(signal.SIGUSR2)
    until(result(runs, jobs).exists)
    assert start()[1] != jobs


# ---- what Slurm is told


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of commands by Slurm's names: sbatch keeps the script that it gets as `batch`, squeue prints `queue`."""
    folder = tmp_path / "slurm"
    folder.mkdir()
    commands = {
        "sbatch": f'cp "$1" {folder}/batch; echo "Submitted batch job 7"',
        "squeue": f"cat {folder}/queue",
        "srun": "exit 1",
    }
    for name, text in commands.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    (folder / "queue").write_text("7_0\n7_1\n9\n", encoding="utf-8")
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def hand_over(folder: Path, rows: Sequence[str] = ("both", "global"), **resources: Any) -> dict[str, str]:
    runs, file = opened(folder)
    return submit(runs, named_runs(runs.profile, rows), file, Resources(**resources))


def test_slurm_gets_one_array_with_what_a_run_asks_for(tmp_path: Path, slurm: Path) -> None:
    jobs = hand_over(tmp_path, gpus=1, memory=48, hours=2.5, cpus=6, partition="long")
    assert sorted(jobs.items()) == [("both", "7_0"), ("global", "7_1")]
    told = (slurm / "batch").read_text(encoding="utf-8").splitlines()
    for option in (
        *("array=0-1%2", "gpus-per-node=1", "mem=48GB", "time=150", "cpus-per-task=6", "partition=long", "requeue"),
        *("job-name=mcar-grid", "signal=USR2@120"),
    ):
        assert f"#SBATCH --{option}" in told
    assert any(line.startswith("srun ") and "--cpus-per-task 6" in line for line in told)


def test_what_was_handed_over_is_listed_as_waiting_for_its_job(tmp_path: Path, slurm: Path) -> None:
    hand_over(tmp_path)
    runs, _ = opened(tmp_path)
    found = all_runs(runs.artifacts, runs.local)
    assert [(each.state, str(each.reason)[:7]) for each in found] == [("waiting", "job 7_0"), ("waiting", "job 7_1")]


def test_a_job_that_slurm_no_longer_knows_is_started_anew(tmp_path: Path, slurm: Path) -> None:
    hand_over(tmp_path)
    (slurm / "batch").unlink()
    hand_over(tmp_path)
    assert not (slurm / "batch").exists()
    (slurm / "queue").write_text("7_1\n", encoding="utf-8")
    hand_over(tmp_path)
    assert "--array" not in (slurm / "batch").read_text(encoding="utf-8")


def test_several_gpus_train_one_run_together(tmp_path: Path) -> None:
    runs, file = opened(tmp_path)
    command = cluster._command(runs, NamedRun("both", runs.profile.row("both"), ("--row", "both")), file, 4)
    assert " ".join(command[1:]).startswith(
        f"-m torch.distributed.run --standalone --nproc-per-node 4 -m mcar_lib train --profile {file} --row both --res"
    )


def test_what_sbatch_does_not_like_is_told_in_one_sentence(tmp_path: Path, slurm: Path) -> None:
    (slurm / "sbatch").write_text("#!/bin/sh\necho invalid partition specified: x >&2; exit 1\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"Slurm does not take these jobs: .*invalid partition specified: x"):
        hand_over(tmp_path, partition="x")


def test_a_slurm_that_does_not_answer_starts_nothing_twice(tmp_path: Path, slurm: Path) -> None:
    hand_over(tmp_path)
    (slurm / "batch").unlink()
    (slurm / "squeue").write_text("#!/bin/sh\necho Unable to contact slurm controller >&2; exit 1\n", encoding="utf-8")
    with pytest.raises(MCARError, match="Unable to contact slurm controller"):
        hand_over(tmp_path)
    assert not (slurm / "batch").exists()


# ---- the command


def grid(folder: Path, *arguments: str) -> Any:
    opened(folder)
    places = ["--results", str(folder / "results"), "--artifacts", str(folder / "artifacts")]
    return CliRunner().invoke(app, ["grid", "--profile", str(folder / "grid.toml"), *places, *arguments])


def test_the_command_on_this_machine_ends_with_a_line_a_run_and_tells_a_failure_by_its_exit_code(
    tmp_path: Path,
) -> None:
    done = grid(tmp_path, "--rows", "global,broken")
    assert done.exit_code == 1, done.output
    first, second = done.stdout.splitlines()[-2:]
    assert first.startswith("global: mAP ")
    assert second.startswith("broken: failed: ConfigError: num_regions is 21; scenes trainval has 20 classes")
    again = grid(tmp_path, "--rows", "global")
    assert (again.exit_code, again.stdout.splitlines()[-1]) == (0, first)
    assert "training" not in again.stdout


def test_the_command_on_slurm_tells_jobs_and_logs(tmp_path: Path, slurm: Path) -> None:
    done = grid(tmp_path, "--on", "slurm", "--rows", "both")
    assert done.exit_code == 0, done.output
    logs = tmp_path / "artifacts" / "slurm"
    assert done.stdout.splitlines()[-2:] == ["both: job 7", f"1 jobs; logs: {logs}; next: mcar status"]


def test_the_command_waits_and_tells_what_did_not_come_to_an_end(tmp_path: Path, slurm: Path) -> None:
    (slurm / "queue").write_text("9\n", encoding="utf-8")
    done = grid(tmp_path, "--on", "slurm", "--rows", "both", "--wait")
    assert done.exit_code == 1, done.output
    assert done.stdout.splitlines()[-1].startswith("both: failed: its job ended without a word (cancelled")


def test_without_slurm_the_command_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = grid(tmp_path, "--on", "slurm")
    assert (done.exit_code, done.stderr.startswith("error: no Slurm here")) == (2, True)


def test_a_row_that_is_none_is_named(tmp_path: Path) -> None:
    done = grid(tmp_path, "--rows", "both,neither")
    assert done.exit_code == 2
    assert "has no row 'neither'; it has both, global, broken" in done.stderr


@pytest.mark.parametrize(
    "options",
    [
        *(["--on", "cloud"], ["--on", "slurm", "--gpus", "-1"], ["--on", "slurm", "--hours", "0"]),
        *(["--on", "slurm", "--memory", "0"], ["--on", "slurm", "--cpus", "0"], ["--partition", "x"], ["--wait"]),
    ],
)
def test_an_option_that_cannot_be_is_refused(options: list[str], tmp_path: Path) -> None:
    done = grid(tmp_path, *options)
    assert done.exit_code == 2
    assert options[-2 if len(options) > 1 else -1] in done.stderr
