"""The processes that train one run together, as torchrun starts them; one, the main process, decides and writes.

Where torchrun did not start this process it is the main process, alone: no process group is made, nothing waits.
"""

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import nn

from mcar_lib.errors import ConfigError, MCARError, TrainingError

T = TypeVar("T")

COMMANDS = ("train", "evaluate")  # the commands that several processes can share
ALIKE = "raised in every process; the main process tells it"
TOLD = "another process tells it"
GOES_ON = "the same command goes on from here"
SECONDS_BETWEEN_LOOKS, SECONDS_BETWEEN_BEATS, LOST_SECONDS = 1.0, 5.0, 45.0


def started_by_torchrun() -> bool:
    """Whether torchrun (or accelerate launch) started this process, be it for one process or for many."""
    return "LOCAL_RANK" in os.environ


def num_processes() -> int:
    return _state().num_processes if started_by_torchrun() else 1


def rank() -> int:
    """This process's number; 0 is the main process."""
    return _state().process_index if started_by_torchrun() else 0


def num_local() -> int:
    """How many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or 1) if started_by_torchrun() else 1


def is_main() -> bool:
    return rank() == 0


def _state() -> PartialState:
    _join()
    return PartialState()


@functools.cache
def _join() -> "_Watch":
    """Makes the process group, and watches that none of it is lost."""
    _check_started()
    forget_accelerate_settings()
    # Without a GPU accelerate would let every process train by itself, unless it is told to use the CPU. The others
    # wait long while the main process checks data or waits for another job's lock.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))
    return _Watch(state.process_index, state.num_processes)


def _check_started() -> None:
    """Raises ConfigError where LOCAL_RANK is there, but not all that torchrun sets beside it."""
    rank, local, size = (os.environ.get(name, "") for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    numbers = {"RANK": rank, "LOCAL_RANK": local, "WORLD_SIZE": size, "MASTER_PORT": os.environ.get("MASTER_PORT", "")}
    odd = [f"{name} is {value!r}" for name, value in numbers.items() if not (value.isascii() and value.isdigit())]
    if not odd and int(rank) >= int(size):
        odd = [f"RANK is {rank} of WORLD_SIZE {size}"]
    odd += [] if os.environ.get("MASTER_ADDR") else ["MASTER_ADDR is not set"]
    if odd:
        raise ConfigError(
            f"LOCAL_RANK in the environment says that torchrun started this process, but {', '.join(odd)}; "
            "unset LOCAL_RANK, or start it with torchrun"
        )


def forget_accelerate_settings() -> None:
    """Takes accelerate's settings out of the environment: the recipe alone says how a run computes, not what accelerate
    launch or another job has left there (accumulated gradients, precisions, compilers, devices)."""
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]


class _Watch:
    """Ends this process when torchrun or another process of the group is gone: a collective would wait on for a day.

    Each process counts up a number of its own in torchrun's store; one that stands still is lost.
    """

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.parent, self.ended = rank, os.getppid(), threading.Event()
        self.seen = dict.fromkeys(range(count), time.monotonic())
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = torch.distributed.TCPStore(address, port, is_master=False, wait_for_workers=False)
        for task in (self.beat, self.look):
            threading.Thread(target=task, daemon=True).start()

    def beat(self) -> None:
        counted = dict.fromkeys(self.seen, 0)
        with contextlib.suppress(RuntimeError):  # without a store nobody is seen any more
            while not self.ended.is_set():
                for each, before in counted.items():
                    counted[each] = self.store.add(f"mcar/beats/{each}", int(each == self.rank))
                    if counted[each] != before:
                        self.seen[each] = time.monotonic()
                self.ended.wait(SECONDS_BETWEEN_BEATS)

    def look(self) -> None:
        while not self.ended.wait(SECONDS_BETWEEN_LOOKS):
            lost = [each for each, when in self.seen.items() if time.monotonic() - when > LOST_SECONDS]
            left = [each for each in self.seen if each not in lost] or [self.rank]
            if os.getppid() != self.parent:
                self.end("the process that started it is gone", self.rank == 0)
            elif lost:
                self.end(f"process {lost[0]} is not heard of any more", self.rank == left[0])

    def end(self, reason: str, tell: bool) -> None:
        if tell:
            sys.stderr.write(f"error: this run cannot go on: {reason}; {GOES_ON}\n")
            sys.stderr.flush()
        os._exit(1)  # the main thread may be in a collective, which nothing interrupts

    def is_first(self) -> bool:
        """Whether no other process has asked this."""
        try:
            return self.store.add("mcar/told", 1) == 1
        except RuntimeError:
            return self.rank == 0


def broadcast_from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, which alone calls it, in every process; likewise an MCARError of it.

    What it returns is pickled. All processes must come here, so `make` must not.
    """
    if num_processes() == 1:
        return make()
    box: list[Any] = [None, None]
    if is_main():
        try:
            box[0] = make()
        except MCARError as error:
            error.add_note(ALIKE)
            box[1] = error
    made, failed = broadcast_object_list(box)
    if failed is not None:
        raise failed
    found: T = made
    return found


def main_first(make: Callable[[], T]) -> T:
    """What `make` returns in each process; the others call it when the main process is done with it.

    An MCARError of the main process is raised in all, and the others do not call it.
    """
    made: list[T] = []
    broadcast_from_main(lambda: made.append(make()))
    return made[0] if made else make()


def gather(items: list[T]) -> list[T]:
    """The items of all processes, those of the main process first. They are pickled."""
    return items if num_processes() == 1 else gather_object(items)


def broadcast_buffers(model: nn.Module | None) -> None:
    """Gives every process the main process's buffers: the running statistics of batch normalisation."""
    if model is not None and num_processes() > 1:
        broadcast(list(model.buffers()))


def shard_size(size: int, batch_size: int) -> int:
    """How many of a batch's `size` images are this process's: its shard of batch_size / num_processes() images, or less
    of a batch that is not full."""
    shard = batch_size // num_processes()
    return min(max(size - rank() * shard, 0), shard)


def check_batch(batch_size: int, statistics_batch: int = 0) -> None:
    """Raises ConfigError unless the processes get equal shards of a batch, and whole groups of statistics_batch."""
    count = num_processes()
    shard, rest = divmod(batch_size, count)
    if rest:
        raise ConfigError(
            f"batch_size is {batch_size}, which {count} processes cannot share equally; "
            "make it a multiple of their number, or start another number of processes"
        )
    if count > 1 and statistics_batch and shard % statistics_batch:
        raise ConfigError(
            f"statistics_batch is {statistics_batch}, but each of {count} processes has {shard} images of a batch; "
            "make it a divisor of that, or 0 for all images of a process"
        )


def check_command(name: str | None) -> None:
    """Raises ConfigError for a command that several processes cannot share."""
    if name not in COMMANDS and num_processes() > 1:
        raise ConfigError(f"mcar {name} runs in one process: start it without torchrun, which is for training")


@contextlib.contextmanager
def only_main_prints() -> Iterator[None]:
    """Meanwhile only the main process writes to standard output; at a good end all processes leave their group."""
    if not started_by_torchrun():
        yield
        return
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(sys.stdout if is_main() else nowhere):
        try:
            yield
        except RuntimeError as error:
            if not _is_of_the_network(error):
                raise
            lost = TrainingError(f"a process of this run was lost ({_short(error)}); {GOES_ON}")
            if not is_first_to_tell():
                lost.add_note(TOLD)
            raise lost from error
    _join().ended.set()
    _state().destroy_process_group()


def _is_of_the_network(error: RuntimeError) -> bool:
    """Gloo's errors have no type of their own, but name the file that they come from."""
    return isinstance(error, torch.distributed.DistError) or "gloo/" in str(error)


def _short(error: RuntimeError) -> str:
    """[/far/away/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:3213 -> its own words."""
    return str(error).splitlines()[0].rpartition("] ")[2].partition(" [")[0][:200] or "the connection ended"


def is_first_to_tell() -> bool:
    """Whether no other process of this run has asked this: what befalls all of them is told once."""
    return not started_by_torchrun() or _join().is_first()


def tells(error: MCARError) -> bool:
    """Whether this process should print an error: the others need not repeat what the main process says. They have the
    same command line, so they raise every ConfigError alike."""
    notes = getattr(error, "__notes__", ())
    if TOLD in notes:
        return False
    try:
        return is_main() or not (isinstance(error, ConfigError) or ALIKE in notes)
    except ConfigError:  # of _check_started: there are no others
        return True
