"""The record of what a run's regions look at, and the tables, figures and sentences that follow from it."""

from pathlib import Path

import numpy as np
import pytest
import torch

from mcar_lib import report
from mcar_lib.attention import (
    load_regions,
    measure_regions,
    overlap_table,
    pointing_table,
    regions_differences,
    regions_finding,
    upsampled,
)
from mcar_lib.config import Profile, RunConfig
from mcar_lib.data.transforms import normalise
from mcar_lib.experiment import Workspace
from mcar_lib.regions import attention_maps


def test_the_record_is_made_once_and_found_by_its_run(
    workspace: Workspace, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = measure_regions(workspace, tiny_config)
    monkeypatch.delattr("mcar_lib.localisation.class_regions")
    assert repr(measure_regions(workspace, tiny_config)) == repr(made)
    assert repr(load_regions(workspace.local_folder, workspace.profile)) == repr(made)
    assert made["run_id"] == workspace.run(tiny_config).run_id


def test_without_the_run_there_is_no_record(tmp_path: Path, tiny_profile: Profile) -> None:
    assert load_regions(tmp_path, tiny_profile) is None


def test_the_gallery_has_the_boxes_and_maps_of_the_model(workspace: Workspace, tiny_config: RunConfig) -> None:
    entry = measure_regions(workspace, tiny_config)["gallery"][1]
    mcar, mean_std = workspace.trained_model(tiny_config)
    data = workspace.data(tiny_config)
    squares = workspace.resized(data.test, tiny_config.image_size)
    with torch.no_grad():
        x = normalise(torch.stack([squares[at] for at in range(4)]), *mean_std)
        output = mcar(x)
        maps = attention_maps(mcar.class_logits(mcar.features(x)), output.regions.classes, squares[0].shape[-2:])
    assert entry["labels"] == [data.test.classes[k] for k in output.regions.classes[1].tolist()]
    assert entry["boxes"] == output.regions.boxes[1].tolist()
    torch.testing.assert_close(upsampled(entry["cells"], tiny_config.image_size), maps[1], rtol=1e-3, atol=1e-4)


def test_tables_and_figures_follow_from_the_record(workspace: Workspace, tiny_config: RunConfig) -> None:
    record = measure_regions(workspace, tiny_config)
    assert next(iter(overlap_table(record, 2)["measure"])) == "IoU, own class"
    assert {"top", "random", "centre", "top - random"} <= set(overlap_table(record, 2).columns)
    assert len(pointing_table(record)) == 8
    assert set(regions_differences(record, 2)["compared"]) == {"top - random", "top - centre"}
    assert report.regions_figure(record, workspace.profile).axes
    assert len(report.gallery_figure(record, workspace).axes) >= 4


def changed(record: dict, low: float, high: float) -> dict:
    rows = [{**row, "mean": (low + high) / 2, "low": low, "high": high} for row in record["overlap"]]
    return {**record, "overlap": rows}


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 0.2, "the top regions find more"),
        (-0.2, -0.1, "random regions find more"),
        (-0.1, 0.1, "no difference that this data can show"),
        (np.nan, np.nan, "nothing to compare"),
    ],
)
def test_the_finding_says_what_the_interval_supports(
    workspace: Workspace, tiny_config: RunConfig, low: float, high: float, said: str
) -> None:
    record = changed(dict(measure_regions(workspace, tiny_config)), low, high)
    first = regions_finding(record, 2).splitlines()[0]
    assert first.startswith("- Top - random, objects found at IoU 0.3, N = ")
    assert said in first
