"""Files that are whole or not there, JSON with all digits, names made from content, and where the project lies."""

import contextlib
import errno
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mcar_lib.errors import ConfigError, MCARError, ResultsError, reason_of

PACKAGE = Path(__file__).resolve().parent
DISTRIBUTION = 'name = "mcar-lib"'  # a line of this project's pyproject.toml
OTHER_ARTIFACTS = "choose another --artifacts folder, or set MCAR_ARTIFACTS"


def checkout() -> Path | None:
    """The checkout of this project that the package lies in; None where the package was installed without one."""
    described = PACKAGE.parent / "pyproject.toml"
    is_ours = described.is_file() and DISTRIBUTION in described.read_text(encoding="utf-8", errors="replace")
    return PACKAGE.parent if is_ours else None


DAY = 24 * 60 * 60
HERE = hashlib.sha256(platform.node().encode()).hexdigest()[:6]  # another machine's process numbers say nothing here
PARTIAL = re.compile(r"\..+\.(?P<machine>\w+)-(?P<process>\d+)-\w+\.part")


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


def shipped(folder: str) -> Path:
    """A folder of the checkout, "models" or "results/published"; an installed package brings it along."""
    root = checkout()
    return root / folder if root else PACKAGE / Path(folder).name


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
    """Writes a JSON file; numbers keep all their digits, and those that are none (NaN, infinities) become null.

    Raises ResultsError if it cannot.
    """
    write_text(path, json.dumps(without_nan(content), indent=1, allow_nan=False) + "\n")


def without_nan(value: Any) -> Any:
    """What JSON can hold of a value: numbers that are none become null."""
    if isinstance(value, Mapping):
        return {key: without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(path: Path, text: str) -> Path:
    """Writes a text file whole or not at all, its folder too; raises ResultsError if it cannot."""
    write_bytes(path, text.encode())
    return path


def write_bytes(
    path: Path,
    content: bytes | memoryview,
    kind: type[MCARError] = ResultsError,
    advice: str = "choose another --results folder",
) -> None:
    """As write_atomically, for what is in memory: writers of other libraries do not say why a write failed."""
    write_atomically(path, lambda partial: partial.write_bytes(content), kind, advice)


def write_atomically(
    path: Path,
    write: Callable[[Path], object],
    kind: type[MCARError] = ResultsError,
    advice: str = "choose another --results folder",
) -> None:
    """Calls write on a temporary neighbour, forces it to disk, and renames: the file is whole or it is not there.

    The neighbour's name is this writer's own, so several may write one file: the last one's stays. The folder is made,
    and cleared of what writers that were killed have left. Raises `kind`, which says what to do, where the system
    refuses; what write raises beside that goes through.
    """
    partial = path.with_name(f".{path.name}.{HERE}-{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent)
        write(partial)
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)  # before the free room is told
        raise kind(f"{path} cannot be written ({error.strerror or error}); {_advised(error, path, advice)}") from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _advised(error: OSError, path: Path, advice: str) -> str:
    if error.errno == errno.EFBIG:
        return "it is larger than a file may be here (ulimit -f); raise that limit and give the same command again"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return advice
    try:
        free = f"{shutil.disk_usage(path.parent).free:,} bytes are free in {path.parent}, and more are needed"
    except OSError:
        free = str(path.parent)
    return f"the disk is full, {free}; make room there and give the same command again"


def remove_leftovers(folder: Path) -> None:
    """Removes what writers of this module that were killed have left in a folder; where it cannot be told whether
    they still live, what is older than a day."""
    for path in folder.glob(".*.part"):
        if found := PARTIAL.fullmatch(path.name):
            with contextlib.suppress(OSError):
                dead = found["machine"] == HERE and not lives(int(found["process"]))
                if dead or time.time() - path.stat().st_mtime > DAY:
                    path.unlink()


def lives(process: int) -> bool:
    """Whether a process of this machine is there."""
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        pass
    return True


def check_zip(path: Path) -> None:
    """Holds every member of a zip file (so torch and NumPy write theirs) to its checksum, which their readers do not
    all do. Raises BadZipFile, or what zipfile does on a broken file."""
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"{damaged} differs from its checksum")


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
        raise kind(f"{path}: expected {expected}, but it cannot be read as that ({reason_of(error)})") from error


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
