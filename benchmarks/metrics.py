"""Time the metrics at the size of the paper's test sets, on one thread, beside scikit-learn's per-class loop.

    python benchmarks/metrics.py [--write FILE.md]

Prints a Markdown table; --write also stores the printed text. Takes about a minute.
"""

from collections.abc import Callable

import numpy as np
import sklearn
import torch
from sklearn.metrics import average_precision_score, precision_recall_fscore_support
from timing import machine, median_seconds, print_report, report_parser

from mcar_lib.intervals import map_difference
from mcar_lib.metrics import multilabel_metrics

COCO = {"num_images": 40_137, "num_classes": 80, "labels_per_image": 2.9}
VOC2007 = {"num_images": 4_952, "num_classes": 20, "labels_per_image": 1.5}
REQUIRED_SECONDS = 2.0  # multilabel_metrics at COCO's size


def random_case(num_images: int, num_classes: int, labels_per_image: float) -> tuple[torch.Tensor, torch.Tensor]:
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


def report() -> str:
    scores, targets = random_case(**COCO)
    score_array, target_array = scores.numpy(), targets.numpy()
    ours, theirs = multilabel_metrics(scores, targets), sklearn_metrics(score_array, target_array)
    largest_gap = max(abs(ours[key] - value) for key, value in theirs.items())
    voc_scores, voc_targets = random_case(**VOC2007)
    noise = torch.randn(voc_scores.shape, generator=torch.Generator().manual_seed(1))
    voc_other = (voc_scores.logit() + 0.3 * noise).sigmoid()

    jobs: list[tuple[str, Callable[[], object], int]] = [
        ("multilabel_metrics, 40,137 x 80", lambda: multilabel_metrics(scores, targets), 5),
        (
            "multilabel_metrics, 40,137 x 80, top 3",
            lambda: multilabel_metrics(scores, targets, 0.6, top_k=3),
            5,
        ),
        ("scikit-learn, class by class, 40,137 x 80", lambda: sklearn_metrics(score_array, target_array), 5),
        (
            "map_difference, 4,952 x 20, 2,000 resamples",
            lambda: map_difference(voc_scores, voc_other, voc_targets),
            3,
        ),
    ]
    timed = [(what, median_seconds(job, runs), runs) for what, job, runs in jobs]
    rows = [f"| {what} | {seconds:.3f} | {runs} |" for what, seconds, runs in timed]
    verdict = "met" if timed[0][1] < REQUIRED_SECONDS else "MISSED"
    return "\n".join(
        [
            "| what | seconds (median) | runs |",
            "|---|---:|---:|",
            *rows,
            "",
            f"First row: required < {REQUIRED_SECONDS:g} s: {verdict}.",
            f"Largest difference from scikit-learn in mAP, CP, CR, OP, OR, OF1: {largest_gap:.1e}.",
            f"{machine()} scikit-learn {sklearn.__version__}.",
        ]
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = report_parser(__doc__).parse_args()
    print_report(report(), options.write)
