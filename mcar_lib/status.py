"""What a run says of itself in a file beside its checkpoints, and how all runs stand: mcar status.

Nothing here needs torch, so that it answers at once, while runs are running and after a crash.
"""

import contextlib
import os
import platform
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from mcar_lib.errors import MCARError, ResultsError, Stopped, reason_of
from mcar_lib.files import lives, read_json, write_json
from mcar_lib.progress import format_seconds, say

if TYPE_CHECKING:
    from mcar_lib.training.execution import Standing

NAME = "status.json"
SECONDS_BETWEEN_WRITES = 3.0
SECONDS_BETWEEN_BEATS = 60.0  # a run touches its file, whatever it is busy with
SILENT_SECONDS = 600.0  # after which a run of another machine is taken for dead
GOES_ON = "the same command goes on from its last checkpoint"
State = Literal["running", "waiting", "failed", "killed", "stopped", "finished"]
ORDER = ("running", "waiting", "failed", "killed", "stopped", "finished")


class Status(BaseModel):
    """How a run stands. Times are of this session, in UTC; images: those of the epoch that are done; last_map: a
    fraction; record: the path of its record, reason: why it ended, each where there is one."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    label: str
    run_id: str
    profile: str
    state: State
    host: str | None = None
    pid: int | None = None
    started: str | None = None
    updated: str | None = None
    epoch: int | None = None
    epochs: int | None = None
    images: int | None = None
    images_of_epoch: int | None = None
    images_per_second: float | None = None
    seconds_left: float | None = None
    last_map: float | None = None
    reason: str | None = None
    record: str | None = None

    def cells(self) -> dict[str, object]:
        """The run as a row of a table."""
        goes = self.state == "running"
        return {
            "run": self.label,
            "run id": self.run_id,
            "state": self.state,
            "host": self.host,
            "epoch": None if self.epoch is None else f"{self.epoch}/{self.epochs}",
            "images/s": f"{self.images_per_second:.0f}" if goes and self.images_per_second is not None else None,
            "time left": format_seconds(self.seconds_left) if goes and self.seconds_left is not None else None,
            "mAP %": None if self.last_map is None else f"{100 * self.last_map:.1f}",
            "what": self.reason or (self.record and os.path.relpath(self.record)),
        }


class StatusFile:
    """status.json in a run's folder. That it cannot be written stops no run.

    writes: False in all processes of a run but one.
    """

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.path, self.writes = folder, folder / NAME, writes
        self._content: dict[str, Any] = {}
        self._written = -SECONDS_BETWEEN_WRITES

    def waiting(self, label: str, run_id: str, profile: str, job: str = "") -> None:
        """Says that this session, or that job of a cluster, is going to train it, where no other one does now."""
        if self.writes:
            with contextlib.suppress(OSError, NotImplementedError, Timeout):
                self.folder.mkdir(parents=True, exist_ok=True)
                with FileLock(self.folder / "lock", timeout=0):
                    self._start("waiting", label, run_id, profile, job)

    def running(self, label: str, run_id: str, profile: str) -> None:
        self._start("running", label, run_id, profile)

    def tell(self, standing: "Standing") -> None:
        """Where it is; written every few seconds."""
        self._content |= standing._asdict()
        if time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self._write()

    def finished(self, record: Path, last_map: float | None) -> None:
        """last_map: a fraction; None where nothing was scored."""
        epochs = self._content.get("epochs")
        self._end("finished", epoch=epochs, seconds_left=0.0, last_map=last_map, record=str(record))

    def failed(self, reason: str) -> None:
        self._end("failed", reason=reason)

    def stopped(self, signal_name: str, resumable: bool) -> None:
        """resumable: a checkpoint of that moment was written."""
        where = "here" if resumable else "its last checkpoint"
        self._end("stopped", reason=f"{signal_name}; the same command goes on from {where}")

    def give_up(self, reason: str) -> None:
        """As failed, where it still waits for this session."""
        with contextlib.suppress(MCARError):
            if self.writes and (found := read_status(self.path)).state == "waiting" and found.pid == os.getpid():
                self._content = found.model_dump()
                self.failed(reason)

    @contextlib.contextmanager
    def following(self, label: str, run_id: str, profile: str) -> Iterator[None]:
        """Says that the run is running, and how it ends where it ends badly; meanwhile the file is kept fresh."""
        self.running(label, run_id, profile)
        ended = threading.Event()
        threading.Thread(target=self._beat, args=(ended,), daemon=True).start()
        try:
            yield
        except Stopped as stop:
            self.stopped(stop.signal.name, stop.resumable)
            raise
        except KeyboardInterrupt:
            self.stopped("SIGINT", resumable=False)
            raise
        except MCARError as error:
            self.failed(str(error))
            raise
        except Exception as error:
            self.failed(f"{type(error).__name__}: {reason_of(error)}")
            raise
        finally:
            ended.set()

    def _beat(self, ended: threading.Event) -> None:
        while self.writes and not ended.wait(SECONDS_BETWEEN_BEATS):
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _start(self, state: State, label: str, run_id: str, profile: str, job: str = "") -> None:
        self._content = {"label": label, "run_id": run_id, "profile": profile, "state": state, "started": _now()}
        here = {"host": platform.node(), "pid": os.getpid()}
        self._content |= {"reason": f"job {job} of the cluster; squeue tells of it"} if job else here
        self._write()

    def _end(self, state: State, **values: object) -> None:
        self._content |= {"state": state, **values}
        self._write()

    def _write(self) -> None:
        if self.writes:
            with contextlib.suppress(MCARError, OSError):
                write_json(self.path, {**self._content, "updated": _now()})
            self._written = time.monotonic()


def read_status(path: Path) -> Status:
    """What a status file says; raises ResultsError where it is none."""
    content = read_json(path)
    try:
        return Status.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ResultsError(f"{path}: {where}: {first['msg']}; it is not the status of a run") from error


def all_runs(artifacts: Path, results: Path) -> list[Status]:
    """Every run that left a status among the artifacts, or a record in results/<profile>/runs, as it stands now; those
    that run first. A file that is neither is passed over, which is said."""
    finished = _records(results)
    found: dict[str, Status] = {}
    for path in sorted((artifacts / "runs").glob(f"*/{NAME}")):
        try:
            found[path.parent.name] = _as_it_is(path)
        except ResultsError as error:
            if not isinstance(error.__cause__, FileNotFoundError):  # removed meanwhile
                say(f"{error}; passed over")
    for name, record in finished.items():
        if name not in found or found[name].state not in ("running", "finished"):
            found[name] = record
    return sorted(found.values(), key=lambda each: (ORDER.index(each.state), each.label, each.run_id))


def _as_it_is(path: Path) -> Status:
    """What a status file says, unless whoever wrote it is gone."""
    told = read_status(path)
    here = told.host == platform.node()
    if told.state == "waiting" and here and told.pid is not None and not lives(told.pid):
        return told.model_copy(update={"state": "stopped", "reason": "its session ended; the same command goes on"})
    if told.state == "running" and not _is_alive(path, here):
        again = read_status(path)  # a run that ends says so before it lets go of its lock
        return again.model_copy(update={"state": "killed", "reason": GOES_ON}) if again.state == "running" else again
    return told


def _is_alive(path: Path, here: bool) -> bool:
    """Whether a session holds the run's lock; on another machine, or where that cannot be told, whether its file is
    fresh."""
    with contextlib.suppress(OSError, NotImplementedError):
        if here:
            return _is_locked(path.parent / "lock")
    with contextlib.suppress(OSError):
        return time.time() - path.stat().st_mtime < SILENT_SECONDS
    return False


def _is_locked(lock: Path) -> bool:
    if not lock.exists():
        return False
    try:
        with FileLock(lock, timeout=0):
            return False
    except Timeout:  # which is an OSError
        return True


def _records(results: Path) -> dict[str, Status]:
    found = {}
    for path in sorted(results.glob("*/runs/[!.]*.json")):
        try:
            content = read_json(path)
            metrics = content["metrics"]
            status = Status(
                **{name: content[name] for name in ("label", "run_id", "profile")},
                state="finished",
                epochs=len(content["history"]),
                epoch=len(content["history"]),
                last_map=None if metrics is None else metrics["last"]["fused"]["mAP"],
                record=str(path),
            )
        except ResultsError as error:
            say(f"{error}; passed over")
        except (KeyError, TypeError, ValueError):  # pydantic's ValidationError is a ValueError
            say(f"{path}: it is not the record of a run; passed over")
        else:
            found[status.run_id] = status
    return found


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
