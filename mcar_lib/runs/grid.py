"""Grids of runs: those that have no record yet are trained side by side, each in a process of its own.

A run of a profile with threads = 1 leaves the other cores free, so a grid takes as many runs at once as there are
cores and as the free memory holds, and its numbers do not depend on how many those are. The notebooks of `make
reproduce` and `mcar grid` come here; a grid that a Slurm cluster trains goes through cluster.
"""

import contextlib
import dataclasses
import functools
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

import torch

from mcar_lib.errors import ConfigError, MCARError, Stopped, WeightsError
from mcar_lib.progress import format_seconds, say
from mcar_lib.runs.config import Profile, RunConfig
from mcar_lib.runs.memory import GIB, estimated_memory, free_memory, side_by_side
from mcar_lib.runs.records import Failure, Record
from mcar_lib.runs.runs import Runs
from mcar_lib.status import StatusFile
from mcar_lib.training import Execution
from mcar_lib.training.stopping import stop_request

MAX_AT_ONCE = 8  # unless more are asked for
JOBS = "MCAR_JOBS"  # how many runs at once, where notebooks train them: they have no options
SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_TO_STOP = 60.0  # the step that a run is in, and its checkpoint
STOPPED = "stopped; the same command goes on from its checkpoint"
RESOURCE_TRACKER = "resource_tracker"  # joblib's and Python's own processes, which see to it that nothing is left over


def find_or_train(runs: Runs, configs: Sequence[RunConfig], at_once: int | None = None) -> list[Record | Failure]:
    """The record of each run in the order asked for; those that have none are trained, the longest first.

    A run that fails does not keep the others from being trained: it is told, and a Failure stands in its place.
    at_once: runs side by side, by default what MCAR_JOBS says, else as many as the cores allow; fewer where the memory
    that is free does not hold so many, which is told.
    """
    outcomes: dict[str, Record | Failure] = {}
    for config in configs:
        with contextlib.suppress(WeightsError):  # a Failure of this run alone, once it is to be trained
            if (record := runs.find(config)) is not None:
                outcomes[_key(config)] = record
    missing = {_key(config): config for config in configs if _key(config) not in outcomes}
    marked = dict[str, StatusFile]()
    for key, config in missing.items():
        with contextlib.suppress(MCARError):  # likewise
            marked[key] = runs.mark_waiting(config)
    asked = at_once or asked_at_once(runs.profile) or runs_at_once(runs.profile)
    at_once = _within_memory(runs, list(missing.values()), min(asked, max(len(missing), 1)))
    started, waiting = time.monotonic(), sorted(missing.values(), key=relative_cost, reverse=True)
    for done, (config, error) in enumerate(_train_all(runs, waiting, at_once), start=1):
        record = runs.find(config) if error is None else None
        outcome = record or Failure(config, error or "the run ended without a record")
        outcomes[_key(config)] = outcome
        if isinstance(outcome, Failure) and _key(config) in marked:
            marked[_key(config)].give_up(outcome.error)
        seconds = format_seconds(time.monotonic() - started)
        say(f"run {done} of {len(missing)}, {seconds} so far: {config.label}: {outcome_told(outcome)}")
    return [outcomes[_key(config)] for config in configs]


def runs_at_once(profile: Profile) -> int:
    """How many runs of a profile the cores of this machine can train side by side; on a GPU, one."""
    if torch.cuda.is_available() or not profile.threads:
        return 1
    import joblib  # it knows the limits of containers

    return max(1, min(MAX_AT_ONCE, joblib.cpu_count() // profile.threads))


def asked_at_once(profile: Profile) -> int | None:
    """What MCAR_JOBS in the environment says, None where it says nothing; one where side by side would change numbers:
    on a CPU, runs of a profile that leaves the number of their threads open."""
    if not (text := os.environ.get(JOBS)):
        return None
    if not text.strip().isdecimal() or int(text) < 1:
        raise ConfigError(f"{JOBS} is {text!r} in the environment; give a number of runs, 1 or more")
    if int(text) > 1 and not profile.threads and not torch.cuda.is_available():
        say(f"profile {profile.name} has no number of threads, on which sums depend: its runs are trained one by one")
        return 1
    return int(text)


def _within_memory(runs: Runs, configs: Sequence[RunConfig], at_once: int) -> int:
    """That many, or as many as the free memory holds; says so where these are fewer."""
    if at_once == 1:
        return 1
    needed = sorted((_memory(runs, config) for config in configs), reverse=True)
    free = free_memory()
    fitting = min(at_once, side_by_side(needed, free))
    if fitting < at_once:
        wanted, there = (f"{each / GIB:.0f}" for each in (sum(needed[:at_once]), free))
        say(f"{at_once} runs at once would take about {wanted} GiB, and {there} are free: {fitting} at once")
    return fitting


def _memory(runs: Runs, config: RunConfig) -> int:
    """About what a run takes, in bytes; 0 where it cannot be told, or the run will not start."""
    try:
        return estimated_memory(config, runs.data(config).num_images)
    except (MCARError, RuntimeError, NotImplementedError):  # the last two: tensors without content cannot do everything
        return 0


def relative_cost(config: RunConfig) -> float:
    """Pixels that a run sends through its backbone for each training image: enough to put the longest first."""
    inputs = 1 + config.num_regions if config.local_stream else 1
    return config.image_size**2 * inputs * config.epochs


def outcome_told(outcome: Record | Failure) -> str:
    """How a run came out, in a few words."""
    if isinstance(outcome, Failure):
        return f"failed: {outcome.error}"
    return f"mAP {100 * outcome.map():.1f}" if outcome.is_scored else "trained, not scored"


def _train_all(runs: Runs, configs: Sequence[RunConfig], at_once: int) -> Iterator[tuple[RunConfig, str | None]]:
    """Each run with what went wrong, or None, as they end."""
    if at_once == 1:
        for config in configs:
            yield config, _attempt(runs, config)
        return
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    say(f"{len(configs)} runs to train, {at_once} at once")
    ready = []
    for config in configs:
        try:
            runs.data(config)  # scenes are drawn and files checked once, not by every process
            ready.append(config)
        except MCARError as problem:
            yield config, f"{type(problem).__name__}: {problem}"
    # The cores train: a run that is one of many reads its photos itself, unless it is told otherwise.
    execution = dataclasses.replace(runs.execution, workers=runs.execution.workers or 0)
    place = (runs.profile, runs.results, runs.splits.data_root, runs.artifacts, execution, os.getpid())
    tasks = (joblib.delayed(_train_in_worker)(*place, index, config) for index, config in enumerate(ready))
    left = dict(enumerate(ready))
    try:
        with (
            stop_request(_tell_workers) as request,
            joblib.parallel_config("loky", inner_max_num_threads=runs.profile.threads or None),
        ):
            for index, error in joblib.Parallel(at_once, return_as="generator_unordered")(tasks):
                if error != STOPPED:
                    yield left.pop(index), error
            if request.signal:
                raise Stopped(request.signal, resumable=True)
    except TerminatedWorkerError:
        for config in left.values():
            yield config, "its process was killed (out of memory?); the same command goes on from its last checkpoint"


def _attempt(runs: Runs, config: RunConfig) -> str | None:
    try:
        runs.run(config)
    except MCARError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:  # out of memory, say; the other runs are still worth their time
        traceback.print_exc()
        return f"{type(error).__name__}: {error}"
    return None


def _train_in_worker(
    profile: Profile,
    results: Path,
    data_root: Path | None,
    artifacts: Path,
    execution: Execution,
    parent: int,
    index: int,
    config: RunConfig,
) -> tuple[int, str | None]:
    _end_with(parent)
    if _stopped.is_set():
        return index, STOPPED
    runs = _opened(profile.model_dump_json(), results, data_root, artifacts, execution)
    with contextlib.redirect_stdout(_Prefixed(sys.stdout, f"{config.label}: ")):
        try:
            return index, _attempt(runs, config)
        except Stopped:  # with a checkpoint
            _stopped.set()
            return index, STOPPED


@functools.lru_cache(maxsize=1)
def _opened(profile: str, results: Path, data_root: Path | None, artifacts: Path, execution: Execution) -> Runs:
    """One a process, so that images are read once for all runs that it trains."""
    return Runs(Profile.model_validate_json(profile), results, data_root, artifacts, execution=execution)


_stopped = threading.Event()  # in a worker: it was told to stop, and trains nothing more


@functools.cache
def _end_with(parent: int) -> None:
    """Lets this process be told to stop while it trains nothing, and ends it when the one that started it is gone,
    however it went: a run that it trains gets time for a checkpoint."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os.kill(os.getpid(), signal.SIGTERM)
        _stopped.wait(SECONDS_TO_STOP)
        os._exit(1)

    for each in (signal.SIGTERM, signal.SIGINT):
        signal.signal(each, lambda *_: _stopped.set())
    threading.Thread(target=watch, daemon=True).start()


def _tell_workers() -> None:
    """Sends SIGTERM to the workers: they end their runs with a checkpoint."""
    import psutil  # ipykernel brings it

    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if RESOURCE_TRACKER not in " ".join(child.cmdline()):
                child.terminate()


class _Prefixed:
    """Standard output whose lines say which run they are of."""

    def __init__(self, stream: TextIO, prefix: str) -> None:
        self.stream, self.prefix = stream, prefix

    def write(self, text: str) -> int:
        return self.stream.write(f"{self.prefix}{text}" if text.strip() else text)

    def flush(self) -> None:
        self.stream.flush()


def _key(config: RunConfig) -> str:
    return config.model_dump_json()
