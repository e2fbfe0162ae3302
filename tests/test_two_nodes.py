"""A run that two nodes train, as two agents of torchrun on two loopback addresses."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_processes import Done, Job, ended, make_job

ROOT = Path(__file__).resolve().parent.parent
EPOCHS = ("--set", "epochs=1")


def numbers(job: Job) -> Any:
    (record,) = job.records()
    assert record["environment"]["processes"] == 2
    return record["metrics"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start_node(job: Job, node: int, port: int) -> "subprocess.Popen[str]":
    """What the README has a node start, of two with one process each."""
    place = ["--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1", "--master-port", str(port)]
    address = ["--master-addr", "127.0.0.1", "--local-addr", f"127.0.0.{node + 1}"]
    command = ["-m", "torch.distributed.run", *place, *address, "-m", "mcar_lib", "train", *job.options, *EPOCHS]
    return subprocess.Popen(
        [sys.executable, *command],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_on_two_nodes(job: Job) -> list[Done]:
    port = free_port()
    nodes = [start_node(job, node, port) for node in range(2)]
    return [ended(node) for node in nodes]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs a second loopback address")
def test_two_nodes_make_the_numbers_of_two_processes_on_one(tmp_path: Path) -> None:
    one, two = make_job(tmp_path / "one"), make_job(tmp_path / "two")
    together = one.train(*EPOCHS)
    assert together.code == 0, together.err
    first, second = train_on_two_nodes(two)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "record: " in first.out
    assert "record: " not in second.out
    assert numbers(two) == numbers(one)
