"""A result is shown only with data that was looked at, or with a line that says it was not."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from mcar_lib.cli import app
from mcar_lib.errors import ConfigError, DataError, WeightsError
from mcar_lib.notebooks.runner import DONE, FAILED, run_notebook
from mcar_lib.runs import Failure, Profile, RunConfig, Runs, find_or_train, make_config, open_runs
from mcar_lib.runs.records import Record

ROOT = Path(__file__).resolve().parent.parent
UNSEEN = "table: no data root was named that holds it; its records are shown without a look at the data"
PROFILE = """
name = "own"
title = "own photos"
seeds = [0]
bootstrap_resamples = 20
threads = 1
[run]
dataset = "table"
backbone = "mobilenet_v2"
weights = "none"
image_size = 32
num_regions = 2
epochs = 1
batch_size = 4
schedule = "onecycle"
jitter = 0.0
"""


def write_table(folder: Path, labels: tuple[str, ...] = ("cat", "dog", "cat;dog")) -> Path:
    """Six photos to train on and four to test, each with one of the labels in turn."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, lines = np.random.default_rng(0), ["path,labels,split"]
    for index in range(10):
        pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        lines.append(f"{index}.png,{labels[index % len(labels)]},{'train' if index < 6 else 'test'}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return write_table(tmp_path / "photos")


@pytest.fixture
def own_profile(tiny_backbone: str) -> Profile:
    run = {"dataset": "table", "backbone": tiny_backbone, "weights": "none", "image_size": 64, "num_regions": 2}
    config = make_config({**run, "epochs": 1, "batch_size": 4, "schedule": "onecycle", "jitter": 0.0})
    return Profile(name="own", title="own photos", seeds=(0,), bootstrap_resamples=20, run=config)


@pytest.fixture
def open_own(own_profile: Profile, tmp_path: Path) -> Callable[..., Runs]:
    """Opens one results folder with or without a data root, as a new session would."""

    def opened(data_root: Path | None = None) -> Runs:
        return Runs(own_profile, tmp_path / "results", data_root, tmp_path / "artifacts")

    return opened


@pytest.fixture
def config(own_profile: Profile) -> RunConfig:
    return own_profile.run


@pytest.fixture
def record(open_own: Callable[..., Runs], table: Path, config: RunConfig) -> Record:
    return open_own(table).run(config)


Opened = Callable[..., Runs]


def test_a_record_is_shown_without_a_data_root_and_says_so_once(
    open_own: Opened, record: Record, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    runs = open_own()
    assert [runs.find(config), runs.find(config)] == [record, record]
    assert capsys.readouterr().out.splitlines() == [UNSEEN]


def test_a_record_of_data_that_was_looked_at_says_nothing(
    open_own: Opened, record: Record, table: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert open_own(table).find(config) == record
    assert capsys.readouterr().out == ""


def test_a_data_root_that_is_not_there_shows_no_record(
    open_own: Opened, record: Record, config: RunConfig, tmp_path: Path
) -> None:
    runs = open_own(tmp_path / "nowhere")
    for ask in (runs.find, runs.run, lambda asked: find_or_train(runs, [asked])):
        with pytest.raises(DataError, match="nowhere: no such data root"):
            ask(config)


def test_a_data_root_from_the_environment_counts_as_named(
    open_own: Opened, record: Record, config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MCAR_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="nowhere: no such data root"):
        open_own().find(config)


def test_broken_data_shows_no_record(open_own: Opened, record: Record, table: Path, config: RunConfig) -> None:
    (table / "3.png").write_bytes(b"no photo")
    with pytest.raises(DataError, match=r"3\.png"):
        open_own(table).find(config)


def test_a_record_of_other_labels_is_not_shown(
    open_own: Opened, record: Record, config: RunConfig, tmp_path: Path
) -> None:
    other = write_table(tmp_path / "other", ("dog", "cat", "cat;dog"))
    assert open_own(other).find(config) is None


def test_starting_weights_that_a_path_names_must_be_there(
    open_own: Opened, record: Record, config: RunConfig, table: Path, tmp_path: Path
) -> None:
    runs, absent = open_own(table), config.vary(weights=str(tmp_path / "absent.pt"))
    with pytest.raises(WeightsError, match=r"no file .*absent\.pt"):
        runs.find(absent)
    failed, found = find_or_train(runs, [absent, config])  # the others are had all the same
    assert isinstance(failed, Failure)
    assert "absent.pt" in failed.error
    assert found == record


def test_a_package_of_weights_that_is_not_installed_is_told(
    open_own: Opened,
    record: Record,
    table: Path,
    config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    content = json.loads(record.path.read_text())
    content["config"]["weights"] = "bundled"
    record.path.write_text(json.dumps(content))

    def absent(backbone: str, weights: str) -> str:
        raise WeightsError("the package is not installed")

    monkeypatch.setattr("mcar_lib.runs.runs.weights_fingerprint", absent)
    capsys.readouterr()
    assert open_own(table).find(config.vary(weights="bundled")) is not None
    assert "not installed; records are shown without a look at the starting weights" in capsys.readouterr().out


def test_scenes_that_cannot_be_drawn_are_told(
    runs: Runs, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    record = runs.run(tiny_config)

    def full(config: RunConfig) -> Path:
        raise DataError("cannot write scenes here (disk full)")

    monkeypatch.setattr(runs.splits, "place_of", full)
    runs.verbose = True
    capsys.readouterr()
    found = runs.find(tiny_config)
    assert found is not None
    assert found.run_id == record.run_id
    assert capsys.readouterr().out.startswith("cannot write scenes here (disk full); its records are shown without")


def test_a_record_of_several_processes_says_what_they_change(
    open_own: Opened, record: Record, table: Path, config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    content = json.loads(record.path.read_text())
    content["environment"]["processes"] = 2
    record.path.write_text(json.dumps(content))
    capsys.readouterr()
    assert open_own(table).find(config) is not None
    told = capsys.readouterr().out
    assert "trained by 2 processes, so with batch statistics over 2 images each; with statistics_batch=2" in told


# ---- several profiles, one data root


@pytest.fixture
def profiles(tmp_path: Path) -> list[str]:
    paths = []
    for dataset in ("table", "coco2014", "scenes"):
        path = tmp_path / f"{dataset}.toml"
        path.write_text(PROFILE.replace("own", dataset, 1).replace('dataset = "table"', f'dataset = "{dataset}"'))
        paths.append(str(path))
    return paths


def test_a_data_root_is_that_of_the_profiles_whose_data_it_holds(
    profiles: list[str], table: Path, tmp_path: Path
) -> None:
    opened = open_runs(profiles, tmp_path, str(table))
    assert [runs.splits.data_root for runs in opened] == [table.resolve(), None, None]


def test_a_data_set_of_which_a_part_is_there_is_meant(profiles: list[str], table: Path, tmp_path: Path) -> None:
    (table / "val2014").mkdir()
    assert open_runs(profiles, tmp_path, str(table))[1].splits.data_root == table.resolve()


@pytest.mark.parametrize("chosen", [slice(0, 1), slice(0, 3)], ids=["one profile", "several"])
def test_a_data_root_that_holds_nothing_of_any_profile_stays_an_error(
    profiles: list[str], tmp_path: Path, chosen: slice
) -> None:
    (tmp_path / "empty").mkdir()
    runs = open_runs(profiles[chosen], tmp_path, str(tmp_path / "empty"))[0]
    with pytest.raises(DataError, match="empty"):
        runs.find(runs.profile.run)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"profile": 3}, "profile 3: a profile is named by a text"),
        ({"data_root": True}, "True is not a path"),
        ({"data_root": ["photos"]}, ".'photos'. is not a path"),
    ],
)
def test_a_parameter_of_another_type_is_told(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Runs(**values)  # type: ignore[arg-type]


def test_profiles_that_are_no_list_are_told() -> None:
    with pytest.raises(ConfigError, match="profiles is 'mini'; give a list of names"):
        open_runs("mini")


@pytest.mark.parametrize("nothing", [None, False, ""])
def test_no_data_root_may_be_said_in_several_ways(nothing: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MCAR_DATA", raising=False)
    assert Runs("smoke", data_root=nothing).splits.data_root is None  # type: ignore[arg-type]


# ---- commands and notebooks


@pytest.fixture
def mcar(tmp_path: Path, record: Record) -> Callable[..., Result]:
    """A command on the results that hold the record."""
    profile = tmp_path / "own.toml"
    profile.write_text(PROFILE.replace("mobilenet_v2", "tiny").replace("image_size = 32", "image_size = 64"))
    folders = ["--profile", str(profile), "--results", str(tmp_path / "results")]
    artifacts = ["--artifacts", str(tmp_path / "artifacts")]

    def command(name: str, *options: str) -> Result:
        return CliRunner().invoke(app, [name, *folders, *([] if name == "reproduce" else artifacts), *options])

    return command


def test_evaluate_shows_a_record_without_a_data_root_with_that_line(mcar: Callable[..., Result]) -> None:
    done = mcar("evaluate")
    assert done.exit_code == 0
    assert UNSEEN in done.output
    assert "record: " in done.output


@pytest.mark.parametrize("name", ["train", "evaluate", "reproduce"])
def test_commands_end_where_the_named_data_is_not_there(mcar: Callable[..., Result], tmp_path: Path, name: str) -> None:
    done = mcar(name, "--data-root", str(tmp_path / "nowhere"))
    assert done.exit_code == 3
    assert "nowhere: no such data root" in done.output
    assert "record" not in done.output


def test_export_ends_where_the_named_data_is_not_there(mcar: Callable[..., Result], tmp_path: Path) -> None:
    done = mcar("export", "--data-root", str(tmp_path / "nowhere"), "--output", str(tmp_path / "own.safetensors"))
    assert done.exit_code == 3
    assert not (tmp_path / "own.safetensors").exists()


def test_evaluate_has_no_record_for_other_data(mcar: Callable[..., Result], tmp_path: Path) -> None:
    other = write_table(tmp_path / "other", ("dog", "cat", "cat;dog"))
    done = mcar("evaluate", "--data-root", str(other))
    assert done.exit_code == 5
    assert "no current record" in done.output
    assert "with this data" in done.output


@pytest.mark.slow
def test_notebooks_on_a_table_leave_out_what_needs_boxes(
    tmp_path: Path, table: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MCAR_ARTIFACTS", str(tmp_path / "artifacts"))
    (tmp_path / "own.toml").write_text(PROFILE)
    profile, results = str(tmp_path / "own.toml"), str(tmp_path / "results")
    values = {"profile": profile, "profiles": [profile], "results": results, "data_root": str(table)}
    for number in ("01", "09"):
        (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
        assert run_notebook(path, tmp_path / path.name, values) == DONE
    told = (tmp_path / "09_attentional_regions.ipynb").read_text()
    assert "table test has no boxes to hold regions to" in told
    values["data_root"] = str(tmp_path / "nowhere")
    assert run_notebook(path, tmp_path / "failed.ipynb", values) == FAILED
    assert "nowhere: no such data root" in capfd.readouterr().out
