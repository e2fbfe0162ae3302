"""Reproduce, publish and report: the headless notebooks, and what is committed held against the records."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_cli import PROFILE, Trained, mcar, train_tiny
from typer.testing import CliRunner

from mcar_lib.errors import ConfigError, MCARError, ResultsError
from mcar_lib.files import DISTRIBUTION, write_text
from mcar_lib.notebooks import jobs
from mcar_lib.notebooks.jobs import compare, drifted, publish, reproduce
from mcar_lib.notebooks.runner import DONE, select_notebooks
from mcar_lib.runs import ONE_SEED
from mcar_lib.runs.trainer import arithmetic_fingerprint
from mcar_lib.tables import Generated, fill_blocks

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "tiny.toml"
    path.write_text(PROFILE)
    return path


@pytest.fixture(scope="module")
def trained(profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_tiny(profile, tmp_path_factory.mktemp("trained"))


# ---- notebooks


def write_notebook(path: Path, *cells: str) -> Path:
    """A notebook with the parameters cell that a notebook has."""
    parameters = 'profiles = ["mini"]\nresults = "results"\ndata_root = ""'
    made = [nbformat.v4.new_code_cell(parameters, id="parameters", metadata={"tags": ["parameters"]})]
    made += [nbformat.v4.new_code_cell(source, id=f"cell-{index}") for index, source in enumerate(cells)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": kernel}), path)
    return path


class Reproduced(NamedTuple):
    """What four notebooks left behind: the first fails, the profile has no values for the third, the last dies."""

    folder: Path
    told: dict[str, object]
    error: str
    output: str


@pytest.fixture(scope="module")
def reproduced(profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Reproduced:
    folder = tmp_path_factory.mktemp("reproduced")
    notebooks, results = folder / "notebooks", folder / "results"
    told = "import json, os, sys, pathlib\n"
    told += "values = [profiles, results, data_root, sys.executable, os.getcwd()]\n"
    told += "pathlib.Path(results, 'told.json').write_text(json.dumps(values)); print('told')"
    write_notebook(notebooks / "01_broken.ipynb", "print('before')", "{}['absent']", "print('never')")
    write_notebook(notebooks / "02_told.ipynb", told)
    asks = "from mcar_lib.runs import Runs\nRuns(profiles[0], results).profile.axis('pooling')"
    write_notebook(notebooks / "04_absent.ipynb", asks, "print('never')")
    write_notebook(notebooks / "10_dead.ipynb", "import os\nos._exit(3)")
    foreign = folder / "jupyter" / "kernels" / "python3"  # another program's kernel of the same name
    foreign.mkdir(parents=True)
    (foreign / "kernel.json").write_text(json.dumps({"argv": ["false"], "display_name": "", "language": "python"}))
    printed = CliRunner()
    with pytest.MonkeyPatch.context() as patch, printed.isolation() as streams:
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        with pytest.raises(MCARError) as raised:
            reproduce(str(profile), [], results, folder, notebooks)
        output = streams[0].getvalue().decode()
    keys = ("profiles", "results", "data_root", "python", "cwd")
    values = json.loads((results / "told.json").read_text())
    return Reproduced(results / "tiny", dict(zip(keys, values, strict=True)), str(raised.value), output)


def test_a_failing_notebook_does_not_keep_others_from_running(reproduced: Reproduced) -> None:
    assert reproduced.error == "failed: 01_broken, 10_dead"
    assert "01_broken: FAILED in cell [4]: KeyError: 'absent'" in reproduced.output
    assert re.search(r"02_told: done \(\d+:\d\d\)", reproduced.output)


def test_what_a_notebook_prints_is_printed(reproduced: Reproduced) -> None:
    lines = reproduced.output.splitlines()
    assert lines[:2] == ["01_broken: running", "before"]
    assert "told" in lines
    assert "never" not in lines


def test_a_notebook_that_the_profile_has_no_values_for_is_left_out(reproduced: Reproduced) -> None:
    assert "04_absent: left out: profile tiny has no [ablations] for pooling; it has none" in reproduced.output


def test_only_a_whole_output_has_the_name_of_its_notebook(reproduced: Reproduced) -> None:
    left = sorted(path.name for path in (reproduced.folder / "notebooks").glob("*.ipynb"))
    assert left == ["01_broken.failed.ipynb", "02_told.ipynb", "10_dead.failed.ipynb"]


def test_notebooks_get_their_parameters(reproduced: Reproduced, profile: Path) -> None:
    parent = reproduced.folder.parent
    expected = {"profiles": [str(profile)], "results": str(parent), "data_root": str(parent.parent)}
    assert {key: reproduced.told[key] for key in expected} == expected


def test_notebooks_run_under_this_python_at_the_top_of_the_project(reproduced: Reproduced) -> None:
    assert reproduced.told["python"] == sys.executable
    assert Path(str(reproduced.told["cwd"])).samefile(ROOT)


def test_only_the_notebooks_asked_for_are_run_in_their_order(tmp_path: Path) -> None:
    for name in ("01_a", "02_b", "10_c"):
        (tmp_path / f"{name}.ipynb").touch()
    (tmp_path / "scratch.ipynb").touch()

    def chosen(*only: str) -> list[str]:
        return [path.stem for path in select_notebooks(tmp_path, only)]

    assert chosen() == ["01_a", "02_b", "10_c"]
    assert chosen("10,1") == chosen("10_c", "01_a") == chosen("10", "01", "1") == ["01_a", "10_c"]
    with pytest.raises(ConfigError, match=r"no notebook 03 .* 02_b"):
        chosen("03")


def test_a_folder_without_notebooks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are: none"):
        select_notebooks(tmp_path)


def test_results_that_cannot_be_written_are_an_error(tmp_path: Path, profile: Path) -> None:
    write_notebook(tmp_path / "notebooks" / "01_a.ipynb")
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="--results"):
        reproduce(str(profile), [], tmp_path / "file", None, tmp_path / "notebooks")


def write_differences(folder: Path, name: str, *rows: str) -> None:
    write_text(folder / "tables" / f"{name}.csv", "\n".join(["compared,difference,low,high,finding", *rows, ""]))


def test_committed_findings_stand_beside_those_made_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here, committed = tmp_path / "here", tmp_path / "committed"
    rows = ["max - avg,2.0,0.5,3.5,higher", f"N = 1 - 2,9.0,,,{ONE_SEED}", "lost,1.0,-1.0,3.0,none"]
    write_differences(committed, "difference", "MCAR - baseline,5.2,3.0,7.2,MCAR is better")
    write_differences(committed, "ablation_differences", *rows)
    write_differences(here, "difference", "MCAR - baseline,5.0,2.6,6.9,MCAR is better")
    write_differences(here, "ablation_differences", "max - avg,0.5,-1.0,2.0,none", f"N = 1 - 2,-9.0,,,{ONE_SEED}")
    compare(committed, here)
    page = here / "comparison_findings.md"
    assert capsys.readouterr().out.splitlines() == [
        "max - avg: committed +2.0 (+0.5 to +3.5), here +0.5 (-1.0 to +2.0): another finding (higher; here none)",
        "MCAR - baseline: committed +5.2 (+3.0 to +7.2), here +5.0 (+2.6 to +6.9): the same finding",
        f"findings: 1 the same, 1 another; 1 comparisons of one seed carry none, 1 are on one side only ({page})",
        f"numbers: 0 compared ({here / 'comparison_runs.md'})",
    ]
    kept = {row["compared"]: row for row in pd.read_csv(page.with_suffix(".csv")).to_dict("records")}
    assert kept["N = 1 - 2"]["verdict"] == ONE_SEED
    told = ["committed", "committed low", "committed high", "here", "here low", "here high", "verdict"]
    assert [kept["MCAR - baseline"][name] for name in told] == [5.2, 3.0, 7.2, 5.0, 2.6, 6.9, "the same finding"]
    assert "| lost | 1.0 | -1.0 | 3.0 | none | - | - | - | - | only committed |" in page.read_text()


def test_numbers_of_runs_stand_beside_those_made_here(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, committed = tmp_path / "here", tmp_path / "committed"
    for folder in (here, committed):
        shutil.copytree(trained.results / "tiny" / "runs", folder / "runs")
    content = json.loads(trained.record.read_text())
    content["metrics"]["last"]["fused"]["mAP"] += 0.5
    (committed / "runs" / trained.record.name).write_text(json.dumps(content))
    compare(committed, here)
    apart = pd.read_csv(here / "comparison_runs.csv").set_index(["run", "metric"])["difference"][content["label"]]
    assert apart.to_dict() == {"mAP fused": pytest.approx(-50), "mAP global": 0}
    assert re.search(r"numbers: \d+ compared, up to 50\.0 points of mAP apart", capsys.readouterr().out)


# ---- committed results


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of its own: one notebook and a README."""
    write_notebook(tmp_path / "notebooks" / "01_shown.ipynb", "print(*profiles, results)", "1 / 2")
    (tmp_path / "results").mkdir()
    (tmp_path / "README.md").write_text("# Title\n\n<!-- generated: main-results -->\nold\n<!-- end -->\n")
    (tmp_path / "pyproject.toml").write_text(f"{DISTRIBUTION}\n")
    monkeypatch.setattr("mcar_lib.files.PACKAGE", tmp_path / "mcar_lib")
    return tmp_path


def write_record(path: Path, run_id: str, arithmetic: str | None = None) -> None:
    content = {"format": 1, "run_id": run_id, "keys": {"arithmetic": arithmetic or arithmetic_fingerprint()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds = {"train_seconds": 1.0, "test_seconds": 0.0}
    losses = dict.fromkeys(("global_loss", "local_loss", "map_global", "map_local", "map_fused"))
    content |= {
        **{"label": run_id, "profile": "mini", "config": {"seed": 999}, "environment": {}, "metrics": None},
        "data": {
            **{"train": "train", "test": None, "train_images": 1, "test_images": None},
            **{"subset": False, "classes": ["cat"]},
        },
        "history": [{"epoch": 1, **losses, **seconds}],
        "cost": {"parameters": 1, "parameters_over_backbone": 1, "macs_per_image": 1, **seconds},
    }
    path.write_text(json.dumps(content))


def write_comparison(path: Path, a: str, b: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ends = {"difference": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}
    numbers = {**ends, **dict.fromkeys(("seed_error", "image_error", "degrees_of_freedom"), 1.0)}
    path.write_text(
        json.dumps({"format": 1, "a": [a], "b": [b], "runs": [a, b], "seeds": [1, 1], "paired": False, **numbers})
    )


@pytest.fixture
def published(project: Path) -> Path:
    """A project whose local results were made the committed ones."""
    local, committed = project / "results" / "local" / "mini", project / "results" / "mini"
    write_record(committed / "runs" / "earlier.json", "earlier")
    write_record(local / "runs" / "new.json", "new")
    write_record(local / "runs" / "stale.json", "stale", arithmetic="other")
    write_comparison(local / "comparisons" / "good.json", "new", "new")
    write_comparison(local / "comparisons" / "stale.json", "new", "stale")
    publish("mini")
    return project


def test_publishing_replaces_the_committed_records_by_current_local_ones(published: Path) -> None:
    committed = published / "results" / "mini"
    assert sorted(path.name for path in committed.iterdir()) == ["comparisons", "runs"]
    assert [path.name for path in (committed / "runs").iterdir()] == ["new.json"]
    assert [path.name for path in (committed / "comparisons").iterdir()] == ["good.json"]


def test_published_notebooks_show_outputs_and_nothing_that_changes_by_itself(published: Path) -> None:
    path = published / "notebooks" / "01_shown.ipynb"
    once = path.read_bytes()
    notebook = nbformat.read(path, as_version=4)
    parameters, shown, value = notebook.cells
    assert (parameters.id, parameters.metadata) == ("parameters", {"tags": ["parameters"]})
    assert (shown.metadata, shown.outputs[0]["text"]) == ({}, "mini results\n")
    assert value.outputs[0]["data"] == {"text/plain": "0.5"}
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    publish("mini")
    assert path.read_bytes() == once


def test_a_notebook_that_fails_to_be_published_is_left_as_it_was(published: Path) -> None:
    path = write_notebook(published / "notebooks" / "02_broken.ipynb", "1 / 0")
    before = path.read_bytes()
    with pytest.raises(MCARError, match="02_broken"):
        publish("mini")
    assert path.read_bytes() == before


def test_there_must_be_something_to_publish(project: Path) -> None:
    write_record(project / "results" / "local" / "mini" / "runs" / "stale.json", "stale", arithmetic="other")
    with pytest.raises(ResultsError, match="mcar reproduce"):
        publish("mini")


def draw(path: Path, change: int = 0) -> Path:
    """A picture of grey noise, and a stripe of it changed."""
    pixels = np.random.default_rng(0).integers(0, 200, (40, 60), dtype=np.uint8)
    pixels[:4] += change
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, format="png")
    return path


def write_pages(results: Path, readme: Path) -> None:
    """What the project's notebook would write."""
    written = Generated(results / "mini")
    written.put_text("tables/main.csv", "1\n")
    draw(written.folder / "figures/main.png")
    written.note("figures/main.png")
    write_text(results / "README.md", "page\n")
    fill_blocks(readme, {"main-results": "new\n"})


@pytest.fixture
def reported(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose notebook, here a plain function, writes one table, one figure and the pages, as committed."""

    def run(notebook: Path, output: Path, values: dict[str, str], named: object = None) -> str:
        write_pages(Path(values["results"]), Path(values["readme"]))
        return DONE

    def run_in_place(notebook: Path, scratch: Path) -> str:
        return run(notebook, scratch, {"results": str(project / "results"), "readme": str(project / "README.md")})

    monkeypatch.setattr(jobs, "run_notebook", run)
    monkeypatch.setattr(jobs, "run_in_place", run_in_place)
    write_record(project / "results" / "mini" / "runs" / "new.json", "new")
    write_text(project / "results" / "local" / "mini" / "tables" / "main.csv", "local\n")
    jobs.report()
    return project


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_drifts_after_a_report(reported: Path) -> None:
    assert mcar("report", "--check").exit_code == 0


def test_local_results_are_not_part_of_the_report(reported: Path) -> None:
    assert (reported / "results/local/mini/tables/main.csv").read_text() == "local\n"


def test_a_notebook_that_fails_is_named_by_the_check(project: Path) -> None:
    write_notebook(project / "notebooks" / "02_broken.ipynb", "1 / 0")
    with pytest.raises(MCARError, match="failed: 02_broken"):
        drifted(project)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results/mini/tables/main.csv", "2\n"),
        ("results/README.md", "edited\n"),
        ("README.md", "<!-- generated: main-results -->\nedited\n<!-- end -->\n"),
    ],
)
def test_a_check_names_what_drifted_and_changes_nothing(name: str, text: str, reported: Path) -> None:
    (reported / name).write_text(text)
    before = contents(reported)
    done = mcar("report", "--check")
    assert done.exit_code == 1
    assert done.stderr.splitlines()[1:] == [f"  {name}"]
    assert contents(reported) == before


def test_a_report_mends_what_drifted_and_leaves_what_no_notebook_writes(reported: Path) -> None:
    (reported / "results/mini/tables/main.csv").write_text("2\n")
    (reported / "results/mini/tables/own.csv").write_text("somebody's\n")
    done = mcar("report")
    assert "left as they are: results/mini/tables/main.yours.csv, results/mini/tables/own.csv" in done.output
    assert drifted(reported) == []
    assert (reported / "results/mini/tables/main.csv").read_text() == "1\n"
    assert (reported / "results/mini/tables/own.csv").read_text() == "somebody's\n"


def test_a_missing_table_drifts(reported: Path) -> None:
    missing = Path("results/mini/tables/main.csv")
    (reported / missing).unlink()
    assert drifted(reported) == [missing]


@pytest.mark.parametrize(("change", "names"), [(5, []), (50, [Path("results/mini/figures/main.png")])])
def test_a_figure_drifts_when_more_than_its_fonts_differ(change: int, names: list[Path], reported: Path) -> None:
    draw(reported / "results" / "mini" / "figures" / "main.png", change)
    assert drifted(reported) == names
