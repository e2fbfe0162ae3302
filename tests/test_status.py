"""mcar status: what each run says of itself, in a file that stops no run, read while runs run and after a crash."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from test_cli import mcar

from mcar_lib import status
from mcar_lib.errors import Stopped, TrainingError
from mcar_lib.files import HERE, read_json, write_json
from mcar_lib.runs import RunConfig, Runs, find_or_train
from mcar_lib.status import SILENT_SECONDS, Status, StatusFile, all_runs, read_status
from mcar_lib.training.execution import Standing

NAMES = ("voc2007-tiny-s0", "0123456789ab", "paper")
STANDING = Standing(3, 60, 800, 5011, 41.7, 5025.0, 0.8123)
GONE = 2**22 + 1  # above every process number


@pytest.fixture
def file(tmp_path: Path) -> StatusFile:
    """Of a run among the artifacts of this test."""
    return StatusFile(tmp_path / "artifacts" / "runs" / NAMES[1])


def the_run(tmp_path: Path) -> Status:
    (found,) = all_runs(tmp_path / "artifacts", tmp_path / "results")
    return found


def write_record(results: Path, run_id: str = NAMES[1], value: float | None = 0.9) -> Path:
    metrics = None if value is None else {"last": {"fused": {"mAP": value}}}
    content = {"label": NAMES[0], "run_id": run_id, "profile": "paper", "metrics": metrics, "history": [{}] * 60}
    path = results / "paper" / "runs" / f"{NAMES[0]}-{run_id}.json"
    write_json(path, content)
    return path


# ---- the file


def test_a_run_that_holds_its_lock_is_running_and_says_how_far_it_is(file: StatusFile, tmp_path: Path) -> None:
    file.running(*NAMES)
    file._written = -status.SECONDS_BETWEEN_WRITES
    file.tell(STANDING)
    with FileLock(file.folder / "lock"):
        found = the_run(tmp_path)
    assert (found.label, found.run_id, found.profile, found.state) == (*NAMES, "running")
    assert (found.host, found.pid) == (platform.node(), os.getpid())
    cells = found.cells()
    told = [cells[name] for name in ("epoch", "images/s", "time left", "mAP %")]
    assert told == ["3/60", "42", "1:23:45", "81.2"]


def test_standings_are_written_every_few_seconds_only(file: StatusFile) -> None:
    file.running(*NAMES)
    file.tell(STANDING)
    assert read_status(file.path).epoch is None
    file._written -= status.SECONDS_BETWEEN_WRITES
    file.tell(STANDING)
    assert read_status(file.path).epoch == STANDING.epoch


def test_a_file_that_cannot_be_written_stops_no_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    nowhere = StatusFile(tmp_path / "file" / "run")
    nowhere.waiting(*NAMES)
    with nowhere.following(*NAMES):
        nowhere.tell(STANDING)
    nowhere.finished(tmp_path / "record.json", 0.5)
    assert not nowhere.path.exists()


def test_only_the_process_that_is_to_write_does(tmp_path: Path) -> None:
    other = StatusFile(tmp_path / "run", writes=False)
    other.waiting(*NAMES)
    with other.following(*NAMES):
        other.finished(tmp_path / "record.json", 0.5)
    assert not other.folder.exists()


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (TrainingError("the loss is nan"), "failed", "the loss is nan"),
        (RuntimeError("out of memory\nand more"), "failed", "RuntimeError: out of memory"),
        (Stopped(15, resumable=True), "stopped", "SIGTERM; the same command goes on from here"),
        (Stopped(15), "stopped", "SIGTERM; the same command goes on from its last checkpoint"),
        (KeyboardInterrupt(), "stopped", "SIGINT; the same command goes on from its last checkpoint"),
    ],
    ids=repr,
)
def test_how_a_run_ends_badly_is_told_with_the_reason(
    error: BaseException, state: str, reason: str, file: StatusFile, tmp_path: Path
) -> None:
    with pytest.raises(type(error)), file.following(*NAMES):
        raise error
    found = the_run(tmp_path)
    assert (found.state, found.reason) == (state, reason)


def test_a_run_that_is_busy_with_something_else_keeps_its_file_fresh(
    file: StatusFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(status, "SECONDS_BETWEEN_BEATS", 0.01)
    with file.following(*NAMES):
        os.utime(file.path, (0, 0))
        until = time.monotonic() + 10
        while file.path.stat().st_mtime == 0 and time.monotonic() < until:
            time.sleep(0.01)
        assert file.path.stat().st_mtime > 0


def test_a_run_that_another_session_trains_is_not_marked_as_waiting(file: StatusFile) -> None:
    file.running(*NAMES)
    with FileLock(file.folder / "lock"):
        StatusFile(file.folder).waiting(*NAMES)
    assert read_status(file.path).state == "running"


# ---- what is not as the file says


def test_a_run_whose_process_is_gone_was_killed(file: StatusFile, tmp_path: Path) -> None:
    file.running(*NAMES)
    (file.folder / "lock").touch()
    found = the_run(tmp_path)
    assert (found.state, found.reason) == ("killed", "the same command goes on from its last checkpoint")


@pytest.mark.parametrize(("seconds", "state"), [(SILENT_SECONDS - 60, "running"), (SILENT_SECONDS + 60, "killed")])
def test_a_run_of_another_machine_was_killed_if_it_is_silent_for_long(
    seconds: float, state: str, file: StatusFile, tmp_path: Path
) -> None:
    file.running(*NAMES)
    write_json(file.path, {**read_json(file.path), "host": "another"})
    when = time.time() - seconds
    os.utime(file.path, (when, when))
    assert the_run(tmp_path).state == state


def test_a_run_waits_only_as_long_as_its_session_lives(file: StatusFile, tmp_path: Path) -> None:
    file.waiting(*NAMES)
    assert the_run(tmp_path).state == "waiting"
    write_json(file.path, {**read_json(file.path), "pid": GONE})
    assert the_run(tmp_path).state == "stopped"


def test_a_run_that_was_handed_to_a_cluster_waits_for_its_job(file: StatusFile, tmp_path: Path) -> None:
    file.waiting(*NAMES, job="7_1")
    found = the_run(tmp_path)
    assert (found.state, found.pid, found.reason) == ("waiting", None, "job 7_1 of the cluster; squeue tells of it")


def test_a_run_killed_after_its_record_was_written_is_finished(file: StatusFile, tmp_path: Path) -> None:
    file.running(*NAMES)
    path = write_record(tmp_path / "results")
    found = the_run(tmp_path)
    assert (found.state, found.record) == ("finished", str(path))


# ---- all of them


def test_records_without_a_status_are_listed_too(tmp_path: Path) -> None:
    write_record(tmp_path / "results", "a" * 12)
    write_record(tmp_path / "results", "b" * 12, None)
    found = all_runs(tmp_path / "artifacts", tmp_path / "results")
    assert [(run.state, run.last_map, run.epoch) for run in found] == [("finished", 0.9, 60), ("finished", None, 60)]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"label": 3}', '{"state": "dancing"}', "\x00"])
def test_a_torn_or_foreign_file_is_passed_over_with_a_sentence(
    content: str, file: StatusFile, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.running(*NAMES)
    record = tmp_path / "results" / "paper" / "runs" / "foreign.json"
    broken = file.path.parent.with_name("broken") / file.path.name
    for path in (broken, record):
        path.parent.mkdir(parents=True)
        path.write_text(content)
    assert the_run(tmp_path).run_id == NAMES[1]
    lines = capsys.readouterr().out.splitlines()
    assert [str(path) in line and "passed over" in line for path, line in zip((record, broken), lines, strict=True)]


# ---- the command


def test_the_command_shows_each_run_on_one_line(file: StatusFile, tmp_path: Path) -> None:
    file.running(*NAMES)
    file.failed("the loss is nan")
    path = write_record(tmp_path / "results", "f" * 12)
    done = mcar("status", "--artifacts", tmp_path / "artifacts", "--results", tmp_path / "results")
    assert done.exit_code == 0, done.output
    text = " ".join(done.output.split())
    assert f"{NAMES[1]} failed {platform.node()} - - - - the loss is nan" in text
    assert f"{'f' * 12} finished - 60/60 - - 90.0" in text
    assert path.name in "".join(done.output.split())


def test_the_command_gives_all_that_is_known_as_json(file: StatusFile, tmp_path: Path) -> None:
    file.running(*NAMES)
    file.failed("the loss is nan")
    done = mcar("status", "--json", "--artifacts", tmp_path / "artifacts", "--results", tmp_path / "results")
    (run,) = json.loads(done.stdout)
    assert run == read_status(file.path).model_dump()


def test_the_command_says_where_there_is_nothing(tmp_path: Path) -> None:
    done = mcar("status", "--artifacts", tmp_path / "a", "--results", tmp_path / "r")
    assert (done.exit_code, done.stdout) == (0, f"no run has left anything in {tmp_path / 'a'} or {tmp_path / 'r'}\n")


def test_the_command_needs_no_torch(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from mcar_lib.cli import app; app(['status', *sys.argv[1:]])"
    places = ("--artifacts", str(tmp_path), "--results", str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code, *places], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith("no run")


# ---- what sessions leave


def test_a_run_that_was_trained_is_finished(runs: Runs, tiny_config: RunConfig) -> None:
    record = runs.run(tiny_config)
    (found,) = all_runs(runs.artifacts, runs.local)
    assert (found.state, found.record, found.last_map) == ("finished", str(record.path), record.map())


def test_a_status_that_was_half_written_when_its_run_was_killed_goes_when_the_run_is_found(
    runs: Runs, tiny_config: RunConfig
) -> None:
    folder = runs.artifacts / "runs" / runs.run(tiny_config).run_id
    half = folder / f".status.json.{HERE}-{GONE}-0123abcd.part"
    half.touch()
    runs.run(tiny_config)
    assert not half.exists()


def test_a_run_says_that_it_is_running_meanwhile(
    runs: Runs, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Status] = []

    def look(*_: object, **__: object) -> None:
        seen.extend(all_runs(runs.artifacts, runs.local))
        raise TrainingError("seen")

    monkeypatch.setattr("mcar_lib.runs.runs.train", look)
    with pytest.raises(TrainingError):
        runs.run(tiny_config)
    assert [each.state for each in seen] == ["running"]
    assert [each.state for each in all_runs(runs.artifacts, runs.local)] == ["failed"]


def test_the_runs_of_a_grid_wait_for_their_turn(
    runs: Runs, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    train: Callable[[RunConfig], object] = runs._train

    def look(config: RunConfig) -> object:
        seen.append([each.state for each in all_runs(runs.artifacts, runs.local)])
        return train(config)

    monkeypatch.setattr(runs, "_train", look)
    find_or_train(runs, [tiny_config, tiny_config.vary(seed=1)], at_once=1)
    assert seen == [["waiting", "waiting"], ["waiting", "finished"]]


def test_a_run_of_a_grid_that_fails_before_it_starts_waits_no_longer(
    runs: Runs, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "run", lambda config: 1 / 0)
    find_or_train(runs, [tiny_config], at_once=1)
    (found,) = all_runs(runs.artifacts, runs.local)
    assert (found.state, found.reason) == ("failed", "ZeroDivisionError: division by zero")
