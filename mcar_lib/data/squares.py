"""The photos of an image set as squares, decoded once where they can be kept: in memory, or in a file on disk."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from mcar_lib.data.image_set import ImageSet, read_in_threads
from mcar_lib.data.transforms import resize_square
from mcar_lib.errors import ResultsError
from mcar_lib.files import file_hash, read_json, write_atomically, write_json
from mcar_lib.progress import say

MEMORY_LIMIT = 1 << 30  # bytes
Progress = Callable[[int, int], None]


class ResizedImages(Dataset[Tensor]):
    """The photos of an image set as squares: item i is uint8 (3, size, size).

    Each photo is decoded and resized once and the squares are kept in memory when all of them fit into
    `memory_limit_bytes`, or in `file` where one is named (see `squares_file`); otherwise each access reads its photo.
    All ways give the same pixels. `progress` is called with (photos done, photos in all) while they are read.
    """

    def __init__(
        self,
        image_set: ImageSet,
        size: int,
        memory_limit_bytes: int = MEMORY_LIMIT,
        progress: Progress | None = None,
        file: Path | None = None,
    ) -> None:
        self.image_set, self.size = image_set, size
        self.file: Path | None = None
        self.kept: Tensor | None = None
        if file is not None:
            self._keep_on_disk(file, progress)
        elif num_bytes(image_set, size) <= memory_limit_bytes:
            self.kept = torch.empty(self._shape, dtype=torch.uint8)
            for index, square in enumerate(read_in_threads(self._read, len(image_set), progress)):
                self.kept[index] = square

    def __len__(self) -> int:
        return len(self.image_set)

    def __getitem__(self, index: int) -> Tensor:
        return self._read(index) if self.kept is None else self.kept[index]

    def batch(self, indices: Sequence[int]) -> Tensor:
        """uint8 (len(indices), 3, size, size)."""
        squares: Tensor = default_collate([self[index] for index in indices])  # a worker's is in shared memory
        return squares

    @property
    def _shape(self) -> tuple[int, int, int, int]:
        return len(self.image_set), 3, self.size, self.size

    def _read(self, index: int) -> Tensor:
        return resize_square(self.image_set.image(index), self.size)

    # On disk: <file> holds the squares one after another, <file>.json how to know them again ------------------------

    def _keep_on_disk(self, file: Path, progress: Progress | None) -> None:
        try:
            if not _is_whole(file, num_bytes(self.image_set, self.size)):
                say(f"{file}: {_gigabytes(num_bytes(self.image_set, self.size))} of resized photos are written, once")
                self._write(file, progress)
        except ResultsError as error:
            say(f"{error}; photos are read and resized each time instead")
            return
        self.file = file
        self.kept = self._opened(file)

    def _write(self, file: Path, progress: Progress | None) -> None:
        def write(partial: Path) -> None:
            with partial.open("wb") as stream:
                for square in read_in_threads(self._read, len(self), progress):
                    stream.write(square.numpy().tobytes())

        write_atomically(file, write, advice="choose another --artifacts folder or --cache none")
        write_json(_seal(file), {**_state(file), "sha256": file_hash(file)})

    def _opened(self, file: Path) -> Tensor:
        # Copy on write: torch wants what it could write to; nothing does, so nothing is copied.
        return torch.from_numpy(np.memmap(file, np.uint8, "c", shape=self._shape))

    def __getstate__(self) -> dict[str, Any]:
        """For a process that does not share this one's memory: the file is opened there, not sent."""
        return {**self.__dict__, "kept": None if self.file else self.kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.file:
            self.kept = self._opened(self.file)


def num_bytes(image_set: ImageSet, size: int) -> int:
    """What all squares of an image set take."""
    return len(image_set) * 3 * size * size


def fits_on_disk(folder: Path, needed: int) -> bool:
    """Whether a file of that many bytes leaves at least as much free again where the folder is, or will be."""
    there = next(each for each in (folder, *folder.parents) if each.exists())
    return 2 * needed <= shutil.disk_usage(there).free


def _is_whole(file: Path, size: int) -> bool:
    """Whether a file holds what was written to it. One that was touched since is read whole."""
    if not file.exists() or not _seal(file).exists():
        return False
    try:
        sealed, state = read_json(_seal(file)), _state(file)
        if state["bytes"] == size and state == {key: sealed.get(key) for key in state}:
            return True
        if state["bytes"] == size and file_hash(file) == sealed.get("sha256"):
            write_json(_seal(file), {**sealed, **state})
            return True
    except (ResultsError, OSError) as error:
        say(f"{file}: {error}")
    say(f"{file}: not what was written; it is made again")
    return False


def _seal(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def _state(file: Path) -> dict[str, int]:
    state = file.stat()
    return {"bytes": state.st_size, "changed_ns": state.st_mtime_ns}


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
