"""MCAR: a global stream, a parameter-free region module and a local stream for multi-label image recognition."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mcar_lib.released import ReleasedModel

__version__ = "0.1.0"


def load(name_or_path: str | Path) -> "ReleasedModel":
    """A trained model with its classes and its input size: by the name of one that we ship, from a .safetensors file,
    or by the id of a run that was trained here. Called with a photo, or several, it says what is on them.

    Raises WeightsError if there is no such model.
    """
    from mcar_lib.released import load_released  # torch is slow to import, and `mcar --help` needs none

    return load_released(name_or_path)
