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

from mcar_lib.errors import ConfigError, MCARError, ResultsError

PACKAGE = Path(__file__).resolve().parent
DISTRIBUTION = 'name = "mcar-lib"'  # a line of this project's pyproject.toml
OTHER_ARTIFACTS = "choose another --artifacts folder, or set MCAR_ARTIFACTS"


def checkout() -> Path | None:
    """The checkout of this project that the package lies in; None where the package was installed without one."""
    described = PACKAGE.parent / "pyproject.toml"
    is_ours = described.is_file() and DISTRIBUTION in described.read_text(encoding="utf-8", errors="replace")
    return PACKAGE.parent if is_ours else None


def project_root() -> Path:
    """The checkout, wherever one works; without one the working folder, which then gets results and artifacts."""
    return checkout() or Path.cwd()


def results_folder(results: object, root: Path) -> Path:
    """Where results are, in full: "results" and what is below it are the project's, any other relative path starts at
    the working folder, and nothing means the project's. Raises ConfigError for what is no path."""
    asked = user_path(results or "results")
    return (root / asked if asked.parts[:1] == ("results",) else asked).resolve()


def needed_checkout(job: str) -> Path:
    """The checkout; raises ConfigError where there is none."""
    if (root := checkout()) is None:
        raise ConfigError(
            f"{job} works on the notebooks and the committed results, which an installed package does not hold; "
            "run it in a checkout of the project"
        )
    return root


def published_table(name: str) -> Path:
    """One of the tables of figures published by others: results/published, which an installed package brings along."""
    root = checkout()
    return (root / "results" / "published" if root else PACKAGE / "published") / name


def user_path(path: object) -> Path:
    """A path as its reader means it: ~ is the home folder. Raises ConfigError for what is no path."""
    if not isinstance(path, str | Path) or not str(path):
        raise ConfigError(f"{path!r} is not a path; give the name of a file or folder")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path}: there is no user {str(path).split('/')[0]!r}; give the path in full") from error


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


def made_folder(folder: Path, advice: str = "choose another --results folder") -> Path:
    """A folder that can be written, made if need be: told before an hour of work, not after it. Else ResultsError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ResultsError(f"{folder} cannot be written ({error.strerror}); {advice}") from error
    return folder


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
