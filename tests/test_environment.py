"""The ways to install this agree with each other, pin everything, and name no place to install from."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from mcar_lib.runs.environment import PeakMemory, describe_environment

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
PINS = [Requirement(line.removesuffix(" \\")) for line in LOCK if not line.startswith(" ")]
CONDA = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
# In two parts, so that this file does not name them.
REGISTRY_HOSTS = ("pypi." + "org", "pythonhosted." + "org", "anaconda." + "org", "pytorch." + "org/whl")
INSTALL_SOURCES = ("index" + "-url", "find" + "-links", "trusted" + "-host")


def declared() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    return [Requirement(line) for line in [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]]


@pytest.mark.parametrize("wanted", declared(), ids=str)
def test_a_declared_dependency_is_pinned_to_a_version_that_satisfies_it(wanted: Requirement) -> None:
    pins = [pin for pin in PINS if canonicalize_name(pin.name) == canonicalize_name(wanted.name)]
    assert len(pins) == 1
    assert pins[0].marker is None  # installed on every platform
    assert wanted.specifier.contains(version(pins[0]))


def test_each_lock_line_is_one_exact_version() -> None:
    exact = re.compile(r"==[0-9][0-9a-zA-Z.!+]*")
    assert [str(pin) for pin in PINS if pin.url or not exact.fullmatch(str(pin.specifier))] == []


def test_every_line_of_the_lock_is_a_pin_with_its_hashes() -> None:
    """pip then takes no file that is not one of those the lock was made from."""
    entries = re.split(r"\n(?! )", "\n".join(LOCK))
    one = re.compile(r"\S[^\n]* \\(\n    --hash=sha256:[0-9a-f]{64}( \\|$))+")
    assert len(entries) == len(PINS)
    assert [entry for entry in entries if not one.fullmatch(entry)] == []


@pytest.mark.parametrize("python", ["3.11.4", "3.12.0", "3.13.0", "3.14.0"])
def test_the_lock_has_each_package_once_for_each_python(python: str) -> None:
    environment = {"python_full_version": python, "python_version": python.rpartition(".")[0]}
    there = [pin for pin in PINS if pin.marker is None or pin.marker.evaluate(environment)]
    names = [canonicalize_name(pin.name) for pin in there]
    assert len(names) == len(set(names))


def test_conda_installs_the_very_same_pins() -> None:
    pip_section = next(entry["pip"] for entry in CONDA if isinstance(entry, dict))
    assert pip_section == ["-r requirements.lock"]  # nothing without a hash may stand beside what has them
    assert [entry for entry in CONDA if isinstance(entry, str) and entry != "pip"] == [f"python={conda_python()}"]


def test_conda_python_is_one_that_the_project_supports() -> None:
    newest = f"{conda_python()}.99"  # conda takes the newest patch release of 3.11
    assert SpecifierSet(PROJECT["requires-python"]).contains(newest)


def test_no_tracked_file_names_a_registry() -> None:
    """A reader's own pip configuration decides where packages come from."""
    forbidden = re.compile("|".join(re.escape(word) for word in REGISTRY_HOSTS + INSTALL_SOURCES))
    found = {name: forbidden.search(text) for name, text in tracked_texts().items()}
    assert {name: match[0] for name, match in found.items() if match} == {}


@pytest.mark.parametrize("name", ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG"])
def test_a_setting_that_acts_like_another_machine_is_in_the_record(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = describe_environment()["settings"]
    monkeypatch.setenv(name, "x")
    assert describe_environment()["settings"] == {**before, name: "x"}


def version(pin: Requirement) -> str:
    return next(iter(pin.specifier)).version


def conda_python() -> str:
    return next(entry.removeprefix("python=") for entry in CONDA if str(entry).startswith("python="))


def tracked_texts() -> dict[str, str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    contents = {str(path.relative_to(ROOT)): path.read_bytes() for path in paths if path.is_file()}
    return {name: content.decode(errors="ignore") for name, content in contents.items() if b"\0" not in content}


@pytest.mark.skipif(sys.platform != "linux" or torch.cuda.is_available(), reason="measures a process on Linux")
def test_peak_memory_is_not_that_of_an_earlier_run() -> None:
    earlier = PeakMemory()
    if not earlier.known:
        pytest.skip("this system does not let a process forget its peak")
    large = torch.ones(2**28)  # 1 GiB
    before = earlier.bytes
    del large
    own = PeakMemory()
    small = torch.ones(2**26)
    assert before is not None
    assert own.bytes is not None
    assert small.nbytes < own.bytes < before - 2**29


def test_peak_memory_that_cannot_be_told_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(Path, "write_text", refuse)
    assert PeakMemory().bytes is None
