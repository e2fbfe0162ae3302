"""Figures show the numbers that they are given."""

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.patches import Rectangle

from mcar_lib import plots
from mcar_lib.localisation import SIZES


def overlap_table() -> pd.DataFrame:
    """Rows as of localisation.overlap_rows for N = 1 and 2, no two means alike."""
    keys = [(way, n, size) for way in plots.WAYS for n in (1, 2) for size in ("all", *SIZES)]
    table = pd.DataFrame(keys, columns=["regions", "N", "size"]).assign(measure="found", objects=7)
    table["mean"] = np.arange(len(table)) / 100
    return table.assign(low=table["mean"] - 0.1, high=table["mean"] + 0.2)


def test_regions_found_shows_all_objects_by_number_and_the_sizes_at_one_number() -> None:
    table = overlap_table()
    by_number, by_size = plots.regions_found(table, "found", 2, "title").axes
    for place, way in enumerate(plots.WAYS):
        of_way = table[table["regions"] == way]
        expected = 100 * of_way.loc[of_way["size"] == "all", "mean"]
        np.testing.assert_allclose(by_number.containers[place].lines[0].get_ydata(orig=False), expected)
        expected = 100 * of_way.loc[(of_way["size"] != "all") & (of_way["N"] == 2), "mean"]
        np.testing.assert_allclose(by_size.containers[place].lines[0].get_ydata(orig=False), expected)


def test_regions_found_draws_the_ends_of_the_intervals() -> None:
    table = overlap_table()
    by_number, _ = plots.regions_found(table, "found", 2, "title").axes
    (bars,) = by_number.containers[0].lines[2]
    drawn = [segment[:, 1].tolist() for segment in bars.get_segments()]
    rows = table[(table["regions"] == next(iter(plots.WAYS))) & (table["size"] == "all")]
    assert drawn == [pytest.approx(ends) for ends in (100 * rows[["low", "high"]]).to_numpy().tolist()]


def test_regions_found_draws_nothing_where_nothing_was_measured() -> None:
    table = overlap_table()
    table.loc[table["regions"] == "centre", ["mean", "low", "high"]] = np.nan
    by_number, _ = plots.regions_found(table, "found", 2, "title").axes
    assert np.isnan(by_number.containers[-1].lines[0].get_ydata(orig=False)).all()


def test_the_gallery_draws_regions_solid_and_objects_dashed_in_the_colour_of_their_class() -> None:
    image, maps = torch.zeros(3, 16, 16, dtype=torch.uint8), torch.rand(2, 16, 16)
    boxes = torch.tensor([[0, 0, 8, 8], [4, 4, 12, 12]])
    annotated = [("cat", [1.0, 2.0, 5.0, 7.0])]
    photo = plots.attention_gallery([image], [maps], [boxes], [["dog", "cat"]], [annotated], 0.5).axes[0]
    drawn = [
        (patch.get_linestyle(), (*patch.get_xy(), patch.get_width(), patch.get_height()), patch.get_edgecolor()[:3])
        for patch in photo.patches
        if isinstance(patch, Rectangle)
    ]
    assert ("--", (1, 2, 4, 5), plots.COLOURS[1]) in drawn
    assert ("-", (0, 0, 8, 8), plots.COLOURS[0]) in drawn
    assert ("-", (4, 4, 8, 8), plots.COLOURS[1]) in drawn
