"""The command line: what it runs, what it prints, its exit codes, and the headless notebooks behind `reproduce`."""

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from mcar_lib import report
from mcar_lib.cli import app, parse_settings
from mcar_lib.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    MCARError,
    ResultsError,
    TrainingError,
    WeightsError,
)
from mcar_lib.experiment import Workspace, arithmetic_fingerprint
from mcar_lib.reproduce import compare, drifted, publish, rebuild, reproduce, select_notebooks

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ("reproduce", "publish", "report", "plan", "train", "evaluate", "export", "submit", "data")
PROFILE = """
name = "tiny"
title = "one epoch on sixteen scenes"
seeds = [0]
bootstrap_resamples = 20

[run]
dataset = "scenes"
data_options = { num_train = 16, num_test = 16, side = 64, seed = 3 }
backbone = "mobilenet_v2"
weights = "none"
image_size = 64
num_regions = 2
epochs = 1
batch_size = 8
"""
NOT_ON_A_BARE_MACHINE = (
    "IPython", "ipykernel", "ipywidgets", "jupyter_client", "matplotlib", "nbclient", "nbformat", "pandas", "papermill",
    "pycocotools", "seaborn", "sklearn", "torchmetrics",
)  # fmt: skip


def mcar(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class Trained(NamedTuple):
    """One run that was trained from the command line, and the options that name it."""

    options: tuple[object, ...]
    results: Path
    artifacts: Path
    output: str

    @property
    def record(self) -> Path:
        return next((self.results / "tiny" / "runs").glob("*.json"))


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("profile") / "tiny.toml"
    path.write_text(PROFILE)
    return path


@pytest.fixture(scope="module")
def trained(profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    results, artifacts = folder / "results", folder / "artifacts"
    options = ("--profile", profile, "--results", results, "--artifacts", artifacts)
    done = mcar("train", *options)
    assert done.exit_code == 0, done.output
    return Trained(options, results, artifacts, done.output)


# ---- usage and exit codes


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str) -> None:
    done = mcar(command, "--help")
    assert done.exit_code == 0
    assert "--help" in done.output


def test_help_lists_the_commands_and_exit_codes() -> None:
    text = " ".join(mcar("--help").output.split())
    assert all(command in text for command in COMMANDS)
    assert all(f"{code} " in text for code in (0, 1, 2, 3, 4, 5, 130))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (TrainingError("x"), 1),
        (ConfigError("x"), 2),
        (DataError("x"), 3),
        (WeightsError("x"), 4),
        (CheckpointError("x"), 4),
        (ResultsError("x"), 5),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_error_is_one_message_and_the_exit_code_of_its_family(
    error: MCARError, code: int, profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Workspace, "run", fail)
    done = mcar("train", "--profile", profile)
    assert done.exit_code == code
    assert done.stderr == "error: x\n"
    assert done.stdout == ""


def test_an_interrupt_exits_with_130(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Workspace, "run", interrupt)
    assert mcar("train", "--profile", profile).exit_code == 130


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("nonsense",), 2, "nonsense"),
        (("train", "--nonsense"), 2, "--nonsense"),
        (("train", "--set", "nonsense=1"), 2, "nonsense"),
        (("train", "--set", "epochs=many"), 2, "epochs"),
        (("train", "--set", "epochs"), 2, "KEY=VALUE"),
        (("train", "--profile", "nonsense"), 2, "smoke"),
        (("evaluate", "--release"), 2, "--checkpoint"),
        (("reproduce", "--only", "99"), 2, "02_training"),
        (("data", "check", "--dataset", "voc2007", "--data-root", "/nonsense"), 3, "/nonsense"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_wrong_call_says_what_is_wrong(arguments: tuple[str, ...], code: int, named: str) -> None:
    done = mcar(*arguments)
    assert done.exit_code == code
    assert named in done.stderr
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    ("texts", "values"),
    [
        (["epochs=3", "learning_rate=0.1", "flip=false"], {"epochs": 3, "learning_rate": 0.1, "flip": False}),
        (["weights=none", "backbone = timm:resnet18"], {"weights": "none", "backbone": "timm:resnet18"}),
        (["data_options.side=64", "data_options.seed=1"], {"data_options": {"side": 64, "seed": 1}}),
        (["data_options={side=64}"], {"data_options": {"side": 64}}),
        (["milestones=[1, 2]"], {"milestones": [1, 2]}),
        (['weights=C:\\models\\"my" é.pth'], {"weights": 'C:\\models\\"my" é.pth'}),
    ],
    ids=str,
)
def test_settings_are_toml_or_else_strings(texts: list[str], values: dict[str, Any]) -> None:
    assert parse_settings(texts) == values


@pytest.mark.parametrize("texts", [["epochs"], ["=3"], ["epochs=1", "epochs=2"], ["epochs=1", "epochs.x=2"]], ids=str)
def test_settings_that_are_not_key_and_value_are_an_error(texts: list[str]) -> None:
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        parse_settings(texts)


@pytest.mark.parametrize(
    ("setting", "options"),
    [
        ("data_options.side=96", {"num_train": 16, "num_test": 16, "side": 96, "seed": 3}),
        ("dataset=voc2007", {}),
    ],
)
def test_data_options_are_kept_for_the_same_data_set_only(
    setting: str, options: dict[str, int], profile: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(Workspace, "find", lambda self, config: asked.append(config))
    mcar("evaluate", "--profile", profile, "--set", setting)
    assert asked[0].data_options == options


# ---- train, evaluate, data


def test_training_prints_its_record_and_its_metrics(trained: Trained) -> None:
    fused = json.loads(trained.record.read_text())["metrics"]["last"]["fused"]
    assert f"record: {trained.record}" in trained.output
    assert re.search(rf"fused +0\.5 +{100 * fused['mAP']:.2f} +{100 * fused['at']['0.5']['CP']:.2f}", trained.output)
    assert len(metric_lines(trained.output)) == 15  # three streams at five operating points


def test_training_again_trains_nothing(trained: Trained) -> None:
    again = mcar("train", *trained.options)
    assert again.exit_code == 0
    assert "epoch 1/1" in trained.output
    assert "epoch 1/1" not in again.output
    assert metric_lines(again.output) == metric_lines(trained.output)


def test_evaluating_prints_what_training_printed(trained: Trained) -> None:
    done = mcar("evaluate", *trained.options)
    assert done.exit_code == 0
    assert metric_lines(done.output) == metric_lines(trained.output)


def test_evaluating_the_weights_of_a_run_gives_its_metrics(trained: Trained) -> None:
    weights = next(trained.artifacts.glob("runs/*/model.safetensors"))
    done = mcar("evaluate", *trained.options, "--checkpoint", weights)
    assert done.exit_code == 0, done.output
    assert metric_lines(done.output) == metric_lines(trained.output)


def test_evaluating_what_was_never_trained_is_a_results_error(trained: Trained) -> None:
    done = mcar("evaluate", *trained.options, "--set", "seed=7")
    assert done.exit_code == 5
    assert "mcar train" in done.stderr


@pytest.mark.parametrize("release", [(), ("--release",)], ids=["ours", "release"])
def test_weights_that_cannot_be_read_are_an_error(release: tuple[str, ...], trained: Trained, tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"no weights")
    done = mcar("evaluate", *trained.options, "--checkpoint", broken, *release)
    assert done.exit_code == 4
    assert str(broken) in done.stderr


def test_data_check_counts_each_class(trained: Trained) -> None:
    options = ("num_train=16", "num_test=16", "side=64", "seed=3")
    settings = [part for option in options for part in ("--set", option)]
    done = mcar("data", "check", "--dataset", "scenes", "--artifacts", trained.artifacts, *settings)
    keys = json.loads(trained.record.read_text())["keys"]
    assert done.exit_code == 0, done.output
    assert f"scenes test: 16 images, fingerprint {keys['test_data']}" in done.output
    assert re.search(r"^ *tvmonitor +\d+ +\d+ +\d+ +\d+$", done.output, re.MULTILINE)


def metric_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.strip().startswith(("global ", "local ", "fused "))]


# ---- a machine without Jupyter and pandas


def on_a_bare_machine(*arguments: object) -> subprocess.CompletedProcess[str]:
    """python -m mcar_lib where the packages for notebooks, tables and COCO are not installed."""
    code = f"""
        import runpy, sys
        from importlib.machinery import PathFinder

        find_spec = PathFinder.find_spec

        def find_installed(name, path=None, target=None):
            return None if name.split(".")[0] in {NOT_ON_A_BARE_MACHINE} else find_spec(name, path, target)

        PathFinder.find_spec = find_installed
        sys.argv = {["mcar", *map(str, arguments)]}
        runpy.run_module("mcar_lib", run_name="__main__")
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_training_needs_no_notebook_package(trained: Trained) -> None:
    done = on_a_bare_machine("train", *trained.options, "--set", "seed=1", "--set", "local_stream=false")
    assert done.returncode == 0, done.stderr
    assert len(metric_lines(done.stdout)) == 15


def test_a_command_that_needs_more_names_the_package(profile: Path, tmp_path: Path) -> None:
    done = on_a_bare_machine("reproduce", "--profile", profile, "--results", tmp_path)
    assert done.returncode == 2
    assert "needs the package pandas" in done.stderr
    assert "Traceback" not in done.stderr


# ---- notebooks


def write_notebook(path: Path, *cells: str) -> Path:
    """A notebook with the parameters cell that all notebooks have."""
    parameters = 'profile = "mini"\nresults = "results"\ndata_root = ""'
    made = [nbformat.v4.new_code_cell(parameters, id="parameters", metadata={"tags": ["parameters"]})]
    made += [nbformat.v4.new_code_cell(source, id=f"cell-{index}") for index, source in enumerate(cells)]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=made, metadata={"kernelspec": kernel}), path)
    return path


class Reproduced(NamedTuple):
    """What four notebooks left behind: the first fails, the profile has no values for the third, the last dies."""

    folder: Path
    told: dict[str, str]
    error: str
    output: str


@pytest.fixture(scope="module")
def reproduced(profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Reproduced:
    folder = tmp_path_factory.mktemp("reproduced")
    notebooks, results = folder / "notebooks", folder / "results"
    told = "import json, os, sys, pathlib\n"
    told += "values = [profile, results, data_root, sys.executable, os.getcwd()]\n"
    told += "pathlib.Path(results, 'told.json').write_text(json.dumps(values)); print('told')"
    write_notebook(notebooks / "01_broken.ipynb", "print('before')", "{}['absent']", "print('never')")
    write_notebook(notebooks / "02_told.ipynb", told)
    write_notebook(notebooks / "04_ablation_pooling.ipynb", "print('never')")
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
    keys = ("profile", "results", "data_root", "python", "cwd")
    values = json.loads((results / "told.json").read_text())
    return Reproduced(results / "tiny", dict(zip(keys, values, strict=True)), str(raised.value), output)


def test_a_failing_notebook_does_not_keep_others_from_running(reproduced: Reproduced) -> None:
    assert reproduced.error == "failed: 01_broken, 10_dead"
    assert "01_broken: FAILED in cell [4]: KeyError: 'absent'" in reproduced.output
    assert re.search(r"02_told: done \(\d+:\d\d\)", reproduced.output)


def test_what_a_notebook_prints_is_printed(reproduced: Reproduced) -> None:
    lines = reproduced.output.splitlines()
    assert lines[1:3] == ["01_broken: running", "before"]
    assert "told" in lines
    assert "never" not in lines


def test_an_ablation_that_the_profile_has_no_values_for_is_left_out(reproduced: Reproduced) -> None:
    assert reproduced.output.startswith("04_ablation_pooling: left out, profile tiny has no [ablations] for it")


def test_only_a_whole_output_has_the_name_of_its_notebook(reproduced: Reproduced) -> None:
    left = sorted(path.name for path in (reproduced.folder / "notebooks").iterdir())
    assert left == ["01_broken.failed.ipynb", "02_told.ipynb", "10_dead.failed.ipynb"]


def test_notebooks_get_their_parameters(reproduced: Reproduced, profile: Path) -> None:
    parent = reproduced.folder.parent
    expected = {"profile": str(profile), "results": str(parent), "data_root": str(parent.parent)}
    assert {key: reproduced.told[key] for key in expected} == expected


def test_notebooks_run_under_this_python_at_the_top_of_the_project(reproduced: Reproduced) -> None:
    assert reproduced.told["python"] == sys.executable
    assert Path(reproduced.told["cwd"]).samefile(ROOT)


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


def test_committed_results_stand_beside_those_made_here(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here, committed = tmp_path / "here", tmp_path / "committed"
    for folder in (here, committed):
        shutil.copytree(trained.results / "tiny" / "runs", folder / "runs")
    content = json.loads(trained.record.read_text())
    content["metrics"]["last"]["fused"]["mAP"] += 0.5
    (committed / "runs" / trained.record.name).write_text(json.dumps(content))
    compare(committed, here)
    table = pd.read_csv(here / "comparison.csv")
    verdicts = table.set_index(["run", "metric"])["verdict"][content["label"]]
    assert verdicts.to_dict() == {"mAP fused": "different", "mAP global": "same"}
    assert "different" in capsys.readouterr().out
    assert "different" in (here / "comparison.md").read_text()


# ---- committed results


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkout of its own around the working folder: one notebook, published figures, a README."""
    write_notebook(tmp_path / "notebooks" / "01_shown.ipynb", "print(profile, results)", "1 / 2")
    shutil.copytree(ROOT / "results" / "published", tmp_path / "results" / "published")
    (tmp_path / "README.md").write_text("# Title\n\n<!-- generated: main-results -->\nold\n<!-- end -->\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_record(path: Path, run_id: str, arithmetic: str | None = None) -> None:
    content = {"format": 1, "run_id": run_id, "keys": {"arithmetic": arithmetic or arithmetic_fingerprint()}}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, "config": {"seed": 999}}))


def write_comparison(path: Path, a: str, b: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"a": [a], "b": [b], "runs": [a, b]}))


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


def test_publishing_rebuilds_what_follows_from_the_records(published: Path) -> None:
    assert "old" not in (published / "README.md").read_text()
    assert drifted(published) == []


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
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def reported(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose report is one table and one figure, as committed."""

    def write_profile(folder: Path, _: object) -> list[Path]:
        table = folder / "tables" / "main.csv"
        table.parent.mkdir(exist_ok=True)
        table.write_text("1\n")
        return [table, draw(folder / "figures" / "main.png")]

    monkeypatch.setattr(report, "write_profile", write_profile)
    write_record(project / "results" / "mini" / "runs" / "new.json", "new")
    write_record(project / "results" / "local" / "mini" / "runs" / "new.json", "new")
    rebuild(project)
    return project


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_nothing_drifts_after_a_report(reported: Path) -> None:
    assert mcar("report", "--check").exit_code == 0


def test_local_results_are_not_part_of_the_report(reported: Path) -> None:
    assert not (reported / "results" / "local" / "mini" / "tables").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results/mini/tables/main.csv", "2\n"),
        ("results/mini/tables/stale.csv", "1\n"),
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
    mcar("report")
    assert mcar("report", "--check").exit_code == 0


def test_a_missing_table_drifts(reported: Path) -> None:
    missing = Path("results/mini/tables/main.csv")
    (reported / missing).unlink()
    assert drifted(reported) == [missing]


@pytest.mark.parametrize(("change", "names"), [(5, []), (50, [Path("results/mini/figures/main.png")])])
def test_a_figure_drifts_when_more_than_its_fonts_differ(change: int, names: list[Path], reported: Path) -> None:
    draw(reported / "results" / "mini" / "figures" / "main.png", change)
    assert drifted(reported) == names
