"""Progress with rate and time left that reads well in a terminal, in a notebook and in a log file."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

from mcar_lib import processes

SECONDS_BETWEEN_LOG_LINES = 30.0
SECONDS_BETWEEN_UPDATES = 0.5


def format_seconds(seconds: float) -> str:
    """75 -> '1:15', 3700 -> '1:01:40'."""
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"


class Progress:
    """One line of progress over `total` units. A terminal and a notebook rewrite the line; a log file gets a new one
    every half minute, and none at all for work that is over sooner. Of several processes only the main one shows it."""

    def __init__(self, what: str, total: int, unit: str = "images", enabled: bool = True) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.enabled = enabled and processes.is_main()
        self.done = 0
        self.started = self.shown = time.monotonic()
        self._write, self._finish = _writer() if self.enabled else (_ignore, _ignore)
        self._interval = SECONDS_BETWEEN_LOG_LINES if self._write is _log_line else SECONDS_BETWEEN_UPDATES

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._finish("")

    def advance(self, units: int = 1) -> None:
        self.update(self.done + units, self.total)

    def update(self, done: int, total: int) -> None:
        """Also usable as a callback (units done, units in all)."""
        self.done, self.total = done, total
        now = time.monotonic()
        if now - self.shown >= self._interval:
            self.shown = now
            self._write(self.line())

    def line(self) -> str:
        seconds = max(time.monotonic() - self.started, 1e-9)
        rate = self.done / seconds
        left = format_seconds((self.total - self.done) / rate) if rate > 0 else "?"
        return f"{self.what}: {self.done:,}/{self.total:,} {self.unit}, {rate:.1f}/s, {left} left"


def say(line: str) -> None:
    """One lasting line of a run's story (an epoch's result, a fallback), in every setting, from the main process."""
    if processes.is_main():
        print(line, flush=True)


def _ignore(line: str) -> None:
    pass


def _log_line(line: str) -> None:
    print(line, flush=True)


def _writer() -> tuple[Callable[[str], None], Callable[[str], None]]:
    if "ipykernel" in sys.modules:
        return _notebook_writer()
    if sys.stderr.isatty():
        return _terminal_line, _terminal_clear
    return _log_line, _ignore


def _terminal_line(line: str) -> None:
    sys.stderr.write(f"\r\x1b[2K{line}")
    sys.stderr.flush()


def _terminal_clear(line: str) -> None:
    _terminal_line("")


def _notebook_writer() -> tuple[Callable[[str], None], Callable[[str], None]]:
    from IPython.display import display

    handle: Any = None

    def write(line: str) -> None:
        nonlocal handle
        text = {"text/plain": line}
        if handle is None:
            handle = display(text, raw=True, display_id=True)
        else:
            handle.update(text, raw=True)

    def finish(line: str) -> None:
        if handle is not None:
            handle.update({"text/plain": ""}, raw=True)

    return write, finish
