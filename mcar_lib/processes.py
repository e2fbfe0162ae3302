"""The processes that train one run together, as torchrun starts them; one, the main process, decides and writes.

Where torchrun did not start this process it is the main process, alone: no process group is made, nothing waits.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from mcar_lib.errors import ConfigError, MCARError

if TYPE_CHECKING:
    from accelerate import PartialState
    from torch import nn

T = TypeVar("T")

COMMANDS = ("train", "evaluate")  # the commands that several processes can share
LONGEST_WAIT = timedelta(days=1)  # the others wait while the main process checks data or waits for another job's lock
ALIKE = "raised in every process; the main process tells it"


def started_together() -> bool:
    """Whether torchrun (or accelerate launch) started this process, be it for one process or for many."""
    return "LOCAL_RANK" in os.environ


def count() -> int:
    return _state().num_processes if started_together() else 1


def index() -> int:
    """0 is the main process."""
    return _state().process_index if started_together() else 0


def is_main() -> bool:
    return index() == 0


@functools.cache
def _state() -> "PartialState":
    import torch
    from accelerate import PartialState

    # Without a GPU accelerate would let every process train by itself, unless it is told to use the CPU.
    return PartialState(cpu=not torch.cuda.is_available(), timeout=LONGEST_WAIT)


def from_main(make: Callable[[], T]) -> T:
    """What `make` returns in the main process, which alone calls it, in every process; likewise an MCARError of it.

    What it returns is pickled. All processes must come here, so `make` must not.
    """
    if count() == 1:
        return make()
    from accelerate.utils import broadcast_object_list

    box: list[Any] = [None]
    errors: list[MCARError] = []
    if is_main():
        with _noting(errors):
            box = [make()]
    _raise_alike(errors)
    made: T = broadcast_object_list(box)[0]
    return made


def main_first(make: Callable[[], T]) -> T:
    """What `make` returns in each process; the others call it when the main process is done with it.

    An MCARError that it raises in one of them is raised in all.
    """
    made: list[T] = []
    for turn in (True, False):
        errors: list[MCARError] = []
        if is_main() is turn:
            with _noting(errors):
                made = [make()]
        _raise_alike(errors)
    return made[0]


def gathered(items: list[T]) -> list[T]:
    """The items of all processes, those of the main process first. They are pickled."""
    if count() == 1:
        return items
    from accelerate.utils import gather_object

    found: list[T] = gather_object(items)
    return found


def take_buffers_of_main(model: "nn.Module") -> None:
    """Gives every process the main process's buffers: the running statistics of batch normalisation."""
    if count() > 1:
        from accelerate.utils import broadcast

        broadcast(list(model.buffers()))


def share_of(size: int, batch_size: int) -> int:
    """How many of a batch's `size` images are this process's: its piece of batch_size / count() images, or less of a
    batch that is not full."""
    piece = batch_size // count()
    return min(max(size - index() * piece, 0), piece)


def check_batch(batch_size: int, statistics_batch: int = 0) -> None:
    """Raises ConfigError unless the processes get equal shares of a batch, and whole groups of statistics_batch."""
    piece, rest = divmod(batch_size, count())
    if rest:
        raise ConfigError(
            f"batch_size is {batch_size}, which {count()} processes cannot share equally; "
            "make it a multiple of their number, or start another number of processes"
        )
    if count() > 1 and statistics_batch and piece % statistics_batch:
        raise ConfigError(
            f"statistics_batch is {statistics_batch}, but each of {count()} processes has {piece} images of a batch; "
            "make it a divisor of that, or 0 for all images of a process"
        )


def check_command(name: str | None) -> None:
    """Raises ConfigError for a command that several processes cannot share."""
    if started_together() and name not in COMMANDS and count() > 1:
        raise ConfigError(f"mcar {name} runs in one process: start it without torchrun, which is for training")


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """Meanwhile only the main process writes to standard output; at a good end all processes leave their group."""
    if not started_together():
        yield
        return
    with contextlib.ExitStack() as stack:
        if not is_main():
            nowhere = stack.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        yield
    _state().destroy_process_group()


def tells(error: MCARError) -> bool:
    """Whether this process should print an error: the others need not repeat what the main process says. They have the
    same command line, so they raise every ConfigError alike."""
    return is_main() or not (isinstance(error, ConfigError) or ALIKE in getattr(error, "__notes__", ()))


@contextlib.contextmanager
def _noting(errors: list[MCARError]) -> Iterator[None]:
    try:
        yield
    except MCARError as error:
        errors.append(error)


def _raise_alike(errors: list[MCARError]) -> None:
    for error in gathered(errors):
        if count() > 1:
            error.add_note(ALIKE)
        raise error
