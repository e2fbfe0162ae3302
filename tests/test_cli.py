"""The command line: what it runs, what it prints, and its exit codes."""

import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner, Result

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
from mcar_lib.runs import Runs

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "reproduce",
    "publish",
    "report",
    "plan",
    "train",
    "grid",
    "status",
    "evaluate",
    "export",
    "predict",
    "submit",
    "data",
)
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


def train_tiny(profile: Path, folder: Path) -> Trained:
    results, artifacts = folder / "results", folder / "artifacts"
    options = ("--profile", profile, "--results", results, "--artifacts", artifacts)
    done = mcar("train", *options)
    assert done.exit_code == 0, done.output
    return Trained(options, results, artifacts, done.output)


@pytest.fixture(scope="module")
def trained(profile: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return train_tiny(profile, tmp_path_factory.mktemp("trained"))


# ---- usage and exit codes


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str) -> None:
    done = mcar(command, "--help")
    assert done.exit_code == 0
    assert "--help" in done.output


def test_help_lists_the_commands_and_exit_codes() -> None:
    text = " ".join(mcar("--help").output.split())
    assert all(command in text for command in COMMANDS)
    assert all(f"{code} " in text for code in (0, 1, 2, 3, 4, 5, 75))
    assert "129, 130, 143 stopped by" in text


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

    monkeypatch.setattr(Runs, "run", fail)
    done = mcar("train", "--profile", profile)
    assert done.exit_code == code
    assert done.stderr == "error: x\n"
    assert done.stdout == ""


def test_an_interrupt_exits_with_130(profile: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Runs, "run", interrupt)
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
        (("train", "--set", "lr=0.1"), 2, "lr: no such key; did you mean learning_rate? There are epochs, "),
        (("data", "check", "voc2008"), 2, "unknown data set 'voc2008'"),
        (("grid", "--on", "slurm", "--jobs", "2"), 2, "--jobs is for this machine"),
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
    monkeypatch.setattr(Runs, "find", lambda self, config, look=True: asked.append(config))
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


@pytest.fixture(scope="module")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "mine.safetensors"
    done = mcar("export", *trained.options, "--output", path)
    assert done.exit_code == 0, done.output
    return path


def with_header(path: Path, other: Path, **changes: object) -> Path:
    with safe_open(path, framework="pt") as stored:
        about = json.loads(stored.metadata()["mcar"])
    save_file(load_file(path), other, {"mcar": json.dumps({**about, **changes})})
    return other


def test_a_run_is_exported_by_its_id(trained: Trained, tmp_path: Path) -> None:
    """As by its settings, and settings beside it are refused."""
    run_id = json.loads(trained.record.read_text())["run_id"]
    one, other = tmp_path / "one.safetensors", tmp_path / "other.safetensors"
    assert mcar("export", *trained.options, "--output", one).exit_code == 0
    assert mcar("export", *trained.options, "--run", run_id, "--output", other).exit_code == 0
    assert one.read_bytes() == other.read_bytes()
    assert mcar("export", *trained.options, "--run", run_id, "--set", "seed=1", "--output", other).exit_code == 2
    unknown = mcar("export", *trained.options, "--run", "0" * 12, "--output", other)
    assert unknown.exit_code == 4
    assert "no record of a run 000000000000" in unknown.stderr


def test_the_card_loads_its_file(exported: Path) -> None:
    card = exported.with_suffix(".md").read_text()
    assert f'mcar_lib.load("{exported}")' in card
    assert "![" not in card


def test_an_exported_file_is_scored_as_its_header_says(trained: Trained, exported: Path) -> None:
    other = ("--set", "data_options.seed=3")
    plain = mcar("evaluate", *trained.options, "--checkpoint", exported)
    assert plain.exit_code == 0, plain.output
    wide = trained.record.parent / "wide.toml"
    wide.write_text(PROFILE.replace("image_size = 64\n", 'image_size = 96\npooling = "max"\n').replace("= 2", "= 3"))
    places = ("--profile", wide, "--artifacts", trained.artifacts, *other, "--checkpoint", exported)
    done = mcar("evaluate", *places)
    assert done.exit_code == 0, done.output
    for line in ("image_size = 64", "pooling = avg", "num_regions = 2", "precision = fp32"):
        assert f"{line}, from the file" in done.stdout
    assert f"dataset = scenes, from the profile {wide}" in done.stdout
    assert metric_lines(done.stdout) == metric_lines(plain.stdout)
    changed = mcar("evaluate", *places, "--set", "pooling=max")
    assert "pooling = max, from an option" in changed.stdout


def test_the_normalisation_of_an_exported_file_is_its_own(trained: Trained, exported: Path, tmp_path: Path) -> None:
    other = with_header(exported, tmp_path / "x.safetensors", mean=[0.9, 0.1, 0.5], std=[2.0, 3.0, 0.1])
    lines = [
        metric_lines(mcar("evaluate", *trained.options, "--checkpoint", each).stdout) for each in (exported, other)
    ]
    assert len(lines[1]) == 15
    assert lines[0] != lines[1]


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        (lambda names: ["moth", *names[1:]], "class 1 is 'moth' there and"),
        (lambda names: names[::-1], "the same in another order: class 1 is"),
    ],
)
def test_an_exported_file_of_other_classes_is_refused(
    classes: Callable[[list[str]], list[str]], words: str, trained: Trained, exported: Path, tmp_path: Path
) -> None:
    with safe_open(exported, framework="pt") as stored:
        names = json.loads(stored.metadata()["mcar"])["classes"]
    other = with_header(exported, tmp_path / "x.safetensors", classes=classes(names))
    done = mcar("evaluate", *trained.options, "--checkpoint", other)
    assert done.exit_code == 4
    assert words in done.stderr


def test_weights_without_a_header_say_that_the_profile_s_settings_are_used(trained: Trained) -> None:
    weights = next(trained.artifacts.glob("runs/*/model.safetensors"))
    done = mcar("evaluate", *trained.options, "--checkpoint", weights)
    assert f"{weights}: holds no settings" in done.stderr
    assert "pooling = avg, from the profile" in done.stdout


@pytest.mark.parametrize("name", ["notes.md", "notes.safetensors"])
def test_export_writes_over_no_file_of_another_kind(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("my notes")
    done = mcar("export", "--output", tmp_path / "notes.safetensors")
    assert done.exit_code == 2
    assert f"{tmp_path / name} is there" in done.stderr
    assert "notes.safetensors and notes.md" in done.stderr
    assert (tmp_path / name).read_text() == "my notes"


def test_export_writes_over_its_own_files(trained: Trained, exported: Path) -> None:
    before = exported.with_suffix(".md").read_text()
    assert mcar("export", *trained.options, "--output", exported).exit_code == 0
    assert exported.with_suffix(".md").read_text() == before


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


def on_a_bare_machine(*arguments: object, lacks: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """python -m mcar_lib where the packages for notebooks, tables and COCO, and others, are not installed."""
    code = f"""
        import runpy, sys
        from importlib.machinery import PathFinder

        find_spec = PathFinder.find_spec

        def find_installed(name, path=None, target=None):
            return None if name.split(".")[0] in {(*NOT_ON_A_BARE_MACHINE, *lacks)} else find_spec(name, path, target)

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


@pytest.mark.parametrize("arguments", [(), ("train",)], ids=["mcar", "mcar train"])
def test_help_needs_no_torch(arguments: tuple[str, ...]) -> None:
    done = on_a_bare_machine(*arguments, "--help", lacks=("torch", "numpy"))
    assert done.returncode == 0, done.stderr
    assert "Usage: mcar" in done.stdout


def test_a_command_that_needs_more_names_the_package(profile: Path, tmp_path: Path) -> None:
    done = on_a_bare_machine("reproduce", "--profile", profile, "--results", tmp_path)
    assert done.returncode == 2
    assert "needs the package pandas" in done.stderr
    assert "Traceback" not in done.stderr
