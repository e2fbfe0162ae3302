"""Photos are read ahead by workers, from memory, disk or their files: always the same bits, and faults are told."""

import contextlib
import dataclasses
import errno
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import SCENES
from torch import Tensor

from mcar_lib.data.image_set import ImageSet
from mcar_lib.data.squares import ResizedImages, fits_on_disk
from mcar_lib.errors import ConfigError, DataError
from mcar_lib.runs import Runs
from mcar_lib.training import Execution, reader
from mcar_lib.training.reader import Reader, num_workers

CPU = torch.device("cpu")
Squares = tuple[ResizedImages, ResizedImages]


@pytest.fixture
def images(scene_squares: Squares, tmp_path: Path) -> ImageSet:
    """Training scenes whose photos are the test's own."""
    found = scene_squares[0].image_set
    paths = tuple(Path(shutil.copy(path, tmp_path)) for path in found.paths)
    return dataclasses.replace(found, paths=paths)


# ---- squares


def all_of(squares: ResizedImages) -> Tensor:
    return squares.batch(range(len(squares)))


def test_squares_on_disk_are_those_of_the_photos(images: ImageSet, tmp_path: Path) -> None:
    kept, read = ResizedImages(images, 64, file=tmp_path / "squares"), ResizedImages(images, 64, 0)
    assert (kept.file, read.kept) == (tmp_path / "squares", None)
    assert torch.equal(all_of(kept), all_of(read))


def test_squares_on_disk_are_read_without_the_photos(images: ImageSet, tmp_path: Path) -> None:
    first = all_of(ResizedImages(images, 64, file=tmp_path / "squares"))
    for path in images.paths:
        path.unlink()
    assert torch.equal(all_of(ResizedImages(images, 64, file=tmp_path / "squares")), first)


def test_the_size_of_squares_is_told_before_they_are_written(
    images: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ResizedImages(images, 64, file=tmp_path / "squares", progress=lambda done, total: print(done))
    assert capsys.readouterr().out.splitlines()[:2] == [
        f"{tmp_path / 'squares'}: 0.3 MB of resized photos are written, once",
        "1",
    ]


@pytest.mark.parametrize("change", ["cut", "flipped", "unsealed"])
def test_squares_that_are_not_what_was_written_are_made_again(images: ImageSet, tmp_path: Path, change: str) -> None:
    file = tmp_path / "squares"
    first = all_of(ResizedImages(images, 64, file=file))
    content = bytearray(file.read_bytes())
    if change == "unsealed":
        file.with_name("squares.json").unlink()
    else:
        content[500] ^= 255
        file.write_bytes(content[: 1000 if change == "cut" else None])
    assert torch.equal(all_of(ResizedImages(images, 64, file=file)), first)


def test_squares_that_were_only_copied_are_not_made_again(images: ImageSet, tmp_path: Path) -> None:
    first = all_of(ResizedImages(images, 64, file=tmp_path / "squares"))
    os.utime(tmp_path / "squares", (1, 1))
    for path in images.paths:
        path.unlink()
    assert torch.equal(all_of(ResizedImages(images, 64, file=tmp_path / "squares")), first)


def test_a_full_disk_costs_time_and_nothing_else(
    images: ImageSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    squares = ResizedImages(images, 64, file=tmp_path / "s" / "squares")
    told = capsys.readouterr().out
    assert "the disk is full" in told
    assert "photos are read and resized each time instead" in told
    assert torch.equal(all_of(squares), all_of(ResizedImages(images, 64)))
    assert list((tmp_path / "s").iterdir()) == []


def test_a_place_that_cannot_be_written_costs_time_and_nothing_else(
    images: ImageSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    squares = ResizedImages(images, 64, file=tmp_path / "file" / "squares")
    assert "cannot be written" in capsys.readouterr().out
    assert torch.equal(all_of(squares), all_of(ResizedImages(images, 64)))


def test_another_process_opens_the_file_anew(images: ImageSet, tmp_path: Path) -> None:
    squares = ResizedImages(images, 64, file=tmp_path / "squares")
    sent = pickle.dumps(squares)
    assert len(sent) < 200_000  # without the squares
    assert torch.equal(all_of(pickle.loads(sent)), all_of(squares))


def test_room_for_squares_is_twice_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert fits_on_disk(tmp_path / "not" / "yet", 50)
    assert not fits_on_disk(tmp_path, 51)


def squares_of(open_runs: Callable[..., Runs], **options: object) -> ResizedImages:
    runs = open_runs(execution=Execution(**options))
    return runs.splits.squares(runs.data().train, 64)


@pytest.mark.parametrize(
    ("cache", "in_memory", "on_disk"),
    [("auto", True, False), ("memory", True, False), ("disk", True, True), ("none", False, False)],
)
def test_the_cache_is_chosen(open_runs: Callable[..., Runs], cache: str, in_memory: bool, on_disk: bool) -> None:
    squares = squares_of(open_runs, cache=cache)
    assert (squares.kept is not None, squares.file is not None) == (in_memory, on_disk)


@pytest.mark.parametrize("free", [True, False])
def test_many_photos_are_kept_on_disk_where_there_is_room(
    open_runs: Callable[..., Runs], monkeypatch: pytest.MonkeyPatch, free: bool
) -> None:
    monkeypatch.setattr("mcar_lib.runs.splits.MEMORY_LIMIT", 100)
    monkeypatch.setattr("mcar_lib.runs.splits.fits_on_disk", lambda folder, needed: free)
    squares = squares_of(open_runs)
    assert (squares.file is not None, squares.kept is not None) == (free, free)


def test_photos_that_are_looked_at_once_are_not_written(
    open_runs: Callable[..., Runs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcar_lib.runs.splits.MEMORY_LIMIT", 100)
    runs = open_runs()
    squares = runs.splits.squares(runs.data().test, 64, once=True)
    assert (squares.file, squares.kept) == (None, None)


def test_other_photos_have_another_file(open_runs: Callable[..., Runs]) -> None:
    runs = open_runs(execution=Execution(cache="disk"))
    photos = runs.data().train
    files = {runs.splits.squares(each, 64).file for each in (photos, photos.select(range(5)), runs.data().test)}
    files.add(runs.splits.squares(photos, 96).file)
    assert len(files) == 4
    assert None not in files


# ---- workers


@pytest.fixture
def read_by(images: ImageSet) -> Callable[[int], Iterator[tuple[Tensor, ...]]]:
    """The photos in batches of 4, read and resized by so many workers."""

    def read(workers: int) -> Iterator[tuple[Tensor, ...]]:
        source = Reader(Batches(ResizedImages(images, 64, 0)), workers, 4 * 3 * 64 * 64, CPU)
        with contextlib.closing(source):
            yield from source.batches([range(first, first + 4) for first in range(0, len(images), 4)])

    return read


class Batches:
    """A batch of squares, and the process that read it."""

    def __init__(self, squares: ResizedImages) -> None:
        self.squares = squares

    def __call__(self, indices: range) -> tuple[Tensor, Tensor]:
        return self.squares.batch(indices), torch.tensor(os.getpid())


@pytest.mark.parametrize("workers", [0, 1, 2, 4])
def test_any_number_of_workers_reads_the_same(images: ImageSet, read_by: Callable[..., Iterator], workers: int) -> None:
    found = list(read_by(workers))
    assert torch.equal(torch.cat([squares for squares, _ in found]), all_of(ResizedImages(images, 64)))
    readers = {int(process) for _, process in found}
    assert len(readers - {os.getpid()}) == workers


def test_workers_go_on_from_one_pass_to_the_next(images: ImageSet) -> None:
    source = Reader(Batches(ResizedImages(images, 64)), 1, 1, CPU)
    first, second = (list(source.batches([range(3), range(5)])) for _ in range(2))
    assert [len(squares) for squares, _ in first] == [3, 5]
    assert all(
        torch.equal(*pair) for one, other in zip(first, second, strict=True) for pair in zip(one, other, strict=True)
    )
    source.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_photo_that_vanishes_is_told_by_name(
    images: ImageSet, read_by: Callable[..., Iterator], workers: int
) -> None:
    images.paths[9].unlink()
    with pytest.raises(DataError, match=rf"^{images.paths[9]}: cannot read the image file \(No such file"):
        list(read_by(workers))


# In a process of its own: torch raises what it has to tell of a lost worker in the middle of whatever is done.
LOST = """
import multiprocessing, os, signal, time
import torch
from mcar_lib.errors import TrainingError
from mcar_lib.training.reader import Reader, lost_worker_told

def read(task):
    time.sleep(0.05)
    return torch.zeros(3), torch.tensor(os.getpid())

source = Reader(read, 2, 1, torch.device("cpu"))
batches = source.batches([range(3)] * 200)
workers = [int(next(batches)[1]) for _ in range(2)]
try:
    with lost_worker_told():
        os.kill(workers[0], signal.SIGKILL)
        list(batches)
except TrainingError as error:
    print(error)
# As where the loss is told in the middle of looking at the event, or where the worker was looking at it.
source.loader._iterator._workers_done_event._cond.acquire()
source.close()
print({each.pid for each in multiprocessing.active_children()} & set(workers))
"""


def test_a_worker_that_is_killed_is_one_sentence_and_ends_the_others_whatever_lock_is_held() -> None:
    command = [sys.executable, "-c", LOST]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parent.parent), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    sentence, left = done.stdout.splitlines()
    assert re.match(r"a process that reads photos was lost .* from the last checkpoint", sentence)
    assert (left, done.returncode) == ("set()", 0)


def test_little_shared_memory_is_told_and_files_take_its_place(
    images: ImageSet,
    read_by: Callable[..., Iterator],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=10**5)
    monkeypatch.setattr(reader.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(reader, "SHARED", tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "files"))
    (tmp_path / "files").mkdir()
    found = list(read_by(2))
    assert torch.equal(torch.cat([squares for squares, _ in found]), all_of(ResizedImages(images, 64)))
    assert f"{tmp_path} has 0 MB free" in capsys.readouterr().out
    assert list((tmp_path / "files").iterdir()) == []


def test_a_gpu_has_the_other_cores_to_decode_its_photos(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(8)))
    gpu = torch.device("cuda")
    assert [num_workers(None, CPU, True), num_workers(None, gpu, True), num_workers(None, gpu, False)] == [0, 7, 0]
    monkeypatch.setattr(reader.processes, "num_local", lambda: 4)
    assert num_workers(None, gpu, True) == 1


def test_more_workers_than_cores_are_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(2)))
    assert num_workers(4, CPU, False) == 4
    assert capsys.readouterr().out == "4 workers read photos and there are 2 cores: fewer are as fast\n"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"workers": -1}, "workers is -1; give a number of processes"),
        ({"cache": "tape"}, "cache is 'tape'; choose one of auto, memory, disk, none"),
        ({"checkpoint_minutes": float("nan")}, "checkpoint_minutes is nan"),
    ],
)
def test_impossible_ways_of_carrying_out_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Execution(**values)  # type: ignore[arg-type]


def test_notebooks_are_told_by_the_environment() -> None:
    said = {"MCAR_WORKERS": "3", "MCAR_CACHE": "none", "MCAR_CHECKPOINT_MINUTES": "0.5", "MCAR_TRACKERS": "a, b"}
    assert Execution.of_environment(said) == Execution(3, "none", 0.5, ("a", "b"))
    assert Execution.of_environment({}) == Execution()
    with pytest.raises(ConfigError, match="MCAR_WORKERS is 'many' in the environment; give a number"):
        Execution.of_environment({"MCAR_WORKERS": "many"})


@pytest.mark.parametrize("options", [{"cache": "none", "workers": 2}, {"cache": "disk", "workers": 1}, {"workers": 2}])
def test_a_run_s_numbers_do_not_depend_on_how_its_photos_are_read(
    open_runs: Callable[..., Runs], tiny_config: object, options: dict[str, object], tmp_path: Path
) -> None:
    config = tiny_config.vary(jitter=0.3, crop_area=0.5, epochs=1)  # type: ignore[attr-defined]
    assert SCENES["num_train"] % config.batch_size == 0
    plain = open_runs(tmp_path / "plain").run(config)
    other = open_runs(tmp_path / "other", execution=Execution(**options)).run(config)  # type: ignore[arg-type]
    assert plain.path != other.path
    assert json.dumps(plain.metrics) == json.dumps(other.metrics)  # a class without positives is NaN in both
    losses = [[(each["global_loss"], each["local_loss"]) for each in run.content["history"]] for run in (plain, other)]
    assert losses[0] == losses[1]
