"""Grids on a Slurm cluster: submitit hands it the runs that have no record, as one job array, one run a job.

A job starts the command that `mcar plan` prints, so a run is the same wherever it is started; what becomes of it is in
the records and in what is noted here, as many a cluster keeps no accounts of ended jobs (sacct).

A run that several nodes train together is not a grid; it is torchrun's, which the nodes start alike, say in a job with
--nodes=2 --ntasks-per-node=1 (HOST is the first node):

    srun sh -c 'torchrun --nnodes 2 --node-rank $SLURM_NODEID --nproc-per-node 4 --master-addr HOST \\
        --master-port 29500 -m mcar_lib train --profile paper --row voc2007-resnet101-448 --data-root DIR'
"""

import contextlib
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mcar_lib.cluster_job import ClusterJob
from mcar_lib.errors import ConfigError, MCARError, WeightsError
from mcar_lib.files import OTHER_ARTIFACTS, content_id, made_folder, read_json, write_json
from mcar_lib.progress import say
from mcar_lib.runs.outcome import alone
from mcar_lib.runs.plan import NamedRun
from mcar_lib.runs.records import Failure, Record
from mcar_lib.runs.runs import Runs

NO_LIMIT = 10**6  # submitit gives a job up after 3 time limits, and takes every preemption of a short job for one
SECONDS_TO_STOP = 120  # between submitit's signal and the time limit: for the end of a step, and a checkpoint
SECONDS_BETWEEN_LOOKS = 5.0


@dataclass(frozen=True)
class Resources:
    """What each job asks for; several GPUs train one run together. memory: GiB. cpus: None: what the cluster gives.
    partition: None: the cluster's own choice."""

    gpus: int = 1
    memory: float = 64
    hours: float = 24
    cpus: int | None = None
    partition: str | None = None


def submit(
    runs: Runs, asked: Sequence[NamedRun], profile: str, resources: Resources, cluster: str = "slurm"
) -> dict[str, str]:
    """The ids of the jobs by name of the run: one is started for each run that has neither a record nor a job that
    waits or runs. Says a line for each run.

    profile: as commands are to name it. cluster: submitit's name of it; on "local" all jobs start at once, here.
    Raises ConfigError where there is no Slurm, or it does not take the jobs.
    """
    import submitit

    if cluster == "slurm" and not (shutil.which("sbatch") and shutil.which("srun") and shutil.which("squeue")):
        raise ConfigError("no Slurm here: sbatch, srun, squeue are not found; give this command on a login node")
    missing = [each for each in asked if not _is_done(runs, each)]
    folder, noted = made_folder(_folder(runs), OTHER_ARTIFACTS), _folder(runs) / "jobs.json"
    with alone(folder / "jobs.lock", "hands runs to the cluster"):
        jobs: dict[str, Any] = read_json(noted) if noted.exists() else {}
        alive = _alive(folder, [jobs[_key(runs, each)] for each in missing if _key(runs, each) in jobs], cluster)
        new = [each for each in missing if jobs.get(_key(runs, each)) not in alive]
        if new:
            executor = submitit.AutoExecutor(
                folder, cluster, slurm_max_num_timeout=NO_LIMIT, local_max_num_timeout=NO_LIMIT
            )
            executor.update_parameters(name=f"mcar-{runs.profile.name}", **_parameters(resources, cluster))
            commands = [_command(runs, each, profile, resources.gpus) for each in new]
            try:
                started = executor.map_array(ClusterJob(), commands)
            except (RuntimeError, OSError) as error:  # of submitit, with what sbatch wrote
                raise ConfigError(f"Slurm does not take these jobs: {' '.join(str(error).split())}") from error
            jobs |= {_key(runs, each): job.job_id for each, job in zip(new, started, strict=True)}
            write_json(noted, jobs)
            for each in new:
                with contextlib.suppress(MCARError):  # which its job will tell
                    runs.mark_waiting(each.config, jobs[_key(runs, each)])
    for each in asked:
        job = f"job {jobs[_key(runs, each)]}" if each in missing else "has a record"
        say(f"{each.name}: {job}{'' if each in new or each not in missing else ', which still waits or runs'}")
    return {each.name: jobs[_key(runs, each)] for each in missing}


def wait(
    runs: Runs, asked: Sequence[NamedRun], jobs: Mapping[str, str], cluster: str = "slurm"
) -> list[Record | Failure]:
    """What came of each run, in the order asked for, once none of the jobs waits or runs any more."""
    while _alive(_folder(runs), jobs.values(), cluster):
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return [_outcome(runs, each, jobs.get(each.name)) for each in asked]


def log_of(runs: Runs, job: str) -> Path:
    """What a job's command has written to its error output; its standard output is beside it (.out)."""
    return _folder(runs) / f"{job}_0_log.err"


def _folder(runs: Runs) -> Path:
    return runs.artifacts / "slurm"


def _key(runs: Runs, run: NamedRun) -> str:
    asked = {"records": str(runs.local_folder), "config": run.config.model_dump(mode="json")}
    return f"{run.config.label}-{content_id(asked)}"


def _is_done(runs: Runs, run: NamedRun) -> bool:
    with contextlib.suppress(WeightsError):  # the failure of this run alone, once its job has started
        return runs.find(run.config) is not None
    return False


def _command(runs: Runs, run: NamedRun, profile: str, gpus: int) -> list[str]:
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus), "-m"] if gpus > 1 else []
    named = str(Path(profile).expanduser().resolve()) if profile.endswith(".toml") else profile
    folders = {"--results": runs.local, "--artifacts": runs.artifacts, "--data-root": runs.splits.data_root}
    places = [part for option, folder in folders.items() if folder for part in (option, str(folder))]
    return [sys.executable, "-m", *several, "mcar_lib", "train", "--profile", named, *run.options, *places]


def _parameters(resources: Resources, cluster: str) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "timeout_min": math.ceil(60 * resources.hours),
        "mem_gb": resources.memory,
        "gpus_per_node": resources.gpus or None,
        "cpus_per_task": resources.cpus,
    }
    if cluster == "slurm":
        cpus = {"srun_args": ["--cpus-per-task", str(resources.cpus)]} if resources.cpus else {}  # srun does not ask
        own: dict[str, Any] = {"partition": resources.partition, "signal_delay_s": SECONDS_TO_STOP, **cpus}
        asked |= {f"slurm_{name}": value for name, value in own.items()}
        asked["slurm_additional_parameters"] = {"requeue": True}
    return asked


def _alive(folder: Path, jobs: Iterable[str], cluster: str) -> Collection[str]:
    """Those of the jobs that wait or run."""
    jobs = set(jobs)
    if not jobs or cluster != "slurm":
        return {job for job in jobs if not _result(folder, job).exists()}
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    except (OSError, subprocess.SubprocessError) as error:
        reason = (getattr(error, "stderr", None) or str(error)).strip()
        raise MCARError(f"Slurm does not say which jobs run ({reason}); give the same command again later") from error
    return jobs & set(asked.stdout.split())


def _result(folder: Path, job: str) -> Path:
    from submitit.core.utils import JobPaths

    return JobPaths(folder, job).result_pickle


def _outcome(runs: Runs, run: NamedRun, job: str | None) -> Record | Failure:
    try:
        found = runs.find(run.config)
    except WeightsError as error:
        return Failure(run.config, f"WeightsError: {error}")
    if found is not None:
        return found
    return Failure(run.config, _why(_folder(runs), job) + (f" ({log_of(runs, job)})" if job else ""))


def _why(folder: Path, job: str | None) -> str:
    """The last line of what a job that failed has left."""
    from submitit.core.utils import pickle_load

    if job is None or not _result(folder, job).exists():
        return "its job ended without a word (cancelled, out of memory?); the same command goes on from its checkpoint"
    ended, told = pickle_load(_result(folder, job))
    return str(told).strip().splitlines()[-1] if ended == "error" else "its job ended without a record"
