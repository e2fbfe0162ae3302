"""What runs' regions are worth, kept as records, and several seeds of them together.

A record keeps sums for each image, so that seeds and test images are resampled together wherever it is read. N and tau
are chosen by F1 on the record of a tuning run, which is trained on the train list and scored on val; the records of the
reported runs tell of the chosen ones only.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mcar_lib.attribution import class_maps, maps_of, occlusion_maps
from mcar_lib.data.image_set import ImageSet
from mcar_lib.data.squares import ResizedImages
from mcar_lib.files import content_id
from mcar_lib.intervals import holm, two_level
from mcar_lib.localisation import (
    F1,
    Key,
    Objects,
    annotated_objects,
    class_regions,
    counts_to_tell,
    image_sums,
    measure_overlaps,
    pointing_game,
    val_grid,
)
from mcar_lib.model import MCAR
from mcar_lib.regions import attentional_regions
from mcar_lib.runs.comparisons import NO_DIFFERENCE, ONE_SEED, SIGNIFICANT
from mcar_lib.runs.config import RunConfig
from mcar_lib.runs.environment import describe_environment
from mcar_lib.runs.fingerprints import fingerprint
from mcar_lib.runs.records import RECORD_FORMAT
from mcar_lib.runs.runs import Runs
from mcar_lib.runs.tuning import tune, tuning_run
from mcar_lib.training.loop import check_settings

GALLERY_IMAGES, GALLERY_REGIONS = 4, 3
NO_OBJECTS = Objects(torch.zeros(0, 4), torch.zeros(0), torch.zeros(0), torch.zeros(0))


class Settings(NamedTuple):
    """What is reported: N, tau of the class maps, tau of the occlusion maps."""

    num_regions: int
    threshold: float
    occlusion_threshold: float


def best_settings(grid: Sequence[Mapping[str, Any]]) -> Settings:
    """N and tau of the highest F1 of the top regions, then the tau with which occlusion is best at this N. Of equal
    ones the first counts."""
    best = max((row for row in grid if row["way"] == "top"), key=lambda row: float(row["F1"]))
    same_number = (row for row in grid if row["way"] == "occlusion" and row["N"] == best["N"])
    return Settings(best["N"], best["tau"], max(same_number, key=lambda row: float(row["F1"]))["tau"])


def val_record(runs: Runs, config: RunConfig) -> Mapping[str, Any] | None:
    """The record of the tuning run at this configuration's tuned rate, whose grid chooses; None where the profile has
    no tuning."""
    if runs.profile.tuning is None:
        return None
    return measure_regions(runs, tuning_run(tune(runs, [config])[0], runs.profile.tuning))


def own_settings(config: RunConfig) -> Settings:
    """The run's own N and tau, for occlusion too: what is reported where nothing was chosen."""
    return Settings(config.num_regions, config.threshold, config.threshold)


def measure_regions(
    runs: Runs, config: RunConfig, settings: Settings | None = None, occluded: bool = True
) -> Mapping[str, Any]:
    """The record of a run's regions on the images that it scores, made once: image_sums, and a small gallery.

    settings: by default the run's own. occluded: whether occlusion maps, which take 36 passes an image, are held beside
    the model's own. A run that is scored on val has val_grid too; none on test has.
    The gallery holds, for the first images, each region's box, class and map cells, and the annotated objects.
    Without annotated boxes in the data set (a table has none) nothing is measured, and the gallery is all there is.
    """
    run_id, settings = runs.run(config).run_id, settings or own_settings(config)

    def measured() -> dict[str, Any]:
        check_settings()
        test = runs.data(config).test
        squares = runs.splits.squares(test, config.image_size)
        found = _measured(runs.trained_model(config), squares, settings, config.scored_on == "val", occluded)
        names = {"format": RECORD_FORMAT, "run_id": run_id, "label": config.label, "data": test.title}
        chosen = {"settings": settings._asdict()}
        return {**names, **chosen, **found, "environment": describe_environment(runs.profile.threads)}

    keys = {"boxes": boxes_fingerprint(runs.data(config).test)} if "test_data" in runs.look(config)[0] else {}
    is_plain = occluded and settings == own_settings(config)
    name = run_id if is_plain else content_id({"run": run_id, "settings": settings, "occluded": occluded})
    return runs.keep("regions", name, regions_fingerprint(), measured, **keys)


def regions_fingerprint() -> str:
    """What a record of regions computes with."""
    return fingerprint(_measured)


def boxes_fingerprint(images: ImageSet) -> str:
    """A short hash of the annotated objects of a split: corners, class and difficult of each, image by image."""
    found = [images.boxes(index) for index in range(len(images))] if images.has_boxes else []
    rows = [[part.tolist() for part in (each.xyxy, each.classes, each.difficult)] for each in found]
    return content_id({"boxes": rows})


def _measured(
    model: MCAR, squares: ResizedImages, settings: Settings, with_grid: bool, occluded: bool
) -> dict[str, Any]:
    test, num_images = squares.image_set, len(squares)
    if not test.has_boxes:
        unmeasured = {"difficult": 0, "counts": {}, "sums": [], "grid": []}
        return {"images": num_images, **unmeasured, "gallery": _gallery(model, squares, NO_OBJECTS)}
    objects, maps = annotated_objects(test, squares.size), maps_of(model, squares)
    of_ways = {"top": maps, **({"occlusion": occlusion_maps(model, squares, maps.scores)} if occluded else {})}
    found = class_regions(maps, settings.threshold)
    of_occlusion = class_regions(of_ways["occlusion"], settings.occlusion_threshold) if occluded else None
    pointing = pointing_game(objects, found, of_occlusion)
    ways = measure_overlaps(objects, found, of_occlusion, max(counts_to_tell(settings.num_regions, len(test.classes))))
    counts, sums = image_sums(objects, ways, pointing, settings.num_regions, num_images)
    return {
        "images": num_images,
        "difficult": sum(int(test.boxes(index).difficult.sum()) for index in range(num_images)),
        "counts": {among: as_text(values) for among, values in counts.items()},
        "sums": [{**key._asdict(), "sums": as_text(values)} for key, values in sums.items()],
        "grid": val_grid(objects, of_ways) if with_grid else [],
        "gallery": _gallery(model, squares, objects),
    }


def as_text(numbers: Tensor) -> str:
    """Numbers (n,) on one line of a record, five digits of each."""
    return " ".join(f"{number:.5g}" for number in numbers.tolist())


def as_numbers(text: str) -> np.ndarray:
    """What as_text wrote, (n,) float64."""
    return np.array(text.split(), dtype=np.float64)


def _gallery(model: MCAR, squares: ResizedImages, objects: Objects) -> list[dict[str, Any]]:
    size, names = (squares.size, squares.size), squares.image_set.classes
    indices = range(min(GALLERY_IMAGES, len(squares)))
    scores, class_logits = class_maps(model, torch.stack([squares[at] for at in indices]))
    found = attentional_regions(
        class_logits, scores, size, model.num_regions, model.threshold, model.selection, model.generator
    )

    def entry(at: int) -> dict[str, Any]:
        classes, here = found.classes[at, :GALLERY_REGIONS].tolist(), objects.images == at
        annotated = zip(objects.classes[here].tolist(), objects.boxes[here].round(decimals=2).tolist(), strict=True)
        return {
            "image": squares.image_set.ids[at],
            "labels": [names[k] for k in classes],
            "boxes": found.boxes[at, :GALLERY_REGIONS].tolist(),
            "cells": [[as_text(row) for row in cells] for cells in torch.sigmoid(class_logits)[at, classes]],
            "annotated": [[names[k], box] for k, box in annotated],
        }

    return [entry(at) for at in indices]


# Several seeds ----------------------------------------------------------------------------------------------------


def study_rows(
    records: Sequence[Mapping[str, Any]],
    differences: Sequence[tuple[Key, Key]] | None = None,
    num_resamples: int = 2000,
) -> list[dict[str, Any]]:
    """Each share of the records, one a seed, as rows: the fields of Key, mean over seeds, low, high (fractions).

    With differences, each a - b instead, paired in every record; p_value: of "no difference", adjusted for their number
    (Holm), and the finding that it supports. Seeds and images are held together, all seeds with the same resampled
    images (two_level); with one seed p_value is NaN. A share that not all records have is that of those that have it.
    All is NaN where there is nothing to measure.
    """
    generator, n = np.random.default_rng(0), records[0]["images"]
    weights = np.vstack((np.ones(n), generator.multinomial(n, np.full(n, 1 / n), num_resamples)))
    shares = [_shares(record, weights) for record in records]
    pairs = [(key, None) for key in shares[0]] if differences is None else differences
    rows = []
    for a, b in pairs:
        # Rounded, or float64 noise would decide on which side of 0 two equal ways fall.
        having = [of for of in shares if a in of and (b is None or b in of)]
        values = np.stack([of[a] - (of[b] if b else 0) for of in having], axis=1).round(12)  # (1 + R, S)
        found = two_level(values[1:], values[0])
        way = f"{a.way} - {b.way}" if b else a.way
        ends = {"mean": found.estimate, "low": found.low, "high": found.high}
        rows.append({**a._asdict(), "way": way, **ends, "seeds": len(having), "p_value": found.p_value})
    if differences is not None:
        adjusted = holm([row["p_value"] for row in rows])
        for row, p, (a, _) in zip(rows, adjusted, pairs, strict=True):
            row["p_value"] = p
            row["finding"] = _finding(row, a.way, row["seeds"])
    return rows


def _finding(row: Mapping[str, Any], way: str, seeds: int) -> str:
    if np.isnan(row["mean"]):
        return "nothing to compare"
    if seeds == 1:
        return ONE_SEED
    if row["p_value"] < SIGNIFICANT:
        return f"{way} {'higher' if row['mean'] > 0 else 'lower'}"
    return NO_DIFFERENCE


def _shares(record: Mapping[str, Any], weights: np.ndarray) -> dict[Key, np.ndarray]:
    """Each share of a record where its images occur as often as each row of weights (R, n) says: (R,)."""
    counts = {among: as_numbers(text) for among, text in record["counts"].items()}
    found = {}
    for row in record["sums"]:
        key = Key(row["way"], row["N"], row["among"], row["measure"])
        total = counts[key.among] + (key.N if key.measure == F1 else 0)
        with np.errstate(invalid="ignore"):  # nothing of the kind in a resample
            found[key] = (weights @ as_numbers(row["sums"])) / (weights @ total)
    return found
