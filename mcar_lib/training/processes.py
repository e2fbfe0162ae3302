"""The processes that train one run together, as torchrun starts them; one, the main process, decides and writes.

Where torchrun did not start this process it is the main process, alone: no process group is made, nothing waits.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast, broadcast_object_list, gather_object
from torch import nn

from mcar_lib.errors import ConfigError, MCARError

T = TypeVar("T")

COMMANDS = ("train", "evaluate")  # the commands that several processes can share
ALIKE = "raised in every process; the main process tells it"


def started_by_torchrun() -> bool:
    """Whether torchrun (or accelerate launch) started this process, be it for one process or for many."""
    return "LOCAL_RANK" in os.environ


def num_processes() -> int:
    return _state().num_processes if started_by_torchrun() else 1


def rank() -> int:
    """This process's number; 0 is the main process."""
    return _state().process_index if started_by_torchrun() else 0


def is_main() -> bool:
    return rank() == 0


def _state() -> PartialState:
    # Without a GPU accelerate would let every process train by itself, unless it is told to use the CPU. The others
    # wait long while the main process checks data or waits for another job's lock.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=1))


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


def broadcast_buffers(model: nn.Module) -> None:
    """Gives every process the main process's buffers: the running statistics of batch normalisation."""
    if num_processes() > 1:
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
        yield
    _state().destroy_process_group()


def tells(error: MCARError) -> bool:
    """Whether this process should print an error: the others need not repeat what the main process says. They have the
    same command line, so they raise every ConfigError alike."""
    return is_main() or not (isinstance(error, ConfigError) or ALIKE in getattr(error, "__notes__", ()))
