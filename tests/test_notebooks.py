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

from mcar_lib.ablations import studies
from mcar_lib.config import load_profile
from mcar_lib.experiment import Workspace, main_grid, read_records
from mcar_lib.reproduce import SHOWN_IN_NOTEBOOKS, drifted, reproduce, runs_of

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.slow
def test_stored_outputs_follow_from_the_committed_records() -> None:
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-cell-timeout=900", "-p", "no:cacheprovider", "-q"]
    done = subprocess.run([*command, *map(str, NOTEBOOKS)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"\d+ passed", done.stdout)


@pytest.mark.slow
def test_smoke_runs_every_notebook_and_a_second_time_trains_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MCAR_ARTIFACTS", str(tmp_path / "artifacts"))
    reproduce("smoke", only=[], results=tmp_path / "results", data_root=None)  # raises if a notebook fails
    records = sorted((tmp_path / "results/smoke/runs").glob("*.json"))
    executed = sorted((tmp_path / "results/smoke/notebooks").glob("*.ipynb"))
    assert [path.name for path in executed] == [path.name for path in NOTEBOOKS]
    written = {path: path.stat().st_mtime_ns for path in (*records, *executed)}
    wanted = {run.model_dump_json() for path in NOTEBOOKS for run in runs_of(path, load_profile("smoke"))}
    assert len(records) == len(wanted)
    for name in ("main_results", *(f"ablation_{study}" for study in studies(load_profile("smoke")))):
        assert (tmp_path / f"results/smoke/tables/{name}.csv").exists()
        assert (tmp_path / f"results/smoke/figures/{name}.png").exists()

    reproduce("smoke", only=[], results=tmp_path / "results", data_root=None)
    assert sorted((tmp_path / "results/smoke/runs").glob("*.json")) == records
    assert {path: path.stat().st_mtime_ns for path in written} == written


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_parameters_cell_holds_literals_and_outputs_hold_no_path_of_a_machine(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1
    for line in tagged[0].source.splitlines():
        assert re.fullmatch(r'\w+ = "[^"]*"(  # .*)?', line), line
    outputs = str([cell.get("outputs") for cell in notebook.cells])
    assert not re.search(r"/(home|root|work|tmp|Users)/", outputs)
    assert "Traceback" not in outputs
    assert all(cell.get("execution_count") for cell in notebook.cells if cell.cell_type == "code")


@pytest.mark.parametrize("profile", sorted(path.parent.name for path in (ROOT / "results").glob("*/runs")))
def test_committed_records_were_made_by_todays_arithmetic_data_and_weights(profile: str) -> None:
    roots = {"photos": real_voc2007, "photos-coco": real_coco2014}
    workspace = Workspace(profile, data_root=roots[profile]() if profile in roots else None, verbose=False)
    records = read_records(ROOT / "results" / profile)
    wanted = [config for group in main_grid(workspace.profile).values() for config in group]
    if profile == SHOWN_IN_NOTEBOOKS:
        wanted += [config for study in studies(workspace.profile).values() for config in study.runs]
    stale = [record.path.name for record in records if record.content["keys"] != workspace.keys(record.config)]
    assert stale == []
    assert [config.label for config in wanted if not any(record.config == config for record in records)] == []


@pytest.mark.slow
def test_a_tampered_record_is_noticed(tmp_path: Path) -> None:
    """A number that no run gave makes the tables drift, and so `make test` fail."""
    shutil.copytree(ROOT / "results", tmp_path / "results", ignore=shutil.ignore_patterns("local"))
    shutil.copy(ROOT / "README.md", tmp_path)
    config = studies(load_profile(SHOWN_IN_NOTEBOOKS))["pooling"].runs[-1]
    (record,) = (each for each in read_records(tmp_path / "results" / SHOWN_IN_NOTEBOOKS) if each.config == config)
    content = json.loads(record.path.read_text())
    content["metrics"]["last"]["fused"]["mAP"] += 0.01
    record.path.write_text(json.dumps(content))
    assert Path(f"results/{SHOWN_IN_NOTEBOOKS}/tables/ablation_pooling.csv") in drifted(tmp_path)
