"""The archive for the PASCAL server: what is written, what is refused, and the command that scores VOC2012 test."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from submissions import members, read_submission
from test_data import write_voc
from typer.testing import CliRunner, Result

from mcar_lib.cli import app
from mcar_lib.data import load_voc, prepare
from mcar_lib.data.squares import ResizedImages
from mcar_lib.data.voc import VOC_CLASSES
from mcar_lib.errors import DataError, ResultsError
from mcar_lib.notebooks.jobs import compare_runs
from mcar_lib.runs import STREAMS, Record, Runs, make_config, read_records
from mcar_lib.runs.outcome import Outcome
from mcar_lib.runs.records import run_id_of
from mcar_lib.runs.trainer import arithmetic_fingerprint, build_model
from mcar_lib.submission import write_voc2012_submission
from mcar_lib.training import evaluate

IDS = ("2008_000006", "2008_000011", "2011_003276")
SCORES = torch.rand((3, 20), generator=torch.Generator().manual_seed(0))
PROFILE = """
name = "tiny"
title = "an untrained model on small photos"
seeds = [0]
bootstrap_resamples = 20

[run]
dataset = "voc2007"
backbone = "mobilenet_v2"
weights = "none"
image_size = 64
num_regions = 2
epochs = 1
batch_size = 8
"""


@pytest.fixture
def written(tmp_path: Path) -> Path:
    return write_voc2012_submission(tmp_path / "new" / "scores.tar.gz", IDS, VOC_CLASSES, SCORES)


# ---- the archive


def test_the_archive_has_one_file_for_each_class_and_one_line_for_each_image(written: Path) -> None:
    files = members(written)
    assert set(files) == {f"results/VOC2012/Main/comp2_cls_test_{name}.txt" for name in VOC_CLASSES}
    for name, text in files.items():
        assert text.endswith("\n")
        lines = text.splitlines()
        assert [line.split(" ")[0] for line in lines] == list(IDS)
        assert all(re.fullmatch(r"\S+ \d\.\d+", line) for line in lines), name
    column = VOC_CLASSES.index("dog")
    scores = [float(line.split()[1]) for line in files["results/VOC2012/Main/comp2_cls_test_dog.txt"].splitlines()]
    assert torch.equal(torch.tensor(scores), SCORES[:, column])


def test_what_was_written_is_read_back_exactly(written: Path) -> None:
    found = read_submission(written)
    assert found.image_ids == IDS
    assert torch.equal(found.scores.float(), SCORES)


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=20, max_size=20))
def test_every_finite_score_keeps_its_value(tmp_path_factory: pytest.TempPathFactory, row: list[float]) -> None:
    scores = torch.tensor([row])
    path = write_voc2012_submission(tmp_path_factory.mktemp("any") / "a.tar.gz", IDS[:1], VOC_CLASSES, scores)
    assert "e" not in "".join(text.split()[1] for text in members(path).values())
    assert torch.equal(read_submission(path).scores.float(), scores)


def test_the_same_scores_give_the_same_bytes(written: Path, tmp_path: Path) -> None:
    order = torch.arange(19, -1, -1)
    classes = [VOC_CLASSES[column] for column in order]
    again = write_voc2012_submission(tmp_path / "other name.tar.gz", list(IDS), classes, SCORES[:, order])
    assert again.read_bytes() == written.read_bytes()
    assert b"scores" not in written.read_bytes()[:64]  # gzip would note the file's name and date


def test_a_write_that_fails_leaves_what_was_there(written: Path) -> None:
    before = written.read_bytes()
    with pytest.raises(DataError):
        write_voc2012_submission(written, IDS, VOC_CLASSES, SCORES * torch.nan)
    assert written.read_bytes() == before
    assert list(written.parent.iterdir()) == [written]


def test_a_folder_that_cannot_be_written_is_a_results_error(written: Path) -> None:
    with pytest.raises(ResultsError, match="cannot be written"):
        write_voc2012_submission(written / "below a file.tar.gz", IDS, VOC_CLASSES, SCORES)


@pytest.mark.parametrize(
    ("ids", "classes", "scores", "message"),
    [
        (IDS, VOC_CLASSES, SCORES[:2], r"scores should be \(3, 20\), images by classes, found \(2, 20\)"),
        (IDS, VOC_CLASSES, SCORES[:, :19], r"found \(3, 19\)"),
        (IDS, VOC_CLASSES, SCORES[0], r"found \(20,\)"),
        (IDS, VOC_CLASSES[:19], SCORES[:, :19], "the classes should be the 20 of VOC"),
        (IDS, (*VOC_CLASSES[:19], "dog"), SCORES, "the classes should be the 20 of VOC"),
        ((*IDS[:2], IDS[0]), VOC_CLASSES, SCORES, "1 image ids are repeated"),
        ((*IDS[:2], "a b"), VOC_CLASSES, SCORES, "an image id is one word, found 'a b'"),
        ((), VOC_CLASSES, SCORES[:0], "no images"),
        (IDS, VOC_CLASSES, SCORES.index_fill(1, torch.tensor(3), torch.inf), "of 2008_000006 for boat is inf"),
        (IDS, VOC_CLASSES, SCORES.index_fill(0, torch.tensor(1), torch.nan), "of 2008_000011 for aeroplane is nan"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " in value else "",
)
def test_scores_that_do_not_fit_are_not_written(
    ids: tuple[str, ...], classes: tuple[str, ...], scores: torch.Tensor, message: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        write_voc2012_submission(tmp_path / "a.tar.gz", ids, classes, scores)
    assert list(tmp_path.iterdir()) == []


# ---- photos without labels


@pytest.fixture
def voc2012_test(tmp_path: Path) -> Path:
    """A data root with VOC2012 test as its archive holds it: photos and their list, no labels, no boxes."""
    root = tmp_path / "data"
    lists = write_voc(root, {image_id: {} for image_id in IDS}, "test", "2012")
    for path in [*lists.glob("*_test.txt"), *(root / "VOCdevkit/VOC2012/Annotations").iterdir()]:
        path.unlink()
    return root


def test_photos_without_labels_say_so(voc2012_test: Path) -> None:
    images = load_voc(voc2012_test, "2012", "test", labelled=False)
    assert images.title == "VOC2012 test without labels, subset of 3 of 10,991 images"
    assert images.ids == IDS
    assert images.targets.tolist() == [[0] * 20] * 3
    assert not images.has_boxes
    assert not images.select([0]).labelled
    assert len(prepare(images)) == 16


def test_photos_with_labels_do_not(tmp_path: Path) -> None:
    write_voc(tmp_path, {"x": {}}, "test", "2012")
    assert load_voc(tmp_path, "2012", "test").labelled


def test_a_list_that_is_not_there_is_still_an_error_without_labels(voc2012_test: Path) -> None:
    with pytest.raises(DataError, match="no such image list"):
        load_voc(voc2012_test, "2012", "trainval", labelled=False)


# ---- mcar submit


def mcar(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def options(voc2012_test: Path, tmp_path: Path) -> tuple[object, ...]:
    profile = tmp_path / "tiny.toml"
    profile.write_text(PROFILE)
    folders = ("--data-root", voc2012_test, "--artifacts", tmp_path / "artifacts", "--results", tmp_path / "results")
    return ("--profile", profile, *folders, "--output", tmp_path / "out" / "scores.tar.gz")


def run_config() -> dict[str, object]:
    return tomllib.loads(PROFILE)["run"]


def test_submit_writes_the_scores_of_a_checkpoint(
    options: tuple[object, ...], voc2012_test: Path, tmp_path: Path
) -> None:
    config = make_config(run_config())
    model = build_model(config.vary(seed=3), 20)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "weights.safetensors")
    done = mcar("submit", "voc2012", *options, "--checkpoint", tmp_path / "weights.safetensors")
    assert done.exit_code == 0, done.output
    assert "VOC2012 test without labels, subset of 3 of 10,991 images, 3 images, 20 classes" in done.stdout
    assert "the server wants scores of all 10,991 images" in done.stdout
    found = read_submission(tmp_path / "out" / "scores.tar.gz")
    photos = ResizedImages(load_voc(voc2012_test, "2012", "test", labelled=False), 64)
    expected = evaluate(model, photos, verbose=False).fused
    assert found.image_ids == IDS
    assert torch.equal(found.scores.float(), expected)


def test_submit_takes_the_weights_of_the_run_that_the_options_name(
    options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"arithmetic": arithmetic_fingerprint(), "weights": "w"}
    name = run_id_of(make_config(run_config()), keys)
    monkeypatch.setattr(Runs, "find", lambda *_: Record(tmp_path, {"run_id": name, "keys": keys}))
    weights = tmp_path / "artifacts" / "runs" / name / "model.safetensors"
    done = mcar("submit", "voc2012", *options)
    assert done.exit_code == 4
    assert f"{weights}: the weights of this run are not on this machine" in done.stderr
    model = build_model(make_config(run_config()), 20)
    weights.parent.mkdir(parents=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, weights)
    done = mcar("submit", "voc2012", *options)
    assert done.exit_code == 0, done.output


def test_submit_takes_weights_that_todays_arithmetic_left_for_a_record_of_a_former_one(
    options: tuple[object, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {"arithmetic": "former", "weights": "w"}
    monkeypatch.setattr(Runs, "find", lambda *_: Record(tmp_path, {"run_id": "0123", "keys": keys}))
    config = make_config(run_config())
    name = run_id_of(config, {**keys, "arithmetic": arithmetic_fingerprint()})
    weights = tmp_path / "artifacts" / "runs" / name / "model.safetensors"
    weights.parent.mkdir(parents=True)
    state = build_model(config, 20).state_dict()
    save_file({key: value.contiguous() for key, value in state.items()}, weights)
    done = mcar("submit", "voc2012", *options)
    assert done.exit_code == 0, done.output


def test_submit_takes_the_checkpoints_of_the_release(options: tuple[object, ...], tmp_path: Path) -> None:
    settings = ("--set", "backbone=resnet50")
    model = build_model(make_config(run_config()).vary(backbone="resnet50"), 20)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "release.pth")
    done = mcar("submit", "voc2012", *options, *settings, "--checkpoint", tmp_path / "release.pth", "--release")
    assert done.exit_code == 0, done.output
    assert len(read_submission(tmp_path / "out" / "scores.tar.gz").image_ids) == 3


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        (("voc2007",), 2, "voc2012"),
        (("voc2012", "--release"), 2, "--checkpoint"),
        (("voc2012",), 5, "mcar train"),
        (("voc2012", "--checkpoint", "/nonsense.pth"), 4, "/nonsense.pth"),
        (("voc2012", "--data-root", "/nonsense"), 3, "no VOC2012 here"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_wrong_call_says_what_is_wrong(
    arguments: tuple[str, ...], code: int, named: str, options: tuple[object, ...], tmp_path: Path
) -> None:
    done = mcar("submit", *options, *arguments)
    assert done.exit_code == code, done.output
    assert named in done.stderr
    assert not (tmp_path / "out").exists()


def test_submit_names_the_photos_that_are_missing(
    options: tuple[object, ...], voc2012_test: Path, tmp_path: Path
) -> None:
    (voc2012_test / "VOCdevkit/VOC2012/JPEGImages" / f"{IDS[1]}.jpg").unlink()
    model = build_model(make_config(run_config()), 20)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    done = mcar("submit", "voc2012", *options, "--checkpoint", tmp_path / "weights.pth")
    assert done.exit_code == 3
    assert f"{IDS[1]}.jpg: cannot read" in done.stderr


# ---- a run on VOC2012, whose test labels nobody has


@pytest.fixture
def voc2012(voc2012_test: Path) -> Path:
    """The same data root with a few photos of trainval, which have labels."""
    labels = {f"2009_00000{number}": {"dog": 1} if number % 2 else {"cat": 1} for number in range(8)}
    write_voc(voc2012_test, labels, "trainval", "2012")
    return voc2012_test


def trained(options: tuple[object, ...], *more: object) -> Result:
    return mcar("train", *options[:-2], "--set", "dataset=voc2012", *more)


def test_a_run_whose_test_labels_nobody_has_is_trained_and_submitted(
    options: tuple[object, ...], voc2012: Path, tmp_path: Path
) -> None:
    done = trained(options)
    assert done.exit_code == 0, done.output
    assert "VOC2012 test has no public labels, so there is nothing to score; next: mcar submit voc2012" in done.stdout
    assert "mAP" not in done.stdout
    command = shlex.split(done.stdout.partition("next: mcar ")[2])
    done = mcar(*command, *options[-2:])
    assert done.exit_code == 0, done.output
    found = read_submission(tmp_path / "out" / "scores.tar.gz")
    (weights,) = tmp_path.glob("artifacts/runs/*/model.safetensors")
    model = build_model(make_config(run_config()), 20)
    model.load_state_dict(load_file(weights))
    photos = ResizedImages(load_voc(voc2012, "2012", "test", labelled=False), 64)
    assert torch.equal(found.scores.float(), evaluate(model, photos, verbose=False).fused)


def test_a_record_without_test_labels_has_no_metrics(
    options: tuple[object, ...], voc2012: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("mcar_lib.training.loop.evaluate")  # nothing is scored after an epoch either
    assert trained(options).exit_code == 0
    (record,) = read_records(tmp_path / "results" / "tiny")
    assert record.content["metrics"] is None
    assert (record.content["data"]["test"], record.content["data"]["test_images"]) == (None, None)
    (epoch,) = record.content["history"]
    assert {epoch[f"map_{stream}"] for stream in STREAMS} == {None}
    assert epoch["global_loss"] > 0
    with pytest.raises(ResultsError, match=r"no metrics: VOC2012 test has no public labels"):
        record.map()
    assert compare_runs(tmp_path / "results" / "tiny", tmp_path / "results" / "tiny").empty
    done = mcar("evaluate", *options[:-2], "--set", "dataset=voc2012")
    assert done.exit_code == 5
    assert "no metrics" in done.stderr


def test_a_run_without_test_labels_is_the_same_without_the_test_photos(
    options: tuple[object, ...], voc2012: Path, tmp_path: Path
) -> None:
    (voc2012 / "VOCdevkit/VOC2012/ImageSets/Main/test.txt").unlink()
    assert "next: mcar submit voc2012" in trained(options).stdout
    runs = Runs("smoke", tmp_path / "results", voc2012, tmp_path / "artifacts")
    config = make_config(run_config()).vary(dataset="voc2012")
    before = runs.keys(config)
    (voc2012 / "VOCdevkit/VOC2012/ImageSets/Main/test.txt").write_text("\n".join(IDS))
    again = Runs("smoke", tmp_path / "results", voc2012, tmp_path / "artifacts")
    assert again.keys(config) == before
    for scored in (lambda: again.data(config).test, lambda: again.scores(config)):
        with pytest.raises(DataError, match="nothing to score; mcar submit voc2012"):
            scored()


def test_a_run_with_test_labels_of_one_s_own_is_scored(
    options: tuple[object, ...], voc2012: Path, tmp_path: Path
) -> None:
    write_voc(voc2012, {image_id: {"dog": 1} for image_id in IDS}, "test", "2012")
    done = trained(options)
    assert done.exit_code == 0, done.output
    assert "mAP" in done.stdout
    (record,) = read_records(tmp_path / "results" / "tiny")
    assert record.map() == record.content["history"][0]["map_fused"]


def test_a_run_that_stopped_goes_on_without_test_labels(
    options: tuple[object, ...], voc2012: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Outcome, "save", stop)
        assert trained(options).exit_code == 130
    monkeypatch.delattr("mcar_lib.training.loop.training_step")
    assert trained(options).exit_code == 0
