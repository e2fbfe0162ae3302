"""Faults of the machine: a disk that fills, damaged files, kills, several sessions at once. All are told, nothing is
torn, and no damaged file is believed."""

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from filelock import FileLock
from matplotlib.figure import Figure
from mutations import mutated
from safetensors.torch import load_file, save_file

from mcar_lib import tables
from mcar_lib.data.preparation import prepare
from mcar_lib.errors import ConfigError, MCARError, ResultsError, WeightsError
from mcar_lib.files import HERE, read_json, remove_leftovers, write_atomically, write_bytes, write_json
from mcar_lib.released import export_run
from mcar_lib.runs import Prediction, Record, RunConfig, Runs, compare, comparisons, load_profile, records, trainer
from mcar_lib.runs.outcome import Outcome, alone
from mcar_lib.training import Recipe, checkpoint
from mcar_lib.weights import read_state_dict

OpenRuns = Callable[..., Runs]
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def record(runs: Runs, tiny_config: RunConfig) -> Record:
    return runs.run(tiny_config)


@pytest.fixture
def outcome(runs: Runs, record: Record) -> Outcome:
    return Outcome(runs.artifacts / "runs" / record.run_id)


# ---- a disk that fills


@contextlib.contextmanager
def full_disk(bytes_left: int = 100) -> Iterator[None]:
    """Every file takes as many bytes and then no more."""

    def fill(path: Path, content: bytes) -> int:
        with path.open("wb") as stream:
            stream.write(bytes(content)[:bytes_left])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "write_bytes", fill)
        yield


@contextlib.contextmanager
def small_files(size: int = 100) -> Iterator[None]:
    """The system itself lets no file grow beyond this size."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_checkpoint(folder: Path) -> None:
    model = torch.nn.Linear(30, 30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    parts = {"optimizer": optimizer, "schedule": schedule}
    checkpoint.save(folder, Recipe(), checkpoint.Fit(), model, parts)  # type: ignore[arg-type]


WRITERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "checkpoint": (checkpoint.CHECKPOINT, save_checkpoint),
    "scores": ("scores.npz", lambda folder: Outcome(folder).save_scores(*some_scores(2))),
    "weights": ("model.safetensors", lambda folder: Outcome(folder).save(torch.nn.Linear(30, 30), checkpoint.Fit())),  # type: ignore[arg-type]
    "record": ("record.json", lambda folder: write_json(folder / "record.json", {"numbers": list(range(100))})),
    "table": ("tables/t.csv", lambda folder: save_table(folder)),
    "figure": ("f.png", lambda folder: save_figure(folder)),
}


def some_scores(count: int) -> list[Any]:
    from mcar_lib.training import StreamScores

    return [StreamScores(torch.rand(30, 4), torch.rand(30, 4)) for _ in range(count)]


def save_figure(folder: Path) -> None:
    figure = Figure((1, 1))
    figure.text(0, 0, "second" if (folder / "f.png").exists() else "first")
    tables.Generated(folder).put_figure("f.png", figure)


def save_table(folder: Path) -> None:
    write_bytes(folder / "tables" / "t.csv", pd.DataFrame({"a": range(100)}).to_csv().encode())


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("full", "told"),
    [
        (
            full_disk,
            r"No space left on device\); the disk is full, [0-9,]+ bytes are free in .*make room there and give",
        ),
        (
            small_files,
            r"File too large\); it is larger than a file may be here \(ulimit -f\); raise that limit and give",
        ),
    ],
    ids=["full", "too large"],
)
def test_a_disk_that_fills_is_told_and_the_earlier_file_stays(
    tmp_path: Path, writer: str, full: Callable[[], Any], told: str
) -> None:
    name, write = WRITERS[writer]
    write(tmp_path)
    before = (tmp_path / name).read_bytes()
    with full(), pytest.raises(ResultsError, match=rf"{tmp_path}.* cannot be written \({told}"):
        write(tmp_path)
    assert (tmp_path / name).read_bytes() == before
    assert list(tmp_path.rglob("*.part")) == []


def test_an_export_onto_a_full_disk_is_told_and_the_earlier_one_stays(
    runs: Runs, record: Record, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    export_run(runs, record, path)
    before = path.read_bytes()
    with small_files(), pytest.raises(WeightsError, match=rf"{path} cannot be written \(File too large\)"):
        export_run(runs, record, path)
    assert path.read_bytes() == before


def test_a_stamp_onto_a_full_disk_costs_only_a_second_check(runs: Runs, tiny_config: RunConfig, tmp_path: Path) -> None:
    images = runs.data(tiny_config).test
    with full_disk():
        assert prepare(images, tmp_path / "notes") == prepare(images)
    assert list((tmp_path / "notes").iterdir()) == []


def test_a_run_on_a_full_disk_keeps_its_last_checkpoint_and_goes_on(
    runs: Runs, record: Record, outcome: Outcome, tiny_config: RunConfig
) -> None:
    weights = outcome.weights
    expected = weights.read_bytes()
    for path in (weights, record.path):
        path.unlink()
    saves = iter((contextlib.nullcontext, full_disk))
    save = checkpoint.write_bytes

    def second_fails(*args: Any, **options: Any) -> None:
        with next(saves)():
            save(*args, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(ResultsError, match="the disk is full"):  # noqa: PT012
        patch.setattr(checkpoint, "write_bytes", second_fails)
        runs.run(tiny_config)
    assert [path.name for path in weights.parent.glob("checkpoint*")] == [checkpoint.CHECKPOINT]
    again = runs.run(tiny_config)
    assert json.dumps(again.content["metrics"]) == json.dumps(record.content["metrics"])
    assert weights.read_bytes() == expected


# ---- what killed writers leave


def leftover(folder: Path, machine: str, process: int, age: float = 0.0) -> Path:
    path = folder / f".x.json.{machine}-{process}-0a1b2c3d.part"
    path.write_text("half")
    os.utime(path, (time.time() - age,) * 2)
    return path


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_what_killed_writers_have_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    day = 24 * 60 * 60
    dead, old = leftover(tmp_path, HERE, dead_process()), leftover(tmp_path, "elsewhere", 1, age=2 * day)
    kept = [leftover(tmp_path, HERE, os.getpid()), leftover(tmp_path, "elsewhere", 2), tmp_path / "photos.tar.part"]
    kept += [tmp_path / ".hidden.part", tmp_path / "x.json"]
    for path in kept[2:]:
        path.write_text("a user's")
    remove_leftovers(tmp_path)
    assert [path.exists() for path in (dead, old)] == [False, False]
    assert all(path.exists() for path in kept)


def test_the_next_write_into_a_folder_removes_leftovers(tmp_path: Path) -> None:
    path = leftover(tmp_path, HERE, dead_process())
    write_json(tmp_path / "y.json", {})
    assert [each.name for each in tmp_path.iterdir()] == ["y.json"]
    assert not path.exists()


def test_a_writer_that_is_killed_leaves_the_earlier_file(tmp_path: Path) -> None:
    text = (
        "import os, signal, sys; from pathlib import Path; from mcar_lib.files import write_atomically\n"
        "def half(path): path.write_text('hal'); os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(Path(sys.argv[1]), half)"
    )
    path = tmp_path / "x.json"
    write_json(path, {"whole": 1})
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", text, str(path)], env=environment, check=False).returncode == -9
    assert (read_json(path), len(list(tmp_path.glob(".*.part")))) == ({"whole": 1}, 1)
    write_json(path, {"whole": 2})
    assert [each.name for each in tmp_path.iterdir()] == ["x.json"]


def test_checkpoints_left_after_the_record_was_written_are_removed_by_the_next_command(
    open_runs: OpenRuns, outcome: Outcome, tiny_config: RunConfig
) -> None:
    path = outcome.folder / checkpoint.PREVIOUS
    path.write_bytes(b"left")
    with FileLock(outcome.folder / "lock"):  # another session works there
        assert open_runs().find(tiny_config) is not None
        assert path.exists()
    assert open_runs().find(tiny_config) is not None
    assert not path.exists()


# ---- several sessions


def test_two_sessions_that_ask_for_one_comparison_make_it_once(
    open_runs: OpenRuns, record: Record, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[object] = []
    found: list[object] = []
    bootstrap = comparisons.map_interval
    together = threading.Barrier(2)

    def slow(*args: Any) -> Any:
        made.append(args)
        time.sleep(0.3)
        return bootstrap(*args)

    def ask() -> None:
        runs = open_runs()
        together.wait()
        found.append(compare(runs, [record], []))

    monkeypatch.setattr(comparisons, "map_interval", slow)
    monkeypatch.setattr(comparisons, "fingerprint", lambda *roots: "bootstraps")
    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), str(found[0])) == (1, str(found[1]))  # as text, NaN equals NaN
    assert "waiting for another session that makes comparisons/" in capsys.readouterr().out


def test_a_session_says_that_it_waits_for_the_training_of_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there, go_on = threading.Event(), threading.Event()

    def train() -> None:
        with Outcome(tmp_path / "abc").locked():
            there.set()
            go_on.wait()

    other = threading.Thread(target=train)
    other.start()
    there.wait()
    threading.Timer(0.1, go_on.set).start()
    with Outcome(tmp_path / "abc").locked():
        assert "waiting for another session that trains the run abc" in capsys.readouterr().out
    other.join()


def test_a_lock_that_cannot_be_made_names_the_option_that_helps(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    told = r"taken/x.lock cannot be locked \(.*\); choose another --artifacts folder, or set MCAR_ARTIFACTS"
    with pytest.raises(ResultsError, match=told), alone(tmp_path / "taken" / "x.lock", "makes x"):
        pass


def test_no_lock_lies_among_the_results(runs: Runs, record: Record) -> None:
    compare(runs, [record], [])
    assert [path for path in runs.results.rglob("*") if path.is_file() and path.suffix != ".json"] == []


def test_readers_never_see_a_torn_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"numbers": [0] * 2000})
    done = threading.Event()

    def write() -> None:
        for number in range(50):
            write_json(path, {"numbers": [number] * 2000})
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    while not done.is_set():
        assert len(set(read_json(path)["numbers"])) == 1
        assert [each.name for each in tmp_path.glob("[!.]*")] == ["x.json"]
    thread.join()


# ---- damaged score files


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


def random_scores(path: Path, shape: tuple[int, int] = (16, 20), **more: Any) -> None:
    draw = np.random.default_rng(0)
    names = [f"{epoch}_{stream}" for epoch in ("last", "best") for stream in ("global", "local")]
    np.savez(path, seconds=np.array(0.0), **{name: draw.random(shape, np.float32) for name in names}, **more)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-300]),
    "one flipped bit": lambda path: flip(path, 300),
    "random numbers": random_scores,
    "random numbers of other images": lambda path: random_scores(path, (7, 20)),
    "no numbers at all": lambda path: np.savez(path, last_global=np.array(["a"])),
    "text": lambda path: path.write_text("scores"),
}


def test_scores_that_are_missing_or_damaged_are_made_again_from_the_weights(
    open_runs: OpenRuns,
    outcome: Outcome,
    tiny_config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = outcome.folder / "scores.npz"
    before = open_runs().scores(tiny_config)
    monkeypatch.delattr(trainer, "fit")  # nothing is trained
    for name, damage in DAMAGES.items():
        damage(path)
        again = open_runs().scores(tiny_config)
        assert all(torch.equal(*pair) for pair in zip(before, again, strict=True)), name
        said = capsys.readouterr().out
        assert "are not on this machine; scoring its weights" in said, name
        assert (str(path) in said) == (name != "missing")
        open_runs().scores(tiny_config)
        assert capsys.readouterr().out == "", name


def test_damaged_scores_of_a_best_epoch_that_was_not_the_last_are_trained_again(
    open_runs: OpenRuns, tiny_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny_config.vary(epochs=4, learning_rate=0.5)
    runs = open_runs()
    best = runs.run(config).metrics["best"]["epoch"]
    assert best < config.epochs
    before = runs.scores(config, "best")
    flip(runs.outcome(config).folder / "scores.npz", 300)
    assert all(torch.equal(*pair) for pair in zip(before, runs.scores(config, "best"), strict=True))
    assert "the scores of the best epoch of" in capsys.readouterr().out


def test_damaged_scores_of_a_test_with_other_values_are_made_again(
    open_runs: OpenRuns, outcome: Outcome, record: Record
) -> None:
    runs = open_runs()
    before = comparisons.tested(runs, record, num_regions=1)
    (path,) = outcome.folder.glob("[!s]*.npz")
    flip(path, 200)
    for evaluation in (runs.local_folder / "evaluations").glob("*.json"):
        evaluation.unlink()
    again = comparisons.tested(open_runs(), record, num_regions=1)
    assert json.dumps(again.metrics) == json.dumps(before.metrics)


def test_weights_of_former_versions_are_taken_and_their_scores_made_again(
    open_runs: OpenRuns, outcome: Outcome, tiny_config: RunConfig
) -> None:
    """Those wrote no checksums, and sigmoids in place of logits."""
    before = open_runs().scores(tiny_config)
    save_file(load_file(outcome.weights), outcome.weights)
    random_scores(outcome.folder / "scores.npz")
    assert all(torch.equal(*pair) for pair in zip(open_runs().scores(tiny_config), before, strict=True))


# ---- damaged weights


def test_damaged_weights_are_told_and_trained_again(
    open_runs: OpenRuns, outcome: Outcome, tiny_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    before = outcome.weights.read_bytes()
    for at in (3, 200, -1):  # the header's length, the header, the last tensor
        flip(outcome.weights, at)
        assert open_runs().trained(tiny_config).weights.read_bytes() == before
        assert f"{outcome.weights}: expected weights, tensors by name" in capsys.readouterr().out


def test_no_flipped_bit_in_weights_is_believed(outcome: Outcome, tmp_path: Path) -> None:
    expected, path = read_state_dict(outcome.weights), tmp_path / "w.safetensors"
    content = outcome.weights.read_bytes()
    for at in range(0, len(content), len(content) // 150):
        path.write_bytes(content)
        flip(path, at)
        with contextlib.suppress(WeightsError):
            found = read_state_dict(path)  # what is flipped may be no part of it: a blank, the name of the checksum
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_weights_with_their_checksum_are_read_by_others(outcome: Outcome) -> None:
    assert load_file(outcome.weights).keys() == read_state_dict(outcome.weights).keys()


# ---- readers of damaged files: they pass them over or say one sentence


def one_line(said: str, path: Path) -> None:
    (line,) = said.splitlines()
    assert str(path) in line
    assert len(line) < 1000


def use(kind: str, path: Path, content: Any) -> None:
    """What tables do with a record."""
    if kind == "runs":
        found = Record(path, content)
        _ = (
            found.config.label,
            found.run_id,
            found.is_current({"arithmetic": "x"}),
            found.classes,
            found.data["subset"],
        )
        if found.is_scored:
            for epoch in ("last", "best"):
                assert all(isinstance(100 * found.map(name, epoch), float) for name in ("global", "local", "fused"))
            _ = Prediction(found).cost
    elif kind == "evaluations":
        assert isinstance(100 * content["metrics"]["fused"]["mAP"], float)
        assert content["cost"]["macs_per_image"] is not None
    else:
        assert isinstance(100 * content["low"] + 100 * content["difference" if content["b"] else "mAP"], float)


@pytest.mark.parametrize("kind", ["runs", "evaluations", "comparisons"])
def test_a_damaged_record_is_named_and_passed_over(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = min((ROOT / "results" / "photos" / kind).glob("*.json"))
    good, path = source.read_bytes(), tmp_path / "damaged.json"
    for damaged in mutated(good):
        path.write_bytes(damaged)
        records._read.cache_clear()
        content = records.read_kept(path, kind)
        said = capsys.readouterr().out
        if content is None:
            one_line(said, path)
        else:
            use(kind, path, content)


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_checkpoint(tmp_path)
    path = tmp_path / checkpoint.CHECKPOINT
    good = path.read_bytes()
    expected = checkpoint._read(path)["model"]
    for damaged in mutated(good):
        path.write_bytes(damaged)
        found, said = checkpoint._newest(tmp_path), capsys.readouterr().out
        if found is None:
            one_line(said, path)
        else:
            assert all(torch.equal(value, expected[key]) for key, value in found[1]["model"].items())


def test_a_damaged_score_file_is_named_and_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome, scores = Outcome(tmp_path), some_scores(2)
    outcome.save(torch.nn.Linear(2, 2), checkpoint.Fit())  # type: ignore[arg-type]
    outcome.save_scores(*scores)
    path = tmp_path / "scores.npz"
    for damaged in mutated(path.read_bytes()):
        path.write_bytes(damaged)
        found, said = outcome.scores("best", (30, 4)), capsys.readouterr().out
        if found is None:
            one_line(said, path)
        else:
            assert all(torch.equal(*pair) for pair in zip(found, scores[1], strict=True))


def test_a_damaged_profile_is_told_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    for damaged in mutated((ROOT / "mcar_lib" / "profiles" / "smoke.toml").read_bytes()):
        path.write_bytes(damaged)
        said = ""
        try:
            load_profile(str(path))
        except ConfigError as error:
            said = str(error)
        assert said == "" or (said.startswith(str(path)) and "\n" not in said), said


def test_a_file_is_written_by_what_raises_errors_of_its_own(tmp_path: Path) -> None:
    def fail(partial: Path) -> None:
        partial.write_text("half")
        raise MCARError("own")

    with pytest.raises(MCARError, match="own"):
        write_atomically(tmp_path / "x", fail)
    assert list(tmp_path.iterdir()) == []


# ---- a soak


@pytest.mark.slow
def test_the_soak_script_finds_no_difference() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "soak.py"), "--rounds", "1", "--pairs", "5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 differences, 0 torn files" in done.stdout
