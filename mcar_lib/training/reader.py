"""Batches of photos, read ahead by worker processes, so that what trains on them need not wait.

What is read depends on the task alone (an epoch, indices), never on who reads it or when: any number of workers gives
the same bits. Batches come through shared memory, or through files where there is too little of it.
"""

import contextlib
import os
import shutil
import signal
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data._utils import signal_handling

from mcar_lib.errors import MCARError, TrainingError
from mcar_lib.progress import say
from mcar_lib.training import processes
from mcar_lib.training.stopping import NAMES

Batch = tuple[Tensor, ...]
AHEAD = 2  # batches that each worker reads ahead
MOST_WORKERS = 16
SHARED = Path("/dev/shm")  # where Linux keeps what processes share


def num_workers(asked: int | None, device: torch.device, decodes: bool) -> int:
    """How many processes read: those that were asked for, else one for each core that is left to this process, another
    core feeding the GPU. None where the cores train, and where photos need no decoding (see squares): this process then
    reads them faster than others could hand them over (benchmarks/reader.md)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if asked is None:
        spare = max(0, min(MOST_WORKERS, cores // processes.num_local() - 1))
        return spare if decodes and device.type != "cpu" else 0
    if asked * processes.num_local() > cores:
        say(f"{asked * processes.num_local()} workers read photos and there are {cores} cores: fewer are as fast")
    return asked


class Reader:
    """Reads batches in order: `read` makes one of a task.

    workers: processes that do so; 0: this one, when a batch is asked for. They go on from one `batches` to the next.
    num_bytes: of a batch, about. On a GPU batches are in pinned memory.
    """

    def __init__(self, read: Callable[[Any], Batch], workers: int, num_bytes: int, device: torch.device) -> None:
        self.tasks = _Tasks()
        # Each is in shared memory when it is read ahead, when it waits for its turn, and when it is used.
        room = (workers * AHEAD + 2) * num_bytes
        self.folder = tempfile.TemporaryDirectory(prefix="mcar-") if workers and not _has_room(room) else None
        with _quiet():
            self.loader: DataLoader[Any] = DataLoader(
                _Source(read, Path(self.folder.name) if self.folder else None),
                batch_size=None,
                sampler=self.tasks,
                num_workers=workers,
                pin_memory=device.type == "cuda",
                prefetch_factor=AHEAD if workers else None,
                persistent_workers=workers > 0,
                worker_init_fn=_start_worker,
                generator=torch.Generator(),  # else it would draw from torch's own
            )

    def close(self) -> None:
        """Ends the workers."""
        iterator: Any = getattr(self.loader, "_iterator", None)  # of persistent workers
        if iterator is not None and not all(worker.is_alive() for worker in iterator._workers):
            _abandon(iterator)
        del self.loader
        if self.folder:
            self.folder.cleanup()

    def batches(self, tasks: Sequence[object]) -> Iterator[Batch]:
        """The batch of each task. Raises the MCARError of a photo that cannot be read, TrainingError where a worker was
        lost."""
        self.tasks.of_now = tasks
        with _quiet():
            found = iter(self.loader)
        with lost_worker_told():
            for batch in found:
                if isinstance(batch, MCARError):
                    raise batch
                yield _taken(batch) if isinstance(batch, Path) else batch


@contextlib.contextmanager
def lost_worker_told() -> Iterator[None]:
    """TrainingError in place of what torch raises, whatever is done at that moment, when a worker was lost."""
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise TrainingError(
            "a process that reads photos was lost (out of memory, or killed); the same command goes on from the last "
            "checkpoint; --workers 0 reads without such processes"
        ) from error


def _abandon(iterator: Any) -> None:
    """Ends the workers of an iterator that has lost one in place of torch's own clean-up (names of torch 2.11 to 2.14),
    which would wait for ever where a lock was held at that moment."""
    iterator._shutdown = True
    if iterator._worker_pids_set:
        signal_handling._remove_worker_pids(id(iterator))
        iterator._worker_pids_set = False
    for worker, queue in zip(iterator._workers, iterator._index_queues, strict=True):
        worker.kill()
        worker.join()
        queue.cancel_join_thread()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of too many workers, which num_workers has told of, and of a fork with threads, which the
    workers do not use."""
    with warnings.catch_warnings():
        for message in ("This DataLoader will create", "This process .* is multi-threaded"):
            warnings.filterwarnings("ignore", message=message)
        yield


class _Tasks:
    """What the loader is to read: set anew each time."""

    of_now: Sequence[object] = ()

    def __iter__(self) -> Iterator[object]:
        return iter(self.of_now)

    def __len__(self) -> int:
        return len(self.of_now)


class _Source(Dataset[Any]):
    """What the workers do. An error of this project comes back as it is: torch would wrap it into a traceback."""

    def __init__(self, read: Callable[[Any], Any], folder: Path | None) -> None:
        self.read, self.folder = read, folder

    def __getitem__(self, task: Any) -> Any:
        try:
            batch = self.read(task)
        except MCARError as error:
            return error
        if self.folder is None:
            return batch
        number, path = tempfile.mkstemp(dir=self.folder)
        with os.fdopen(number, "wb") as stream:
            torch.save(batch, stream)
        return Path(path)


def _taken(path: Path) -> Any:
    batch = torch.load(path, weights_only=True)
    path.unlink()
    return batch


def _has_room(needed: int) -> bool:
    """Whether batches can wait in shared memory, and a line where they cannot; a system without SHARED has another
    kind."""
    if not SHARED.is_dir() or (free := shutil.disk_usage(SHARED).free) >= 2 * needed:
        return True
    say(
        f"{SHARED} has {free / 1e6:.0f} MB free and {2 * needed / 1e6:.0f} are wanted for batches of photos: workers "
        f"hand them over in files below {tempfile.gettempdir()} (in a container, --shm-size gives more)"
    )
    return False


def _start_worker(_: int) -> None:
    """A worker ends with its loader; signals, which whole groups of processes get, are the main process's to handle."""
    for name in NAMES:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
