"""The metrics at the size of COCO's test set, on one thread, beside scikit-learn's per-class loop."""

import statistics

import numpy as np
import torch
from reports import Cell, Finding, Report, Table
from sklearn.metrics import average_precision_score, precision_recall_fscore_support
from timing import beside, in_turns, ratio

from mcar_lib.metrics import multilabel_metrics

COCO = (40_137, 80, 2.9)  # images, classes, labels an image
REQUIRED_SECONDS, ROUNDS = 2.0, 3
OURS, TOP, SKLEARN = "multilabel_metrics", "multilabel_metrics, top 3", "scikit-learn, class by class"


def random_case(num_images: int, num_classes: int, labels_per_image: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores of a model with some skill, (n, K), and targets."""
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(num_images, num_classes, generator=generator) < labels_per_image / num_classes).long()
    logits = torch.randn(num_images, num_classes, generator=generator) + 3 * targets - 2
    return logits.sigmoid(), targets


def sklearn_metrics(scores: np.ndarray, targets: np.ndarray) -> dict[str, float]:
    """The same figures by scikit-learn, one class at a time."""
    predicted = scores >= 0.5
    classes = range(targets.shape[1])
    aps = [average_precision_score(targets[:, k], scores[:, k]) for k in classes]
    by_class = [
        precision_recall_fscore_support(targets[:, k], predicted[:, k], average="binary", zero_division=0)[:2]
        for k in classes
    ]
    class_precision, class_recall = np.mean(by_class, axis=0)
    overall = precision_recall_fscore_support(targets.ravel(), predicted.ravel(), average="binary")
    return {
        "mAP": float(np.mean(aps)),
        "CP": float(class_precision),
        "CR": float(class_recall),
        "OP": float(overall[0]),
        "OR": float(overall[1]),
        "OF1": float(overall[2]),
    }


def measure(quick: bool) -> Report:
    torch.set_num_threads(1)
    scores, targets = random_case(2000 if quick else COCO[0], *COCO[1:])
    score_array, target_array = scores.numpy(), targets.numpy()
    ours, theirs = multilabel_metrics(scores, targets), sklearn_metrics(score_array, target_array)
    largest_gap = max(abs(ours[key] - value) for key, value in theirs.items())
    arms = {
        OURS: lambda: multilabel_metrics(scores, targets),
        TOP: lambda: multilabel_metrics(scores, targets, 0.6, top_k=3),
        SKLEARN: lambda: sklearn_metrics(score_array, target_array),
    }
    seconds = in_turns(arms, 1 if quick else ROUNDS)
    each = {name: statistics.median(found) for name, found in seconds.items()}
    rows: list[tuple[Cell, ...]] = [(name, each[name], ratio(seconds, name, OURS)) for name in arms]
    size = f"{len(scores):,} x {scores.shape[1]}"
    findings = (
        Finding(what=f"all metrics of {size} scores", ours=each[OURS], unit="s", at_most=REQUIRED_SECONDS),
        beside(
            seconds,
            each,
            OURS,
            SKLEARN,
            what=f"all metrics of {size} scores",
            unit="s",
        ),
    )
    return Report(
        title="Metrics",
        about=f"{size} random scores, as many as COCO's test set has, on one thread: mAP, CP, CR, CF1, OP, OR and OF1.",
        findings=findings,
        tables=(Table(heading="All ways", columns=("what", "s", "times ours"), rows=tuple(rows)),),
        notes=(
            f"Largest difference from scikit-learn in mAP, CP, CR, OP, OR, OF1: {largest_gap:.1e} (some float32 scores "
            "tie). They take turns; medians over rounds.",
        ),
    )
