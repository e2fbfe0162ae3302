"""The paper profile: every published figure has its run, with the release's recipe, and every one of them runs."""

import json
import re
from pathlib import Path

import pytest
import torch
from test_data import write_photo, write_voc
from typer.testing import CliRunner

from mcar_lib.cli import app, parse_settings
from mcar_lib.data.coco import COCO_CLASSES
from mcar_lib.data.voc import VOC_CLASSES
from mcar_lib.errors import ConfigError
from mcar_lib.files import write_json
from mcar_lib.notebooks.runner import DONE, run_notebook
from mcar_lib.runs import RunConfig, Runs, load_profile, read_records
from mcar_lib.runs.measures import LABEL_METRICS, OPERATING_POINTS, STREAMS, count_macs
from mcar_lib.runs.plan import TUNING, all_runs, key_of, parse_throughput, plan, published_map
from mcar_lib.runs.trainer import arithmetic_fingerprint, build_model, dry_run
from mcar_lib.tables import read_published

ROOT = Path(__file__).resolve().parent.parent
PAPER = load_profile("paper")
EXCEPTION = ("mobilenet_v2", 448)


# ---- the rows


def test_each_published_figure_has_one_row_that_is_named_after_it() -> None:
    published = read_published("map.csv")
    names = [f"{cell.dataset}-{cell.backbone}-{cell.image_size}" for cell in published.itertuples()]
    assert len(names) == 16
    assert sorted(names) == sorted(PAPER.rows)
    assert [key_of(PAPER.row(name)) for name in names] == list(
        zip(published["dataset"], published["backbone"], published["image_size"], strict=True)
    )


@pytest.mark.parametrize("name", PAPER.rows)
def test_each_row_has_the_recipe_of_the_release(name: str) -> None:
    row = PAPER.row(name)
    exception = (row.backbone, row.image_size) == EXCEPTION
    rate, milestones, pooling = (0.1, (10, 30, 50), "avg") if exception else (0.01, (30, 50), "gwp")
    assert (row.learning_rate, row.milestones, row.pooling) == (rate, milestones, pooling)
    assert (row.epochs, row.batch_size, row.schedule, row.gamma, row.backbone_factor) == (60, 16, "step", 0.1, 0.1)
    assert (row.momentum, row.weight_decay, row.flip, row.jitter) == (0.9, 1e-4, True, 0.3)
    assert (row.weights, row.num_regions, row.threshold, row.selection) == ("imagenet", 4, 0.5, "top")
    assert row.local_stream


def test_a_row_that_is_not_there_names_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"voc2007-vgg16-448.*voc2007-resnet101-448"):
        PAPER.row("voc2007-vgg16-448")


def test_published_map_is_the_published_table() -> None:
    published = read_published("map.csv")
    keys = zip(published["dataset"], published["backbone"], published["image_size"], strict=True)
    assert published_map() == dict(zip(keys, published["percent"], strict=True))


# ---- the plan


def test_the_plan_has_the_published_targets_and_official_counts() -> None:
    runs = {run.name: run for run in plan(PAPER)}
    assert set(runs) == set(PAPER.rows)
    voc, coco = runs["voc2007-resnet101-448"], runs["coco2014-resnet101-576"]
    assert (voc.published, voc.train_images, voc.test_images, voc.steps) == (94.8, 5011, 4952, 60 * 314)
    assert (coco.published, coco.train_images, coco.test_images, coco.steps) == (84.5, 82081, 40137, 60 * 5131)
    assert voc.macs == 60 * (3 * 5011 + 4952) * voc.macs_per_image
    assert runs["voc2012-resnet50-448"].macs == 60 * 3 * 11540 * runs["voc2012-resnet50-448"].macs_per_image


@pytest.mark.parametrize(("every", "tests"), [(1, 60), (7, 9), (30, 2), (60, 1), (100, 1)])
def test_the_plan_counts_the_tests_that_a_run_asks_for_and_the_last(every: int, tests: int) -> None:
    row = {"voc": {"dataset": "voc2007", "evaluate_every": every}}
    (run,) = plan(PAPER.model_copy(update={"rows": row}))
    assert run.macs == (60 * 3 * 5011 + tests * 4952) * run.macs_per_image


def test_the_plan_shows_what_tests_every_epoch_and_at_the_end_only_add() -> None:
    runs = {run.name: run for run in plan(PAPER)}
    names = ("tests every epoch", "at the end only")
    voc = runs["voc2007-resnet101-448"]
    assert [voc.cells({})[name] for name in names] == ["32.9 %", "0.5 %"]
    speed = {"": voc.macs_per_image * 4952 / 3600 / 1e12}  # at which one test takes an hour
    assert [voc.cells(speed)[name] for name in names] == ["60.00 h", "1.00 h"]
    assert [runs["voc2012-resnet50-448"].cells({})[name] for name in names] == [None, None]


def test_planned_operations_are_those_that_a_model_is_counted_with() -> None:
    config = RunConfig(backbone="mobilenet_v2", weights="none", image_size=64, num_regions=2)
    counted = count_macs(build_model(config, 20), 64)
    planned = plan(load_profile("smoke"))[1]
    assert planned.config.local_stream
    assert planned.macs_per_image == pytest.approx(counted, rel=0.005)  # which counts the crops too


def test_hours_follow_from_the_throughput_of_the_backbone() -> None:
    run = next(run for run in plan(PAPER) if run.name == "voc2007-resnet50-448")
    assert run.hours({"": 10.0}) == pytest.approx(run.macs / 1e13 / 3600)
    assert run.hours({"": 10.0, "resnet50": 20.0}) == pytest.approx(run.macs / 2e13 / 3600)
    assert run.hours({"resnet101": 20.0}) is None
    assert parse_throughput(["20", "mobilenet_v2=3"]) == {"": 20.0, "mobilenet_v2": 3.0}


@pytest.mark.parametrize("text", ["fast", "resnet50=", "0", "-1", "nan", "inf"])
def test_a_throughput_that_is_no_speed_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="throughput"):
        parse_throughput([text])


def test_the_command_prints_every_row_with_its_command() -> None:
    done = CliRunner().invoke(app, ["plan", "--throughput", "20"], env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    for name in PAPER.rows:
        assert f"mcar train --profile paper --row {name} --data-root DIR" in done.output
    assert "307,860" in done.output
    assert "hours" in done.output


def test_the_command_of_a_run_without_a_row_names_that_run() -> None:
    smoke = load_profile("smoke")
    runs = plan(smoke)
    assert [run.config.local_stream for run in runs] == [False] * len(smoke.seeds) + [True] * len(smoke.seeds)
    for run in runs:
        command, *settings = run.command.split(" --set ")
        assert command == "mcar train --profile smoke"
        assert smoke.run.vary(**parse_settings(settings)) == run.config


@pytest.mark.parametrize("name", ["mini", "photos", "photos-coco"])
def test_the_plan_has_every_run_that_was_made(name: str) -> None:
    """Whatever rate it was tuned to: the plan is made before that."""

    def known(config: RunConfig) -> str:
        return config.vary(learning_rate=1.0).model_dump_json()

    planned = {known(run.config) for run in all_runs(load_profile(name))}
    made = {known(record.config): record.run_id for record in read_records(ROOT / "results" / name)}
    assert made
    assert [run_id for key, run_id in made.items() if key not in planned] == []


def test_the_plan_has_no_run_twice_and_its_commands_name_its_runs() -> None:
    photos = load_profile("photos")
    runs = all_runs(photos)
    assert len({run.config.model_dump_json() for run in runs}) == len(runs)
    for run in runs:
        assert photos.run.vary(**parse_settings(run.options[1::2])) == run.config


def test_runs_that_tune_are_planned_on_the_lists_they_use() -> None:
    tuning = [run for run in plan(load_profile("photos"), everything=True) if run.study == TUNING]
    assert tuning
    assert {(run.train_images, run.test_images) for run in tuning} == {(2501, 2510)}


def test_the_plan_of_a_profile_without_rows_is_all_of_it() -> None:
    done = CliRunner().invoke(app, ["plan", "--profile", "smoke", "--throughput", "0.02"], env={"COLUMNS": "300"})
    runs = all_runs(load_profile("smoke"))
    assert done.output.count("mcar train --profile smoke") == len(runs) > 2
    total = done.output.splitlines()[-1]
    assert total.startswith(f"{len(runs)} runs (main comparison 2, equal cost 5, ablation of pooling 2, ")
    assert re.search(r"T MACs, [0-9.]+ hours one after another$", total)


def test_the_plan_says_what_it_leaves_out() -> None:
    left_out = len(all_runs(PAPER)) - len(PAPER.rows)
    done = CliRunner().invoke(app, ["plan"], env={"COLUMNS": "200"})
    assert done.output.splitlines()[-1] == f"left out: {left_out} runs of the studies; --all shows them"
    assert done.output.splitlines()[-2].startswith("16 runs (rows 16): ")
    assert "left out" not in CliRunner().invoke(app, ["plan", "--all"], env={"COLUMNS": "200"}).output


def test_images_of_ones_own_cannot_be_planned() -> None:
    own = PAPER.model_copy(update={"rows": {"own": {"dataset": "table"}}})
    with pytest.raises(ConfigError, match="table"):
        plan(own)


# ---- what was run stands beside what was published


def record_of(row: str, subset: bool) -> dict[str, object]:
    points = dict.fromkeys(OPERATING_POINTS, dict.fromkeys(LABEL_METRICS, 0.81))
    stream = {"classes_without_positives": 0, "AP": [0.8], "at": points}
    values = {"last": 0.8321, "best": 0.8401}
    metrics = {
        epoch: {"epoch": 1, **{name: {**stream, "mAP": value} for name in STREAMS}} for epoch, value in values.items()
    }
    losses = dict.fromkeys(("global_loss", "local_loss", "map_global", "map_local", "map_fused"), 0.5)
    seconds = {"train_seconds": 1.0, "test_seconds": 1.0}
    return {
        "format": 1,
        "run_id": "0" * 12,
        "label": row,
        "profile": "paper",
        "config": PAPER.row(row).model_dump(mode="json"),
        "keys": {"arithmetic": arithmetic_fingerprint()},
        "data": {
            **{"train": "train", "test": "test", "train_images": 1, "test_images": 1},
            **{"subset": subset, "classes": ["cat"]},
        },
        "metrics": metrics,
        "history": [{"epoch": 1, **losses, **seconds}],
        "cost": {"parameters": 1, "parameters_over_backbone": 1, "macs_per_image": 1, **seconds},
        "environment": {},
    }


def test_a_row_that_was_run_stands_beside_the_published_one_unless_on_a_subset(tmp_path: Path) -> None:
    """On the page that the summary notebook writes."""
    for row, subset in (("coco2014-resnet101-448", False), ("coco2014-resnet50-448", True)):
        write_json(tmp_path / "paper" / "runs" / f"{row}.json", record_of(row, subset))
    (notebook,) = (ROOT / "notebooks").glob("*_summary.ipynb")
    values = {"profiles": ["paper"], "results": str(tmp_path), "readme": ""}
    assert run_notebook(notebook, tmp_path / notebook.name, values) is DONE
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "| 83.8 | 84.0 (last epoch 83.2) | README" in page
    assert re.search(r"\| top-3 \| ours \|.* \| 81\.0 \(last epoch 81\.0\) \| - \|\n", page)
    assert re.search(r"\| resnet50 \| 448 px \|.* \| 82\.1 \| - \| README", page)


# ---- every row runs


@pytest.fixture(scope="module")
def published_trees(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few photos in the official layouts of all three data sets; VOC 2012 test has no labels."""
    root = tmp_path_factory.mktemp("published")
    for year in ("2007", "2012"):
        write_voc(root, {f"{year}_{n}": {VOC_CLASSES[n]: 1} for n in range(4)}, "trainval", year)
    write_voc(root, {f"test_{n}": {VOC_CLASSES[n]: 1} for n in range(2)}, "test", "2007")
    lists = write_voc(root, {f"test_{n}": {} for n in range(2)}, "test", "2012")
    for labels in lists.glob("*_test.txt"):
        labels.unlink()
    for split, count in (("train2014", 4), ("val2014", 2)):
        numbers = range(1, count + 1)
        content = {
            "images": [{"id": n, "file_name": f"{n}.jpg", "width": 12, "height": 12} for n in numbers],
            "categories": [{"id": n, "name": name} for n, name in enumerate(COCO_CLASSES, start=1)],
            "annotations": [{"id": n, "image_id": n, "category_id": n, "bbox": [1, 2, 3, 4]} for n in numbers],
        }
        for n in numbers:
            write_photo(root / split / f"{n}.jpg", n)
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


# Each data set, backbone and input size at least once: the others differ from these in nothing that could not run.
TRIED = (*(name for name in PAPER.rows if "mobilenet" in name), "voc2007-resnet50-256", "voc2012-resnet101-448")


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TRIED, "coco2014-resnet101-576"])
def test_two_steps_and_one_test_batch_of_a_row_run(name: str, published_trees: Path, tmp_path: Path) -> None:
    """Its own backbone, input size and number of regions; one image a batch, no download, and no bf16, which some
    processors only emulate."""
    runs = Runs(PAPER, tmp_path / "results", published_trees, tmp_path / "artifacts", verbose=False)
    config = PAPER.row(name).vary(batch_size=1, weights="none", precision="fp32")
    torch.set_num_threads(2)
    try:
        done = dry_run(runs.splits, config, runs.profile.threads)
    finally:
        torch.set_num_threads(1)
    assert done.train_images == 2
    assert done.test_images == (4 if config.dataset == "voc2012" else 2)  # of VOC 2012 the training photos are scored
    assert done.result.global_loss > 0
    assert done.result.local_loss > 0
    assert done.result.train_seconds > 0
    assert done.result.test_seconds > 0
    assert not list(tmp_path.rglob("*.json.part")), "nothing is kept"
    assert not (tmp_path / "results").exists()
