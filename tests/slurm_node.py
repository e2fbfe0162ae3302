"""Runs a grid on a real Slurm of one node, stops one of its jobs, and holds all numbers against those of one process.

    sudo .venv/bin/python tests/slurm_node.py [--keep]

For a Debian machine that can spare it, as root: installs slurm-wlm and munge where they are missing, and starts munged,
slurmctld and slurmd on the loopback address with a configuration of its own in a temporary folder; an installed Slurm
that is in use is left alone. Three runs go to it by `mcar grid --on slurm --wait`; one that trains is told to make room
by the signal that comes before a time limit, another by SIGTERM alone. Takes some minutes. Ends the daemons, prints
PASS or FAIL, and exits with 0 or 1.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"slurm-wlm": "slurmctld", "munge": "munged"}
PROFILE = """
name = "slurm"
title = "slurm"
seeds = [0]
bootstrap_resamples = 20
threads = 1
[run]
dataset = "scenes"
data_options = { num_train = 48, num_test = 16, side = 64, seed = 3 }
backbone = "mobilenet_v2"
weights = "none"
image_size = 32
num_regions = 2
epochs = 10
batch_size = 8
learning_rate = 0.05
schedule = "onecycle"
jitter = 0.0
[rows.first]
[rows.second]
seed = 1
[rows.third]
local_stream = false
"""
CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
KillWait=30
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmctldPort={port}
SlurmdPort={other_port}
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", action="store_true", help="keep the temporary folder, with all logs")
    keep = parser.parse_args().keep
    if os.geteuid() != 0:
        sys.exit("this starts daemons: run it as root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the daemons end, too
    install()
    folder = Path(tempfile.mkdtemp(prefix="slurm-node-"))
    (folder / "slurm.toml").write_text(PROFILE, encoding="utf-8")
    try:
        alone = train_alone(folder)
        with slurm(folder / "slurm"):
            differences = train_on_slurm(folder, alone)
    except (RuntimeError, subprocess.SubprocessError) as error:
        differences = [str(error)]
    for line in differences:
        print(line)
    if keep or differences:
        print(f"logs: {folder}")
    else:
        shutil.rmtree(folder)
    print("FAIL" if differences else "PASS")
    return int(bool(differences))


def install() -> None:
    missing = [package for package, program in PACKAGES.items() if not shutil.which(program)]
    if missing:
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for command in (["update"], ["install", "--yes", "--no-install-recommends", *missing]):
            subprocess.run(["apt-get", "--quiet", *command], check=True, env=environment)


def train_alone(folder: Path) -> dict[str, str]:
    """Metrics by label of the run, from one process."""
    print("in one process", flush=True)
    mcar(folder, "alone").wait()
    return metrics(folder / "alone")


def train_on_slurm(folder: Path, alone: dict[str, str]) -> list[str]:
    """What is not as it should be once the grid has come to its end."""
    print("on Slurm", flush=True)
    started = time.monotonic()
    grid = mcar(folder, "together", "--on", "slurm", "--wait", "--gpus", "0", "--memory", "1", "--hours", "1")
    logs = folder / "together" / "artifacts" / "slurm"
    until("three jobs", lambda: (logs / "jobs.json").exists() or grid.poll() is not None)
    jobs = {name.rpartition("-")[0]: job for name, job in json.loads((logs / "jobs.json").read_text()).items()}
    stopped = sorted(job for label, job in jobs.items() if "global" not in label)
    for job, number in zip(stopped, ("USR2", "TERM"), strict=True):
        log = logs / f"{job}_0_log.out"
        until(f"an epoch of job {job}", lambda log=log: "epoch 2/" in text(log))
        subprocess.run(["scancel", f"--signal={number}", job], check=True)
        until(f"job {job} queued again", lambda job=job: restarts(job) == 1, 180)
        subprocess.run(["scontrol", "update", f"JobId={job}", "StartTime=now"], check=True)  # not in two minutes
        print(f"job {job}: SIG{number}, queued again", flush=True)
    try:
        code = grid.wait(timeout=900)
    except subprocess.TimeoutExpired:
        grid.terminate()
        code = -1
    print(f"{time.monotonic() - started:.0f} s", flush=True)
    together = metrics(folder / "together")
    found = [f"mcar grid has ended with {code}"] if code else []
    found += [f"{label}: not as in one process" for label in alone if together.get(label) != alone[label]]
    found += [f"{len(alone)} records, not three"] if len(alone) != 3 else []
    for job in stopped:
        if text(logs / f"{job}_0_log.out").count("epoch 1/") != 1:
            found.append(f"job {job}: its second start has begun anew")
    return found


def mcar(folder: Path, name: str, *options: str) -> "subprocess.Popen[bytes]":
    """mcar grid on the profile, with results and artifacts below a folder of this name."""
    places = ["--results", str(folder / name / "results"), "--artifacts", str(folder / name / "artifacts")]
    command = [sys.executable, "-m", "mcar_lib", "grid", "--profile", str(folder / "slurm.toml"), *places, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, cwd=folder, env=environment)


def metrics(place: Path) -> dict[str, str]:
    records = [json.loads(path.read_text()) for path in (place / "results" / "slurm" / "runs").glob("*.json")]
    return {record["label"]: json.dumps(record["metrics"]) for record in records}


def restarts(job: str) -> int:
    """How often Slurm has queued a job again, once it waits or runs anew."""
    shown = subprocess.run(["scontrol", "--oneliner", "show", "job", job], capture_output=True, text=True).stdout
    values = dict(part.split("=", 1) for part in shown.split() if "=" in part)
    return int(values["Restarts"]) if values.get("JobState") in ("PENDING", "RUNNING") else 0


def text(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def until(what: str, condition: Callable[[], Any], seconds: float = 120) -> None:
    ends = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > ends:
            raise RuntimeError(f"{what}: not within {seconds:.0f} s")
        time.sleep(0.5)


@contextlib.contextmanager
def slurm(folder: Path) -> Iterator[None]:
    """A Slurm of this one node, whose files all lie in the folder; its commands find it by SLURM_CONF."""
    for name in ("state", "spool"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    folder.parent.chmod(0o755)
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    host, ports = socket.gethostname().partition(".")[0], free_ports(2)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20 * 9 // 10
    values = {"host": host, "folder": folder, "port": ports[0], "other_port": ports[1]}
    configuration = folder / "slurm.conf"
    configuration.write_text(CONFIGURATION.format(cpus=os.cpu_count(), memory=memory, **values), encoding="utf-8")
    os.environ["SLURM_CONF"] = str(configuration)
    munged = ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", f"--key-file={key}"]
    munged += [f"--pid-file={folder}/munged.pid", f"--log-file={folder}/munged.log", f"--seed-file={folder}/munge.seed"]
    daemons = [
        munged,
        ["slurmctld", "-D", "-c", "-f", str(configuration)],
        ["slurmd", "-D", "-N", host, "-f", str(configuration)],
    ]
    running: list[subprocess.Popen[bytes]] = []
    try:
        with (folder / "daemons.log").open("wb") as log:
            for command in daemons:
                running.append(subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True))
                time.sleep(1)
        until("a node that is idle", lambda: b"idle" in subprocess.run(["sinfo", "-h"], capture_output=True).stdout, 60)
        yield
    finally:
        subprocess.run(["scancel", f"--user={os.getuid()}"], capture_output=True)
        with contextlib.suppress(RuntimeError):
            until("the end of all jobs", lambda: not subprocess.run(["squeue", "-h"], capture_output=True).stdout, 60)
        for daemon in reversed(running):
            daemon.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=30)
            daemon.kill()


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


if __name__ == "__main__":
    sys.exit(main())
