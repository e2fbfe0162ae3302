"""What a finished run leaves on this machine beside its record: weights and test scores, found by the run's id."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import save_file

from mcar_lib.files import write_atomically
from mcar_lib.model import MCAR
from mcar_lib.runs.measures import STREAMS
from mcar_lib.training import Fit, StreamScores, processes


class Outcome:
    """The folder artifacts/runs/<run id>; checkpoints lie in it while the run is trained."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.weights = folder / "model.safetensors"

    def is_here(self) -> bool:
        """Whether the run's weights are on this machine, in the eyes of the main process."""
        return processes.broadcast_from_main(self.weights.exists)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other jobs from the folder; of several processes the main one holds the lock for all."""
        with contextlib.ExitStack() as stack:
            if processes.is_main():
                self.folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(self.folder / "lock"))
            yield

    def save(self, mcar: MCAR, state: Fit) -> None:
        """Scores of a finished run, if it was scored, and its weights: last, for they tell that all is there."""
        if state.last is not None and state.best is not None:
            _save_scores(self.folder / "scores.npz", {"last_": state.last, "best_": state.best})
        weights = {key: value.detach().cpu().contiguous() for key, value in mcar.state_dict().items()}
        write_atomically(self.weights, lambda path: save_file(weights, path))

    def remove_checkpoints(self) -> None:
        """Only once all that a run leaves is safe: until then they spare a run that is killed its epochs."""
        for checkpoint in self.folder.glob("checkpoint*.pt"):
            checkpoint.unlink()

    def scores(self, epoch: str = "last") -> StreamScores:
        """Test scores after the last or the best epoch."""
        return _load_scores(self.folder / "scores.npz", f"{epoch}_")[0]

    def scores_of(self, name: str, score: Callable[[], tuple[StreamScores, float]]) -> tuple[StreamScores, float]:
        """Test scores under a name of their own, and the seconds they took; made once and kept."""
        path = self.folder / f"{name}.npz"
        if not path.exists():
            fresh, seconds = score()
            _save_scores(path, {"": fresh}, seconds)
        return _load_scores(path, "")


def _save_scores(path: Path, scores: Mapping[str, StreamScores], seconds: float = 0.0) -> None:
    arrays = {
        f"{prefix}{name}": stream.numpy()
        for prefix, streams in scores.items()
        for name, stream in zip(STREAMS[:2], streams, strict=True)
    }

    def write(partial: Path) -> None:
        with partial.open("wb") as stream:  # a path would get .npz appended
            np.savez(stream, seconds=np.array(seconds), **arrays)  # type: ignore[arg-type]

    write_atomically(path, write)


def _load_scores(path: Path, prefix: str) -> tuple[StreamScores, float]:
    with np.load(path) as stored:
        streams = (torch.from_numpy(stored[f"{prefix}{name}"]) for name in STREAMS[:2])
        return StreamScores(*streams), float(stored["seconds"])
