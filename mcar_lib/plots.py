"""Figures: each function draws from images, tensors or run records and returns the matplotlib figure."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator
from torch import Tensor

from mcar_lib.data import ImageSet
from mcar_lib.regions import class_marginals

COLOURS = sns.color_palette("colorblind")
GLOBAL, LOCAL, FUSED = COLOURS[0], COLOURS[1], COLOURS[2]
STREAM_COLOURS = {"global": GLOBAL, "local": LOCAL, "fused": FUSED}
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
    made.set_layout_engine("constrained")
    return made, axes.ravel()


def wrapped(title: str, width: int) -> str:
    """A title broken into lines of at most so many characters."""
    return "\n".join(textwrap.wrap(title, width))


def save(made: Figure, path: Path) -> Path:
    """Writes a PNG without anything that changes from one day to the next."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(path, dpi=150, metadata={"Software": None})
    return path


def show_image(axes: Axes, image: Tensor, title: str = "") -> None:
    """An image uint8 (3, H, W) without ticks."""
    axes.imshow(image.permute(1, 2, 0).numpy())
    axes.set_title(title, fontsize=10)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


def draw_box(axes: Axes, box: Sequence[float], label: str, colour: Any, dashed: bool = False) -> None:
    """A box x1 y1 x2 y2 with its label inside the upper left corner."""
    x1, y1, x2, y2 = (float(value) for value in box)
    style = "--" if dashed else "-"
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=colour, linewidth=2, linestyle=style))
    if label:
        background = {"facecolor": colour, "edgecolor": "none", "pad": 1.0}
        axes.text(x1, y1, label, fontsize=8, color="white", va="top", ha="left", bbox=background, clip_on=True)


def sample_photos(images: ImageSet, indices: Sequence[int], columns: int = 4) -> Figure:
    """Photos with their annotated boxes; difficult objects are dashed."""
    made, axes = figure(-(-len(indices) // columns), columns, width=2.9, height=2.9)
    for ax in axes[len(indices) :]:
        ax.set_axis_off()
    for ax, index in zip(axes, indices, strict=False):
        show_image(ax, images.image(index), images.ids[index])
        boxes = images.boxes(index)
        for box, kind, difficult in zip(boxes.xyxy, boxes.classes, boxes.difficult, strict=True):
            colour = COLOURS[int(kind) % len(COLOURS)]
            draw_box(ax, box.tolist(), images.classes[int(kind)], colour, dashed=bool(difficult))
    return made


def class_counts(counts: pd.DataFrame) -> Figure:
    """Images with each class by split; counts: one row a class, one column a split."""
    made, (ax,) = figure(width=9, height=3.6)
    counts.plot.bar(ax=ax, color=[GLOBAL, LOCAL], width=0.8)
    ax.set(xlabel="", ylabel="images with the class")
    ax.tick_params(axis="x", rotation=60)
    ax.grid(axis="x", visible=False)
    return made


def cooccurrence(matrix: pd.DataFrame) -> Figure:
    """P(column class present | row class present), in percent."""
    made, (ax,) = figure(width=8, height=6.6)
    sns.heatmap(100 * matrix, ax=ax, cmap="viridis", vmin=0, vmax=60, square=True, cbar_kws={"label": "percent"})
    ax.set(xlabel="is there too", ylabel="where this class is")
    ax.grid(False)
    return made


def curves(histories: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Loss and mAP of each epoch of one or more runs; histories: run name -> its record's history."""
    made, axes = figure(len(histories), 2, width=5, height=3.2)
    for row, (name, history) in enumerate(histories.items()):
        table = pd.DataFrame(history)
        has_local = bool((table["local_loss"] > 0).any())
        loss, precision = axes[2 * row], axes[2 * row + 1]
        for stream in ("global", "local") if has_local else ("global",):
            loss.plot(table["epoch"], table[f"{stream}_loss"], "o-", color=STREAM_COLOURS[stream], label=stream)
        for stream in ("global", "local", "fused") if has_local else ("global",):
            values = 100 * table[f"map_{stream}"]
            precision.plot(table["epoch"], values, "o-", color=STREAM_COLOURS[stream], label=stream)
        loss.set(title=f"{name}: training loss", xlabel="epoch", ylabel="BCE", ylim=(0, None))
        precision.set(title=f"{name}: test mAP", xlabel="epoch", ylabel="mAP (%)")
        for ax in (loss, precision):
            ax.legend()
            ax.xaxis.get_major_locator().set_params(integer=True)
    return made


def region_steps(
    image: Tensor,
    maps: Tensor,
    px: Tensor,
    py: Tensor,
    boxes: Tensor,
    labels: Sequence[str],
    threshold: float,
    crops: Tensor,
) -> Figure:
    """The region module on one image, a row for each region: map, both marginals with tau and interval, box, crop.

    image: uint8 (3, H, W); maps: (N, H, W); px: (N, W); py: (N, H); boxes: (N, 4); crops: uint8 (N, 3, H, W).
    """
    made, axes = figure(len(boxes), 5, width=2.6, height=2.4)
    for row, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
        on_map, across, down, on_image, crop = axes[5 * row : 5 * row + 5]
        show_image(on_map, image, f"map of {labels[row]}")
        on_map.imshow(maps[row].numpy(), cmap="magma", alpha=0.6)
        _marginal(across, px[row], (x1, x2), threshold, "px(u), over the width")
        _marginal(down, py[row], (y1, y2), threshold, "py(v), over the height")
        show_image(on_image, image, "box")
        draw_box(on_image, (x1, y1, x2, y2), labels[row], COLOURS[row % len(COLOURS)])
        show_image(crop, crops[row], "what the local stream sees")
    return made


def _marginal(ax: Axes, values: Tensor, interval: tuple[int, int], threshold: float, title: str) -> None:
    ax.plot(values.numpy(), color=GLOBAL)
    ax.axhline(threshold, color="black", linestyle="--", linewidth=1)
    ax.axvspan(*interval, color=FUSED, alpha=0.25)
    ax.set_title(title, fontsize=10)
    ax.set_xlabel("pixel", fontsize=9)
    ax.set_ylim(-0.05, 1.05)


def regions_on_images(
    images: Sequence[Tensor], boxes: Sequence[Tensor], labels: Sequence[Sequence[str]], titles: Sequence[str]
) -> Figure:
    """Images uint8 (3, H, W) with the N regions found in each: boxes (N, 4) and N labels an image."""
    columns = 4
    made, axes = figure(-(-len(images) // columns), columns, width=2.9, height=3.1)
    for ax in axes[len(images) :]:
        ax.set_axis_off()
    for ax, image, found, names, title in zip(axes, images, boxes, labels, titles, strict=False):
        show_image(ax, image, title)
        for index, (box, name) in enumerate(zip(found.tolist(), names, strict=True)):
            draw_box(ax, box, name, COLOURS[index % len(COLOURS)])
    return made


def main_results(runs: pd.DataFrame, title: str) -> Figure:
    """Each run's mAP as a dot, each model's mean as a bar's end; runs: columns model, seed, mAP (percent)."""
    made, (ax,) = figure(width=6.4, height=2.8)
    models = list(dict.fromkeys(runs["model"]))
    for place, name in enumerate(models):
        values = runs.loc[runs["model"] == name, "mAP"].to_numpy()
        ax.plot(values, np.full(len(values), place), "o", color=COLOURS[place], markersize=8, alpha=0.7)
        ax.plot(values.mean(), place, "|", color="black", markersize=26, markeredgewidth=2)
        ax.annotate(f"{values.mean():.1f}", (values.mean(), place), (0, 18), textcoords="offset points", ha="center")
    ax.set_yticks(range(len(models)), models)
    ax.set(ylim=(len(models) - 0.5, -0.6), xlabel="test mAP (%): a dot a seed, a line their mean")
    ax.set_title(wrapped(title, 60), fontsize=11)
    return made


def per_class(table: pd.DataFrame, title: str) -> Figure:
    """AP of each class for two models; table: index class, columns the two models' AP in percent."""
    made, (ax,) = figure(width=7.5, height=5.6)
    first, second = table.columns[:2]
    ordered = table.sort_values(second)
    places = np.arange(len(ordered))
    ax.hlines(places, ordered[first], ordered[second], color="grey", linewidth=1)
    ax.plot(ordered[first], places, "o", color=GLOBAL, label=first)
    ax.plot(ordered[second], places, "D", color=FUSED, label=second)
    ax.set_yticks(places, [str(name) for name in ordered.index])
    ax.set_xlabel("AP (%), mean over seeds")
    ax.set_title(wrapped(title, 75), fontsize=11)
    ax.legend()
    return made


def study_settings(table: pd.DataFrame, title: str) -> Figure:
    """A panel for each thing that was varied: mAP of each value with its 95 % interval, a colour for each model.

    table: columns varied, value, model, mAP, low, high (percent).
    """
    panels = list(dict.fromkeys(table["varied"]))
    made, axes = figure(1, len(panels), width=max(3.6, 7.0 / len(panels)), height=3.6)
    for ax, varied in zip(axes, panels, strict=True):
        rows = table[table["varied"] == varied]
        places = {value: place for place, value in enumerate(dict.fromkeys(rows["value"]))}
        models = list(dict.fromkeys(rows["model"]))
        for at, model in enumerate(models):
            of_model = rows[rows["model"] == model]
            shift = 0.16 * (at - (len(models) - 1) / 2)
            across = [places[value] + shift for value in of_model["value"]]
            label = model if len(models) > 1 else None
            _with_intervals(ax, across, of_model, "mAP", label=label, color=_model_colour(model), fmt="o")
        ax.set_xticks(range(len(places)), [str(value) for value in places])
        ax.set(xlabel=varied.removesuffix(" ="), xlim=(-0.5, len(places) - 0.5))
        ax.grid(axis="x", visible=False)
        if len(models) > 1:
            made.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    axes[0].set_ylabel("test mAP (%), 95 % interval")
    made.suptitle(wrapped(title, 42 * len(panels) + 30), fontsize=11)
    return made


def study_against_cost(
    table: pd.DataFrame, title: str, costs: Sequence[str] = ("GMACs an image", "ms an image")
) -> Figure:
    """Accuracy against cost, a panel for each cost (logarithmic), a line for each model, a label for each value.

    table: columns value, model, mAP, low, high (percent) and the costs.
    """
    made, axes = figure(1, len(costs), width=4.6, height=3.8)
    for ax, cost in zip(axes, costs, strict=True):
        for model, rows in table.groupby("model", sort=False):
            ordered = rows.sort_values(cost)
            colour = _model_colour(str(model))
            ax.plot(ordered[cost], ordered["mAP"], "-", color=colour, linewidth=1, alpha=0.6)
            _with_intervals(ax, ordered[cost], ordered, "mAP", label=str(model), color=colour, fmt="o")
            for value, x, y in zip(ordered["value"], ordered[cost], ordered["mAP"], strict=True):
                ax.annotate(str(value), (x, y), (5, 5), textcoords="offset points", fontsize=8)
        ax.set_xscale("log")
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_locator(NullLocator())
        ax.margins(x=0.2)
        ax.set_xlabel(f"{cost} (log scale)")
    axes[0].set_ylabel("test mAP (%), 95 % interval")
    made.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    made.suptitle(wrapped(title, 90), fontsize=11)
    return made


def study_along(table: pd.DataFrame, title: str, reference: str, xlabel: str) -> Figure:
    """mAP and cost along a number: a line for each way in which it was varied, the rows named reference a level line.

    table: columns varied, value, mAP, low, high (percent), GMACs an image.
    """
    made, (precision, cost) = figure(1, 2, width=4.6, height=3.8)
    level = table[table["varied"] == reference]
    for _, row in level.iterrows():
        precision.axhline(row["mAP"], color=GLOBAL, linestyle="--", label=str(row["model"]))
        precision.axhspan(row["low"], row["high"], color=GLOBAL, alpha=0.12, linewidth=0)
        cost.axhline(row["GMACs an image"], color=GLOBAL, linestyle="--")
    ways = [way for way in dict.fromkeys(table["varied"]) if way != reference]
    for at, way in enumerate(ways):
        rows = table[table["varied"] == way]
        x = [value + 0.12 * (at - (len(ways) - 1) / 2) for value in rows["value"]]
        colour, marker = ((FUSED, "o"), (LOCAL, "s"))[at % 2]
        precision.plot(x, rows["mAP"], "-", color=colour, linewidth=1, alpha=0.6)
        _with_intervals(precision, x, rows, "mAP", label=way.removesuffix(" ="), color=colour, fmt=marker)
        if at == 0:
            cost.plot(rows["value"], rows["GMACs an image"], "o-", color=colour)
    for ax in (precision, cost):
        ax.set_xticks(sorted(set(table["value"]) - set(level["value"])))
        ax.set_xlabel(xlabel)
    precision.set_ylabel("test mAP (%), 95 % interval")
    cost.set_ylabel("GMACs an image")
    cost.set_ylim(0, None)
    made.legend(*precision.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False)
    made.suptitle(wrapped(title, 90), fontsize=11)
    return made


def _with_intervals(ax: Axes, x: Any, rows: pd.DataFrame, middle: str, **style: Any) -> None:
    """The column middle of rows with bars from column low to high."""
    # A percentile interval need not hold its own estimate.
    below, above = rows[middle] - rows["low"], rows["high"] - rows[middle]
    ax.errorbar(x, rows[middle], np.vstack((below, above)).clip(min=0), capsize=3, **style)


def _model_colour(model: str) -> Any:
    return GLOBAL if "global" in model else FUSED


def attention_gallery(
    images: Sequence[Tensor],
    maps: Sequence[Tensor],
    boxes: Sequence[Tensor],
    labels: Sequence[Sequence[str]],
    annotated: Sequence[Sequence[tuple[str, Sequence[float]]]],
    threshold: float,
    captions: Sequence[str] | None = None,
) -> Figure:
    """What the module looks at, a row for each image: the photo, then the map of each region with its marginals.

    images: uint8 (3, S, S); maps: (N, S, S); boxes: (N, 4) and labels: N class names of each image's regions, drawn
    solid; annotated: (class name, box) of each image's objects, dashed, in the colour of the region of their class, or
    in white. captions: of the photos, by default what is annotated. Above a map is px(u), to its right py(v); the
    dashed line is tau, the shaded band the interval.
    """
    num_regions = len(boxes[0])
    made, axes = figure(len(images), 1 + num_regions, width=3.3, height=3.3)
    for row, image in enumerate(images):
        on_photo, *on_maps = axes[row * (1 + num_regions) : (row + 1) * (1 + num_regions)]
        colours = {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(labels[row])}
        names = ", ".join(dict.fromkeys(name for name, _ in annotated[row]))
        show_image(on_photo, image, wrapped(captions[row] if captions else f"annotated: {names or 'nothing'}", 34))
        for name, box in annotated[row]:
            draw_box(on_photo, box, "", "black")  # between the dashes: a light one would be lost on a light photo
            draw_box(on_photo, box, "", colours.get(name, "white"), dashed=True)
        px, py = class_marginals(maps[row])
        for index, (ax, name, box) in enumerate(zip(on_maps, labels[row], boxes[row].tolist(), strict=True)):
            draw_box(on_photo, box, "", colours[name])
            # Regions often coincide: numbers side by side, the names are on the maps.
            offset, background = (2 + 13 * index, -2), {"facecolor": colours[name], "edgecolor": "none", "pad": 1.5}
            corner = {"textcoords": "offset points", "va": "top", "color": "white", "fontsize": 9, "bbox": background}
            on_photo.annotate(str(index + 1), box[:2], offset, **corner)
            show_image(ax, image)
            ax.imshow(maps[row][index].numpy(), cmap="magma", alpha=0.6)
            draw_box(ax, box, str(index + 1), colours[name])
            ax.set_xlabel(f"{index + 1} {name}", fontsize=10)
            _beside(ax, px[index], box[0::2], threshold, upright=False)
            _beside(ax, py[index], box[1::2], threshold, upright=True)
    return made


def _beside(ax: Axes, values: Tensor, interval: Sequence[float], threshold: float, upright: bool) -> None:
    """A marginal along the upper or the right edge of its map, pixel for pixel."""
    pixels, ends = np.arange(len(values)), (-0.5, len(values) - 0.5)
    if upright:
        edge = ax.inset_axes((1.03, 0, 0.22, 1), xlim=(-0.05, 1.05), ylim=ends[::-1])
        edge.plot(values.numpy(), pixels, color=GLOBAL)
        edge.axvline(threshold, color="black", linestyle="--", linewidth=1)
        edge.axhspan(*interval, color=FUSED, alpha=0.25)
    else:
        edge = ax.inset_axes((0, 1.03, 1, 0.22), xlim=ends, ylim=(-0.05, 1.05))
        edge.plot(pixels, values.numpy(), color=GLOBAL)
        edge.axhline(threshold, color="black", linestyle="--", linewidth=1)
        edge.axvspan(*interval, color=FUSED, alpha=0.25)
    edge.set(xticks=[], yticks=[])


WAYS = {"top": (COLOURS[2], "o"), "random": (COLOURS[1], "s"), "bottom": (COLOURS[4], "v"), "centre": (COLOURS[7], "D")}


def regions_found(rows: pd.DataFrame, measure: str, num_regions: int, title: str) -> Figure:
    """A measure of localisation.overlap_rows in percent, 95 % intervals: by N, and by object size at N = num_regions.

    rows: the data frame of those rows; measure: one of localisation.MEASURES.
    """
    made, (by_number, by_size) = figure(1, 2, width=5.2, height=3.9)
    shown = rows[rows["measure"] == measure]
    shown = shown.assign(**{end: 100 * shown[end] for end in ("mean", "low", "high")})
    for place, (way, (colour, marker)) in enumerate(WAYS.items()):
        of_way = shown[shown["regions"] == way]
        numbers = of_way[of_way["size"] == "all"]
        sizes = of_way[(of_way["N"] == num_regions) & (of_way["size"] != "all")]
        style = {"marker": marker, "color": colour, "label": way}
        _with_intervals(by_number, numbers["N"] + 0.12 * (place - 1.5), numbers, "mean", linestyle="-", **style)
        _with_intervals(by_size, np.arange(len(sizes)) + 0.16 * (place - 1.5), sizes, "mean", linestyle="none", **style)
    by_size.set_xticks(range(len(sizes)), [f"{row.size}\n{row.objects:,} objects" for row in sizes.itertuples()])
    by_number.set_xticks(sorted(set(shown["N"])))
    by_number.set_xlabel("number of regions N")
    by_size.set_xlabel(f"object size, at N = {num_regions}")
    for ax in (by_number, by_size):
        ax.set_ylabel(f"{measure} (%)")
        ax.set_ylim(-0.03 * ax.get_ylim()[1], None)  # a marker at 0 is whole
    made.legend(*by_number.get_legend_handles_labels(), loc="outside lower center", ncols=len(WAYS))
    made.suptitle(wrapped(title, 110), fontsize=11)
    return made
