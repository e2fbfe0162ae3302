"""One run as a job of a cluster: the command that trains it, as a child that is told to stop and is started again.

submitit calls this in the job. It can take a signal only once this is imported, so nothing here needs torch.
"""

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import IO, TYPE_CHECKING, Any, NoReturn

from mcar_lib.errors import RESUMABLE, MCARError

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

PREEMPTIONS = (signal.SIGUSR1, signal.SIGUSR2) if hasattr(signal, "SIGUSR2") else ()  # Windows has none
# What a child ends with that was told to stop: with a checkpoint of that moment; before there was anything to keep.
STOPPED = (RESUMABLE, 128 + signal.SIGTERM, -signal.SIGTERM)
SECONDS_BETWEEN_LOOKS = 0.5
LAST_LINES = 20


class ClusterJob:
    """Carries out a command in a job of submitit, in which it may be called once; the job fails where the command does.

    A job that is to make room (submitit's signal, before the time limit or a preemption) tells the command to stop with
    SIGTERM, waits for it and is queued again: the same command then goes on from its checkpoint. The job does the same
    on SIGTERM, which submitit would let pass, and where the command alone was told to stop.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._is_told = False

    def __call__(self, command: Sequence[str]) -> None:
        # Slurm signals every process of a job, and training would die of this one: it inherits that it is blocked.
        signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTIONS)
        self._child = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
        signal.signal(signal.SIGTERM, lambda *_: self._tell())
        assert self._child.stderr is not None
        last = deque[str](maxlen=LAST_LINES)
        errors = threading.Thread(target=_pass_on, args=(self._child.stderr, last), daemon=True)
        errors.start()
        while self._child.poll() is None:
            # checkpoint() is called here and nowhere else: it would wait for ever for a lock that poll() holds.
            signal.pthread_sigmask(signal.SIG_UNBLOCK, PREEMPTIONS)
            time.sleep(SECONDS_BETWEEN_LOOKS)
            signal.pthread_sigmask(signal.SIG_BLOCK, PREEMPTIONS)
        errors.join(timeout=5)  # a process that outlives the child may hold the pipe
        if self._child.returncode in STOPPED or (self._is_told and self._child.returncode):  # torchrun's is always 1
            _queue_again()
        if self._child.returncode:
            raise MCARError(f"exit code {self._child.returncode}\n{''.join(last).rstrip()}")

    def checkpoint(self, command: Sequence[str]) -> "DelayedSubmission":
        """What submitit is to start when the job's turn comes again; it calls this when the job is to make room.

        The very same, however the child has ended: a run that is done is found, one that failed fails again.
        """
        from submitit.helpers import DelayedSubmission

        if self._child is not None:
            self._tell()
            self._child.wait()
        return DelayedSubmission(ClusterJob(), command)

    def _tell(self) -> None:
        """Tells the child to stop, once: training that is told again, later, ends without a checkpoint."""
        if self._child is not None and not self._is_told:
            self._is_told = True
            self._child.terminate()


def _pass_on(errors: IO[str], last: deque[str]) -> None:
    for line in errors:
        last.append(line)
        sys.stderr.write(line)
        sys.stderr.flush()


def _queue_again() -> NoReturn:
    """Ends the job, queued again unless Slurm has already done that, or cancelled it."""
    import submitit

    environment: Any = submitit.JobEnvironment()
    if environment.cluster != "slurm" or _state(environment.job_id) == "RUNNING":
        environment._requeue(0)
    sys.exit(RESUMABLE)


def _state(job: str) -> str:
    command = ["squeue", "--noheader", "--format=%T", f"--jobs={job}"]
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    return ""
