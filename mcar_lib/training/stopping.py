"""Signals that ask a run to end: it goes on to a place where a checkpoint can be written, and ends there."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

ONE_EVENT = 1.0  # seconds in which further signals count as one: timeout and terminals send theirs twice
NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class StopRequest:
    """signal: the one that asked this process to end, or 0."""

    def __init__(self) -> None:
        self.signal = 0
        self.since = 0.0


@contextlib.contextmanager
def stop_request(then: Callable[[], None] | None = None) -> Iterator[StopRequest]:
    """Meanwhile a signal is noted, and `then` called; a second one, later, acts as it did before.

    Those that are ignored stay so. Only the main thread can do that; elsewhere nothing is noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    numbers = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
    before: dict[int, Any] = {each: signal.getsignal(each) for each in numbers}
    before = {each: handler for each, handler in before.items() if handler not in (signal.SIG_IGN, None)}

    def note(number: int, frame: Any) -> None:
        if not request.signal:
            request.signal, request.since = number, time.monotonic()
            told = "after this step a checkpoint is written; once more ends it at once"
            with contextlib.suppress(OSError):  # print may be what this interrupts
                os.write(2, f"{signal.Signals(number).name}: {told}\n".encode())
            if then is not None:
                then()
        elif time.monotonic() - request.since > ONE_EVENT:
            _as_before(before[number], number, frame)

    for each in before:
        signal.signal(each, note)
    try:
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def _as_before(handler: Callable[[int, Any], object] | int, number: int, frame: Any) -> None:
    if callable(handler):
        handler(number, frame)
    else:  # the system's own
        signal.signal(number, handler)
        signal.raise_signal(number)
