"""Grids of runs: those that have no record yet are trained side by side, each in a process of its own.

A run of a profile with threads = 1 leaves the other cores free, so a grid takes as many runs at once as there are
cores, and its numbers do not depend on how many those are.
"""

import contextlib
import functools
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch

from mcar_lib.config import Profile, RunConfig
from mcar_lib.errors import MCARError
from mcar_lib.experiment import Record, Workspace, content_id, read_json, write_json
from mcar_lib.progress import format_seconds, say

MAX_AT_ONCE = 8  # each holds one to two GiB
SECONDS_BETWEEN_LOOKS = 1.0


@dataclass(frozen=True)
class Failure:
    """A run that failed, and why; a later attempt may succeed."""

    label: str
    error: str


def run_grid(workspace: Workspace, configs: Sequence[RunConfig], at_once: int | None = None) -> list[Record | Failure]:
    """The record of each run in the order asked for; those that have none are trained, the longest first.

    A run that fails does not keep the others from being trained: a Failure stands in its place, and a note of it in the
    profile's folder failures/ until it succeeds. at_once: runs side by side, by default as many as the cores allow.
    """
    found = {_key(config): workspace.find(config) for config in configs}
    missing = {_key(config): config for config in configs if found[_key(config)] is None}
    at_once = min(at_once or runs_at_once(workspace.profile), max(len(missing), 1))
    outcomes: dict[str, Record | Failure] = {key: record for key, record in found.items() if record is not None}
    started = time.monotonic()
    waiting = sorted(missing.values(), key=relative_cost, reverse=True)
    for config, error in _train_all(workspace, waiting, at_once):
        outcomes[_key(config)] = outcome = _note_outcome(workspace, config, error)
        done = sum(key in outcomes for key in missing)
        text = _told(outcome)
        seconds = format_seconds(time.monotonic() - started)
        say(f"run {done} of {len(missing)}, {seconds} so far: {config.label}: {text}")
    return [outcomes[_key(config)] for config in configs]


def runs_at_once(profile: Profile) -> int:
    """How many runs of a profile the cores of this machine can train side by side; on a GPU, one."""
    if torch.cuda.is_available() or not profile.threads:
        return 1
    import joblib  # it knows the limits of containers

    return max(1, min(MAX_AT_ONCE, joblib.cpu_count() // profile.threads))


def relative_cost(config: RunConfig) -> float:
    """Pixels that a run sends through its backbone for each training image: enough to put the longest first."""
    inputs = 1 + config.num_regions if config.local_stream else 1
    return config.image_size**2 * inputs * config.epochs


def read_failures(folder: Path) -> dict[str, str]:
    """What the last attempt said of each run, or test of one, that failed, by its name; of one results/<profile>."""
    return {path.stem: str(read_json(path)["error"]) for path in sorted((folder / "failures").glob("*.json"))}


def failure_name(config: RunConfig) -> str:
    """What the note of a run's failure is named: labels alone do not tell the lengths of runs apart."""
    return f"{config.label}-{content_id(config.model_dump(mode='json'))}"


def note_failure(folder: Path, name: str, error: str) -> None:
    """Keeps in results/<profile>/failures why something failed."""
    with contextlib.suppress(MCARError):  # a folder that cannot be written is itself the failure
        write_json(folder / "failures" / f"{name}.json", {"error": error})


def forget_failure(folder: Path, name: str) -> None:
    """Drops the note of an earlier failure."""
    (folder / "failures" / f"{name}.json").unlink(missing_ok=True)


def _told(outcome: Record | Failure) -> str:
    if isinstance(outcome, Failure):
        return f"failed: {outcome.error}"
    return f"mAP {100 * outcome.map():.1f}" if outcome.is_scored else "trained, not scored"


def _note_outcome(workspace: Workspace, config: RunConfig, error: str | None) -> Record | Failure:
    record = workspace.find(config) if error is None else None
    if record is not None:
        forget_failure(workspace.local_folder, failure_name(config))
        return record
    failure = Failure(config.label, error or "the run ended without a record")
    note_failure(workspace.local_folder, failure_name(config), failure.error)
    return failure


def _train_all(
    workspace: Workspace, configs: Sequence[RunConfig], at_once: int
) -> Iterator[tuple[RunConfig, str | None]]:
    """Each run with what went wrong, or None, as they end."""
    if at_once == 1:
        for config in configs:
            yield config, _attempt(workspace, config)
        return
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    say(f"{len(configs)} runs to train, {at_once} at once")
    for config in configs:
        workspace.data(config)  # scenes are drawn and files checked once, not by every process
    place = (workspace.profile, workspace.results, workspace.data_root, workspace.artifacts, os.getpid())
    tasks = (joblib.delayed(_train_in_worker)(*place, index, config) for index, config in enumerate(configs))
    left = dict(enumerate(configs))
    try:
        with joblib.parallel_config("loky", inner_max_num_threads=workspace.profile.threads):
            for index, error in joblib.Parallel(at_once, return_as="generator_unordered")(tasks):
                yield left.pop(index), error
    except TerminatedWorkerError:
        for config in left.values():
            yield config, "its process was killed (out of memory?); the same command goes on from its last epoch"


def _attempt(workspace: Workspace, config: RunConfig) -> str | None:
    try:
        workspace.run(config)
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
    parent: int,
    index: int,
    config: RunConfig,
) -> tuple[int, str | None]:
    _end_with(parent)
    workspace = _opened(profile.model_dump_json(), results, data_root, artifacts)
    with contextlib.redirect_stdout(_Prefixed(sys.stdout, f"{config.label}: ")):
        return index, _attempt(workspace, config)


@functools.lru_cache(maxsize=1)
def _opened(profile: str, results: Path, data_root: Path | None, artifacts: Path) -> Workspace:
    """One workspace a process, so that images are read once for all runs that it trains."""
    return Workspace(Profile.model_validate_json(profile), results, data_root, artifacts)


@functools.cache
def _end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone, however it went."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(SECONDS_BETWEEN_LOOKS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
