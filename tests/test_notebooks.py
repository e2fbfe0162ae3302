"""The notebooks: the committed ones follow from the committed records, and every cell of each runs under smoke."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from real_photos import real_coco2014, real_voc2007

from mcar_lib.notebooks import jobs
from mcar_lib.notebooks.clean import cleaned
from mcar_lib.notebooks.runner import DONE, run_notebook
from mcar_lib.runs import Runs, load_profile, read_records

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROFILES = sorted(path.parent.name for path in (ROOT / "results").glob("*/runs"))


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_stored_outputs_follow_from_the_committed_records() -> None:
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-cell-timeout=900", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run([*command, *map(str, NOTEBOOKS)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"\d+ passed", done.stdout)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_cell_holds_literals_and_outputs_hold_no_path_of_a_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for line in tagged[0].source.splitlines():
        assert re.fullmatch(r'\w+ = ("[^"]*"|\["[^\]]*\])(  # .*)?', line), line
    outputs = str([cell.get("outputs") for cell in notebook.cells])
    assert not re.search(r"/(home|root|work|tmp|Users)/", outputs)
    assert "Traceback" not in outputs
    assert all(cell.get("execution_count") for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem[:2] > "02"], ids=lambda path: path.stem)
def test_a_results_notebook_answers_its_question_at_the_top(path: Path) -> None:
    """The answer is the output of the first code cell, written when the last ones have run."""
    first = next(cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    assert "**Answer.**" in str(first.outputs)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_is_in_its_clean_form(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert cleaned(text) == text


def test_what_jupyter_rewrites_by_itself_is_left_out() -> None:
    """As JupyterLab saves a notebook that somebody only opened: the kernel's version, view state, timings, widgets."""
    path = NOTEBOOKS[0]
    notebook = json.loads(path.read_text(encoding="utf-8"))
    notebook["metadata"]["language_info"] = {"name": "python", "version": "3.99.1", "mimetype": "text/x-python"}
    notebook["metadata"]["kernelspec"]["display_name"] = "My Python"
    notebook["metadata"]["widgets"] = {"application/vnd.jupyter.widget-state+json": {}}
    code = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    code["metadata"] |= {"execution": {"iopub.execute_input": "2026-01-01"}, "scrolled": True, "papermill": {}}
    code["outputs"].append(
        {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": {}}, "metadata": {}}
    )
    assert cleaned(json.dumps(notebook)) == path.read_text(encoding="utf-8")


def test_a_changed_cell_is_not_cleaned_away() -> None:
    text = NOTEBOOKS[0].read_text(encoding="utf-8")
    changed = text.replace('profile = \\"mini\\"', 'profile = \\"smoke\\"', 1)
    assert changed != text
    assert cleaned(changed) == changed


def test_git_cleans_notebooks_with_that_filter(tmp_path: Path) -> None:
    """In a checkout of its own: a notebook saved with other metadata is no change to git."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "core.autocrlf=false"]
    shutil.copy(ROOT / ".gitattributes", tmp_path)
    shutil.copy(NOTEBOOKS[0], tmp_path / "notebooks.ipynb")
    (tmp_path / "notebooks").mkdir()
    saved = tmp_path / "notebooks" / NOTEBOOKS[0].name
    shutil.copy(NOTEBOOKS[0], saved)
    command = f"{sys.executable} -m mcar_lib.notebooks.clean"
    for arguments in (
        ["init", "-q"],
        ["config", "filter.notebook.clean", command],
        ["add", "."],
        ["commit", "-qm", "a"],
    ):
        subprocess.run([*git, *arguments], cwd=tmp_path, check=True)
    notebook = json.loads(saved.read_text(encoding="utf-8"))
    notebook["metadata"]["language_info"]["version"] = "3.99.1"
    saved.write_text(json.dumps(notebook), encoding="utf-8")
    status = subprocess.run(["git", "diff", "--stat"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert status.stdout == ""


@pytest.mark.parametrize("profile", PROFILES)
def test_committed_records_were_made_by_todays_arithmetic_data_and_weights(profile: str) -> None:
    """Or by one that came out the same and is named in fingerprints.SAME_NUMBERS."""
    roots = {"photos": real_voc2007, "photos-coco": real_coco2014}
    runs = Runs(profile, data_root=roots[profile]() if profile in roots else None, verbose=False)
    records = read_records(ROOT / "results" / profile)
    assert [record.path.name for record in records if not record.is_current(runs.keys(record.config))] == []


@pytest.mark.parametrize("profile", PROFILES)
def test_the_runs_of_the_main_comparison_are_committed(profile: str) -> None:
    configs = [record.config for record in read_records(ROOT / "results" / profile)]
    run, seeds = load_profile(profile).run, load_profile(profile).seeds
    assert all(run.vary(local_stream=local, seed=seed) in configs for local in (False, True) for seed in seeds)


@pytest.mark.slow
def test_a_tampered_record_is_noticed(tmp_path: Path) -> None:
    """A number that no run gave makes a table drift, and so `make test` fail."""
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("local", "tables", "figures"))
    config = load_profile("photos").base("pooling").vary(pooling="gwp")
    records = read_records(tmp_path / "results/photos")
    (record,) = (each for each in records if each.config.vary(learning_rate=config.learning_rate) == config)
    content = json.loads(record.path.read_text())
    content["metrics"]["last"]["fused"]["mAP"] += 0.01
    record.path.write_text(json.dumps(content))
    (notebook,) = (path for path in NOTEBOOKS if path.stem.endswith("pooling"))
    assert run_notebook(notebook, tmp_path / "out.ipynb", {"results": str(tmp_path / "results")}) == DONE
    for name, same in (("ablation_pooling", False), ("ablation_pooling_differences", True)):
        table = f"results/photos/tables/{name}.csv"
        assert jobs.same_file(ROOT / table, tmp_path / table) is same
