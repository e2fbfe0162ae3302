"""What a long job tells meanwhile: a bar with rate and time left, and lines that stay."""

import multiprocessing
import os
from types import TracebackType

from tqdm.auto import tqdm

IN_A_NOTEBOOK = any(base.__name__ == "tqdm_notebook" for base in tqdm.__mro__)  # tqdm has found out


def _is_first() -> bool:
    return "LOCAL_RANK" not in os.environ or os.environ.get("RANK", "0") == "0"  # torchrun numbers its processes


def speaks() -> bool:
    """Whether this process talks to the reader: of torchrun's processes the first, of a grid's none but its own."""
    return _is_first() and multiprocessing.current_process().name == "MainProcess"


def say(line: str) -> None:
    """One lasting line of a run's story (an epoch's result, a fallback), in every setting, from torchrun's first."""
    if _is_first():
        print(line, flush=True)


def format_seconds(seconds: float) -> str:
    """75 -> '1:15', 3700 -> '1:01:40'."""
    return tqdm.format_interval(round(seconds)).removeprefix("0")


class Progress:
    """A bar over `total` units in a terminal or a notebook; nothing in a log file, whose lines are those of `say`."""

    def __init__(self, what: str, total: int, unit: str = "images", enabled: bool = True) -> None:
        off = None if enabled and not IN_A_NOTEBOOK else not enabled  # None: tqdm asks whether it writes to a terminal
        self.bar = tqdm(total=total, desc=what, unit=f" {unit}", leave=False, disable=off if speaks() else True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()

    def advance(self, units: int = 1) -> None:
        self.bar.update(units)

    def update(self, done: int, total: int) -> None:
        """Also usable as a callback (units done, units in all)."""
        self.bar.total = total
        self.bar.update(done - self.bar.n)
