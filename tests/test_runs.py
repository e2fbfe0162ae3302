"""Runs that are trained once, records that are taken only where they still hold, and where all of it lies."""

import copy
import dataclasses
import json
import math
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mcar_lib.backbones import HALF, IMAGENET_MEAN, IMAGENET_STD, build_backbone
from mcar_lib.errors import ConfigError, DataError, ResultsError, WeightsError
from mcar_lib.files import write_json
from mcar_lib.metrics import average_precision, multilabel_metrics
from mcar_lib.runs import (
    OPERATING_POINTS,
    Profile,
    Record,
    RunConfig,
    Runs,
    compare,
    load_profile,
    make_config,
    read_records,
    trainer,
)
from mcar_lib.runs.measures import count_macs
from mcar_lib.runs.trainer import build_model
from mcar_lib.training import evaluate

OpenRuns = Callable[..., Runs]

# ---- models


def test_a_model_of_one_configuration_is_drawn_alike_each_time(tiny_config: RunConfig) -> None:
    one, other = (build_model(tiny_config, 20).state_dict() for _ in range(2))
    assert all(torch.equal(value, other[key]) for key, value in one.items())


def test_a_model_of_another_seed_is_drawn_otherwise(tiny_config: RunConfig) -> None:
    one, other = (build_model(tiny_config.vary(seed=seed), 20) for seed in (0, 1))
    assert not torch.equal(one.convclass.weight, other.convclass.weight)


def test_the_classifier_is_drawn_alike_over_any_starting_weights(tiny_config: RunConfig, tmp_path: Path) -> None:
    path = save_tiny_weights(tmp_path, seed=1)
    one, other = (build_model(tiny_config.vary(weights=weights), 20) for weights in ("none", str(path)))
    assert torch.equal(one.convclass.weight, other.convclass.weight)


@pytest.mark.parametrize(
    ("backbone", "mean", "std"),
    [("mobilenet_v2", IMAGENET_MEAN, IMAGENET_STD), ("efficientnet_lite0", HALF, HALF)],
)
def test_a_model_carries_its_backbone_s_normalisation(backbone: str, mean: Any, std: Any) -> None:
    made = build_model(make_config({"backbone": backbone, "weights": "none"}), 20)
    assert (made.mean, made.std) == (mean, std)


def test_a_model_has_the_configuration_s_own_values(tiny_config: RunConfig) -> None:
    values = {"pooling": "gwp", "num_regions": 3, "threshold": 0.4, "selection": "random", "local_stream": False}
    made = build_model(tiny_config.vary(**values), 20)
    assert {name: getattr(made, name) for name in values} == values
    assert made.generator is not None


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
    fit = trainer.fit

    def note(model: Any, train: Any, test: Any, config: RunConfig, *rest: Any, **options: Any) -> Any:
        configs.append(config)
        return fit(model, train, test, config, *rest, **options)

    monkeypatch.setattr(trainer, "fit", note)
    return configs


@pytest.fixture
def record(runs: Runs, tiny_config: RunConfig) -> Record:
    return runs.run(tiny_config)


@pytest.fixture(scope="module")
def session(tiny_profile: Profile, scenes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Runs for tests that only look."""
    results = tmp_path_factory.mktemp("session") / "results"
    return Runs(tiny_profile, results, artifacts=scenes_data.parent, verbose=False)


@pytest.fixture(scope="module")
def finished(session: Runs, tiny_config: RunConfig) -> Record:
    """The only record of the session."""
    return session.run(tiny_config)


def rewrite(record: Record, **changes: Any) -> None:
    record.path.write_text(json.dumps({**record.content, **changes}))


def test_a_run_leaves_one_record(session: Runs, finished: Record) -> None:
    assert [found.path for found in read_records(session.local_folder)] == [finished.path]


def test_a_record_lies_under_its_profile_with_label_and_id(session: Runs, finished: Record) -> None:
    name = f"{finished.config.label}-{finished.run_id}.json"
    assert finished.path == session.results / "tiny" / "runs" / name


def test_a_record_is_read_as_it_was_written(session: Runs, finished: Record) -> None:
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
    session: Runs, finished: Record, tiny_config: RunConfig, epoch: str, stream: str
) -> None:
    scores = session.scores(tiny_config, epoch)
    own = {"global": scores.global_scores, "local": scores.local_scores, "fused": scores.fused}[stream]
    expected = average_precision(own, session.data(tiny_config).test.targets)
    np.testing.assert_array_equal(finished.stream(stream, epoch)["AP"], expected.numpy())


@pytest.mark.parametrize("point", OPERATING_POINTS)
def test_a_record_has_precision_and_recall_at_every_operating_point(
    session: Runs, finished: Record, tiny_config: RunConfig, point: str
) -> None:
    targets = session.data(tiny_config).test.targets
    probabilities = torch.sigmoid(session.scores(tiny_config).fused)
    expected = multilabel_metrics(probabilities, targets, *OPERATING_POINTS[point])
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
    both, one = (count_macs(build_model(tiny_config.vary(local_stream=on), 20), 64) for on in (True, False))
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
    runs: Runs, record: Record, tiny_config: RunConfig, trained: list[RunConfig]
) -> None:
    assert (runs.run(tiny_config).path, trained) == (record.path, [])


def test_a_later_session_trains_nothing(
    open_runs: OpenRuns, record: Record, tiny_config: RunConfig, trained: list[RunConfig]
) -> None:
    open_runs().run(tiny_config)
    assert trained == []


def test_a_deleted_record_repeats_that_run_only(
    open_runs: OpenRuns, record: Record, tiny_config: RunConfig, trained: list[RunConfig]
) -> None:
    other = tiny_config.vary(seed=1)
    open_runs().run(other)
    trained.clear()
    record.path.unlink()
    for config in (tiny_config, other):
        open_runs().run(config)
    assert trained == [tiny_config]


def test_a_repeated_run_has_the_same_metrics(runs: Runs, record: Record, tiny_config: RunConfig) -> None:
    record.path.unlink()
    again = runs.run(tiny_config)
    assert json.dumps(again.content["metrics"]) == json.dumps(record.content["metrics"])


def test_a_repeated_run_has_the_same_name(runs: Runs, record: Record, tiny_config: RunConfig) -> None:
    record.path.unlink()
    assert runs.run(tiny_config).path == record.path


def test_runs_of_other_configurations_are_not_taken(runs: Runs, record: Record) -> None:
    assert runs.find(record.config.vary(threshold=0.4)) is None


@pytest.mark.parametrize("key", ["arithmetic", "train_data", "test_data", "weights"])
def test_a_record_with_another_fingerprint_is_not_taken(
    open_runs: OpenRuns, record: Record, tiny_config: RunConfig, key: str
) -> None:
    rewrite(record, keys={**record.content["keys"], key: "another"})
    assert open_runs().find(tiny_config) is None


def test_a_record_of_other_arithmetic_is_kept_beside_the_new_one(
    open_runs: OpenRuns, record: Record, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mcar_lib.runs.runs.arithmetic_fingerprint", lambda: "another")
    runs = open_runs()
    runs.run(tiny_config)
    assert len(read_records(runs.local_folder)) == 2


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_record_of_other_images_is_not_taken(
    open_runs: OpenRuns, runs: Runs, record: Record, tiny_config: RunConfig, split: str
) -> None:
    data = runs.data(tiny_config)
    photo = {"train": data.train, "test": data.test}[split].paths[0]
    photo.write_bytes(photo.read_bytes() + b"\0")
    assert open_runs().find(tiny_config) is None


def test_a_record_of_other_starting_weights_is_not_taken(runs: Runs, tiny_config: RunConfig, tmp_path: Path) -> None:
    config = tiny_config.vary(weights=str(save_tiny_weights(tmp_path, seed=1)))
    runs.run(config)
    save_tiny_weights(tmp_path, seed=2)
    assert runs.find(config) is None


def test_a_record_with_an_edited_configuration_is_not_taken(
    open_runs: OpenRuns, record: Record, tiny_config: RunConfig
) -> None:
    rewrite(record, config={**record.content["config"], "learning_rate": 0.2})
    assert open_runs().find(tiny_config) is None


def without(record: Record, *place: str) -> str:
    """A record's text less the value at a place."""
    content = copy.deepcopy(dict(record.content))
    inner = content
    for name in place[:-1]:
        inner = inner[name]
    del inner[place[-1]]
    return json.dumps(content)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda record: "{", "expected a JSON object, but"),
        (lambda record: record.path.read_text()[:1000], "expected a JSON object, but"),
        (lambda record: f"<<<<<<< ours\n{record.path.read_text()}", "expected a JSON object, but"),
        (lambda record: "[]", "expected a JSON object, found list"),
        (lambda record: "{}", "not a record of format 1"),
        (lambda record: without(record, "run_id"), "run_id: Field required"),
        (lambda record: without(record, "cost", "parameters"), "cost.parameters: Field required"),
        (lambda record: without(record, "metrics", "best", "local", "at", "0.5", "CF1"), "CF1: Field required"),
        (lambda record: json.dumps({**record.content, "keys": [1]}), "keys: Input should be a valid dictionary"),
        (lambda record: json.dumps({**record.content, "history": []}), "its history has no epoch"),
        (lambda record: json.dumps({**record.content, "config": {"colour": "red"}}), "colour: no such key"),
        (lambda record: json.dumps({**record.content, "config": {"epochs": "2"}}), "epochs: give a whole number"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_no_record_is_named_once_and_passed_over(
    runs: Runs,
    record: Record,
    tiny_config: RunConfig,
    capsys: pytest.CaptureFixture[str],
    broken: Callable[[Record], str],
    message: str,
) -> None:
    other = record.path.with_name("a-copy.json")
    other.write_text(broken(record))
    found = [runs.find(tiny_config) for _ in range(2)]
    assert [each.path for each in found if each] == [record.path] * 2
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{other}: ")
    assert message in line
    assert line.endswith("; passed over, move it away")


def test_what_a_mac_leaves_beside_a_record_is_passed_over_without_a_word(
    runs: Runs, record: Record, tiny_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    record.path.with_name(f"._{record.path.name}").write_bytes(b"\0\5\x16\7")
    assert runs.find(tiny_config) is not None
    assert capsys.readouterr().out == ""


def test_a_broken_record_of_the_run_that_is_asked_for_is_made_again(
    open_runs: OpenRuns, record: Record, tiny_config: RunConfig, trained: list[RunConfig]
) -> None:
    record.path.write_text(record.path.read_text()[:-100])
    again = open_runs().run(tiny_config)
    assert json.dumps(again.content["metrics"]) == json.dumps(record.content["metrics"])
    assert trained == [tiny_config]


def test_numbers_that_are_none_are_written_as_null_and_read_as_nan(
    runs: Runs, record: Record, tiny_config: RunConfig
) -> None:
    content = copy.deepcopy(dict(record.content))
    fused = content["metrics"]["last"]["fused"]
    fused["mAP"], fused["AP"][3], fused["at"]["0.5"]["CF1"] = math.nan, math.inf, math.nan
    content["history"][0]["map_fused"] = math.nan
    write_json(record.path, content)
    assert "NaN" not in record.path.read_text()
    assert "Infinity" not in record.path.read_text()
    (found,) = read_records(runs.local_folder)
    values = (found.map(), found.stream()["AP"][3], found.stream()["at"]["0.5"]["CF1"])
    assert all(map(math.isnan, (*values, found.content["history"][0]["map_fused"])))
    assert json.dumps(found.stream("global")) == json.dumps(record.stream("global"))


def test_a_record_of_other_arithmetic_may_have_unknown_options(
    open_runs: OpenRuns, record: Record, tiny_config: RunConfig
) -> None:
    rewrite(record, config={"colour": "red"}, keys={**record.content["keys"], "arithmetic": "other"})
    assert open_runs().find(tiny_config) is None


# ---- weights and scores of a run


def test_a_trained_model_gives_the_recorded_scores(runs: Runs, record: Record, tiny_config: RunConfig) -> None:
    test = runs.splits.squares(runs.data(tiny_config).test, tiny_config.image_size)
    scores = evaluate(runs.trained_model(tiny_config), test, verbose=False)
    assert all(torch.equal(*pair) for pair in zip(scores, runs.scores(tiny_config), strict=True))


def test_a_trained_model_is_in_evaluation_mode(runs: Runs, record: Record, tiny_config: RunConfig) -> None:
    assert not runs.trained_model(tiny_config).training


def test_a_trained_model_with_other_values_has_the_same_weights(
    runs: Runs, record: Record, tiny_config: RunConfig
) -> None:
    own, other = runs.trained_model(tiny_config), runs.trained_model(tiny_config, num_regions=1, selection="random")
    assert (other.num_regions, other.selection, other.generator is None) == (1, "random", False)
    assert all(torch.equal(value, other.state_dict()[key]) for key, value in own.state_dict().items())


@pytest.mark.parametrize("epoch", ["last", "best"])
def test_scores_of_an_epoch_have_its_recorded_map(runs: Runs, tiny_config: RunConfig, epoch: str) -> None:
    config = tiny_config.vary(epochs=4, learning_rate=0.5)
    record = runs.run(config)
    targets = runs.data(config).test.targets
    found = average_precision(runs.scores(config, epoch).fused, targets).nanmean().item()
    assert found == record.map("fused", epoch)


def test_scores_that_are_not_on_this_machine_are_computed_again(
    runs: Runs, record: Record, tiny_config: RunConfig, trained: list[RunConfig]
) -> None:
    before = runs.scores(tiny_config)
    shutil.rmtree(runs.artifacts / "runs")
    again = runs.scores(tiny_config)
    assert trained == [tiny_config]
    assert all(torch.equal(*pair) for pair in zip(before, again, strict=True))


def test_a_finished_run_leaves_no_checkpoints(runs: Runs, record: Record) -> None:
    assert list((runs.artifacts / "runs").rglob("checkpoint*")) == []


@pytest.mark.parametrize(
    "moment", ["outcome.safetensors_with_checksum", "outcome.np.savez", "trainer.run_cost", "runs.write_json"]
)
def test_a_run_killed_after_its_last_epoch_trains_no_epoch_again(
    open_runs: OpenRuns, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    def killed(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr(f"mcar_lib.runs.{moment}", killed)
        open_runs().run(tiny_config)
    monkeypatch.delattr("mcar_lib.training.loop.training_step")
    assert open_runs().run(tiny_config).config == tiny_config


def test_a_run_killed_in_an_epoch_has_the_record_of_one_that_was_not(
    open_runs: OpenRuns, record: Record, tiny_config: RunConfig, tmp_path: Path
) -> None:
    def killed(*args: object) -> None:
        raise KeyboardInterrupt

    shutil.rmtree(tmp_path / "artifacts" / "runs")
    record.path.unlink()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        patch.setattr("mcar_lib.training.loop.stream_map", killed)
        open_runs().run(tiny_config)
    again = open_runs().run(tiny_config)
    assert json.dumps(again.content["metrics"]) == json.dumps(record.content["metrics"])


def test_two_sessions_that_ask_at_once_train_once(
    open_runs: OpenRuns, tiny_config: RunConfig, trained: list[RunConfig]
) -> None:
    records: list[Record] = []
    together = threading.Barrier(2)

    def ask(runs: Runs) -> None:
        runs.data(tiny_config)
        together.wait()
        records.append(runs.run(tiny_config))

    threads = [threading.Thread(target=ask, args=(open_runs(),)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(records), trained) == (2, [tiny_config])


def test_images_of_two_subsets_are_not_mixed_up(runs: Runs, tiny_config: RunConfig) -> None:
    test = runs.data(tiny_config).test
    found = [runs.splits.squares(test.select(chosen), 32).image_set.ids for chosen in ([0, 1], [0, 2])]
    assert found[0] != found[1]


def test_images_are_read_once_a_session(runs: Runs, tiny_config: RunConfig) -> None:
    test = runs.data(tiny_config).test
    assert runs.splits.squares(test, 32) is runs.splits.squares(test, 32)


# ---- what cannot be run


def test_results_that_cannot_be_written_are_told_before_training(
    runs: Runs, tiny_config: RunConfig, trained: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*args: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    with pytest.raises(ResultsError, match=r"runs cannot be written \(Permission denied\); choose another --results"):
        runs.run(tiny_config)
    assert trained == []


def test_a_results_folder_that_is_a_file_is_told(open_runs: OpenRuns, tiny_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(ResultsError, match="cannot be written"):
        open_runs(tmp_path / "taken").run(tiny_config)


def test_data_without_a_root_is_told(runs: Runs, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    runs.splits.data_root = None
    with pytest.raises(DataError, match="voc2007 needs a data root; give --data-root DIR or set MCAR_DATA"):
        runs.run(tiny_config.vary(dataset="voc2007", data_options={}))


def test_a_data_root_that_is_not_there_is_told(open_runs: OpenRuns, tiny_config: RunConfig, tmp_path: Path) -> None:
    runs = open_runs(data_root=tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"nowhere: no such data root"):
        runs.run(tiny_config.vary(dataset="voc2007", data_options={}))


def test_the_data_root_can_come_from_the_environment(
    open_runs: OpenRuns, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MCAR_DATA", str(tmp_path))
    assert open_runs().splits.data_root == tmp_path.resolve()


def test_more_regions_than_classes_are_refused(runs: Runs, tiny_config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="num_regions is 21; scenes trainval has 20 classes"):
        runs.run(tiny_config.vary(num_regions=21))


def test_weights_that_are_not_there_are_told(runs: Runs, tiny_config: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no file .*nowhere\.pt"):
        runs.run(tiny_config.vary(weights=str(tmp_path / "nowhere.pt")))


# ---- committed results


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of its own that results="results" means."""
    root = tmp_path / "checkout"
    (root / "results").mkdir(parents=True)
    monkeypatch.setattr("mcar_lib.runs.runs.project_root", lambda: root)
    return root


@pytest.fixture
def committed(checkout: Path, open_runs: OpenRuns, tiny_config: RunConfig) -> Record:
    """A record among the committed ones."""
    made = open_runs().run(tiny_config)
    path = checkout / "results" / "tiny" / "runs" / made.path.name
    path.parent.mkdir(parents=True)
    made.path.rename(path)
    return dataclasses.replace(made, path=path)


@pytest.mark.parametrize("results", ["results", ""])
def test_committed_results_are_read(
    open_runs: OpenRuns, committed: Record, tiny_config: RunConfig, trained: list[RunConfig], results: str
) -> None:
    assert (open_runs(results).run(tiny_config).path, trained) == (committed.path, [])


def test_a_run_that_the_committed_results_lack_goes_to_the_local_ones(
    open_runs: OpenRuns, committed: Record, tiny_config: RunConfig, checkout: Path
) -> None:
    made = open_runs("results").run(tiny_config.vary(seed=1))
    assert made.path.parent == checkout / "results" / "local" / "tiny" / "runs"


def test_a_local_run_is_found_beside_the_committed_ones(
    open_runs: OpenRuns, committed: Record, tiny_config: RunConfig, trained: list[RunConfig]
) -> None:
    for _ in range(2):
        open_runs("results").run(tiny_config.vary(seed=1))
    assert trained == [tiny_config.vary(seed=1)]


def test_what_follows_from_runs_goes_to_the_local_results(
    open_runs: OpenRuns, committed: Record, tiny_config: RunConfig, checkout: Path
) -> None:
    runs = open_runs("results")
    compare(runs, [committed], [runs.run(tiny_config.vary(seed=1))])
    assert len(list((checkout / "results" / "local" / "tiny" / "comparisons").glob("*.json"))) == 1
    assert not (checkout / "results" / "tiny" / "comparisons").exists()


def test_results_behind_a_link_stay_read_only(open_runs: OpenRuns, checkout: Path, tmp_path: Path) -> None:
    (checkout / "results").rename(tmp_path / "elsewhere")
    (checkout / "results").symlink_to(tmp_path / "elsewhere")
    assert open_runs("results").local == tmp_path / "elsewhere" / "local"


def test_local_results_do_not_read_the_committed_ones(
    open_runs: OpenRuns, committed: Record, tiny_config: RunConfig
) -> None:
    assert open_runs("results/local").find(tiny_config) is None


def test_a_profile_by_name_opens_its_runs(tmp_path: Path) -> None:
    assert Runs("smoke", tmp_path, artifacts=tmp_path, verbose=False).profile == load_profile("smoke")


def test_profiles_do_not_share_a_folder(open_runs: OpenRuns, tiny_profile: Profile, tmp_path: Path) -> None:
    other = tiny_profile.model_copy(update={"name": "other"})
    folders = {Runs(profile, tmp_path / "results").folder for profile in (tiny_profile, other)}
    assert len(folders) == 2
