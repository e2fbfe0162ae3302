"""What was measured beside what was published: the verdict, where there is none, and the report of an evaluation."""

import dataclasses
import hashlib
import re
from pathlib import Path

import pytest
from test_cli import mcar
from test_data import write_voc
from test_paper import PAPER, record_of
from test_release import VOC_LABELS, build, write_release

from mcar_lib.backbones import weights_fingerprint
from mcar_lib.data import load_image_set
from mcar_lib.data.voc import VOC_CLASSES
from mcar_lib.files import write_json
from mcar_lib.runs import OPERATING_POINTS, STREAMS, Record, RunConfig
from mcar_lib.runs.published import (
    RELEASE_BOUND,
    REPORT_LINE,
    TRAINED_BOUND,
    Beside,
    beside_record,
    beside_release,
    evaluated,
)
from mcar_lib.runs.trainer import arithmetic_fingerprint

ROW = "coco2014-resnet101-448"
PUBLISHED = 83.8


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four photos of VOC 2007 test."""
    folder = tmp_path_factory.mktemp("data")
    write_voc(folder, VOC_LABELS, "test")
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release checkpoint of a published data set, backbone and input size."""
    path = tmp_path_factory.mktemp("release") / "voc2007-mobilenetv2-gwp-256-4-0.5.pth.tar"
    return write_release(build("mobilenet_v2", 20), path, "mobilenet_v2")


def trained(row: str = ROW, subset: bool = False, **changes: object) -> Record:
    content = record_of(row, subset)
    content["config"] = PAPER.row(row).vary(**changes).model_dump(mode="json")
    return Record(Path("record.json"), content)


def write_row(results: Path) -> tuple[object, ...]:
    """Leaves the record of a row there; gives the options that find it."""
    content = record_of(ROW, subset=False)
    keys = {"arithmetic": arithmetic_fingerprint(), "weights": weights_fingerprint("resnet101", "imagenet")}
    write_json(results / "paper" / "runs" / "row.json", {**content, "keys": keys})
    return ("--profile", "paper", "--row", ROW, "--results", results, "--artifacts", results / "artifacts")


def of_release(root: Path, whole: bool = True, **changes: object) -> Beside:
    images = load_image_set("voc2007", "test", root)
    test = dataclasses.replace(images, official_size=len(images)) if whole else images
    config = PAPER.row("voc2007-resnet101-448").vary(**changes)
    return beside_release(config, test, {"fused": {"mAP": 0.9473}})


# ---- the verdict


@pytest.mark.parametrize("bound", [RELEASE_BOUND, TRAINED_BOUND])
@pytest.mark.parametrize("sign", [1, -1])
def test_values_agree_up_to_the_bound_and_no_further(bound: float, sign: int) -> None:
    assert Beside(PUBLISHED, PUBLISHED + sign * bound, bound).agrees is True
    assert Beside(PUBLISHED, PUBLISHED + sign * (bound + 0.001), bound).agrees is False


def test_a_trained_row_stands_beside_the_published_figure() -> None:
    beside = beside_record(trained())
    assert beside is not None
    assert beside.line == (
        "published mAP 83.8 %, ours 83.21 %, difference -0.59 points: it does not agree within 0.5 points"
    )


def test_a_released_checkpoint_stands_beside_the_published_figure(root: Path) -> None:
    assert of_release(root).line == (
        "published mAP 94.8 %, ours 94.73 %, difference -0.07 points: it agrees within 0.1 points"
    )


@pytest.mark.parametrize(
    "change", [{"seed": 3}, {"precision": "fp32"}, {"statistics_batch": 4}, {"evaluate_every": 60}]
)
def test_what_the_recipe_leaves_open_keeps_no_row_from_being_compared(change: dict[str, object]) -> None:
    beside = beside_record(trained(**change))
    assert beside is not None
    assert beside.agrees is False


@pytest.mark.parametrize(
    ("change", "words"), [({"epochs": 5}, "epochs 5 in place of 60"), ({"pooling": "max"}, "pooling max")]
)
def test_another_recipe_is_not_compared(change: dict[str, object], words: str) -> None:
    beside = beside_record(trained(**change))
    assert beside is not None
    assert beside.agrees is None
    assert words in beside.line


@pytest.mark.parametrize("change", [{"num_regions": 2}, {"threshold": 0.3}, {"local_stream": False}])
def test_a_checkpoint_that_is_scored_otherwise_is_not_compared(change: dict[str, object], root: Path) -> None:
    beside = of_release(root, **change)
    assert beside.agrees is None
    assert f"{next(iter(change))} {next(iter(change.values()))} in place of" in beside.line


def test_a_subset_is_not_compared_whether_of_a_row_or_a_checkpoint(root: Path) -> None:
    record = trained(subset=True)
    titles = {"train": "VOC2007 trainval", "test": "VOC2007 test, subset of 4 of 4,952 images"}
    record.content["data"].update(titles)
    for beside in (beside_record(record), of_release(root, whole=False)):
        assert beside is not None
        assert beside.agrees is None
        assert beside.line.endswith(
            "not compared: photos are missing (VOC2007 test, subset of 4 of 4,952 images), and the published figure is "
            "of all"
        )


def test_a_run_that_nothing_is_published_of_stands_beside_nothing() -> None:
    assert beside_record(trained(image_size=224)) is None


def test_a_checkpoint_that_nothing_is_published_of_says_so(root: Path) -> None:
    assert of_release(root, image_size=64).line == (
        "not compared with the published figures: there is none of voc2007, resnet101, 64 px"
    )


# ---- the report


def test_the_report_of_a_row_has_all_that_was_scored_and_the_label_metrics_that_were_published(tmp_path: Path) -> None:
    evaluated(trained(), "last").write(tmp_path / "report.md")
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    for stream in STREAMS:
        for point in OPERATING_POINTS:
            assert f"| {stream} | {point} | 83.21 | 81.00 |" in text
    assert "| cat | 80.00 | 80.00 | 80.00 |" in text
    assert "| learning_rate | 0.01 |" in text
    assert "| all | published | 85.0 | 72.1 | 78.0 | 88.0 | 73.9 | 80.3 |" in text
    assert "| top-3 | ours, at 0.6 top-3 | 81.00 |" in text


def test_the_report_of_a_checkpoint_names_file_data_and_versions(root: Path, checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    places = ("--data-root", root, "--artifacts", tmp_path, "--report", report)
    done = mcar("evaluate", "--release", "--checkpoint", checkpoint, *places)
    assert done.exit_code == 0, done.output
    text = report.read_text(encoding="utf-8")
    assert f"SHA-256 `{hashlib.sha256(checkpoint.read_bytes()).hexdigest()}`" in text
    assert "VOC2007 test, subset of 4 of 4,952 images" in text
    assert "published mAP 88.1 %" in done.stdout
    assert "not compared: photos are missing" in done.stdout
    assert "not compared: photos are missing" in text
    assert "\n\nPublished mAP 88.1 %" in text
    assert re.search(r"\| torch \| \d", text)
    assert [f"| {name} |" in text for name in VOC_CLASSES] == [True] * 20
    assert "learning" not in text, "what it was trained with is not known"


def test_both_commands_show_a_row_that_was_trained_beside_the_published_figure(tmp_path: Path) -> None:
    options = write_row(tmp_path)
    for command in ("train", "evaluate"):
        done = mcar(command, *options)
        assert done.exit_code == 0, done.output
        assert "published mAP 83.8 %, ours 83.21 %" in done.stdout


def test_the_report_says_which_epoch_it_is_of(tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    done = mcar("evaluate", *write_row(tmp_path), "--best", "--report", report)
    assert done.exit_code == 0, done.output
    text = report.read_text(encoding="utf-8")
    assert "epoch 1, the best one on the test set" in text
    assert "| fused | 0.5 | 84.01 |" in text
    assert "ours 83.21 %" in text, "the last epoch stands beside the published figure"


def test_a_run_of_another_profile_is_told_nothing_of_published_figures(tmp_path: Path, tiny_config: RunConfig) -> None:
    content = {**record_of(ROW, subset=False), "config": tiny_config.model_dump(mode="json")}
    assert "ublished" not in evaluated(Record(tmp_path / "x.json", content), "last")._text()


def test_a_report_is_written_over_a_report_and_over_nothing_else(tmp_path: Path) -> None:
    report = tmp_path / "report.md"
    command = ("evaluate", *write_row(tmp_path))
    report.write_text("my own")
    done = mcar(*command, "--report", report)
    assert (done.exit_code, report.read_text()) == (2, "my own")
    assert f"{report} is there and is no report that mcar evaluate wrote" in done.stderr
    report.write_text(REPORT_LINE)
    assert mcar(*command, "--report", report).exit_code == 0
    assert mcar(*command, "--report", tmp_path / "report.txt").exit_code == 2
