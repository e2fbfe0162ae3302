"""Figures show the numbers that they are given."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox
from PIL import Image

from mcar_lib import figures
from mcar_lib.data.scenes import CLASSES
from mcar_lib.data.transforms import resize_square
from mcar_lib.figures import COLOURS, MODEL_COLOURS
from mcar_lib.model import MCAR
from mcar_lib.region_study import as_numbers, measure_regions
from mcar_lib.regions import class_marginals, locate_intervals
from mcar_lib.released import ReleasedModel
from mcar_lib.runs import BASELINE, METHOD, RunConfig, Runs


def table() -> pd.DataFrame:
    """Rows as of an ablation, two things varied in two models, no two numbers alike; the last run failed."""
    keys = [(varied, value, model) for varied in ("size", "N =") for model in (BASELINE, METHOD) for value in (8, 2, 4)]
    rows = pd.DataFrame(keys, columns=["varied", "value", "model"])
    rows["mAP"] = np.arange(len(rows), dtype=float)
    rows["GMACs an image"] = 100.0 - rows["mAP"]
    rows.loc[len(rows) - 1, "mAP"] = np.nan
    return rows.assign(low=rows["mAP"] - 0.1, high=rows["mAP"] + 0.2)


def drawn(axes: Axes, place: int) -> tuple[list[float], list[list[float]]]:
    """Middle and ends of the bars of one model."""
    line, _, (bars,) = axes.containers[place].lines
    return line.get_ydata(orig=False).tolist(), [segment[:, 1].tolist() for segment in bars.get_segments()]


@pytest.mark.parametrize(("panel", "varied"), [(0, "size"), (1, "N =")])
def test_settings_are_shown_with_the_ends_of_their_intervals_and_failed_ones_left_out(panel: int, varied: str) -> None:
    axes = figures.settings_with_intervals(table(), "title").axes[panel]
    assert axes.get_xlabel() == varied.removesuffix(" =")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["8", "2", "4"]
    of_panel = table().query("varied == @varied").dropna()
    for place, model in enumerate((BASELINE, METHOD)):
        rows = of_panel[of_panel["model"] == model]
        middles, ends = drawn(axes, place)
        assert middles == rows["mAP"].tolist()
        assert ends == [pytest.approx(each) for each in rows[["low", "high"]].to_numpy().tolist()]


def test_accuracy_stands_over_cost_in_the_colour_of_its_model_and_the_marker_of_its_value() -> None:
    rows = table().query("varied == 'N ='").dropna()
    made = figures.accuracy_against_cost(rows, "title", ["GMACs an image"])
    axes = made.axes[0]
    for model in (BASELINE, METHOD):
        for _, row in rows[rows["model"] == model].iterrows():
            (line,) = (each.lines[0] for each in axes.containers if each.lines[0].get_ydata(orig=False) == row["mAP"])
            assert line.get_xdata(orig=False).tolist() == [row["GMACs an image"]]
            assert line.get_color() == MODEL_COLOURS[model]
            assert line.get_marker() == figures.MARKERS[[8, 2, 4].index(row["value"])]
    assert [text.get_text() for text in made.legends[0].get_texts()] == [BASELINE, METHOD, "8", "2", "4"]


def test_models_with_a_cost_in_common_stand_side_by_side() -> None:
    rows = table().query("varied == 'size'").assign(parameters=7.0)
    axes = figures.accuracy_against_cost(rows, "title", ["parameters"]).axes[0]
    places = {line.get_color(): line.get_xdata(orig=False)[0] for line, *_ in (each.lines for each in axes.containers)}
    assert places[MODEL_COLOURS[BASELINE]] < 7.0 < places[MODEL_COLOURS[METHOD]]


@pytest.mark.parametrize("names", [["a", "b"], [f"net_{at}" for at in range(6)], ["timm:a_net_of_a_long_name"] * 7])
def test_no_label_of_accuracy_against_cost_touches_another(names: list[str]) -> None:
    costs = [2.2, 3.4, 4.15, 4.84, 4.9, 42.5, 43.0][: len(names)]
    values = [f"{name}{at}" for at, name in enumerate(names)]
    rows = [(value, model, cost) for model in (BASELINE, METHOD) for value, cost in zip(values, costs, strict=True)]
    table = pd.DataFrame(rows, columns=["value", "model", "M parameters"]).assign(mAP=50.0, low=40.0, high=60.0)
    made = figures.accuracy_against_cost(table, "title", ["M parameters"])
    made.canvas.draw()
    shown = [label for label in made.axes[0].get_xticklabels() if label.get_text()]
    assert len(shown) >= 2
    assert not touching([label.get_window_extent() for label in shown])
    legend = made.legends[0].get_window_extent()
    assert made.bbox.x0 <= legend.x0 < legend.x1 <= made.bbox.x1


@pytest.mark.parametrize("count", [1, 20, 80])
def test_every_class_has_a_line_of_its_own_with_both_models(count: int) -> None:
    ap = np.linspace(5, 95, count)
    table = pd.DataFrame({BASELINE: ap, METHOD: ap[::-1]}, index=[f"class {at}" for at in range(count)])
    made = figures.per_class_figure(table, "title")
    made.canvas.draw()
    named = [label for axes in made.axes for label in axes.get_yticklabels()]
    assert [label.get_text() for label in named] == list(table.sort_values(METHOD, ascending=False).index)
    assert not touching([label.get_window_extent() for label in named])
    for model in (BASELINE, METHOD):
        lines = [line for axes in made.axes for line in axes.lines if line.get_label() == model]
        drawn = [value for line in lines for value in line.get_xdata(orig=False)]
        assert drawn == table.sort_values(METHOD, ascending=False)[model].tolist()
        assert {line.get_color() for line in lines} == {MODEL_COLOURS[model]}


def touching(boxes: list[Bbox]) -> bool:
    return any(one.overlaps(two) for one, two in itertools.combinations(boxes, 2))


def test_nothing_is_drawn_where_nothing_was_measured() -> None:
    _, (axes,) = figures.figure()
    figures.with_intervals(axes, [0], pd.DataFrame({"mean": [np.nan], "low": [np.nan], "high": [np.nan]}), "mean")
    assert np.isnan(axes.containers[0].lines[0].get_ydata(orig=False)).all()


def boxes_on(axes: Axes) -> list[tuple]:
    return [
        (patch.get_linestyle(), (*patch.get_xy(), patch.get_width(), patch.get_height()), patch.get_edgecolor()[:3])
        for patch in axes.patches
        if isinstance(patch, Rectangle)
    ]


def test_a_label_can_be_read_on_every_colour() -> None:
    """At a contrast of 3 to 1 at least, as WCAG asks of large text."""

    def luminance(colour: str | tuple[float, ...]) -> float:
        parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    _, (axes,) = figures.figure()
    for place, colour in enumerate(COLOURS):
        figures.draw_box(axes, (0, 0, 1, 1), str(place), colour)
        dark, light = sorted((luminance(axes.texts[-1].get_color()), luminance(colour)))
        assert (light + 0.05) / (dark + 0.05) >= 3, colour


def test_a_phone_s_photo_is_shown_upright(tiny_model: Callable[..., MCAR], tmp_path: Path) -> None:
    exif, pixels = Image.Exif(), torch.arange(96 * 64, dtype=torch.int64).view(96, 64).mul(41).remainder(251)
    exif[0x0112] = 6
    Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / "x.png", exif=exif)
    made = figures.photos_figure(ReleasedModel(tiny_model().eval(), CLASSES, 64, {}), {"one": tmp_path / "x.png"}, 1)
    upright = resize_square(pixels.to(torch.uint8).rot90(-1).expand(3, -1, -1), 64)
    np.testing.assert_array_equal(made.axes[0].images[0].get_array(), upright.permute(1, 2, 0))


def test_the_gallery_draws_regions_solid_and_objects_dashed_in_the_colour_of_their_class() -> None:
    image, maps = torch.zeros(3, 16, 16, dtype=torch.uint8), torch.rand(2, 16, 16)
    boxes = torch.tensor([[0, 0, 8, 8], [4, 4, 12, 12]])
    annotated = [("cat", [1.0, 2.0, 5.0, 7.0])]
    photo = figures.attention_gallery([image], [maps], [boxes], [["dog", "cat"]], [annotated], 0.5).axes[0]
    assert ("--", (1, 2, 4, 5), COLOURS[1]) in boxes_on(photo)
    assert ("-", (0, 0, 8, 8), COLOURS[0]) in boxes_on(photo)
    assert ("-", (4, 4, 8, 8), COLOURS[1]) in boxes_on(photo)


def test_a_map_has_its_marginals_beside_it_and_the_interval_as_a_band() -> None:
    image, attention = torch.zeros(3, 16, 16, dtype=torch.uint8), torch.rand(16, 16)
    px, py = class_marginals(attention)
    (x1, x2), (y1, y2) = locate_intervals(torch.stack((px, py)), 0.4).tolist()
    _, (axes,) = figures.figure()
    figures.region_on_map(axes, image, attention, (x1, y1, x2, y2), 0.4, COLOURS[3])
    across, down = axes.child_axes
    assert boxes_on(axes) == [("-", (x1, y1, x2 - x1, y2 - y1), COLOURS[3])]
    np.testing.assert_array_equal(across.lines[0].get_ydata(), px)
    np.testing.assert_array_equal(down.lines[0].get_xdata(), py)
    assert (across.lines[1].get_ydata()[0], down.lines[1].get_xdata()[0]) == (0.4, 0.4)
    assert (across.patches[0].get_x(), across.patches[0].get_width()) == (x1, x2 - x1)
    assert (down.patches[0].get_y(), down.patches[0].get_height()) == (y1, y2 - y1)


def test_the_steps_show_map_box_and_crop_of_each_region() -> None:
    image, crops = torch.zeros(3, 16, 16, dtype=torch.uint8), torch.randint(255, (2, 3, 16, 16), dtype=torch.uint8)
    boxes = torch.tensor([[0, 0, 8, 8], [4, 4, 12, 12]])
    axes = figures.region_steps(image, torch.rand(2, 16, 16), boxes, ["dog", "cat"], 0.5, crops).axes
    for row, (x, y, colour) in enumerate(((0, 0, COLOURS[0]), (4, 4, COLOURS[1]))):
        on_map, on_image, crop = axes[3 * row : 3 * row + 3]
        assert boxes_on(on_map) == boxes_on(on_image) == [("-", (x, y, 8, 8), colour)]
        np.testing.assert_array_equal(crop.images[0].get_array(), crops[row].permute(1, 2, 0))


def test_the_gallery_of_a_run_shows_what_its_record_says(runs: Runs, tiny_config: RunConfig) -> None:
    record = measure_regions(runs, tiny_config)
    axes = figures.gallery_figure(record, runs).axes
    assert len(axes) == 4 * 3  # the photo and two regions, of four images
    entry = record["gallery"][1]
    solid = [place for style, place, _ in boxes_on(axes[3]) if style == "-"]
    assert all((x1, y1, x2 - x1, y2 - y1) in solid for x1, y1, x2, y2 in entry["boxes"])
    cells, shown = np.array([as_numbers(row) for row in entry["cells"][0]]), axes[4].images[1].get_array()
    np.testing.assert_allclose(shown[[0, 0, -1, -1], [0, -1, 0, -1]], cells[[0, 0, -1, -1], [0, -1, 0, -1]], rtol=1e-6)
