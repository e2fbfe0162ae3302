"""Signals end a command with one sentence and their exit code, and leave the program's own handling as it was."""

import os
import signal
from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from mcar_lib import runs
from mcar_lib.cli import app
from mcar_lib.errors import ConfigError, Stopped

GOES_ON = "the same command goes on from here"


@pytest.fixture
def during_a_command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], Result]:
    """Runs a command of mcar, and something in the middle of it."""

    def run(happening: Callable[[], object]) -> Result:
        monkeypatch.setattr(runs, "load_profile", lambda _: happening())
        return CliRunner().invoke(app, ["plan"])

    return run


def send(*numbers: signal.Signals) -> Callable[[], None]:
    """Sends signals to this process, each in the middle of what the one before it has set going."""

    def happening() -> None:
        try:
            os.kill(os.getpid(), numbers[0])
        finally:
            if numbers[1:]:
                send(*numbers[1:])()

    return happening


@pytest.mark.parametrize(
    ("number", "code", "sentence"),
    [
        (signal.SIGTERM, 143, f"stopped by SIGTERM; {GOES_ON}"),
        (signal.SIGHUP, 129, f"stopped by SIGHUP; {GOES_ON}"),
        (signal.SIGINT, 130, f"interrupted; {GOES_ON}"),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_a_signal_ends_a_command_with_one_sentence_and_its_code(
    number: signal.Signals,
    code: int,
    sentence: str,
    during_a_command: Callable[..., Result],
) -> None:
    done = during_a_command(send(number))
    assert (done.exit_code, done.stderr, done.stdout) == (code, f"{sentence}\n", "")


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGHUP])
def test_a_second_signal_does_not_disturb_the_end(
    second: signal.Signals, during_a_command: Callable[..., Result]
) -> None:
    done = during_a_command(send(signal.SIGTERM, second))
    assert (done.exit_code, done.stderr) == (143, f"stopped by SIGTERM; {GOES_ON}\n")


def test_a_signal_that_is_ignored_stays_so(
    during_a_command: Callable[..., Result],
) -> None:
    """As nohup has SIGHUP."""

    def happening() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        raise ConfigError("came this far")

    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert during_a_command(happening).exit_code == 2
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_command_leaves_the_handlers_as_they_were(during_a_command: Callable[..., Result]) -> None:
    stops = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = [signal.getsignal(each) for each in stops]
    during_a_command(send(signal.SIGTERM))
    assert [signal.getsignal(each) for each in stops] == before


def test_training_that_left_a_checkpoint_ends_with_the_code_of_a_temporary_failure(
    during_a_command: Callable[..., Result],
) -> None:
    def happening() -> None:
        raise Stopped(signal.SIGTERM, resumable=True)

    done = during_a_command(happening)
    assert (done.exit_code, done.stderr) == (os.EX_TEMPFAIL, f"stopped by SIGTERM; {GOES_ON}\n")
