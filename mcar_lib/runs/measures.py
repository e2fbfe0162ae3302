"""What a run is measured by, for its record: metrics of each stream at every operating point, operations, seconds."""

import math
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from mcar_lib.data import ImageSet
from mcar_lib.metrics import average_precision, best_threshold, multilabel_metrics
from mcar_lib.model import MCAR
from mcar_lib.runs.config import RunConfig
from mcar_lib.runs.environment import PeakMemory
from mcar_lib.training import Fit, StreamScores

STREAMS = ("global", "local", "fused")
LABEL_METRICS = ("CP", "CR", "CF1", "OP", "OR", "OF1")
# Thresholds and label counts under which every run is scored: the release's 0.6, the usual 0.5, and the top 3 with
# and without a threshold.
OPERATING_POINTS: dict[str, tuple[float, int | None]] = {
    "0.5": (0.5, None),
    "0.6": (0.6, None),
    "0.5 top-3": (0.5, 3),
    "0.6 top-3": (0.6, 3),
    "top-3": (-math.inf, 3),
}


def by_stream(scores: StreamScores) -> dict[str, torch.Tensor]:
    """The scores (n, K) of each of STREAMS."""
    return dict(zip(STREAMS, (*scores, scores.fused), strict=True))


def run_metrics(config: RunConfig, state: Fit, test: ImageSet | None) -> dict[str, Any] | None:
    """The metrics of a run's last and best epoch; None where nothing could be scored."""
    if test is None or state.last is None or state.best is None:
        return None
    return {
        "last": {"epoch": config.epochs, **stream_metrics(state.last, test)},
        "best": {"epoch": state.best_epoch, **stream_metrics(state.best, test)},
    }


def chosen_threshold(config: RunConfig, state: Fit, test: ImageSet | None) -> dict[str, float]:
    """decision_threshold, the probability from which labels are predicted, of a run that was scored on validation
    images; nothing of others, for nothing is chosen on test images."""
    if config.scored_on != "val" or test is None or state.last is None:
        return {}
    return {"decision_threshold": best_threshold(state.last.fused, test.targets)}


def stream_metrics(scores: StreamScores, test: ImageSet) -> dict[str, Any]:
    """mAP, AP of each class, and CP to OF1 at each of OPERATING_POINTS, of each stream; the top 3 of fewer classes are
    all of them."""
    found: dict[str, Any] = {}
    for name, stream in by_stream(scores).items():
        points = {
            point: multilabel_metrics(stream, test.targets, _logit(threshold), top_k and min(top_k, stream.shape[1]))
            for point, (threshold, top_k) in OPERATING_POINTS.items()
        }
        found[name] = {
            "mAP": points["0.5"]["mAP"],
            "classes_without_positives": points["0.5"]["classes_without_positives"],
            "AP": average_precision(stream, test.targets).tolist(),
            "at": {point: {key: values[key] for key in LABEL_METRICS} for point, values in points.items()},
        }
    return found


def _logit(probability: float) -> float:
    """In the units of the scores; -inf, below every score, stays."""
    return math.log(probability / (1 - probability)) if math.isfinite(probability) else probability


def count_macs(mcar: MCAR, image_size: int) -> int:
    """Multiply-accumulate operations for one image, both streams, by torch's own counter."""
    mcar.eval()
    device = next(mcar.parameters()).device
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mcar(torch.zeros(1, 3, image_size, image_size, device=device))
    return counter.get_total_flops() // 2


def run_cost(mcar: MCAR, config: RunConfig, state: Fit, seconds: float, memory: PeakMemory) -> dict[str, Any]:
    """Parameters, operations, seconds and memory of a run; the last two arguments: of this session."""
    return {
        "parameters": sum(parameter.numel() for parameter in mcar.parameters()),
        "parameters_over_backbone": sum(parameter.numel() for parameter in mcar.convclass.parameters()),
        "macs_per_image": count_macs(mcar, config.image_size),
        "train_seconds": sum(result.train_seconds for result in state.history),
        "test_seconds": sum(result.test_seconds for result in state.history),
        "seconds_this_session": seconds,
        "peak_memory_bytes": memory.bytes,
    }
