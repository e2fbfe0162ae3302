"""Files that are whole or not there, JSON with all digits, names made from content, and where the project lies."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mcar_lib.errors import ResultsError


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
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultsError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ResultsError(f"{path} holds no JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file; numbers keep all their digits. Raises ResultsError if it cannot."""
    write_text(path, json.dumps(content, indent=1, allow_nan=True) + "\n")


def write_text(path: Path, text: str) -> Path:
    """Writes a text file whole or not at all, its folder too; raises ResultsError if it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda partial: partial.write_text(text, encoding="utf-8", newline="\n"))
    except OSError as error:
        raise ResultsError(f"{path} cannot be written ({error.strerror}); choose another --results folder") from error
    return path


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Calls write on a temporary neighbour, forces it to disk, and renames: the file is whole or it is not there."""
    partial = path.with_name(path.name + ".part")
    write(partial)
    with partial.open("rb") as stream:
        os.fsync(stream.fileno())
    partial.replace(path)


def made_folder(folder: Path) -> Path:
    """A folder that can be written, made if need be: told before an hour of work, not after it. Else ResultsError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ResultsError(f"{folder} cannot be written ({error.strerror}); choose another --results folder") from error
    return folder
