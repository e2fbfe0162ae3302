"""What a run is measured by, for its record: metrics of each stream at every operating point, operations, seconds."""

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mcar_lib.config import RunConfig
from mcar_lib.data import ImageSet
from mcar_lib.machine import peak_memory
from mcar_lib.metrics import average_precision, multilabel_metrics
from mcar_lib.model import MCAR
from mcar_lib.recipe import StreamScores
from mcar_lib.training import Fit

STREAMS = ("global", "local", "fused")
# Thresholds and label counts under which every run is scored: the release's 0.6, the usual 0.5, and the top 3 with
# and without a threshold.
OPERATING_POINTS: dict[str, tuple[float, int | None]] = {
    "0.5": (0.5, None),
    "0.6": (0.6, None),
    "0.5 top-3": (0.5, 3),
    "0.6 top-3": (0.6, 3),
    "top-3": (-math.inf, 3),
}


def metrics_of(config: RunConfig, state: Fit, test: ImageSet | None) -> dict[str, Any] | None:
    """The metrics of a run's last and best epoch; None where nothing could be scored."""
    if test is None:
        return None
    return {
        "last": epoch_metrics(config.epochs, state.last, test),
        "best": epoch_metrics(state.best_epoch, state.best, test),
    }


def epoch_metrics(epoch: int, scores: StreamScores | None, test: ImageSet) -> dict[str, Any]:
    assert scores is not None
    streams = zip(STREAMS, (scores.global_scores, scores.local_scores, scores.fused), strict=True)
    return {"epoch": epoch, **{name: _stream_metrics(stream, test.targets) for name, stream in streams}}


def at_operating_points(scores: torch.Tensor, targets: torch.Tensor) -> dict[str, dict[str, float]]:
    """multilabel_metrics at each of OPERATING_POINTS; the top 3 of fewer classes are all of them."""
    num_classes = scores.shape[1]
    return {
        name: multilabel_metrics(scores, targets, threshold, top_k and min(top_k, num_classes))
        for name, (threshold, top_k) in OPERATING_POINTS.items()
    }


def _stream_metrics(scores: torch.Tensor, targets: torch.Tensor) -> dict[str, Any]:
    points = at_operating_points(scores, targets)
    first = next(iter(points.values()))
    return {
        "mAP": first["mAP"],
        "classes_without_positives": first["classes_without_positives"],
        "AP": average_precision(scores, targets).tolist(),
        "at": {
            name: {key: point[key] for key in ("CP", "CR", "CF1", "OP", "OR", "OF1")} for name, point in points.items()
        },
    }


def count_macs(mcar: MCAR, image_size: int) -> int:
    """Multiply-accumulate operations for one image, both streams, by torch's own counter."""
    mcar.eval()
    device = next(mcar.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mcar(torch.zeros(1, 3, image_size, image_size, device=device))
    return counter.get_total_flops() // 2


def cost_of(mcar: MCAR, config: RunConfig, state: Fit, seconds: float) -> dict[str, Any]:
    train_seconds = sum(result.train_seconds for result in state.history)
    test_seconds = sum(result.test_seconds for result in state.history)
    return {
        "parameters": sum(parameter.numel() for parameter in mcar.parameters()),
        "parameters_over_backbone": sum(parameter.numel() for parameter in mcar.convclass.parameters()),
        "macs_per_image": count_macs(mcar, config.image_size),
        "train_seconds": train_seconds,
        "test_seconds": test_seconds,
        "seconds_this_session": seconds,
        "peak_memory_bytes": peak_memory(),
    }
