"""The wheel, installed outside of the checkout into an environment that has the declared dependencies and no others."""

import os
import subprocess
import sys
import venv
import zipfile
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_data import write_photo

ROOT = Path(__file__).resolve().parent.parent
KINDS = (
    "mcar_lib/py.typed",
    "mcar_lib/profiles/*.toml",
    "mcar_lib/data/*.toml",
    "mcar_lib/runs/*.py",
    "models/*",
    "results/published/*",
)
EXTRAS_ONLY = ("pandas", "matplotlib", "papermill", "jupyterlab", "ipywidgets", "pycocotools", "pytest")
USES_A_RELEASED_MODEL = """
import sys, mcar_lib
released = mcar_lib.load("voc-photos")
assert released.predict(["photo with blanks.jpg"]).scores.shape == (1, 20)
print(mcar_lib.__file__)
print(*(name for name in sys.argv[1:] if name in sys.modules))
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git tracks, as a user of the repository gets it."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "copy"
    subprocess.run(["git", "checkout-index", "--all", f"--prefix={copy}/"], cwd=ROOT, check=True)
    options = ["--no-deps", "--no-build-isolation", "-q", "-w", str(folder), str(copy)]
    subprocess.run([sys.executable, "-m", "pip", "wheel", *options], check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the programs of an environment with the wheel and, by links, all that it declares to need."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False)
    (site,) = folder.glob("lib/python*/site-packages")
    link_into(site, needed(wheel))
    python = str(folder / "bin" / "python")
    options = ["--no-deps", "--no-index", "--no-compile", "-q", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", python, "install", *options], check=True)
    return folder / "bin"


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    write_photo(tmp_path / "photo with blanks.jpg", side=80)
    return tmp_path


def needed(wheel: Path) -> list[metadata.Distribution]:
    """What the wheel needs, and what that needs, without any extra; as it is installed here."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(name).decode().splitlines()
    waiting = [Requirement(line.removeprefix("Requires-Dist: ")) for line in lines if line.startswith("Requires-Dist:")]
    found: dict[str, metadata.Distribution] = {}
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        is_needed = wanted.marker is None or wanted.marker.evaluate({"extra": ""})
        if is_needed and name not in found:
            found[name] = metadata.distribution(name)
            waiting += map(Requirement, found[name].requires or [])
    return list(found.values())


def link_into(site: Path, distributions: Iterable[metadata.Distribution]) -> None:
    for each in distributions:
        for top in {file.parts[0] for file in each.files or []} - {"..", "__pycache__"}:
            target = site / top
            if not target.exists():
                target.symlink_to(str(each.locate_file(top)))


def outside(program: Path, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A program of the environment, which knows nothing of this checkout and its settings."""
    kept = {key: os.environ[key] for key in ("PATH", "HOME", "LANG", "OMP_NUM_THREADS") if key in os.environ}
    return subprocess.run([program, *words], cwd=cwd, env=kept, capture_output=True, text=True)


def test_a_wheel_holds_all_that_works_without_a_checkout(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for kind in KINDS:
        paths = [path.relative_to(ROOT) for path in ROOT.glob(kind)]
        wanted = [str(path if path.parts[0] == "mcar_lib" else Path("mcar_lib", *path.parts[-2:])) for path in paths]
        assert wanted
        assert set(wanted) <= set(names)


def test_the_environment_has_none_of_the_extras(installed: Path, elsewhere: Path) -> None:
    """Or the other tests here would prove nothing."""
    for name in EXTRAS_ONLY:
        assert outside(installed / "python", "-c", f"import {name}", cwd=elsewhere).returncode == 1


def test_a_released_model_predicts(installed: Path, elsewhere: Path) -> None:
    done = outside(installed / "python", "-c", USES_A_RELEASED_MODEL, cwd=elsewhere)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(done.stdout.splitlines()[0]).is_relative_to(installed.parent)


@pytest.mark.parametrize("profile", ["paper", "mini", "photos"])
def test_the_plan_is_printed(profile: str, installed: Path, elsewhere: Path) -> None:
    done = outside(installed / "mcar", "plan", "--profile", profile, cwd=elsewhere)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"mcar train --profile {profile}" in done.stdout


def test_every_command_has_help(installed: Path, elsewhere: Path) -> None:
    done = outside(installed / "mcar", "--help", cwd=elsewhere)
    assert done.returncode == 0
    assert "evaluate" in done.stdout


def test_a_photo_is_predicted_from_the_terminal(installed: Path, elsewhere: Path) -> None:
    if " predict " not in outside(installed / "mcar", "--help", cwd=elsewhere).stdout:
        pytest.skip("this version has no mcar predict")
    done = outside(installed / "mcar", "predict", "photo with blanks.jpg", cwd=elsewhere)
    assert (done.returncode, done.stderr) == (0, "")
    assert "photo with blanks.jpg" in done.stdout
