"""What the region module of a run looks at, kept as a record: regions against annotated boxes, and a small gallery."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from mcar_lib import localisation
from mcar_lib.config import Profile, RunConfig
from mcar_lib.experiment import RECORD_FORMAT, Workspace, current_record, kept, read_records
from mcar_lib.machine import describe_environment
from mcar_lib.recipe import network_input

KIND = "regions"  # the folder of these records
COUNTS = (1, 2, 4, 6, 8)
FOUND = "found at 0.3, any class"  # the measure of the figure and the finding
GALLERY_IMAGES, GALLERY_REGIONS = 4, 3


def measure_regions(workspace: Workspace, config: RunConfig) -> Mapping[str, Any]:
    """The record of a run's regions: overlap and pointing rows of mcar_lib.localisation, and the gallery.

    The gallery holds, for the first test images, each region's box, class and map cells, and the annotated objects.
    """
    run_id = workspace.run(config).run_id
    return workspace.keep(KIND, run_id, lambda: _measured(workspace, config, run_id))


def load_regions(folder: Path, profile: Profile) -> Mapping[str, Any] | None:
    """The record of the regions of a profile's own run from one results/<profile> folder; None if there is none."""
    record = current_record(read_records(folder), profile.run)
    return kept([folder], KIND, record.run_id) if record else None


def _measured(workspace: Workspace, config: RunConfig, run_id: str) -> dict[str, Any]:
    data = workspace.data(config)
    mcar, mean_std = workspace.trained_model(config)
    squares = workspace.resized(data.test, config.image_size)
    objects = localisation.annotated_objects(data.test, config.image_size)
    found = localisation.class_regions(mcar, squares, mean_std)
    counts = sorted({n for n in (*COUNTS, config.num_regions) if n <= len(data.test.classes)})
    measured = localisation.measure_overlaps(objects, found, max(counts))
    pointing = localisation.pointing_game(objects, found)
    bins = {
        name: int(((objects.sizes >= low) & (objects.sizes < high)).sum())
        for name, (low, high) in localisation.SIZES.items()
    }
    difficult = sum(int(data.test.boxes(index).difficult.sum()) for index in range(len(data.test)))

    indices = range(min(GALLERY_IMAGES, len(squares)))
    with torch.no_grad():
        x = network_input(torch.stack([squares[i] for i in indices]), torch.device("cpu"), mean_std)
        A = mcar.features(x)  # noqa: N806 (the paper's symbol)
        size = (config.image_size, config.image_size)
        regions = mcar.find_regions(A, mcar.classify(mcar.pool(A)), size)
        cells = torch.sigmoid(mcar.class_logits(A))

    def shown(at: int) -> dict[str, Any]:
        classes = regions.classes[at, :GALLERY_REGIONS].tolist()
        here = objects.images == at
        annotated = zip(objects.classes[here].tolist(), objects.boxes[here].tolist(), strict=True)
        return {
            "image": data.test.ids[at],
            "labels": [data.test.classes[k] for k in classes],
            "boxes": regions.boxes[at, :GALLERY_REGIONS].tolist(),
            "cells": cells[at, classes].tolist(),
            "annotated": [[data.test.classes[k], box] for k, box in annotated],
        }

    return {
        "format": RECORD_FORMAT,
        "run_id": run_id,
        "label": config.label,
        "data": data.test.title,
        "images": len(data.test),
        "difficult": difficult,
        "objects": bins,
        "overlap": localisation.overlap_rows(objects, measured, counts, len(data.test)),
        "pointing": localisation.pointing_rows(pointing, config.num_regions, len(data.test)),
        "gallery": [shown(at) for at in indices],
        "environment": describe_environment(workspace.profile.threads),
    }


def upsampled(cells: list[Any], size: int) -> Tensor:
    """A gallery entry's map cells (N, h, w) as maps (N, size, size), as the module sees them."""
    maps = torch.tensor(cells)[None]
    return torch.nn.functional.interpolate(maps, size=(size, size), mode="bilinear", align_corners=True)[0]


# Tables and finding --------------------------------------------------------------------------------------------------


def overlap_table(record: Mapping[str, Any], num_regions: int) -> pd.DataFrame:
    """Regions against annotated objects: a row a measure, a column a way to choose regions; percent with intervals."""
    rows = pd.DataFrame(record["overlap"])
    rows = rows[(rows["N"] == num_regions) & (rows["size"] == "all")]
    return _interval_pivot(rows, index="measure", columns="regions")


def pointing_table(record: Mapping[str, Any]) -> pd.DataFrame:
    """The pointing game: a row a point or difference, a column for the classes counted; percent with intervals."""
    rows = pd.DataFrame(record["pointing"])
    rows["classes"] += " (" + rows["pairs"].astype(str) + " pairs of image and class)"
    return _interval_pivot(rows.rename(columns={"point": "regions"}), index="regions", columns="classes", name="point")


def regions_differences(record: Mapping[str, Any], num_regions: int) -> pd.DataFrame:
    """Top regions against random ones and against the centre box, size by size: points, interval and finding."""
    rows = pd.DataFrame(record["overlap"])
    rows = rows[(rows["measure"] == FOUND) & rows["regions"].str.startswith("top - ")]
    rows = rows[(rows["N"] == num_regions) | ((rows["N"] == 1) & (rows["size"] == "all"))]
    told = {"top - random": "random regions find", "top - centre": "the centre box finds"}
    return pd.DataFrame(
        [
            {
                "compared": row["regions"],
                "N": row["N"],
                "objects": f"{row['size']} ({row['objects']:,})",
                "points": _percent_interval(row),
                "finding": localisation.finding(row, "the top regions find more", f"{told[row['regions']]} more"),
            }
            for row in _dicts(rows)
        ]
    )


def regions_finding(record: Mapping[str, Any], num_regions: int) -> str:
    """What the regions' record supports, in sentences written from its numbers."""
    table = regions_differences(record, num_regions)
    of_all = table[table["objects"].str.startswith("all")]
    lines = [
        f"{row.compared}, objects found at IoU 0.3, N = {row.N}: {row.points} points; {row.finding}."
        for row in of_all.itertuples()
    ]
    points = {row["point"]: row for row in record["pointing"] if row["classes"] == "present"}
    for other in ("random pixel", "centre of the image"):
        row = points[f"peak - {other}"]
        said = localisation.finding(row, "the peak of the map hits more often", f"the {other} hits more often")
        lines.append(
            f"Peak of the map - {other}, pointing game: {_percent_interval({**row, 'regions': ' - '})} points; {said}."
        )
    return "\n".join(f"- {line[0].upper()}{line[1:]}" for line in lines)


def _interval_pivot(rows: pd.DataFrame, index: str, columns: str, name: str = "") -> pd.DataFrame:
    texts = rows.assign(text=[_percent_interval(row) for row in _dicts(rows)])
    order = [list(dict.fromkeys(rows[key])) for key in (index, columns)]
    table = texts.pivot(index=index, columns=columns, values="text").loc[order[0], order[1]]
    return table.rename_axis(index=name or index, columns=None).reset_index()


def _percent_interval(row: Mapping[str, Any]) -> str:
    sign = "+" if " - " in row["regions"] else ""
    mean, low, high = (f"{100 * row[end]:{sign}.1f}" for end in localisation.ENDS)
    return "-" if pd.isna(row["mean"]) else f"{mean} ({low} to {high})"


def _dicts(rows: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in rows.to_dict("records")]
