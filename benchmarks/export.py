"""Exported graphs beside PyTorch: file, mAP, boxes, and time a photo.

The released model voc-photos on VOC 2007 test photos, where there are some below the data root; int8 chooses its ranges
on photos of the val list, which no score here is of. Then three backbones at 224 px, for speed alone.
"""

import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import onnxruntime
import torch
from reports import Cell, Finding, Report, Table
from timing import Seconds, Skipped, in_turns, photos, ratio
from torch import Tensor, nn

import mcar_lib
from mcar_lib.data.image_set import ImageSet
from mcar_lib.data.transforms import network_input, resize_square
from mcar_lib.exported import CALIBRATED_WITH, Precision, drawn_squares
from mcar_lib.metrics import average_precision
from mcar_lib.model import MCAR, Output, build_mcar
from mcar_lib.released import ReleasedModel, export_graph, load_released, made_quick

MODEL, PHOTOS, ROUNDS = "voc-photos", 400, {1: 7, 8: 3}  # rounds by batch
BATCHES, SIDE = tuple(ROUNDS), 224
BACKBONES = {"mobilenet_v2": "bundled", "efficientnet_lite0": "bundled", "resnet50": "none"}
EAGER = "PyTorch, as loaded"
ONNX = "ONNX fp32"
KINDS: Mapping[str, tuple[str, Precision]] = {
    ".pt2": (".pt2", "fp32"),
    ONNX: (".onnx", "fp32"),
    "ONNX fp16 weights": (".onnx", "fp16"),
    "ONNX int8 crops": (".onnx", "int8"),
}
TIMES = tuple(name for batch in BATCHES for name in (f"batch {batch}, ms a photo", "ratio"))


class Variant(NamedTuple):
    """One way to run a model: its file's size in MB, and what computes."""

    megabytes: float | None
    model: Callable[[Tensor], Output]


def measure(quick: bool) -> Report:
    tables, notes, findings = [], [f"onnxruntime {onnxruntime.__version__}."], []
    try:
        tables.append(on_photos(16 if quick else PHOTOS, quick))
    except Skipped as reason:
        notes.append(f"Left out: {MODEL} on photos; {reason}.")
    rows: list[tuple[Cell, ...]] = []
    for backbone, weights in BACKBONES.items():
        seconds, each = of_backbone(backbone, weights, quick)
        rows += [(backbone, name, *cells) for name, cells in zip(each, timed(seconds, list(each)), strict=True)]
        first = BATCHES[0]
        finding = Finding(
            what=f"{ONNX}, {backbone}, {SIDE} px, batch {first}",
            ours=1000 * statistics.median(seconds[first][ONNX]) / first,
            unit="ms a photo",
            against=EAGER,
            theirs=1000 * statistics.median(seconds[first][EAGER]) / first,
            ratio=ratio(seconds[first], ONNX, EAGER),
            in_readme=backbone == "mobilenet_v2",
        )
        findings.append(finding)
    heading = f"Three backbones, 20 classes, N = 4, {SIDE} px"
    tables.append(Table(heading=heading, columns=("backbone", "run by", *TIMES), rows=tuple(rows)))
    return Report(
        title="Exported graphs",
        about="`mcar export RUN model.onnx` and `model.pt2`: the whole of MCAR as one graph, region finding included, "
        f"beside `mcar_lib.load`. Ratios are to {EAGER}; all take turns, medians over rounds. A graph's fp16 is of its "
        "weights (it computes in float32), its int8 of the pass over the crops (the global stream stays in float32, "
        "for its maps place the boxes).",
        findings=tuple(findings),
        tables=tuple(tables),
        notes=tuple(notes),
    )


def variants(released: ReleasedModel, kinds: list[str], folder: Path, calibration: list[Path]) -> dict[str, Variant]:
    """PyTorch as mcar_lib.load has it, and each kind of graph, written as mcar export does, and read back."""
    found = {EAGER: Variant(None, released.model)}
    for index, name in enumerate(kinds):
        suffix, precision = KINDS[name]
        path = folder / f"{index}{suffix}"
        export_graph(released, path, precision=precision, calibration=calibration)
        found[name] = Variant(path.stat().st_size / 1e6, load_released(path).model)
    return found


def in_batches(each: Mapping[str, Variant], images: Tensor, quick: bool) -> dict[int, Seconds]:
    """Batch -> seconds of each variant."""

    def arm(variant: Variant, batch: int) -> Callable[[], object]:
        return torch.inference_mode()(lambda: variant.model(images[:batch]))

    return {
        batch: in_turns({name: arm(variant, batch) for name, variant in each.items()}, 1 if quick else rounds)
        for batch, rounds in ROUNDS.items()
    }


def timed(seconds: Mapping[int, Seconds], names: list[str]) -> list[tuple[Cell, ...]]:
    """The cells TIMES of each variant."""
    return [
        tuple(
            cell
            for batch, times in seconds.items()
            for cell in (1000 * statistics.median(times[name]) / batch, ratio(times, name, EAGER))
        )
        for name in names
    ]


@torch.no_grad()
def outputs(variant: Variant, released: ReleasedModel, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (n, K) and boxes (n, N, 4) of squares."""
    each = [variant.model(network_input(released.model, part)) for part in squares.split(8)]
    return torch.cat([one.scores for one in each]), torch.cat([one.regions.boxes for one in each if one.regions])


def on_photos(count: int, quick: bool) -> Table:
    """The released model in all its forms; raises Skipped where there are no photos."""
    released = mcar_lib.load(MODEL)
    test, val = photos(count, "test"), photos(CALIBRATED_WITH, "val")
    squares = squares_of(test, released.image_size)
    with tempfile.TemporaryDirectory() as folder:
        each = variants(released, list(KINDS), Path(folder), list(val.paths))
        seconds = in_batches(each, network_input(released.model, squares[: max(BATCHES)]), quick)
        found = {name: outputs(variant, released, squares) for name, variant in each.items()}
    rows: list[tuple[Cell, ...]] = []
    for name, cells in zip(each, timed(seconds, list(each)), strict=True):
        (scores, boxes), (wanted, wanted_boxes) = found[name], found[EAGER]
        equal = (boxes == wanted_boxes).all(dim=-1)
        rows.append(
            (
                name,
                each[name].megabytes,
                f"{100 * average_precision(scores, test.targets).nanmean().item():.2f}",
                f"{int(equal.sum()):,} of {equal.numel():,}",
                f"{(scores - wanted).abs().mean().item():.1e}",
                *cells,
            )
        )
    columns = ("run by", "file, MB", "mAP %", "boxes equal", "difference of a score, mean", *TIMES)
    return Table(heading=f"{MODEL}, {test.title}, {len(test)} photos", columns=columns, rows=tuple(rows))


def squares_of(images: ImageSet, side: int) -> Tensor:
    return torch.stack([resize_square(images.image(index), side) for index in range(len(images))])


def of_backbone(backbone: str, weights: str, quick: bool) -> tuple[dict[int, Seconds], list[str]]:
    """Seconds by batch, and the variants' names."""
    model = build_mcar(backbone, 20, weights=weights, seed=0)
    images = network_input(model, drawn_squares(SIDE, max(BATCHES)))
    if weights == "none":
        _take_statistics(model.train(), images)
    model = made_quick(model)
    config = {"backbone": backbone, "pooling": model.pooling, "image_size": SIDE, "local_stream": True}
    about = {"config": {**config, "num_regions": 4, "threshold": 0.5, "selection": "top"}}
    released = ReleasedModel(model, tuple(map(str, range(20))), SIDE, about)
    with tempfile.TemporaryDirectory() as folder:
        each = variants(released, [".pt2", ONNX], Path(folder), [])
        return in_batches(each, images, quick), list(each)


@torch.no_grad()
def _take_statistics(model: MCAR, images: Tensor) -> None:
    """Batch statistics of images for a network that was never trained: without, its values grow from block to block
    until every rounding counts."""
    for each in model.modules():
        if isinstance(each, nn.BatchNorm2d):
            each.momentum = 1.0
    model.features(images)
