"""Configurations that are checked, runs that are trained once, records that are taken only where they still hold."""

import ast
import dataclasses
import json
import math
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcar_lib import experiment
from mcar_lib.backbones import build_backbone
from mcar_lib.config import Profile, RunConfig, load_profile, make_config
from mcar_lib.errors import ConfigError, DataError, ResultsError, WeightsError
from mcar_lib.experiment import Record, Workspace, build_model, read_records
from mcar_lib.metrics import average_precision, multilabel_metrics
from mcar_lib.scoring import OPERATING_POINTS
from mcar_lib.training import evaluate

OpenWorkspace = Callable[..., Workspace]
PROFILES = sorted(path.stem for path in (Path(experiment.__file__).parent / "profiles").glob("*.toml"))

# ---- configurations


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"topN": 4}, "topN: Extra inputs are not permitted"),
        ({"epochs": "6"}, "epochs: .* valid integer"),
        ({"epochs": True}, "epochs: .* valid integer"),
        ({"epochs": 6.5}, "epochs: .* valid integer"),
        ({"epochs": 0}, "epochs: .* greater than or equal to 1"),
        ({"flip": 1}, "flip: .* valid boolean"),
        ({"learning_rate": "fast"}, "learning_rate: .* valid number"),
        ({"learning_rate": 0}, "learning_rate: .* greater than 0"),
        ({"precision": "fp16"}, "precision: .*'fp32' or 'bf16'"),
        ({"milestones": [50, 30]}, "milestones must ascend"),
        ({"image_size": "448"}, "image_size: .* valid integer"),
        ({"image_size": 100}, "image_size: .*image size 100: each side must be a positive multiple of 32"),
        ({"image_size": 0}, "image_size: .* positive multiple of 32"),
        ({"num_regions": 0}, "num_regions: .* greater than or equal to 1"),
        ({"threshold": 0.0}, "threshold: .* greater than 0"),
        ({"threshold": 1.0}, "threshold: .* less than 1"),
        ({"pooling": "sum"}, "pooling: .*'avg', 'max' or 'gwp'"),
        ({"selection": "best"}, "selection: .*'top', 'bottom' or 'random'"),
        ({"backbone": "resnet5"}, "backbone: .*unknown backbone 'resnet5'; choose one of mobilenet_v2"),
        ({"dataset": "imagenet"}, "dataset: .*unknown data set; choose one of scenes, voc2007"),
        ({"seed": -1}, "seed: .* greater than or equal to 0"),
        ({"data_options": {"side": 1.5}}, "data_options.side"),
        ({"epochs": Path("six")}, "run configuration: .*not JSON serializable"),
    ],
)
def test_an_impossible_value_is_refused_with_its_key(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(values)


def test_all_impossible_values_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"epochs: .*; .*image_size: .*; .*colour: "):
        make_config({"epochs": 0, "image_size": 33, "colour": "red"})


def test_a_configuration_is_the_recipe_of_the_release_by_default() -> None:
    config = make_config({})
    found = (config.epochs, config.batch_size, config.learning_rate, config.milestones, config.num_regions)
    assert found == (60, 16, 0.01, (30, 50), 4)


def test_a_varied_configuration_is_checked_like_any_other() -> None:
    with pytest.raises(ConfigError, match="num_regions"):
        make_config({}).vary(num_regions=0)


def test_a_varied_configuration_differs_only_there() -> None:
    base = make_config({"epochs": 7, "milestones": [2, 5]})
    assert base.vary(seed=3).vary(seed=0) == base


def test_labels_tell_runs_apart() -> None:
    base = make_config({"backbone": "timm:resnet18"})
    changes: list[dict[str, object]] = [
        {},
        {"seed": 1},
        {"local_stream": False},
        {"num_regions": 2},
        {"threshold": 0.3},
        {"selection": "bottom"},
        {"pooling": "gwp"},
        {"image_size": 224},
    ]
    assert len({base.vary(**change).label for change in changes}) == len(changes)


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:org/model.tag"])
def test_labels_can_be_file_names(name: str) -> None:
    assert not set(make_config({"backbone": name}).label) & set("/:\\ ")


# ---- profiles


@pytest.mark.parametrize("name", PROFILES)
def test_a_shipped_profile_loads_under_its_own_name(name: str) -> None:
    assert load_profile(name).name == name


def test_shipped_profiles() -> None:
    assert PROFILES == ["mini", "paper", "photos", "photos-coco", "smoke"]


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"no profile 'maxi'; choose one of mini, paper, photos, photos-coco, smoke, or"
    ):
        load_profile("maxi")


GOOD_PROFILE = 'name = "own"\ntitle = "own"\nseeds = [0]\nbootstrap_resamples = 10\n[run]\nepochs = 1\n'


def test_a_profile_of_one_s_own_loads(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(GOOD_PROFILE)
    assert load_profile(str(tmp_path / "own.toml")).run.epochs == 1


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        ("seeds = [0", "seeds = [0]", "own.toml: not valid TOML"),
        ("sedes = [0]", "seeds = [0]", "own.toml: .*seeds: Field required; sedes: Extra inputs"),
        ('seeds = ["0"]', "seeds = [0]", "own.toml: seeds.0: .* valid integer"),
        ('epochs = "1"', "epochs = 1", "own.toml: run.epochs: .* valid integer"),
        ("epochs = true", "epochs = 1", "own.toml: run.epochs: .* valid integer"),
        ("epoch = 1", "epochs = 1", "own.toml: run.epoch: Extra inputs are not permitted"),
        ("image_size = 100", "epochs = 1", "own.toml: run.image_size: .* multiple of 32"),
        ("epochs = 2007-01-01", "epochs = 1", "own.toml: .*not JSON serializable"),
    ],
)
def test_a_wrong_profile_is_refused_with_file_and_key(tmp_path: Path, wrong: str, right: str, message: str) -> None:
    (tmp_path / "own.toml").write_text(GOOD_PROFILE.replace(right, wrong))
    with pytest.raises(ConfigError, match=message):
        load_profile(str(tmp_path / "own.toml"))


def test_a_profile_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_bytes(GOOD_PROFILE.encode("utf-16"))
    with pytest.raises(ConfigError, match=r"own\.toml: not valid TOML"):
        load_profile(str(tmp_path / "own.toml"))


# ---- models


def test_a_model_of_one_configuration_is_drawn_alike_each_time(tiny_config: RunConfig) -> None:
    one, other = (build_model(tiny_config, 20)[0].state_dict() for _ in range(2))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_model_of_another_seed_is_drawn_otherwise(tiny_config: RunConfig) -> None:
    one, other = (build_model(tiny_config.vary(seed=seed), 20)[0] for seed in (0, 1))
    assert not torch.equal(one.convclass.weight, other.convclass.weight)


def test_the_classifier_is_drawn_alike_over_any_starting_weights(tiny_config: RunConfig, tmp_path: Path) -> None:
    path = save_tiny_weights(tmp_path, seed=1)
    one, other = (build_model(tiny_config.vary(weights=weights), 20)[0] for weights in ("none", str(path)))
    assert torch.equal(one.convclass.weight, other.convclass.weight)


def save_tiny_weights(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    path = folder / "weights.pt"
    torch.save(build_backbone("tiny", "none").features.state_dict(), path)
    return path


# ---- one run, one record


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[RunConfig]:
    """The configurations that were really trained, in order."""
    configs: list[RunConfig] = []
    fit = experiment.fit

    def note(model: Any, train: Any, test: Any, config: RunConfig, *rest: Any, **options: Any) -> Any:
        configs.append(config)
        return fit(model, train, test, config, *rest, **options)

    monkeypatch.setattr(experiment, "fit", note)
    return configs


@pytest.fixture
def record(workspace: Workspace, tiny_config: RunConfig) -> Record:
    return workspace.run(tiny_config)


@pytest.fixture(scope="module")
def session(tiny_profile: Profile, scenes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace for tests that only look."""
    results = tmp_path_factory.mktemp("session") / "results"
    return Workspace(tiny_profile, results, artifacts=scenes_data.parent, verbose=False)


@pytest.fixture(scope="module")
def finished(session: Workspace, tiny_config: RunConfig) -> Record:
    """The only record of the session."""
    return session.run(tiny_config)


def rewrite(record: Record, **changes: Any) -> None:
    record.path.write_text(json.dumps({**record.content, **changes}))


def test_a_run_leaves_one_record(session: Workspace, finished: Record) -> None:
    assert [found.path for found in read_records(session.local_folder)] == [finished.path]


def test_a_record_lies_under_its_profile_with_label_and_id(session: Workspace, finished: Record) -> None:
    name = f"{finished.config.label}-{finished.run_id}.json"
    assert finished.path == session.results / "tiny" / "runs" / name


def test_a_record_is_read_as_it_was_written(session: Workspace, finished: Record) -> None:
    written = json.dumps(finished.content, sort_keys=True)
    assert json.dumps(read_records(session.local_folder)[0].content, sort_keys=True) == written


def test_a_record_has_the_promised_parts(finished: Record) -> None:
    assert set(finished.content) == {
        "format",
        "run_id",
        "label",
        "profile",
        "config",
        "keys",
        "data",
        "metrics",
        "history",
        "cost",
        "environment",
    }


def test_a_record_holds_the_whole_configuration(finished: Record, tiny_config: RunConfig) -> None:
    assert finished.content["config"] == tiny_config.model_dump(mode="json")


def test_a_record_holds_the_fingerprints_of_what_it_depends_on(finished: Record) -> None:
    assert sorted(finished.content["keys"]) == ["arithmetic", "test_data", "train_data", "weights"]


def test_a_record_describes_its_data(finished: Record) -> None:
    data = finished.content["data"]
    found = (data["train_images"], data["test_images"], data["subset"], len(data["classes"]))
    assert found == (24, 16, False, 20)


def test_a_record_has_a_history_line_for_each_epoch(finished: Record) -> None:
    assert [line["epoch"] for line in finished.content["history"]] == [1, 2]


def test_the_last_metrics_are_those_of_the_last_epoch(finished: Record) -> None:
    found = (finished.content["metrics"]["last"]["epoch"], finished.map("fused"))
    assert found == (2, finished.content["history"][-1]["map_fused"])


def test_the_best_metrics_are_those_of_the_epoch_with_the_highest_map(finished: Record) -> None:
    best = max(finished.content["history"], key=lambda line: line["map_fused"])
    found = (finished.content["metrics"]["best"]["epoch"], finished.map("fused", "best"))
    assert found == (best["epoch"], best["map_fused"])


@pytest.mark.parametrize("epoch", ["last", "best"])
@pytest.mark.parametrize("stream", ["global", "local", "fused"])
def test_a_record_has_the_ap_of_every_class(
    session: Workspace, finished: Record, tiny_config: RunConfig, epoch: str, stream: str
) -> None:
    scores = session.scores(tiny_config, epoch)
    own = {"global": scores.global_scores, "local": scores.local_scores, "fused": scores.fused}[stream]
    expected = average_precision(own, session.data(tiny_config).test.targets)
    np.testing.assert_array_equal(finished.stream(stream, epoch)["AP"], expected.numpy())


@pytest.mark.parametrize("point", OPERATING_POINTS)
def test_a_record_has_precision_and_recall_at_every_operating_point(
    session: Workspace, finished: Record, tiny_config: RunConfig, point: str
) -> None:
    targets = session.data(tiny_config).test.targets
    expected = multilabel_metrics(session.scores(tiny_config).fused, targets, *OPERATING_POINTS[point])
    assert finished.stream()["at"][point] == {name: expected[name] for name in ("CP", "CR", "CF1", "OP", "OR", "OF1")}


def test_operating_points_are_half_and_the_release_s_with_and_without_top_3() -> None:
    assert set(OPERATING_POINTS.values()) == {(0.5, None), (0.6, None), (0.5, 3), (0.6, 3), (-math.inf, 3)}


def test_a_record_counts_what_the_run_cost(finished: Record) -> None:
    cost = finished.content["cost"]
    positive = ("parameters", "macs_per_image", "train_seconds", "test_seconds", "seconds_this_session")
    assert all(cost[name] > 0 for name in (*positive, "peak_memory_bytes"))


def test_a_record_counts_the_parameters_over_the_backbone(finished: Record) -> None:
    assert finished.content["cost"]["parameters_over_backbone"] == 16 * 20 + 20


def test_operations_of_both_streams_are_counted(tiny_config: RunConfig) -> None:
    both, one = (
        experiment.count_macs(build_model(tiny_config.vary(local_stream=on), 20)[0], 64) for on in (True, False)
    )
    assert both == pytest.approx(3 * one, rel=0.01)  # the image and two regions


@pytest.mark.parametrize(
    "name", ["device", "processor", "cores", "threads", "system", "python", "versions", "commit", "finished"]
)
def test_a_record_names_where_it_was_made(finished: Record, name: str) -> None:
    assert finished.content["environment"][name]


def test_a_record_names_the_versions_of_what_computes(finished: Record) -> None:
    assert torch.__version__.startswith(finished.content["environment"]["versions"]["torch"])


def test_a_record_names_no_host(finished: Record) -> None:
    assert socket.gethostname() not in json.dumps(finished.content["environment"]).replace('"', " ").split()


# ---- found again


def test_a_second_call_trains_nothing(
    workspace: Workspace, record: Record, tiny_config: RunConfig, trained: list[RunConfig]
) -> None:
    assert (workspace.run(tiny_config).path, trained) == (record.path, [])


def test_a_later_session_trains_nothing(
    open_workspace: OpenWorkspace, record: Record, tiny_config: RunConfig, trained: list[RunConfig]
) -> None:
    open_workspace().run(tiny_config)
    assert trained == []


def test_a_deleted_record_repeats_that_run_only(
    open_workspace: OpenWorkspace, record: Record, tiny_config: RunConfig, trained: list[RunConfig]
) -> None:
    other = tiny_config.vary(seed=1)
    open_workspace().run(other)
    trained.clear()
    record.path.unlink()
    for config in (tiny_config, other):
        open_workspace().run(config)
    assert trained == [tiny_config]


def test_a_repeated_run_has_the_same_metrics(workspace: Workspace, record: Record, tiny_config: RunConfig) -> None:
    record.path.unlink()
    again = workspace.run(tiny_config)
    assert json.dumps(again.content["metrics"]) == json.dumps(record.content["metrics"])


def test_a_repeated_run_has_the_same_name(workspace: Workspace, record: Record, tiny_config: RunConfig) -> None:
    record.path.unlink()
    assert workspace.run(tiny_config).path == record.path


def test_runs_of_other_configurations_are_not_taken(workspace: Workspace, record: Record) -> None:
    assert workspace.find(record.config.vary(threshold=0.4)) is None


@pytest.mark.parametrize("key", ["arithmetic", "train_data", "test_data", "weights"])
def test_a_record_with_another_fingerprint_is_not_taken(
    open_workspace: OpenWorkspace, record: Record, tiny_config: RunConfig, key: str
) -> None:
    rewrite(record, keys={**record.content["keys"], key: "another"})
    assert open_workspace().find(tiny_config) is None


def test_a_record_of_other_arithmetic_is_kept_beside_the_new_one(
    open_workspace: OpenWorkspace, record: Record, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "arithmetic_fingerprint", lambda: "another")
    workspace = open_workspace()
    workspace.run(tiny_config)
    assert len(read_records(workspace.local_folder)) == 2


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_record_of_other_images_is_not_taken(
    open_workspace: OpenWorkspace, workspace: Workspace, record: Record, tiny_config: RunConfig, split: str
) -> None:
    data = workspace.data(tiny_config)
    photo = {"train": data.train, "test": data.test}[split].paths[0]
    photo.write_bytes(photo.read_bytes() + b"\0")
    assert open_workspace().find(tiny_config) is None


def test_a_record_of_other_starting_weights_is_not_taken(
    workspace: Workspace, tiny_config: RunConfig, tmp_path: Path
) -> None:
    config = tiny_config.vary(weights=str(save_tiny_weights(tmp_path, seed=1)))
    workspace.run(config)
    save_tiny_weights(tmp_path, seed=2)
    assert workspace.find(config) is None


def test_a_record_with_an_edited_configuration_is_not_taken(
    open_workspace: OpenWorkspace, record: Record, tiny_config: RunConfig
) -> None:
    rewrite(record, config={**record.content["config"], "learning_rate": 0.2})
    assert open_workspace().find(tiny_config) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "not a run record of format 1; move it away"),
    ],
    ids=["broken", "no object", "another format"],
)
def test_a_file_that_is_no_record_is_named(
    workspace: Workspace, record: Record, tiny_config: RunConfig, text: str, message: str
) -> None:
    record.path.write_text(text)
    with pytest.raises(ResultsError, match=f"{record.path.name}.*{message}"):
        workspace.find(tiny_config)


def test_a_current_record_with_an_unknown_option_is_named(
    workspace: Workspace, record: Record, tiny_config: RunConfig
) -> None:
    rewrite(record, config={"colour": "red"})
    with pytest.raises(ResultsError, match=f"{record.path.name}.*colour: Extra inputs are not permitted; move it away"):
        workspace.find(tiny_config)


def test_a_record_of_other_arithmetic_may_have_unknown_options(
    open_workspace: OpenWorkspace, record: Record, tiny_config: RunConfig
) -> None:
    rewrite(record, config={"colour": "red"}, keys={**record.content["keys"], "arithmetic": "other"})
    assert open_workspace().find(tiny_config) is None


def test_a_record_is_found_without_its_data(
    workspace: Workspace, record: Record, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(config: RunConfig) -> None:
        raise DataError("no data here")

    monkeypatch.setattr(workspace, "data", missing)
    assert workspace.find(tiny_config) is not None


def test_a_record_is_found_without_its_starting_weights(
    open_workspace: OpenWorkspace, workspace: Workspace, tiny_config: RunConfig, tmp_path: Path
) -> None:
    path = save_tiny_weights(tmp_path, seed=1)
    config = tiny_config.vary(weights=str(path))
    workspace.run(config)
    path.unlink()
    assert open_workspace().find(config) is not None


def test_a_record_of_other_images_is_not_taken_without_starting_weights_either(
    open_workspace: OpenWorkspace, workspace: Workspace, tiny_config: RunConfig, tmp_path: Path
) -> None:
    path = save_tiny_weights(tmp_path, seed=1)
    config = tiny_config.vary(weights=str(path))
    record = workspace.run(config)
    path.unlink()
    rewrite(record, keys={**record.content["keys"], "test_data": "another"})
    assert open_workspace().find(config) is None


# ---- weights and scores of a run


def test_a_trained_model_gives_the_recorded_scores(
    workspace: Workspace, record: Record, tiny_config: RunConfig
) -> None:
    model, mean_std = workspace.trained_model(tiny_config)
    test = workspace.resized(workspace.data(tiny_config).test, tiny_config.image_size)
    scores = evaluate(model, test, mean_std, verbose=False)
    assert all(torch.equal(*pair) for pair in zip(scores, workspace.scores(tiny_config), strict=True))


def test_a_trained_model_is_in_evaluation_mode(workspace: Workspace, record: Record, tiny_config: RunConfig) -> None:
    assert not workspace.trained_model(tiny_config)[0].training


@pytest.mark.parametrize("epoch", ["last", "best"])
def test_scores_of_an_epoch_have_its_recorded_map(workspace: Workspace, tiny_config: RunConfig, epoch: str) -> None:
    config = tiny_config.vary(epochs=4, learning_rate=0.5)
    record = workspace.run(config)
    targets = workspace.data(config).test.targets
    found = average_precision(workspace.scores(config, epoch).fused, targets).nanmean().item()
    assert found == record.map("fused", epoch)


def test_scores_that_are_not_on_this_machine_are_computed_again(
    workspace: Workspace, record: Record, tiny_config: RunConfig, trained: list[RunConfig]
) -> None:
    before = workspace.scores(tiny_config)
    shutil.rmtree(workspace.artifacts / "runs")
    again = workspace.scores(tiny_config)
    assert all(torch.equal(*pair) for pair in zip(before, again, strict=True))


def test_a_finished_run_leaves_no_checkpoints(workspace: Workspace, record: Record) -> None:
    assert list((workspace.artifacts / "runs").rglob("checkpoint*")) == []


@pytest.mark.parametrize("moment", ["save_file", "_save_arrays", "cost_of", "write_json"])
def test_a_run_killed_after_its_last_epoch_trains_no_epoch_again(
    open_workspace: OpenWorkspace, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(experiment, moment, killed)
        open_workspace().run(tiny_config)
    monkeypatch.delattr("mcar_lib.training.training_step")
    assert open_workspace().run(tiny_config).config == tiny_config


def test_a_run_killed_in_an_epoch_has_the_record_of_one_that_was_not(
    open_workspace: OpenWorkspace, record: Record, tiny_config: RunConfig, tmp_path: Path
) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    shutil.rmtree(tmp_path / "artifacts" / "runs")
    record.path.unlink()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr("mcar_lib.training.stream_map", killed)
        open_workspace().run(tiny_config)
    again = open_workspace().run(tiny_config)
    assert json.dumps(again.content["metrics"]) == json.dumps(record.content["metrics"])


def test_two_sessions_that_ask_at_once_train_once(
    open_workspace: OpenWorkspace, tiny_config: RunConfig, trained: list[RunConfig]
) -> None:
    records: list[Record] = []
    together = threading.Barrier(2)

    def ask(workspace: Workspace) -> None:
        workspace.data(tiny_config)
        together.wait()
        records.append(workspace.run(tiny_config))

    threads = [threading.Thread(target=ask, args=(open_workspace(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(records), trained) == (2, [tiny_config])


def test_images_of_two_subsets_are_not_mixed_up(workspace: Workspace, tiny_config: RunConfig) -> None:
    test = workspace.data(tiny_config).test
    found = [workspace.resized(test.select(chosen), 32).image_set.ids for chosen in ([0, 1], [0, 2])]
    assert found[0] != found[1]


def test_images_are_read_once_a_session(workspace: Workspace, tiny_config: RunConfig) -> None:
    test = workspace.data(tiny_config).test
    assert workspace.resized(test, 32) is workspace.resized(test, 32)


# ---- what cannot be run


def test_results_that_cannot_be_written_are_told_before_training(
    workspace: Workspace, tiny_config: RunConfig, trained: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(ResultsError, match=r"runs cannot be written \(Permission denied\); choose another --results"):
        workspace.run(tiny_config)
    assert trained == []


def test_a_results_folder_that_is_a_file_is_told(
    open_workspace: OpenWorkspace, tiny_config: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ResultsError, match="cannot be written"):
        open_workspace(tmp_path / "taken").run(tiny_config)


def test_data_without_a_root_is_told(
    workspace: Workspace, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace.data_root = None
    with pytest.raises(DataError, match="voc2007 needs a data root; give --data-root DIR or set MCAR_DATA"):
        workspace.run(tiny_config.vary(dataset="voc2007", data_options={}))


def test_a_data_root_that_is_not_there_is_told(
    open_workspace: OpenWorkspace, tiny_config: RunConfig, tmp_path: Path
) -> None:
    workspace = open_workspace(data_root=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"nowhere: no such data root"):
        workspace.run(tiny_config.vary(dataset="voc2007", data_options={}))


def test_the_data_root_can_come_from_the_environment(
    open_workspace: OpenWorkspace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MCAR_DATA", str(tmp_path))
    assert open_workspace().data_root == tmp_path.resolve()


def test_more_regions_than_classes_are_refused(workspace: Workspace, tiny_config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="num_regions is 21; scenes trainval has 20 classes"):
        workspace.run(tiny_config.vary(num_regions=21))


def test_weights_that_are_not_there_are_told(workspace: Workspace, tiny_config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no file .*nowhere\.pt"):
        workspace.run(tiny_config.vary(weights=str(tmp_path / "nowhere.pt")))


# ---- comparisons


@pytest.fixture
def pair(tiny_config: RunConfig) -> tuple[list[RunConfig], list[RunConfig]]:
    """MCAR with two seeds, and the global stream alone with one."""
    return [tiny_config, tiny_config.vary(seed=1)], [tiny_config.vary(local_stream=False)]


def test_a_comparison_is_the_difference_of_mean_maps(
    workspace: Workspace, pair: tuple[list[RunConfig], list[RunConfig]]
) -> None:
    a, b = ([workspace.run(config).map() for config in group] for group in pair)
    assert workspace.compare(*pair)["difference"] == pytest.approx(np.mean(a) - np.mean(b))


def test_a_comparison_has_an_interval_and_a_p_value(
    workspace: Workspace, pair: tuple[list[RunConfig], list[RunConfig]]
) -> None:
    found = workspace.compare(*pair)
    assert found["low"] <= found["difference"] <= found["high"]
    assert 0 < found["p_value"] <= 1


def test_a_comparison_names_the_runs_of_both_groups(
    workspace: Workspace, pair: tuple[list[RunConfig], list[RunConfig]]
) -> None:
    found = workspace.compare(*pair)
    ids = [[workspace.run(config).run_id for config in group] for group in pair]
    assert [found["a"], found["b"]] == ids


def test_a_comparison_is_found_again(
    open_workspace: OpenWorkspace,
    pair: tuple[list[RunConfig], list[RunConfig]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first = open_workspace().compare(*pair)
    monkeypatch.delattr(experiment, "paired_bootstrap")
    assert open_workspace().compare(*pair) == first


def test_a_swapped_comparison_has_the_other_sign(
    workspace: Workspace, pair: tuple[list[RunConfig], list[RunConfig]]
) -> None:
    there, back = workspace.compare(*pair), workspace.compare(*reversed(pair))
    found = [back[name] for name in ("difference", "low", "high", "p_value")]
    assert found == pytest.approx([-there["difference"], -there["high"], -there["low"], there["p_value"]])


def test_a_comparison_of_the_best_epochs_is_another_one(
    workspace: Workspace, pair: tuple[list[RunConfig], list[RunConfig]]
) -> None:
    a, b = ([workspace.run(config).map("fused", "best") for config in group] for group in pair)
    workspace.compare(*pair)
    assert workspace.compare(*pair, epoch="best")["difference"] == pytest.approx(np.mean(a) - np.mean(b))


# ---- committed results


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of its own that results="results" means."""
    root = tmp_path / "checkout"
    (root / "results").mkdir(parents=True)
    monkeypatch.setattr(experiment, "project_root", lambda: root)
    return root


@pytest.fixture
def committed(checkout: Path, open_workspace: OpenWorkspace, tiny_config: RunConfig) -> Record:
    """A record among the committed ones."""
    made = open_workspace().run(tiny_config)
    path = checkout / "results" / "tiny" / "runs" / made.path.name
    path.parent.mkdir(parents=True)
    made.path.rename(path)
    return dataclasses.replace(made, path=path)


@pytest.mark.parametrize("results", ["results", ""])
def test_committed_results_are_read(
    open_workspace: OpenWorkspace, committed: Record, tiny_config: RunConfig, trained: list[RunConfig], results: str
) -> None:
    assert (open_workspace(results).run(tiny_config).path, trained) == (committed.path, [])


def test_a_run_that_the_committed_results_lack_goes_to_the_local_ones(
    open_workspace: OpenWorkspace, committed: Record, tiny_config: RunConfig, checkout: Path
) -> None:
    made = open_workspace("results").run(tiny_config.vary(seed=1))
    assert made.path.parent == checkout / "results" / "local" / "tiny" / "runs"


def test_a_local_run_is_found_beside_the_committed_ones(
    open_workspace: OpenWorkspace, committed: Record, tiny_config: RunConfig, trained: list[RunConfig]
) -> None:
    for _ in range(2):
        open_workspace("results").run(tiny_config.vary(seed=1))
    assert trained == [tiny_config.vary(seed=1)]


def test_a_comparison_goes_to_the_local_results(
    open_workspace: OpenWorkspace, committed: Record, tiny_config: RunConfig, checkout: Path
) -> None:
    open_workspace("results").compare([tiny_config], [tiny_config.vary(seed=1)])
    assert len(list((checkout / "results" / "local" / "tiny" / "comparisons").glob("*.json"))) == 1


def test_local_results_do_not_read_the_committed_ones(
    open_workspace: OpenWorkspace, committed: Record, tiny_config: RunConfig
) -> None:
    assert open_workspace("results/local").find(tiny_config) is None


def test_project_root_is_the_checkout_above_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("notebooks", "results"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert experiment.project_root().resolve() == tmp_path.resolve()


def test_a_profile_by_name_opens_a_workspace(tmp_path: Path) -> None:
    assert Workspace("smoke", tmp_path, artifacts=tmp_path, verbose=False).profile == load_profile("smoke")


def test_profiles_do_not_share_a_folder(open_workspace: OpenWorkspace, tiny_profile: Profile, tmp_path: Path) -> None:
    other = tiny_profile.model_copy(update={"name": "other"})
    folders = {Workspace(profile, tmp_path / "results").folder for profile in (tiny_profile, other)}
    assert len(folders) == 2


# ---- the fingerprint of the arithmetic

SOURCE = '''
"""Module."""
import math

RATE = 0.1  # of a thing

def area(radius, scale=1):
    """Area."""
    if radius < 0:
        raise ValueError(f"radius is {radius}")
    return math.pi * radius**2 * scale
'''


def text_of(source: str) -> str:
    return experiment._tree_text(ast.parse(source))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# of a thing", "# of something else"),
        ('"""Module."""', '"""Another docstring."""'),
        ('    """Area."""\n', ""),
        ("radius is {radius}", "a radius below zero"),
        ("ValueError", "TypeError"),
        ("scale=1)", "scale = 1 )"),
        ("math.pi * radius**2 * scale", "(math.pi * radius**2\n            * scale)"),
    ],
    ids=["comment", "docstring", "no docstring", "error message", "error kind", "blanks", "line breaks"],
)
def test_the_fingerprint_ignores_what_computes_nothing(old: str, new: str) -> None:
    assert text_of(SOURCE.replace(old, new)) == text_of(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("RATE = 0.1", "RATE = 0.2"),
        ("RATE", "SPEED"),
        ("scale=1", "scale=0"),
        ("radius < 0", "radius <= 0"),
        ("radius**2 * scale", "radius**2 / scale"),
        ("return math.pi", "return math.e"),
        ("    return", "    radius = 1\n    return"),
        ("import math", "import cmath as math"),
        ("scale=1", "scale=None"),
        ("scale=1", "scale=True"),
        ("scale=1", "scale='1'"),
    ],
)
def test_the_fingerprint_notices_what_computes(old: str, new: str) -> None:
    assert text_of(SOURCE.replace(old, new)) != text_of(SOURCE)


def test_the_fingerprint_is_of_the_modules_of_the_method() -> None:
    names = {module.__name__.rpartition(".")[2] for module in experiment.ARITHMETIC}
    assert names == {"regions", "model", "backbones", "metrics", "transforms", "recipe"}


@pytest.fixture
def _no_cached_fingerprint() -> Iterator[None]:
    experiment.arithmetic_fingerprint.cache_clear()
    yield
    experiment.arithmetic_fingerprint.cache_clear()


@pytest.mark.usefixtures("_no_cached_fingerprint")
@pytest.mark.parametrize("module", experiment.ARITHMETIC, ids=lambda module: module.__name__.rpartition(".")[2])
def test_the_fingerprint_depends_on_each_module(module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = experiment.arithmetic_fingerprint()
    experiment.arithmetic_fingerprint.cache_clear()
    changed = tmp_path / "module.py"
    changed.write_text(Path(module.__file__).read_text(encoding="utf-8") + "\nMORE = 1\n", encoding="utf-8")
    monkeypatch.setattr(module, "__file__", str(changed))
    assert experiment.arithmetic_fingerprint() != before
