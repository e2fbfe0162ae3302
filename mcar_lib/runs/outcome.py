"""What a finished run leaves on this machine beside its record: weights and test scores, found by the run's id."""

import contextlib
import functools
import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

from mcar_lib.errors import ResultsError, WeightsError
from mcar_lib.files import OTHER_ARTIFACTS, check_zip, reading, remove_leftovers, write_bytes
from mcar_lib.model import MCAR
from mcar_lib.progress import say
from mcar_lib.runs.measures import STREAMS
from mcar_lib.training import Fit, StreamScores, processes
from mcar_lib.weights import read_state_dict, safetensors_with_checksum

SEAL = "seal"  # of a score file: whose scores these are, and that they are those that were written


@contextlib.contextmanager
def alone(lock: Path, what: str) -> Iterator[None]:
    """Keeps other sessions from doing the same meanwhile; where one does, says so and waits for it.

    Raises ResultsError where there can be no lock.
    """
    held = FileLock(lock)
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            held.acquire(timeout=0)
        except Timeout:
            say(f"waiting for another session that {what} ({lock})")
            held.acquire()
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ResultsError(f"{lock} cannot be locked ({reason}); {OTHER_ARTIFACTS}") from error
    try:
        yield
    finally:
        held.release()


class Outcome:
    """The folder artifacts/runs/<run id>; checkpoints lie in it while the run is trained."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = folder / "model.safetensors"

    def is_here(self) -> bool:
        """Whether the run's weights are on this machine and undamaged, in the eyes of the main process."""
        return processes.broadcast_from_main(lambda: _is_whole(self.weights))

    def has_scores(self) -> bool:
        """Whether test scores are on this machine, in the eyes of the main process; they may be without weights."""
        return processes.broadcast_from_main((self.folder / "scores.npz").exists)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other jobs from the folder; of several processes the main one holds the lock for all."""
        with contextlib.ExitStack() as stack:

            def lock() -> None:
                stack.enter_context(alone(self.folder / "lock", f"trains the run {self.folder.name}"))
                remove_leftovers(self.folder)

            processes.broadcast_from_main(lock)
            yield

    def save(self, mcar: MCAR, state: Fit) -> None:
        """Scores of a finished run, if it was scored, and its weights: last, for they tell that all is there."""
        if state.last is not None and state.best is not None:
            self.save_scores(state.last, state.best)
        weights = {key: value.detach().cpu().contiguous() for key, value in mcar.state_dict().items()}
        write_bytes(self.weights, safetensors_with_checksum(weights), advice=OTHER_ARTIFACTS)

    def save_scores(self, last: StreamScores, best: StreamScores | None) -> None:
        """Test scores after the last epoch, and after the best one if they are known."""
        self._write_scores("scores", {"last_": last, **({"best_": best} if best else {})})

    def remove_checkpoints(self) -> None:
        """Only once all that a run leaves is safe: until then they spare a run that is killed its epochs."""
        for checkpoint in self.folder.glob("checkpoint*.pt"):
            checkpoint.unlink(missing_ok=True)

    def remove_leftovers(self) -> None:
        """What a run that was killed after its record was written has left: checkpoints, files half written."""
        left = (*self.folder.glob("checkpoint*.pt"), *self.folder.glob(".*.part"))
        if self.weights.exists() and left:
            with contextlib.suppress(OSError), FileLock(self.folder / "lock", timeout=0):  # else a session works here
                self.remove_checkpoints()
                remove_leftovers(self.folder)

    def scores(self, epoch: str, shape: tuple[int, ...]) -> StreamScores | None:
        """Test scores (n, K) after the last or the best epoch; None where they are not here or damaged, which is
        said."""
        return self._read_scores("scores", f"{epoch}_", shape)

    def scores_of(self, name: str, shape: tuple[int, ...], score: Callable[[], StreamScores]) -> StreamScores:
        """Test scores (n, K) under a name of their own; made once and kept."""
        if found := self._read_scores(name, "", shape):
            return found
        with alone(self.folder / f"{name}.lock", f"tests the run {self.folder.name}"):
            if found := self._read_scores(name, "", shape):
                return found
            fresh = score()
            self._write_scores(name, {"": fresh})
        return fresh

    def _write_scores(self, name: str, scores: Mapping[str, StreamScores]) -> None:
        arrays = {
            f"{prefix}{stream}": values.numpy()
            for prefix, streams in scores.items()
            for stream, values in zip(STREAMS[:2], streams, strict=True)
        }
        arrays[SEAL] = np.array(self._seal(name, arrays))
        stream = io.BytesIO()
        np.savez(stream, **arrays)  # type: ignore[arg-type]
        write_bytes(self.folder / f"{name}.npz", stream.getbuffer(), advice=OTHER_ARTIFACTS)

    def _read_scores(self, name: str, prefix: str, shape: tuple[int, ...]) -> StreamScores | None:
        path = self.folder / f"{name}.npz"
        if not path.exists():
            return None
        try:
            with reading(path, "scores of this run"):
                check_zip(path)
                with np.load(path, allow_pickle=False) as stored:
                    arrays = dict(stored)
                seal = arrays.pop(SEAL, None)
                if str(seal) != self._seal(name, arrays):  # former versions wrote none, and sigmoids in place of logits
                    raise ValueError("they are not those that were written")
                if f"{prefix}{STREAMS[0]}" not in arrays:
                    return None
                streams = [arrays[f"{prefix}{stream}"] for stream in STREAMS[:2]]
                if any(each.shape != shape for each in streams):
                    raise ValueError(f"not {shape[0]} rows of {shape[1]} numbers")
                return StreamScores(*map(torch.from_numpy, streams))
        except ResultsError as error:
            say(f"{error}; they are made again")
            return None

    def _seal(self, name: str, arrays: Mapping[str, "np.ndarray"]) -> str:
        digest = hashlib.sha256(f"{self.folder.name} {name}\n".encode())
        for key, values in sorted(arrays.items()):
            digest.update(f"{key} {values.dtype} {values.shape}\n".encode())
            digest.update(values.tobytes())
        return digest.hexdigest()


def _is_whole(weights: Path) -> bool:
    try:
        state = weights.stat()
    except OSError:
        return False
    return _was_whole(weights, state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _was_whole(weights: Path, size: int, changed_ns: int) -> bool:
    """Once a session and file: reading takes a while."""
    try:
        read_state_dict(weights)
    except WeightsError as error:
        say(f"{error}; it is not used")
        return False
    return True
