"""A photo through a model that was handed on: mcar_lib.load(...).predict, one at a time and several together."""

import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from PIL import Image
from reports import Cell, Finding, Report, Table
from timing import Seconds, Skipped, beside, in_turns, photos
from torch import Tensor

import mcar_lib
from mcar_lib.data.image_set import Photo
from mcar_lib.inference import keep_freed_memory
from mcar_lib.released import ReleasedModel

MODEL, BATCHES, PHOTOS, ROUNDS = "voc-photos", (1, 8, 32), 32, 5
SIDES = (500, 375)  # of a photo that is made up, as most of VOC are


def some_photos(count: int) -> tuple[Sequence[Photo], str]:
    """Real ones, else made up; and what they are."""
    try:
        return photos(count).paths, "photos of VOC 2007, read from their files"
    except Skipped:
        noise = np.random.default_rng(0).integers(256, size=(count, 12, 16, 3), dtype=np.uint8)
        return [Image.fromarray(each).resize(SIDES) for each in noise], "made-up photos in memory, no photos being here"


def measure(quick: bool) -> Report:
    model = mcar_lib.load(MODEL)
    found, what = some_photos(PHOTOS)
    if quick:
        found = found[: max(BATCHES)]
    network = model.network_input(found)
    arms = {f"predict {batch}": _predict(model, found, batch) for batch in BATCHES}
    arms |= {f"network {batch}": _forward(model, network, batch) for batch in BATCHES}
    arms |= {f"unfolded {batch}": _as_trained(arms[f"network {batch}"], model) for batch in BATCHES}
    arms |= {f"plain {batch}": _memory_not_kept(arms[f"unfolded {batch}"]) for batch in BATCHES}
    seconds = in_turns(arms, 1 if quick else ROUNDS)
    each = {name: 1000 * statistics.median(times) / len(found) for name, times in seconds.items()}
    kinds = ("predict", "network", "unfolded", "plain")
    rows: list[tuple[Cell, ...]] = [(batch, *(each[f"{kind} {batch}"] for kind in kinds)) for batch in BATCHES]
    first, last = BATCHES[0], BATCHES[-1]
    finding = beside(
        seconds,
        each,
        f"predict {first}",
        f"predict {last}",
        what=f"predict, batch {first}",
        unit="ms a photo",
        against=f"batch {last}",
    )
    columns = (
        *("batch", "predict, ms a photo", "of it the network, ms a photo"),
        *("the same, nothing folded or packed", "nor freed memory kept"),
    )
    return Report(
        title="Prediction",
        about=f"mcar_lib.load({MODEL!r}).predict at {model.image_size} px on {len(found)} {what}: everything from the "
        "photo to its scores, as anybody calls it, with no setting of memory or threads of this benchmark's own.",
        findings=(finding, *(_saved(seconds, each, batch) for batch in BATCHES)),
        tables=(Table(heading="By batch", columns=columns, rows=tuple(rows)),),
        notes=("The batches take turns; medians over rounds.",),
    )


def _predict(model: ReleasedModel, found: Sequence[Photo], batch: int) -> Callable[[], object]:
    return lambda: [model.predict(found[first : first + batch]) for first in range(0, len(found), batch)]


def _forward(model: ReleasedModel, inputs: Tensor, batch: int) -> Callable[[], object]:
    return torch.inference_mode()(lambda: [model.model(part) for part in inputs.split(batch)])


def _as_trained(job: Callable[[], object], model: ReleasedModel) -> Callable[[], object]:
    """The same with the pass over the crops as the model was trained with."""

    def asked() -> None:
        quick, model.model.local_features = model.model.local_features, None
        job()
        model.model.local_features = quick

    return asked


def _memory_not_kept(job: Callable[[], object]) -> Callable[[], object]:
    """The same with glibc's own way to hand freed memory back."""

    def asked() -> None:
        keep_freed_memory(False)
        job()
        keep_freed_memory()

    return asked


def _saved(seconds: Seconds, each: Mapping[str, float], batch: int) -> Finding:
    return beside(
        seconds,
        each,
        f"network {batch}",
        f"plain {batch}",
        what=f"the network, batch {batch}",
        unit="ms a photo",
        against="nothing folded, packed or kept",
        in_readme=batch == 1,
    )
