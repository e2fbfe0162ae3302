"""One family of errors: each says what is wrong, where, and what to do about it."""

import re
import signal
import unicodedata

RESUMABLE = 75
"""Exit code of a run that was stopped and left a checkpoint: EX_TEMPFAIL of sysexits.h, "try again later"."""
JOINERS = "\u200c\u200d"  # parts of words and signs in some scripts


class MCARError(Exception):
    """Base of every error that mcar_lib raises on purpose."""


class ConfigError(MCARError, ValueError):
    """An option, a profile key or an argument has a value that cannot work."""


class NotInProfileError(ConfigError):
    """A profile has no values for what is asked for; others may."""


class DataError(MCARError):
    """A data set is missing, incomplete or not what its files claim."""


class WeightsError(MCARError):
    """Weights cannot be found, or do not fit the backbone they were asked for."""


class CheckpointError(MCARError):
    """A checkpoint cannot be read, or belongs to another architecture."""


class ResultsError(MCARError):
    """A results folder or a run record cannot be read or written."""


class TrainingError(MCARError):
    """Training cannot go on, for example because the loss is no longer a number."""


class Stopped(KeyboardInterrupt):
    """A signal asks this program to end, which it does as on Ctrl-C.

    resumable: a checkpoint of this very moment was written.
    """

    def __init__(self, number: int, resumable: bool = False) -> None:
        super().__init__(number, resumable)  # so that it can be pickled
        self.signal, self.resumable = signal.Signals(number), resumable

    def __str__(self) -> str:
        return self.signal.name + (", after a checkpoint; the same again goes on from it" if self.resumable else "")


def reason_of(error: Exception) -> str:
    """What another library's error says, in one line of at most 200 characters; its kind where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0][:200]


def printable(text: str) -> str:
    """Text that a terminal can show as it is: control and invisible characters, and bytes that are no text, as their
    escapes; line ends and tabs stay. Names of files and classes may hold anything."""
    return "".join(each if _is_shown(each) else each.encode("unicode_escape").decode() for each in text)


def as_markdown(text: str) -> str:
    """Text on one line that Markdown shows as it is: the name of a class, say."""
    return re.sub(r"(?<!\\)([`*_\[\]<>|])", r"\\\1", printable(" ".join(text.split())))


def _is_shown(character: str) -> bool:
    return character in "\n\t" + JOINERS or unicodedata.category(character) not in ("Cc", "Cf", "Cs", "Zl", "Zp")
