"""The records of runs' regions, what is chosen on val, and several seeds together."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mcar_lib.attribution import class_maps
from mcar_lib.data.image_set import Boxes, ImageSet
from mcar_lib.localisation import F1, FOUND, Key
from mcar_lib.region_study import (
    Settings,
    as_numbers,
    as_text,
    best_settings,
    boxes_fingerprint,
    measure_regions,
    study_rows,
    val_record,
)
from mcar_lib.runs import RunConfig, Runs
from mcar_lib.runs.comparisons import NO_DIFFERENCE, ONE_SEED
from mcar_lib.runs.config import Tuning
from mcar_lib.training import network_input

# ---- the record of a run


def test_the_record_is_made_once_and_found_by_its_run(
    runs: Runs, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = measure_regions(runs, tiny_config)
    monkeypatch.delattr("mcar_lib.region_study.class_regions")
    assert repr(measure_regions(runs, tiny_config)) == repr(made)
    assert made["run_id"] == runs.run(tiny_config).run_id


def test_the_record_counts_what_it_measured(runs: Runs, tiny_config: RunConfig) -> None:
    record, test = measure_regions(runs, tiny_config), runs.data(tiny_config).test
    difficult = torch.cat([test.boxes(index).difficult for index in range(len(test))])
    assert (record["data"], record["images"], record["difficult"]) == (test.title, len(test), difficult.sum())
    counts = {among: as_numbers(text) for among, text in record["counts"].items()}
    assert list(counts) == ["all", "small", "medium", "large", "present", "among the top 2"]
    assert counts["all"].sum() == (~difficult).sum()
    assert {len(as_numbers(row["sums"])) for row in record["sums"]} == {len(test)}
    assert {row["way"] for row in record["sums"] if row["measure"] == F1} == {"top", "random", "occlusion"}
    assert record["grid"] == []  # nothing is chosen on test


def test_the_gallery_has_the_boxes_and_maps_of_the_model(runs: Runs, tiny_config: RunConfig) -> None:
    entry = measure_regions(runs, tiny_config)["gallery"][1]
    mcar, test = runs.trained_model(tiny_config), runs.data(tiny_config).test
    squares = runs.splits.squares(test, tiny_config.image_size)
    images = torch.stack([squares[at] for at in range(4)])
    with torch.no_grad():
        found = mcar(network_input(mcar, images)).regions
    chosen = found.classes[1].tolist()
    assert entry["image"] == test.ids[1]
    assert entry["labels"] == [test.classes[k] for k in chosen]
    assert entry["boxes"] == found.boxes[1].tolist()
    expected = torch.sigmoid(class_maps(mcar, images)[1][1, chosen])
    shown = np.array([[as_numbers(row) for row in rows] for rows in entry["cells"]])
    np.testing.assert_allclose(shown, expected, rtol=1e-3, atol=1e-4)


def test_a_record_of_other_boxes_is_made_anew(runs: Runs, tiny_config: RunConfig) -> None:
    record = measure_regions(runs, tiny_config)
    assert record["boxes"] == boxes_fingerprint(runs.data(tiny_config).test)
    (path,) = (runs.local_folder / "regions").glob("*.json")
    path.write_text(json.dumps({**record, "boxes": "others", "images": 0}))
    assert measure_regions(runs, tiny_config)["images"] == record["images"]


@pytest.mark.parametrize("change", ["corner", "class", "difficult"])
def test_the_fingerprint_of_boxes_holds_all_of_each(change: str) -> None:
    kept = Boxes.of([[0, 0, 4, 4]], [0], [False])
    other = Boxes.of([[0, 0, 4, 5 if change == "corner" else 4]], [int(change == "class")], [change == "difficult"])
    images = [
        ImageSet("a", "test", ("cat", "dog"), ("1",), (Path("1"),), torch.zeros(1, 2), lambda _, boxes=boxes: boxes)
        for boxes in (kept, other)
    ]
    assert boxes_fingerprint(images[0]) != boxes_fingerprint(images[1])


def test_without_boxes_the_record_holds_the_gallery_alone(
    runs: Runs, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = runs.data(tiny_config)
    bare = dataclasses.replace(data, scored=dataclasses.replace(data.test, read_boxes=None))
    monkeypatch.setattr(runs, "data", lambda config=None: bare)
    record = measure_regions(runs, tiny_config)
    assert (record["sums"], record["counts"], record["grid"]) == ([], {}, [])
    assert [entry["annotated"] for entry in record["gallery"]] == [[]] * 4
    assert all(entry["boxes"] for entry in record["gallery"])


def test_a_record_of_chosen_values_stands_beside_that_of_the_runs_own(runs: Runs, tiny_config: RunConfig) -> None:
    own, chosen = measure_regions(runs, tiny_config), measure_regions(runs, tiny_config, Settings(1, 0.3, 0.7))
    assert own["settings"] == {"num_regions": 2, "threshold": 0.5, "occlusion_threshold": 0.5}
    assert chosen["settings"] == {"num_regions": 1, "threshold": 0.3, "occlusion_threshold": 0.7}
    assert len(list((runs.local_folder / "regions").glob("*.json"))) == 2
    found = {Key(*(row[name] for name in Key._fields)): row["sums"] for row in own["sums"]}
    assert any(found[key] != row["sums"] for row in chosen["sums"] if (key := Key(*list(row.values())[:4])) in found)


# ---- chosen on val


def test_n_and_tau_are_those_of_the_highest_f1_and_occlusion_has_its_own_tau() -> None:
    top = {(0.3, 1): 0.2, (0.3, 2): 0.4, (0.5, 1): 0.3, (0.5, 2): 0.4}
    occluded = {(0.3, 1): 0.9, (0.3, 2): 0.1, (0.5, 1): 0.1, (0.5, 2): 0.2}
    grid = [
        {"way": way, "tau": tau, "N": N, "F1": value}
        for way, values in (("top", top), ("occlusion", occluded))
        for (tau, N), value in values.items()
    ]
    assert best_settings(grid) == Settings(2, 0.3, 0.5)


def test_the_tuning_run_at_the_tuned_rate_chooses(
    open_runs: Callable[..., Runs], runs: Runs, tiny_config: RunConfig
) -> None:
    assert val_record(runs, tiny_config) is None
    runs.profile = runs.profile.model_copy(update={"tuning": Tuning(rates=(0.02, 0.05), seed=100, widenings=0)})
    record = val_record(runs, tiny_config)
    assert record is not None
    assert "-val-" in record["label"]
    assert record["data"] == runs.data(tiny_config.vary(scored_on="val")).test.title
    assert {(row["way"], row["N"]) for row in record["grid"]} >= {("top", 8), ("occlusion", 1)}
    by_hand = {Key(*list(row.values())[:4]): as_numbers(row["sums"]).sum() for row in record["sums"]}
    (told,) = (row["F1"] for row in record["grid"] if (row["way"], row["tau"], row["N"]) == ("top", 0.5, 2))
    objects = as_numbers(record["counts"]["all"]).sum()
    assert told == pytest.approx(by_hand[Key("top", 2, "all", F1)] / (objects + 2 * record["images"]), abs=1e-6)


# ---- several seeds


def record_of(found: list[float], other: list[float], objects: list[float]) -> dict[str, object]:
    sums = [("top", found), ("random", other)]
    return {
        "images": len(objects),
        "counts": {"all": as_text(torch.tensor(objects)), "large": as_text(torch.zeros(len(objects)))},
        "sums": [
            *(
                {"way": way, "N": 2, "among": "all", "measure": FOUND, "sums": as_text(torch.tensor(values))}
                for way, values in sums
            ),
            {"way": "top", "N": 2, "among": "all", "measure": F1, "sums": as_text(2 * torch.tensor(found))},
            {"way": "top", "N": 2, "among": "large", "measure": FOUND, "sums": as_text(torch.zeros(len(objects)))},
        ],
    }


TOP, RANDOM = Key("top", 2, "all", FOUND), Key("random", 2, "all", FOUND)


def test_shares_are_means_over_seeds_of_sums_over_counts() -> None:
    records = [record_of([1, 0, 2], [0, 0, 1], [2, 1, 3]), record_of([2, 1, 2], [0, 0, 1], [2, 1, 3])]
    rows = {Key(*list(row.values())[:4]): row for row in study_rows(records, num_resamples=50)}
    assert rows[TOP]["mean"] == pytest.approx((3 / 6 + 5 / 6) / 2)
    assert rows[Key("top", 2, "all", F1)]["mean"] == pytest.approx((6 / 12 + 10 / 12) / 2)  # 6 objects, 3 x 2 regions
    assert rows[TOP]["low"] < rows[TOP]["mean"] < rows[TOP]["high"]
    assert np.isnan(rows[Key("top", 2, "large", FOUND)]["mean"])  # there is no large object


def test_images_are_resampled_not_objects() -> None:
    row = study_rows([record_of([500, 0], [0, 0], [500, 500])])[0]
    assert (row["mean"], row["low"] < 0.1, row["high"] > 0.9) == (0.5, True, True)


def test_seeds_that_differ_widen_the_interval() -> None:
    objects = [1.0] * 60
    halves = [[1.0] * 30 + [0.0] * 30, [1.0] * 36 + [0.0] * 24, [1.0] * 24 + [0.0] * 36]
    alike, apart = [record_of(halves[0], halves[0], objects)] * 3, [record_of(each, each, objects) for each in halves]
    widths = [row["high"] - row["low"] for records in (alike, apart) for row in study_rows(records)[:1]]
    assert widths[1] > 1.2 * widths[0]


def test_differences_are_paired_and_their_p_values_adjusted() -> None:
    draw = np.random.default_rng(0)
    objects = [3.0] * 80
    other = [float(draw.integers(3)) for _ in range(80)]
    better = [value + (index % 4 > 0) for index, value in enumerate(other)]
    records = [record_of(better, other, objects), record_of(better, other, objects)]
    (once,), twice = study_rows(records, [(TOP, RANDOM)]), study_rows(records, [(TOP, RANDOM), (RANDOM, RANDOM)])
    assert once["way"] == "top - random"
    assert once["mean"] == pytest.approx(0.25)
    assert 0 < once["low"] < 0.25 < once["high"] < 0.4
    assert once["p_value"] < 0.01
    assert twice[0]["p_value"] == pytest.approx(min(1, 2 * once["p_value"]))
    assert (twice[1]["mean"], twice[1]["low"], twice[1]["high"], twice[1]["p_value"]) == (0, 0, 0, 1)
    assert [row["finding"] for row in twice] == ["top higher", NO_DIFFERENCE]
    (turned,) = study_rows(records, [(RANDOM, TOP)])
    assert (turned["mean"], turned["finding"]) == (-once["mean"], "random lower")


def test_one_seed_makes_no_finding() -> None:
    (row,) = study_rows([record_of([2, 2, 2, 1], [0, 0, 0, 0], [2, 2, 2, 2])], [(TOP, RANDOM)])
    assert (row["finding"], np.isnan(row["p_value"])) == (ONE_SEED, True)
    assert 0 < row["low"] < row["mean"] == 0.875
