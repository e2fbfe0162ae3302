"""What several notebooks, or the command line, draw: the house style, regions on photos, accuracy with intervals."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import seaborn as sns
import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional

from mcar_lib.data import read_image
from mcar_lib.data.transforms import resize_square
from mcar_lib.errors import printable
from mcar_lib.region_study import as_numbers
from mcar_lib.regions import class_marginals
from mcar_lib.runs import BASELINE, METHOD, Runs

if TYPE_CHECKING:
    from mcar_lib.prediction import Prediction
    from mcar_lib.released import ReleasedModel

COLOURS = sns.color_palette("colorblind")
MODEL_COLOURS = {BASELINE: COLOURS[0], METHOD: COLOURS[2]}  # in every figure; nothing else that stands for a model
# Streams have the colour of their model, so MCAR's are told apart by dashes and markers.
STREAM_LINES: dict[str, dict[str, Any]] = {
    "global": {"linestyle": "--", "marker": "o", "markerfacecolor": "white"},
    "local": {"linestyle": ":", "marker": "s", "markerfacecolor": "white"},
    "fused": {"linestyle": "-", "marker": "D"},
}
CLASSES_IN_A_COLUMN = 30
TICKS_APART = 0.1  # of an axis: nearer numbers would touch
MARKERS = ("o", "s", "D", "^", "v", "P")
STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",  # readable on a dark page too
    "font.size": 11,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def figure(rows: int = 1, columns: int = 1, width: float = 4.0, height: float = 3.0) -> tuple[Figure, np.ndarray]:
    """A figure in the house style and its axes as a flat array. A notebook shows it where it is a cell's value."""
    plt.rcParams.update(STYLE)
    made, axes = plt.subplots(rows, columns, figsize=(width * columns, height * rows), squeeze=False)
    plt.close(made)  # else a notebook would show it a second time, at the end of the cell
    made.set_layout_engine("compressed")
    return made, axes.ravel()


def wrapped(title: str, width: int) -> str:
    """A title broken into lines of at most so many characters."""
    return "\n".join(textwrap.wrap(title, width))


def show_image(axes: Axes, image: Tensor, title: str = "") -> None:
    """An image uint8 (3, H, W) without ticks."""
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set_title(title, fontsize=10)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)


def ink_on(colour: Sequence[float]) -> str:
    """Black or white, whichever is easier to read on a colour (red, green, blue in [0, 1])."""
    red, green, blue = colour
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.59 else "white"


def draw_box(axes: Axes, box: Sequence[float], label: str, colour: Any, dashed: bool = False, place: int = 0) -> None:
    """A box x1 y1 x2 y2 with its label in the upper left corner, `place` steps to the right if boxes may coincide."""
    x1, y1, x2, y2 = (float(value) for value in box)
    style = "--" if dashed else "-"
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=2, linestyle=style))
    if label:
        background = {"facecolor": colour, "edgecolor": "none", "pad": 1.0}
        ink = ink_on(to_rgb(colour))
        text: dict[str, Any] = {"fontsize": 9, "color": ink, "va": "top", "bbox": background, "clip_on": not place}
        axes.annotate(label, (x1, y1), (12 * place, 0), textcoords="offset points", **text)


def region_on_map(
    axes: Axes,
    image: Tensor,
    attention_map: Tensor,
    box: Sequence[float],
    threshold: float,
    colour: Any,
    label: str = "",
) -> None:
    """How a map becomes a box: the map over the photo, px(u) above it and py(v) to its right, pixel for pixel.

    image: uint8 (3, S, S); attention_map: (S, S); box: x1 y1 x2 y2, with its label. The dashed line is tau, the shaded
    band the interval. Colours span the map's own range, as the marginals do.
    """
    show_image(axes, image)
    axes.imshow(attention_map.numpy(), cmap="magma", alpha=0.6)
    draw_box(axes, box, label, colour)
    px, py = class_marginals(attention_map)
    pixels, ends, heights = np.arange(len(px)), (-0.5, len(px) - 0.5), (-0.05, 1.05)
    across = axes.inset_axes((0, 1.03, 1, 0.22), xlim=ends, ylim=heights)
    across.plot(pixels, px.numpy(), color=COLOURS[0])
    across.axhline(threshold, color="black", linestyle="--", linewidth=1)
    across.axvspan(*box[0::2], color=COLOURS[2], alpha=0.25)
    across.set(xticks=[], yticks=[threshold], yticklabels=["tau"])
    across.set_title("px", loc="right", fontsize=10, pad=1)
    down = axes.inset_axes((1.03, 0, 0.22, 1), xlim=heights, ylim=ends[::-1])
    down.plot(py.numpy(), pixels, color=COLOURS[0])
    down.axvline(threshold, color="black", linestyle="--", linewidth=1)
    down.axhspan(*box[1::2], color=COLOURS[2], alpha=0.25)
    down.set(yticks=[], xticks=[threshold], xticklabels=["tau"])
    down.set_title("py", loc="right", fontsize=10, pad=1)


def region_steps(
    image: Tensor, maps: Tensor, boxes: Tensor, labels: Sequence[str], threshold: float, crops: Tensor
) -> Figure:
    """The region module on one image, a row for each region: the map with both marginals, the box, and its crop.

    image: uint8 (3, S, S); maps: (N, S, S); boxes: (N, 4); crops: uint8 (N, 3, S, S).
    """
    made, axes = figure(len(boxes), 3, width=3.3, height=3.1)
    for row, (box, label) in enumerate(zip(boxes.tolist(), labels, strict=True)):
        on_map, on_image, crop = axes[3 * row : 3 * row + 3]
        region_on_map(on_map, image, maps[row], box, threshold, COLOURS[row % len(COLOURS)])
        on_map.set_xlabel(f"map of {label}", fontsize=10)
        show_image(on_image, image, "box")
        draw_box(on_image, box, label, COLOURS[row % len(COLOURS)])
        show_image(crop, crops[row], "what the local stream sees")
    return made


def regions_on_images(
    images: Sequence[Tensor], boxes: Sequence[Tensor], labels: Sequence[Sequence[str]], titles: Sequence[str]
) -> Figure:
    """Images uint8 (3, H, W) with the N regions found in each: boxes (N, 4) and N labels an image."""
    columns = min(4, len(images))
    made, axes = figure(-(-len(images) // columns), columns, width=2.9, height=3.1)
    for ax in axes[len(images) :]:
        ax.set_axis_off()
    for ax, image, found, names, title in zip(axes, images, boxes, labels, titles, strict=False):
        show_image(ax, image, title)
        for index, (box, name) in enumerate(zip(found.tolist(), names, strict=True)):
            draw_box(ax, box, name, COLOURS[index % len(COLOURS)])
    return made


def attention_gallery(
    images: Sequence[Tensor],
    maps: Sequence[Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Sequence[str]],
    annotated: Sequence[Sequence[tuple[str, Sequence[float]]]],
    threshold: float,
    captions: Sequence[str] | None = None,
) -> Figure:
    """What the module looks at, a row for each image: the photo, then each region as region_on_map shows it.

    images: uint8 (3, S, S); maps: (N, S, S); boxes: (N, 4) and labels: N class names of each image's regions, drawn
    solid; annotated: (class name, box) of each image's objects, dashed, in the colour of the region of their class, or
    in white. captions: of the photos, by default what is annotated.
    """
    num_regions = len(boxes[0])
    made, axes = figure(len(images), 1 + num_regions, width=3.3, height=3.3)
    for row, image in enumerate(images):
        on_photo, *on_maps = axes[row * (1 + num_regions) : (row + 1) * (1 + num_regions)]
        colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(labels[row])}
        names = ", ".join(dict.fromkeys(name for name, _ in annotated[row]))
        show_image(on_photo, image, wrapped(captions[row] if captions else f"annotated: {names or 'nothing'}", 32))
        for name, box in annotated[row]:
            draw_box(on_photo, box, "", "black")  # between the dashes: a light one would be lost on a light photo
            draw_box(on_photo, box, "", colours.get(name, "white"), dashed=True)
        for index, (ax, name, box) in enumerate(zip(on_maps, labels[row], boxes[row].tolist(), strict=True)):
            draw_box(on_photo, box, str(index + 1), colours[name], place=index)
            region_on_map(ax, image, maps[row][index], box, threshold, colours[name], str(index + 1))
            ax.set_xlabel(f"{index + 1} {name}", fontsize=10)
    return made


def gallery_figure(record: Mapping[str, Any], runs: Runs) -> Figure:
    """The gallery of a record of region_study.measure_regions, over the test images of the profile's own run."""
    size, shown, test = runs.profile.run.image_size, record["gallery"], runs.data().test
    cells = [
        torch.tensor([[[as_numbers(row).tolist() for row in of_class] for of_class in each["cells"]]]) for each in shown
    ]
    return attention_gallery(
        [resize_square(test.image(at), size) for at in range(len(shown))],
        [F.interpolate(each, size=(size, size), mode="bilinear", align_corners=True)[0] for each in cells],
        [torch.tensor(each["boxes"]) for each in shown],
        [each["labels"] for each in shown],
        [each["annotated"] for each in shown],
        runs.profile.run.threshold,
    )


def photos_figure(released: "ReleasedModel", photos: Mapping[str, Path], num_regions: int = 3) -> Figure:
    """What a released model looks at in photos, by their captions: the regions of the best-scored classes.

    A baseline has no regions: its photos have their best-scored classes above them.
    """
    images = [read_image(path, upright=True) for path in photos.values()]
    output = released.predict(images)
    if output.regions is None:
        best = output.scores.topk(min(num_regions, len(released.classes)))
        titles = [
            ", ".join(f"{released.classes[k]} ({100 * score:.0f} %)" for k, score in zip(*row, strict=True))
            for row in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
        titles = [wrapped(f"{caption}: {found}", 36) for caption, found in zip(photos, titles, strict=True)]
        return regions_on_images(images, [torch.empty(0, 4)] * len(images), [()] * len(images), titles)
    boxes, classes = output.regions.boxes[:, :num_regions].cpu(), output.regions.classes[:, :num_regions]
    scored = zip(classes.tolist(), output.scores.gather(1, classes).tolist(), strict=True)
    return attention_gallery(
        [resize_square(image, released.image_size) for image in images],
        list(released.attention_maps(images, classes).cpu()),
        list(boxes),
        [[f"{released.classes[k]} ({100 * score:.0f} %)" for k, score in zip(*row, strict=True)] for row in scored],
        [[] for _ in images],
        released.model.threshold,
        list(photos),
    )


def side_by_side(photos: Sequence[Path], height: int = 400) -> Image.Image:
    """Several photos as one, at one height."""
    images = [functional.to_pil_image(read_image(path, upright=True)) for path in photos]
    images = [image.resize((round(image.width * height / image.height), height)) for image in images]
    together = Image.new("RGB", (sum(image.width for image in images), height))
    for index, image in enumerate(images):
        together.paste(image, (sum(before.width for before in images[:index]), 0))
    return together


def predictions_figure(predictions: Mapping[str, "Prediction"]) -> Figure:
    """What a model says of photos, by their captions, in a row: the predicted classes with scores and boxes."""
    pictures = [prediction.picture() for prediction in predictions.values()]
    plt.rcParams.update(STYLE)
    made, axes = plt.subplots(
        1, len(pictures), figsize=(13, 3.1), width_ratios=[image.width / image.height for image in pictures]
    )
    plt.close(made)
    made.set_layout_engine("compressed")
    for ax, image, caption in zip(np.ravel(axes), pictures, predictions, strict=True):
        ax.imshow(image)
        ax.set(xticks=[], yticks=[])
        ax.grid(False)
        ax.set_xlabel(wrapped(caption, 38 * image.width // image.height), fontsize=9)
    return made


def with_intervals(axes: Axes, x: Any, rows: pd.DataFrame, middle: str = "mAP", **style: Any) -> None:
    """The column middle of rows with bars from column low to high."""
    below, above = rows[middle] - rows["low"], rows["high"] - rows[middle]
    axes.errorbar(x, rows[middle], np.vstack((below, above)), capsize=3, **style)


def settings_with_intervals(table: pd.DataFrame, title: str) -> Figure:
    """A panel for each thing that was varied: mAP of each value with its 95 % interval, a colour for each model. All on
    one scale, so that what matters more looks so.

    table: columns varied, value, model, mAP, low, high (percent); rows without mAP are left out.
    """
    table = table.dropna(subset="mAP")
    panels = list(table.groupby("varied", sort=False))
    made, axes = figure(1, len(panels), width=max(3.6, 7.0 / len(panels)), height=3.6)
    for ax in axes[1:]:
        ax.sharey(axes[0])
    for ax, (varied, rows) in zip(axes, panels, strict=True):
        values, models = list(dict.fromkeys(rows["value"])), list(dict.fromkeys(rows["model"]))
        for at, model in enumerate(models):
            of_model = rows[rows["model"] == model]
            across = [values.index(value) + 0.16 * (at - (len(models) - 1) / 2) for value in of_model["value"]]
            with_intervals(ax, across, of_model, label=model, color=MODEL_COLOURS[model], fmt="o")
        ax.set_xticks(range(len(values)), [str(value) for value in values])
        ax.set(xlabel=str(varied).removesuffix(" ="), xlim=(-0.5, len(values) - 0.5))
        ax.grid(axis="x", visible=False)
    if len(set(table["model"])) > 1:
        made.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    axes[0].set_ylabel("test mAP (%), 95 % interval")
    made.suptitle(wrapped(title, 42 * len(panels) + 30), fontsize=11)
    return made


def accuracy_against_cost(table: pd.DataFrame, title: str, costs: Sequence[str] = ("GMACs an image",)) -> Figure:
    """Accuracy against cost, a panel for each cost (logarithmic), a line and colour for each model, a marker for each
    value. Where both models have a cost in common, their bars stand side by side.

    table: columns value, model, mAP, low, high (percent) and the costs; rows without mAP are left out.
    """
    table = table.dropna(subset="mAP")
    values, models = list(dict.fromkeys(table["value"])), list(dict.fromkeys(table["model"]))
    made, axes = figure(1, len(costs), width=4.6, height=3.8)
    for ax, cost in zip(axes, costs, strict=True):
        in_common = table.groupby(cost)["model"].nunique().max() > 1
        for at, model in enumerate(models):
            rows, colour = table[table["model"] == model].sort_values(cost), MODEL_COLOURS[str(model)]
            beside = 1.02 ** (2 * at - len(models) + 1) if in_common else 1.0
            ax.plot(beside * rows[cost], rows["mAP"], "-", color=colour, linewidth=1, alpha=0.6)
            for value, row in zip(rows["value"], rows.index, strict=True):
                marker = MARKERS[values.index(value) % len(MARKERS)]
                one = rows.loc[[row]]
                with_intervals(ax, beside * one[cost], one, color=colour, fmt=marker, markersize=7)
        ax.set_xscale("log", subs=[])
        ticks = sorted(set(table[cost]))
        if len(ticks) > len(values):
            ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if ticks[-1] > 20 * ticks[0] else (1, 2, 3, 5)))
        else:
            ax.set_xticks(_apart(ticks))
            ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter("{x:.3g}")
        ax.margins(x=0.1)
        ax.set_xlabel(f"{cost} (log scale)")
    axes[0].set_ylabel("test mAP (%), 95 % interval")
    of_models = [Line2D([], [], color=MODEL_COLOURS[str(model)], linewidth=3, label=str(model)) for model in models]
    of_values = [
        Line2D([], [], color="grey", linestyle="none", marker=marker, markersize=7, label=str(value))
        for value, marker in zip(values, MARKERS * len(values), strict=False)
    ]
    longest = max(len(str(name)) for name in (*models, *values))
    ncols = max(1, min(6, 58 * len(costs) // (longest + 5)))  # so many letters are as wide as the panels
    made.legend(handles=of_models + of_values, loc="outside lower center", ncols=ncols, fontsize=9, frameon=False)
    made.suptitle(wrapped(title, 46 * len(costs)), fontsize=11)
    return made


def _apart(ticks: Sequence[float]) -> list[float]:
    """Those of the sorted ticks of a logarithmic axis whose numbers do not touch: the first, and each that is far
    enough from the one before it."""
    places, kept = np.log(ticks), [0]
    for at in range(1, len(ticks)):
        if places[at] - places[kept[-1]] >= TICKS_APART * (places[-1] - places[0]):
            kept.append(at)
    return [ticks[at] for at in kept]


def per_class_figure(table: pd.DataFrame, title: str) -> Figure:
    """AP of each class in both models, a line a class, by the AP of MCAR from the top down. Many classes stand in
    columns side by side, on one scale, so that each keeps a line that can be read.

    table: columns of the two models (percent), the classes its index.
    """
    ordered = table.sort_values(METHOD, ascending=False)
    columns = -(-len(ordered) // CLASSES_IN_A_COLUMN)
    rows = -(-len(ordered) // columns)
    width = 7.5 if columns == 1 else 5.0
    made, axes = figure(1, columns, width=width, height=0.22 * rows + 1.4)
    for at, ax in enumerate(axes):
        part = ordered.iloc[at * rows : (at + 1) * rows]
        ax.hlines(range(len(part)), part[BASELINE], part[METHOD], color="grey", linewidth=1)
        for model, marker in ((BASELINE, "o"), (METHOD, "D")):
            ax.plot(part[model], range(len(part)), marker, color=MODEL_COLOURS[model], label=model)
        ax.set_yticks(range(len(part)), [printable(str(name)) for name in part.index])
        ax.set(xlabel="AP (%), mean over seeds", ylim=(rows - 0.2, -0.8))
        if columns > 1:
            ax.set_xlim(-3, 103)
    made.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    made.suptitle(wrapped(title, round(10 * width * columns)), fontsize=11)
    return made
