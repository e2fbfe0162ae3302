"""Badges and the installing cell for Colab: written for an address that somebody gives, and for no other."""

import json
import re
import shutil
import tomllib
from pathlib import Path

import nbformat
import pytest

from mcar_lib.errors import ConfigError
from mcar_lib.notebooks.colab import CELL_ID, open_on_colab
from mcar_lib.notebooks.runner import DONE, run_notebook

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = re.search(r"mcar_lib\.notebooks\.colab '\$\(REPOSITORY\)' (.*)", (ROOT / "Makefile").read_text("utf-8"))
HERE, FORK = "https://github.com/someone/mcar", "https://github.com/else-one/mcar.py"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of what is written to."""
    (tmp_path / "notebooks").mkdir()
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        shutil.copy(path, tmp_path / "notebooks")
    return tmp_path


def texts(project: Path) -> dict[str, str]:
    return {path.name: path.read_text("utf-8") for path in sorted(project.rglob("*")) if path.is_file()}


def test_the_address_is_named_in_the_project_its_badges_and_its_notebooks(project: Path) -> None:
    assert NUMBERS
    open_on_colab(project, HERE, NUMBERS[1].split())
    urls = tomllib.loads((project / "pyproject.toml").read_text("utf-8"))["project"]["urls"]
    assert urls["Repository"] == HERE
    readme = (project / "README.md").read_text("utf-8")
    links = re.findall(r"\(https://colab\.research\.google\.com/github/someone/mcar/blob/main/(\S+)\)", readme)
    assert links == ["notebooks/02_training.ipynb", "notebooks/09_attentional_regions.ipynb"]
    assert all((project / link).is_file() for link in links)
    for link in links:
        cells = nbformat.read(project / link, as_version=4).cells
        (at,) = (n for n, cell in enumerate(cells) if cell.id == CELL_ID)
        assert f"git clone -q --depth 1 {HERE} project" in cells[at].source
        assert "parameters" in cells[at + 1].metadata.tags


def test_a_fork_replaces_the_address_and_nothing_else(project: Path) -> None:
    open_on_colab(project, HERE, ["02"])
    before = texts(project)
    open_on_colab(project, f"{FORK}.git", ["02"])
    after = texts(project)
    assert {name for name in before if before[name] != after[name]} == {
        "02_training.ipynb",
        "README.md",
        "pyproject.toml",
    }
    assert {name: text.replace("else-one/mcar.py", "someone/mcar") for name, text in after.items()} == before


def test_the_rest_of_readme_and_notebook_stays(project: Path) -> None:
    before = texts(project)
    open_on_colab(project, HERE, ["02"])
    badges = re.compile("<!-- colab -->.*<!-- end of colab -->\n\n", re.DOTALL)
    assert badges.sub("", (project / "README.md").read_text("utf-8")) == before["README.md"]
    notebook = json.loads((project / "notebooks/02_training.ipynb").read_text("utf-8"))
    notebook["cells"] = [cell for cell in notebook["cells"] if cell["id"] != CELL_ID]
    assert notebook == json.loads(before["02_training.ipynb"])


@pytest.mark.parametrize("address", ["", "mcar", "https://github.com/someone", "https://example.org/someone/mcar", "-"])
def test_what_is_no_repository_changes_nothing(project: Path, address: str) -> None:
    before = texts(project)
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        open_on_colab(project, address, ["02"])
    assert texts(project) == before


def test_badges_stand_where_the_repository_is_named_and_nowhere_else() -> None:
    named = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["urls"].get("Repository")
    readme = (ROOT / "README.md").read_text("utf-8")
    links = re.findall(r"colab\.research\.google\.com/github/([\w-]+/[\w.-]+)/", readme)
    assert {f"https://github.com/{link}" for link in links} == ({named} if named else set())


@pytest.mark.slow
def test_elsewhere_the_cell_does_nothing(project: Path) -> None:
    """Run by a kernel, with the cell before it and none behind it."""
    open_on_colab(project, HERE, ["02"])
    path = project / "notebooks/02_training.ipynb"
    notebook = nbformat.read(path, as_version=4)
    (at,) = (n for n, cell in enumerate(notebook.cells) if cell.id == CELL_ID)
    notebook.cells = notebook.cells[: at + 2]
    nbformat.write(notebook, path)
    assert run_notebook(path, project / "out.ipynb", {}) == DONE
    assert nbformat.read(project / "out.ipynb", as_version=4).cells[at].outputs == []
