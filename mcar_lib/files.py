"""Files that are whole or not there, JSON with all digits, names made from content, and where the project lies."""

import contextlib
import errno
import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mcar_lib.errors import MCARError, ResultsError


def project_root() -> Path:
    """The checkout that holds notebooks/ and results/: above the working folder, else above this file, else here."""
    for folder in (Path.cwd(), *Path.cwd().parents, Path(__file__).resolve().parent.parent):
        if (folder / "notebooks").is_dir() and (folder / "results").is_dir():
            return folder
    return Path.cwd()


def content_id(content: Mapping[str, Any]) -> str:
    """Twelve hex characters of a JSON object's content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises ResultsError if it cannot be read or is none."""
    with reading(path, "a JSON object"):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ResultsError(f"{path}: expected a JSON object, found {type(content).__name__}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file; numbers keep all their digits. Raises ResultsError if it cannot."""
    write_text(path, json.dumps(content, indent=1, allow_nan=True) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Writes a text file whole or not at all, its folder too; raises ResultsError if it cannot."""
    write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8", newline="\n"))
    return path


def write_atomically(
    path: Path,
    write: Callable[[Path], object],
    kind: type[MCARError] = ResultsError,
    advice: str = "choose another --results folder",
) -> None:
    """Calls write on a temporary neighbour, forces it to disk, and renames: the file is whole or it is not there.

    The neighbour's name is this writer's own, so several may write one file: the last one's stays. The folder is made.
    Raises `kind`, which says what to do, where the system refuses; what write raises beside that goes through.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "the disk is full; make room and give the same command again"
        raise kind(f"{path} cannot be written ({error.strerror or error}); {advice}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def reading(path: Path | str, expected: str, kind: type[MCARError] = ResultsError) -> Iterator[None]:
    """Makes one sentence of whatever goes wrong while a file is read and taken apart: which file, what should be in
    it, and why it is not. This project's own errors go through as they are."""
    try:
        yield
    except MCARError:
        raise
    except OSError as error:
        raise kind(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # what a parser raises for a broken file is anybody's guess
        reason = (str(error) or type(error).__name__).splitlines()[0][:200]
        raise kind(f"{path}: expected {expected}, but it cannot be read as that ({reason})") from error


def made_folder(folder: Path) -> Path:
    """A folder that can be written, made if need be: told before an hour of work, not after it. Else ResultsError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ResultsError(f"{folder} cannot be written ({error.strerror}); choose another --results folder") from error
    return folder
