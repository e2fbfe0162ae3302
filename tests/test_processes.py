"""Several processes that train one run: what they agree on, the numbers they end with, the command under torchrun."""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
import torch
import torch.distributed
from safetensors.torch import load_file
from typer.testing import CliRunner

from mcar_lib.cli import app
from mcar_lib.errors import ConfigError, DataError, TrainingError
from mcar_lib.progress import speaks
from mcar_lib.runs import STREAMS, Runs, load_profile
from mcar_lib.runs.trainer import build_model
from mcar_lib.training import CHECKPOINT, evaluate, processes

ROOT = Path(__file__).resolve().parent.parent
PROFILE = (ROOT / "mcar_lib/profiles/smoke.toml").read_text(encoding="utf-8")
# The last of three batches has 3 images: all are of the first process's piece, and the second has none. The test images
# are three batches of EVALUATION_BATCH and less, so that one process scores two of them.
CHANGES = {"num_train = 32": "num_train = 35", "num_test = 32": "num_test = 80", "epochs = 1": "epochs = 2"}


class Done(NamedTuple):
    code: int
    out: str
    err: str


def start_two(*arguments: str) -> "subprocess.Popen[str]":
    """What torchrun is given, in two processes."""
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(started: "subprocess.Popen[str]") -> Done:
    with started as process:
        try:
            out, err = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            process.terminate()  # it ends its processes; without this, leaving the block would wait for ever
            raise
    return Done(process.returncode, out, err)


class Job(NamedTuple):
    """A profile and folders of one's own, and the commands on them."""

    folder: Path

    @property
    def options(self) -> list[str]:
        names = {"--profile": "smoke.toml", "--results": "results", "--artifacts": "artifacts"}
        return [part for name, file in names.items() for part in (name, str(self.folder / file))]

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        """mcar train in two processes."""
        return start_two("-m", "mcar_lib", "train", *self.options, *arguments)

    def train(self, *arguments: str) -> Done:
        return ended(self.start(*arguments))

    def train_alone(self, *arguments: str) -> str:
        done = CliRunner().invoke(app, ["train", *self.options, *arguments])
        assert done.exit_code == 0, done.output
        return done.stdout

    def records(self) -> list[dict[str, Any]]:
        paths = sorted((self.folder / "results/smoke/runs").glob("*.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def make_job(folder: Path) -> Job:
    text = PROFILE
    for old, new in CHANGES.items():
        assert old in text
        text = text.replace(old, new)
    folder.mkdir(exist_ok=True)
    (folder / "smoke.toml").write_text(text, encoding="utf-8")
    return Job(folder)


def losses(record: dict[str, Any]) -> list[tuple[float, float]]:
    """Global and local loss of each epoch."""
    return [(result["global_loss"], result["local_loss"]) for result in record["history"]]


class Trained(NamedTuple):
    job: Job
    done: Done
    record: dict[str, Any]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A run that two processes trained."""
    job = make_job(tmp_path_factory.mktemp("processes"))
    done = job.train()
    assert done.code == 0, done.err
    (record,) = job.records()
    return Trained(job, done, record)


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretends to be the second of two processes."""
    monkeypatch.setattr(processes, "num_processes", lambda: 2)
    monkeypatch.setattr(processes, "rank", lambda: 1)


# ---- one process


def test_without_torchrun_there_is_the_main_process_alone_and_no_process_group() -> None:
    assert (processes.num_processes(), processes.rank(), processes.is_main()) == (1, 0, True)
    assert processes.broadcast_from_main(lambda: "made") == processes.main_first(lambda: "made") == "made"
    assert processes.gather([1, 2]) == [1, 2]
    assert not torch.distributed.is_initialized()


def test_an_error_of_the_only_process_keeps_its_cause() -> None:
    def fail() -> None:
        raise DataError("x") from ValueError("y")

    for call in (processes.broadcast_from_main, processes.main_first):
        with pytest.raises(DataError) as caught:
            call(fail)
        assert isinstance(caught.value.__cause__, ValueError)
        assert processes.tells(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "\u00b2"}, "WORLD_SIZE is '\u00b2'"),
        ({"RANK": "2"}, "RANK is 2 of WORLD_SIZE 2"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": "", "MASTER_ADDR": ""}, "MASTER_PORT is '', MASTER_ADDR is not set"),
    ],
)
def test_half_an_environment_of_torchrun_is_one_sentence(
    changes: dict[str, str], named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}
    for name, value in {**good, **changes}.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(app, ["train", "--profile", "smoke"])
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert f", but {named}; unset LOCAL_RANK" in done.stderr


def test_a_rank_without_a_local_rank_is_no_process_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "x")
    assert processes.num_processes() == 1
    assert speaks()


# ---- a process that is lost


class Watched(NamedTuple):
    store: torch.distributed.TCPStore
    ends: "queue.SimpleQueue[tuple[str, bool]]"

    def start(self, rank: int, count: int) -> processes._Watch:
        return processes._Watch(rank, count)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """A store as torchrun has one; what a watch would end its process with is put into a queue."""
    made = Watched(
        torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False), queue.SimpleQueue()
    )

    def end(watch: processes._Watch, reason: str, tell: bool) -> None:
        watch.ended.set()
        made.ends.put((reason, tell))

    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(made.store.port))
    monkeypatch.setattr(processes._Watch, "end", end)
    for name, seconds in {"LOST_SECONDS": 0.5, "SECONDS_BETWEEN_BEATS": 0.05, "SECONDS_BETWEEN_LOOKS": 0.05}.items():
        monkeypatch.setattr(processes, name, seconds)
    return made


def test_a_process_that_is_not_heard_of_ends_the_others_and_the_first_of_them_tells(watched: Watched) -> None:
    watched.start(2, 3)
    watched.start(1, 3)
    ends = {watched.ends.get(timeout=30) for _ in range(2)}
    assert ends == {("process 0 is not heard of any more", tell) for tell in (True, False)}


def test_processes_that_are_heard_of_go_on(watched: Watched) -> None:
    both = [watched.start(rank, 2) for rank in range(2)]
    with pytest.raises(queue.Empty):
        watched.ends.get(timeout=1)
    for each in both:
        each.ended.set()


def test_a_process_whose_torchrun_is_gone_ends(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    watched.start(0, 1)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert watched.ends.get(timeout=30) == ("the process that started it is gone", True)


def test_what_befalls_all_processes_is_told_by_one(watched: Watched) -> None:
    both = [watched.start(rank, 2) for rank in range(2)]
    assert [each.is_first() for each in (*both, *both)] == [True, False, False, False]
    for each in both:
        each.ended.set()


def test_a_connection_that_ends_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(processes, "rank", lambda: 0)
    monkeypatch.setattr(processes, "is_first_to_tell", lambda: True)
    theirs = (
        "[/far/away/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3213. More of it\nand more"
    )
    with pytest.raises(TrainingError) as caught, processes.only_main_prints():
        raise RuntimeError(theirs)
    assert str(caught.value) == (
        "a process of this run was lost (Connection closed by peer); the same command goes on from here"
    )
    with pytest.raises(RuntimeError, match="of another kind"), processes.only_main_prints():
        raise RuntimeError("of another kind")


# ---- what each process takes of a batch


@pytest.mark.parametrize("count", [1, 2, 4, 8])
@pytest.mark.parametrize("size", [1, 3, 11, 15, 16])
def test_every_image_of_a_batch_belongs_to_one_process(count: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "num_processes", lambda: count)
    shards = []
    for rank in range(count):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shards.append(processes.shard_size(size, 16))
    assert sum(shards) == size
    assert shards == [len(list(range(size))[first : first + 16 // count]) for first in range(0, 16, 16 // count)]


@pytest.mark.usefixtures("two")
@pytest.mark.parametrize(("batch", "group", "named"), [(15, 0, "batch_size is 15"), (16, 16, "statistics_batch is 16")])
def test_a_batch_that_cannot_be_shared_is_refused(batch: int, group: int, named: str) -> None:
    with pytest.raises(ConfigError, match=f"{named}.* 2 processes"):
        processes.check_batch(batch, group)
    processes.check_batch(16, 4)


@pytest.mark.usefixtures("two")
def test_the_others_repeat_no_error_of_all_but_tell_their_own() -> None:
    assert not processes.tells(ConfigError("x"))
    assert processes.tells(TrainingError("x"))
    alike = DataError("x")
    alike.add_note(processes.ALIKE)
    assert not processes.tells(alike)


# ---- two processes


AGREE = """
import json, sys
from pathlib import Path
from mcar_lib.errors import DataError
from mcar_lib.training import processes

folder, rank = Path(sys.argv[1]), processes.rank()

def files() -> int:
    (folder / f"was here {rank}").touch()
    return len(list(folder.iterdir()))

def fail() -> None:
    raise DataError(f"of process {rank}")

with processes.only_main_prints():
    print("said once")
    found = [processes.broadcast_from_main(lambda: rank), processes.main_first(files), processes.gather([rank, "x"])]
    for call in (processes.broadcast_from_main, processes.main_first):
        try:
            call(fail)
        except DataError as error:
            found.append([str(error), processes.tells(error)])
    (folder / f"{rank}.json").write_text(json.dumps(found))
"""


def test_two_processes_agree_on_what_the_main_process_makes_or_raises(tmp_path: Path) -> None:
    script = tmp_path / "agree.py"
    script.write_text(AGREE, encoding="utf-8")
    folder = tmp_path / "found"
    folder.mkdir()
    done = ended(start_two(str(script), str(folder)))
    assert (done.code, done.out) == (0, "said once\n"), done.err
    first, second = (json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2))
    assert first == [0, 1, [0, "x", 1, "x"], ["of process 0", True], ["of process 0", True]]
    assert second == [0, 2, [0, "x", 1, "x"], ["of process 0", False], ["of process 0", False]]


STEP = """
import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy
from mcar_lib.model import MCAR
from mcar_lib.training import processes, training_step

rank, count = processes.rank(), processes.num_processes()

def wrapped():
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=32, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    return nn.parallel.DistributedDataParallel(MCAR(features, 8, 5, num_regions=2), broadcast_buffers=False)

ours, joint = wrapped(), wrapped()
draw = torch.Generator().manual_seed(rank)
for step in range(3):
    images, targets = torch.randn(4, 3, 96, 96, generator=draw), torch.rand(4, 5, generator=draw).round()
    output = joint(images)
    sum(cross_entropy(logits, targets) for logits in output[:2]).backward()
    training_step(ours, images, targets)
    for one, other in zip(ours.parameters(), joint.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
        assert torch.equal(*processes.gather([one.grad]))
        one.data -= one.grad
        other.data -= other.grad
        one.grad = other.grad = None
print(f"process {rank} agrees")
"""


def test_two_processes_average_the_gradients_of_both_losses_bit_for_bit(tmp_path: Path) -> None:
    script = tmp_path / "step.py"
    script.write_text(STEP, encoding="utf-8")
    done = ended(start_two(str(script)))
    assert done.code == 0, done.err
    assert all(f"process {rank} agrees" in done.out for rank in range(2))


def test_two_processes_leave_one_record_that_says_so(trained: Trained) -> None:
    assert trained.record["environment"]["processes"] == 2
    assert len(trained.record["history"]) == 2
    assert trained.done.out.count("record: ") == trained.done.out.count("epoch 2/2:") == 1


def test_two_processes_have_the_losses_of_one_with_two_groups_of_batch_statistics(trained: Trained) -> None:
    """In the first epoch: later ones may differ where a sum's last bit moves the edge of a region."""
    trained.job.train_alone("--set", "statistics_batch=8")
    (alone,) = (record for record in trained.job.records() if record["config"]["statistics_batch"] == 8)
    assert losses(trained.record)[0] == pytest.approx(losses(alone)[0], abs=1e-4)


def test_two_processes_take_the_steps_of_one_with_two_groups_of_batch_statistics(tmp_path: Path) -> None:
    """The second epoch's loss depends on every step of the first, also on that of the batch which is not full."""
    job = make_job(tmp_path)
    done = job.train("--set", "local_stream=false")
    assert done.code == 0, done.err
    job.train_alone("--set", "local_stream=false", "--set", "statistics_batch=8")
    one, other = job.records()
    assert losses(one)[1] == pytest.approx(losses(other)[1], abs=1e-4)
    assert losses(one)[0][0] - losses(one)[1][0] > 0.1


def test_scores_of_two_processes_are_those_of_one(trained: Trained) -> None:
    job, _, record = trained
    profile = load_profile(str(job.folder / "smoke.toml"))
    runs = Runs(profile, job.folder / "results", artifacts=job.folder / "artifacts")
    test = runs.data().test
    mcar = build_model(profile.run, len(test.classes))
    mcar.load_state_dict(load_file(runs.artifacts / "runs" / record["run_id"] / "model.safetensors"))
    alone = evaluate(mcar, runs.splits.squares(test, profile.run.image_size), verbose=False)
    together = runs.scores(profile.run)
    assert all(torch.equal(*pair) for pair in zip(together, alone, strict=True))
    assert record["metrics"]["last"][STREAMS[0]]["mAP"] == record["history"][-1]["map_global"]


def test_two_processes_find_what_was_trained(trained: Trained) -> None:
    again = trained.job.train()
    assert again.code == 0, again.err
    record = trained.done.out.index("record: ")
    assert again.out.endswith(trained.done.out[record:])
    assert "training" not in again.out


def test_a_batch_that_two_processes_cannot_share_ends_the_job_before_it_begins(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    done = job.train("--set", "batch_size=15")
    assert done.code != 0
    assert re.findall(r"exitcode *: (\d)", done.err)[0] == "2"
    assert done.err.count("error: batch_size is 15, which 2 processes cannot share equally") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["smoke.toml"]


def processes_of(starter: int) -> list[psutil.Process]:
    """The processes that a process has started and that run."""
    return list(filter(is_running, psutil.Process(starter).children()))


def still_running(processes: list[psutil.Process], within: float = 10.0) -> list[psutil.Process]:
    """Those that do not end within seconds; a zombie has. A process lets go of its pipes a moment before it ends."""
    ends = time.monotonic() + within
    while (left := [each for each in processes if is_running(each)]) and time.monotonic() < ends:
        time.sleep(0.05)
    return left


def is_running(process: psutil.Process) -> bool:
    try:
        return bool(process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD))
    except psutil.NoSuchProcess:
        return False


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["torchrun", "one"])
def test_what_is_left_of_a_run_ends_soon_with_one_sentence(killed: str, tmp_path: Path) -> None:
    job = make_job(tmp_path)
    process = job.start("--set", "epochs=500")
    assert process.stdout is not None
    assert any(line.startswith("epoch 1/") for line in process.stdout)
    workers = processes_of(process.pid)
    assert len(workers) == 2
    (process if killed == "torchrun" else workers[1]).kill()
    done = ended(process)  # at the end of the last process that holds the pipes
    assert done.err.count("the same command goes on from here") == 1
    ours = [line for line in done.err.splitlines() if "mcar_lib/" in line and line.strip().startswith("File")]
    assert ours == []
    assert still_running(workers) == []


@pytest.mark.slow
def test_two_processes_go_on_where_two_were_killed_and_one_refuses(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    process = job.start("--set", "epochs=5")
    ends = time.monotonic() + 120
    while not list(tmp_path.glob(f"artifacts/runs/*/{CHECKPOINT}")) and time.monotonic() < ends:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    (checkpoint,) = tmp_path.glob(f"artifacts/runs/*/{CHECKPOINT}")
    before = torch.load(checkpoint, weights_only=True)["history"]
    assert 0 < len(before) < 5
    alone = CliRunner().invoke(app, ["train", *job.options, "--set", "epochs=5"])
    assert alone.exit_code == 4, alone.output
    assert "was made with processes: 2, and here are 1" in alone.stderr
    done = job.train("--set", "epochs=5")
    assert done.code == 0, done.err
    (record,) = job.records()
    assert record["history"][: len(before)] == before
    assert [result["epoch"] for result in record["history"]] == [1, 2, 3, 4, 5]
    assert record["environment"]["processes"] == 2
