"""What tests share: a backbone that trains in a second, a few composed scenes, and runs of its own for each."""

import itertools
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from mcar_lib import backbones
from mcar_lib.backbones import Entry
from mcar_lib.data import load_image_set, prepare, scenes_folder
from mcar_lib.data.scenes import CLASSES
from mcar_lib.data.squares import ResizedImages
from mcar_lib.model import MCAR
from mcar_lib.runs import Profile, RunConfig, Runs, make_config
from mcar_lib.weights import Source

SCENES = {"num_train": 24, "num_test": 16, "side": 96, "seed": 5}
TINY_CHANNELS = (3, 8, 8, 16, 16, 16)
IMAGE_SIZE = 64
LONGEST = ("test_notebooks.py", "test_drift.py", "test_smoke.py", "test_processes.py", "test_fingerprints.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take minutes come first, so that side by side none is left to run alone at the end."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums come out the same only with the same number of threads; one also leaves the machine to others."""
    torch.set_num_threads(1)


def build_tiny() -> nn.Module:
    """(B, 3, H, W) -> (B, 16, H/32, W/32): five convolutions of stride 2 with batch normalisation."""
    layers: list[nn.Module] = []
    for channels, wider in itertools.pairwise(TINY_CHANNELS):
        layers += [nn.Conv2d(channels, wider, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(wider), nn.ReLU()]
    return nn.Sequential(*layers)


@pytest.fixture(scope="module")
def tiny_backbone() -> Iterator[str]:
    """Registers the tiny backbone for the tests of one file, and gives its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backbones.BACKBONES, "tiny", Entry(build_tiny, TINY_CHANNELS[-1], Source("tiny")))
        yield "tiny"


@pytest.fixture(scope="session")
def scenes_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder artifacts/data in which the scenes are written and checked."""
    folder = tmp_path_factory.mktemp("artifacts") / "data"
    scenes_folder(folder, **SCENES)
    for split in ("train", "test"):
        prepare(load_image_set("scenes", split, folder, **SCENES), folder / "checked")
    return folder


@pytest.fixture(scope="session")
def scene_squares(scenes_data: Path) -> tuple[ResizedImages, ResizedImages]:
    """Training and test images of the scenes as squares."""
    train, test = (load_image_set("scenes", split, scenes_data, **SCENES) for split in ("train", "test"))
    return ResizedImages(train, IMAGE_SIZE), ResizedImages(test, IMAGE_SIZE)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., MCAR]:
    """Builds a model over the tiny backbone for the scenes' classes, always from the same initial weights."""

    def build(num_classes: int = len(CLASSES), num_regions: int = 2, **options: object) -> MCAR:
        torch.manual_seed(0)
        return MCAR(build_tiny(), TINY_CHANNELS[-1], num_classes, num_regions=num_regions, **options)  # type: ignore[arg-type]

    return build


@pytest.fixture(scope="module")
def tiny_config(tiny_backbone: str) -> RunConfig:
    """A run over the scenes that takes a fraction of a second."""
    return make_config(
        {
            "dataset": "scenes",
            "data_options": SCENES,
            "backbone": tiny_backbone,
            "weights": "none",
            "image_size": IMAGE_SIZE,
            "num_regions": 2,
            "epochs": 2,
            "batch_size": 8,
            "learning_rate": 0.05,
            "schedule": "onecycle",
            "jitter": 0.0,
        }
    )


@pytest.fixture(scope="module")
def tiny_profile(tiny_config: RunConfig) -> Profile:
    return Profile(name="tiny", title="tiny", seeds=(0,), bootstrap_resamples=20, run=tiny_config)


@pytest.fixture
def open_runs(tiny_profile: Profile, scenes_data: Path, tmp_path: Path) -> Callable[..., Runs]:
    """Opens the test's own results and artifacts, again and again as a new session would; the scenes are there."""
    artifacts = tmp_path / "artifacts"
    shutil.copytree(scenes_data, artifacts / "data", copy_function=shutil.copy2)

    def open_again(results: Path | str = tmp_path / "results", **options: object) -> Runs:
        return Runs(tiny_profile, results, artifacts=artifacts, verbose=False, **options)  # type: ignore[arg-type]

    return open_again


@pytest.fixture
def runs(open_runs: Callable[..., Runs]) -> Runs:
    return open_runs()
