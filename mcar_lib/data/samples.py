"""Real photos that installed packages ship, so that a fresh clone has some to look at."""

import importlib.util
from pathlib import Path

# Caption -> package and file. None of them is committed here.
SAMPLES = {
    "Eileen Collins, portrait by NASA (in scikit-image)": ("skimage", "data/astronaut.png"),
    "Chelsea, by Stefan van der Walt, CC0 (in scikit-image)": ("skimage", "data/chelsea.png"),
    "flower.jpg, vultilion on Flickr, CC BY 2.0 (in scikit-learn)": ("sklearn", "datasets/images/flower.jpg"),
}


def sample_photos() -> dict[str, Path]:
    """The photos that are on this machine, by their caption with its credit."""
    places = {caption: _package_folder(package) / file for caption, (package, file) in SAMPLES.items()}
    return {caption: path for caption, path in places.items() if path.is_file()}


def _package_folder(package: str) -> Path:
    """The folder of a package that is not imported for it; the package's name where it is not installed."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else Path(package)
