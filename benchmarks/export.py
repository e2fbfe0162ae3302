"""Exported graphs beside PyTorch: file, mAP, boxes, and time a photo.

   MCAR_DATA=DIR python benchmarks/export.py [--write FILE.md] [--data-root DIR] [--photos 400] [--rounds 7]

DIR holds VOCdevkit/VOC2007, whole or a part of it; int8 chooses its ranges on photos of its val list, which no score
here is of. The released model voc-photos on the first test photos; then three backbones at 224 px, for speed alone.
Times are medians over rounds in which all take their turns, on the CPU with the threads told. About three minutes.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import onnxruntime
import torch
from timing import machine, print_report, report_parser
from torch import Tensor

from mcar_lib.data import load_voc
from mcar_lib.data.image_set import ImageSet
from mcar_lib.data.transforms import network_input, resize_square
from mcar_lib.errors import DataError
from mcar_lib.exported import CALIBRATED_WITH, Precision, drawn_squares
from mcar_lib.inference import folded, keep_freed_memory
from mcar_lib.metrics import average_precision
from mcar_lib.model import Output, build_mcar
from mcar_lib.released import ReleasedModel, export_graph, load_released

BATCHES = (1, 8)
BACKBONES = {"mobilenet_v2": "bundled", "efficientnet_lite0": "bundled", "resnet50": "none"}
KINDS: Mapping[str, tuple[str, Precision]] = {
    ".pt2": (".pt2", "fp32"),
    "ONNX fp32": (".onnx", "fp32"),
    "ONNX fp16 weights": (".onnx", "fp16"),
    "ONNX int8 crops": (".onnx", "int8"),
}


class Variant(NamedTuple):
    """One way to run a model: its name, its file's size in MB, and what computes."""

    name: str
    megabytes: float | None
    model: Callable[[Tensor], Output]


def variants(
    released: ReleasedModel, as_trained: ReleasedModel, kinds: list[str], folder: Path, calibration: list[Path]
) -> list[Variant]:
    """PyTorch as mcar_lib.load has it, and each kind of graph, written as mcar export does, and read back."""
    found = [Variant("PyTorch", None, released.model)]
    for index, name in enumerate(kinds):
        suffix, precision = KINDS[name]
        path = folder / f"{index}{suffix}"
        source = as_trained if precision == "fp16" else released
        export_graph(source, path, precision=precision, calibration=calibration)
        found.append(Variant(name, path.stat().st_size / 1e6, load_released(path).model))
    return found


@torch.no_grad()
def milliseconds(each: list[Variant], images: Tensor, rounds: int) -> list[float]:
    """Median milliseconds a photo of each; they take turns, so that what else the machine does falls on all."""
    times = [list[float]() for _ in each]
    for turn in range(rounds + 1):
        for variant, seconds in zip(each, times, strict=True):
            start = time.perf_counter()
            variant.model(images)
            if turn:  # the first pays for memory and caches
                seconds.append(time.perf_counter() - start)
    return [1000 * statistics.median(seconds) / len(images) for seconds in times]


@torch.no_grad()
def outputs(variant: Variant, released: ReleasedModel, squares: Tensor) -> tuple[Tensor, Tensor]:
    """Scores (n, K) and boxes (n, N, 4) of squares."""
    each = [variant.model(network_input(released.model, part)) for part in squares.split(8)]
    return torch.cat([one.scores for one in each]), torch.cat([one.regions.boxes for one in each if one.regions])


def timed_cells(each: list[Variant], images: Tensor, rounds: int) -> list[str]:
    """Of each variant the cells ms a photo and ratio to the first, by batch."""
    rows = [""] * len(each)
    for batch in BATCHES:
        found = milliseconds(each, images[:batch], rounds)
        rows = [f"{row} {ms:.1f} | {ms / found[0]:.2f} |" for row, ms in zip(rows, found, strict=True)]
    return rows


def on_photos(root: str, photos: int, rounds: int) -> list[str]:
    """The table of the released model."""
    released, as_trained = load_released("voc-photos"), load_released("voc-photos", quick=False)
    test, val = load_voc(root, "2007", "test"), load_voc(root, "2007", "val")
    squares = squares_of(test, min(photos, len(test)), released.image_size)
    targets = test.targets[: len(squares)]
    lines = [
        f"voc-photos on {len(squares)} VOC 2007 test photos:",
        "",
        "| | file MB | mAP % | boxes equal | score difference, mean | "
        + " | ".join(f"ms a photo, batch {batch} | ratio" for batch in BATCHES)
        + " |",
        "| --- |" + " ---: |" * (4 + 2 * len(BATCHES)),
    ]
    with tempfile.TemporaryDirectory() as folder:
        each = variants(released, as_trained, list(KINDS), Path(folder), list(val.paths[:CALIBRATED_WITH]))
        times = timed_cells(each, network_input(released.model, squares[: max(BATCHES)]), rounds)
        found = [outputs(variant, released, squares) for variant in each]
    for variant, (scores, boxes), cells in zip(each, found, times, strict=True):
        mean_ap = 100 * average_precision(scores, targets).nanmean().item()
        equal, size = (boxes == found[0][1]).all(dim=-1), variant.megabytes
        lines.append(
            f"| {variant.name} | {f'{size:.1f}' if size else '-'} | {mean_ap:.2f} | {int(equal.sum())} of "
            f"{equal.numel()} | {(scores - found[0][0]).abs().mean():.1e} |{cells}"
        )
    return lines


def squares_of(images: ImageSet, count: int, side: int) -> Tensor:
    return torch.stack([resize_square(images.image(index), side) for index in range(count)])


def by_backbone(rounds: int, side: int = 224) -> list[str]:
    """The table of times over three backbones."""
    lines = [
        f"Three backbones, 20 classes, N = 4, {side} px:",
        "",
        "| backbone | | " + " | ".join(f"ms a photo, batch {batch} | ratio" for batch in BATCHES) + " |",
        "| --- | --- |" + " ---: |" * (2 * len(BATCHES)),
    ]
    keep_freed_memory()
    for backbone, weights in BACKBONES.items():
        model = build_mcar(backbone, 20, weights=weights, seed=0).eval()
        model.features = folded(model.features)
        model.to(memory_format=torch.channels_last)
        config = {"backbone": backbone, "pooling": model.pooling, "image_size": side, "local_stream": True}
        about = {"config": {**config, "num_regions": 4, "threshold": 0.5, "selection": "top"}}
        released = ReleasedModel(model, tuple(map(str, range(20))), side, about)
        images = network_input(model, drawn_squares(side, max(BATCHES)))
        with tempfile.TemporaryDirectory() as folder:
            each = variants(released, released, [".pt2", "ONNX fp32"], Path(folder), [])
            cells = timed_cells(each, images, rounds)
        lines += [f"| {backbone} | {one.name} |{row}" for one, row in zip(each, cells, strict=True)]
    return lines


def main() -> None:
    parser = report_parser(__doc__)
    parser.add_argument("--data-root", default=os.environ.get("MCAR_DATA"), help="holds VOCdevkit/VOC2007 ($MCAR_DATA)")
    parser.add_argument("--photos", type=int, default=400, help="test photos that are scored, at most")
    parser.add_argument("--rounds", type=int, default=7, help="timed turns of each")
    options = parser.parse_args()
    if not options.data_root:
        raise DataError("where are the photos? --data-root DIR, or MCAR_DATA, which holds VOCdevkit/VOC2007")
    lines = [*on_photos(options.data_root, options.photos, options.rounds), "", *by_backbone(options.rounds)]
    print_report("\n".join([*lines, "", f"onnxruntime {onnxruntime.__version__}. {machine()}"]), options.write)


if __name__ == "__main__":
    main()
