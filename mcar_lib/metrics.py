"""Multi-label metrics of the paper's protocol: AP, mAP, CP/CR/CF1, OP/OR/OF1.

The definitions are those of the paper's released code, but for equal scores. n is the number of images, K of classes.
Scores are any real numbers of which higher means more likely, infinities included; targets are 1 (present), 0
(absent) and -1 (difficult). Tensors of any device and NumPy arrays are accepted, the arithmetic is float64 on
the CPU, and the metrics are fractions in [0, 1].
"""

import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mcar_lib.errors import ConfigError

Array = Tensor | np.ndarray
Ties = Literal["shared", "file order"]


def average_precision(scores: Array, targets: Array, ties: Ties = "shared") -> Tensor:
    """Average precision of each class, not interpolated: mean over the positives of precision at their rank.

    Images with equal scores of a class share one rank, the last of theirs, as in scikit-learn: so the order of the
    images does not matter, and a constant score has the share of the positives.

    Args:
        scores: (n, K) real numbers.
        targets: (n, K) of 1, 0 and -1; an image with -1 is skipped for that class.
        ties: "file order" ranks equal scores by image index, lower first, as the paper's released code does. A table
            that is sorted by class then gains from every tie; only to equal recorded outputs of that code.

    Returns:
        (K,) float64 in [0, 1]; NaN for a class without positives.

    Raises:
        ConfigError: shapes differ, are not (n, K) or empty; a score is NaN; a target is not 1, 0 or -1; ties is
            neither of the two.

    >>> scores = torch.tensor([[0.9, 0.2], [0.8, 0.7], [0.4, 0.1], [0.3, 0.6]])
    >>> average_precision(scores, torch.tensor([[1, 0], [0, -1], [1, 0], [0, 1]]))
    tensor([0.8333, 1.0000], dtype=torch.float64)
    """
    if ties not in ("shared", "file order"):
        raise ConfigError(f"ties is {ties!r}; choose shared or file order")
    _, ranked, ends = rank_images(*check_inputs(scores, targets))
    positive = ranked == 1
    hits = positive.cumsum(dim=1)  # (K, n) positives at this rank or above
    rank = (ranked >= 0).cumsum(dim=1)  # (K, n) images at this rank or above, the skipped ones not counted
    if ties == "shared":
        hits, rank = hits.gather(1, ends), rank.gather(1, ends)
    precision = torch.where(positive, hits.double() / rank, 0.0)
    return precision.sum(dim=1) / positive.sum(dim=1)


def multilabel_metrics(
    scores: Array, targets: Array, threshold: float = 0.5, top_k: int | None = None
) -> dict[str, float]:
    """mAP, per-class CP, CR, CF1 and overall OP, OR, OF1, as the paper's tables report them.

    A label is predicted when its score is at least the threshold (rounded to the scores' own dtype, so that a
    float32 0.7 reaches 0.7) and, with top_k, is one of its image's top_k highest; equal scores go to the
    lower class index. The paper's released code uses threshold=0.6, also with top_k=3. Most other papers use
    0.5, and predict all of the top 3: threshold=-math.inf, or 0 where scores are probabilities.

    Difficult labels (-1) are skipped in AP and count as negatives in precision, recall and F1. CP is the mean
    over all K classes; a class that is never predicted has precision 0, and so has OP if nothing is. A class
    without positives is left out of mAP and CR (this project's choice: no recorded output of the released
    code has such a class). With no positive in any class, mAP, CR, CF1, OR and OF1 are NaN. CF1 and OF1 are
    the harmonic means of CP and CR, OP and OR; 0 where both are 0.

    Args:
        scores: (n, K) real numbers.
        targets: (n, K) of 1, 0 and -1.
        threshold: in the units of the scores; infinite values are allowed.
        top_k: 1 to K, or None for all labels.

    Returns:
        dict of mAP, CP, CR, CF1, OP, OR, OF1, floats in [0, 1], and classes_without_positives, an int.

    Raises:
        ConfigError: as average_precision; the threshold is NaN; top_k is not an integer of 1 to K.

    >>> scores = torch.tensor([[0.9, 0.7], [0.8, 0.3], [0.4, 0.6], [0.3, 0.1]])
    >>> result = multilabel_metrics(scores, torch.tensor([[1, 1], [-1, 0], [1, 1], [0, 0]]), threshold=0.6)
    >>> {name: round(value, 3) for name, value in result.items()}  # doctest: +NORMALIZE_WHITESPACE
    {'mAP': 1.0, 'CP': 0.75, 'CR': 0.75, 'CF1': 0.75, 'OP': 0.75, 'OR': 0.75, 'OF1': 0.75,
     'classes_without_positives': 0}
    """
    scores, targets = check_inputs(scores, targets)
    predicted = _predict(scores, threshold, top_k)
    positive = targets == 1
    num_correct = (predicted & positive).sum(dim=0).double()  # (K,), as the next two
    num_predicted = predicted.sum(dim=0).double()
    num_positive = positive.sum(dim=0).double()

    class_precision = (num_correct / num_predicted.clamp(min=1)).mean().item()
    class_recall = (num_correct / num_positive).nanmean().item()
    overall_precision = (num_correct.sum() / num_predicted.sum().clamp(min=1)).item()
    overall_recall = (num_correct.sum() / num_positive.sum()).item()
    return {
        "mAP": average_precision(scores, targets).nanmean().item(),
        "CP": class_precision,
        "CR": class_recall,
        "CF1": _harmonic_mean(class_precision, class_recall),
        "OP": overall_precision,
        "OR": overall_recall,
        "OF1": _harmonic_mean(overall_precision, overall_recall),
        "classes_without_positives": int((num_positive == 0).sum()),
    }


def best_threshold(scores: Array, targets: Array) -> float:
    """The probability from which labels are predicted that gives the highest OF1, of 0.01 to 0.99; of equals the
    lowest; 0.5 without positives. scores: logits (n, K); targets: (n, K), of validation images. Source: this project's
    convention."""
    if not (torch.as_tensor(targets) == 1).any():
        return 0.5
    f1 = {
        percent: multilabel_metrics(scores, targets, math.log(percent / (100 - percent)))["OF1"]
        for percent in range(1, 100)
    }
    return max(f1, key=lambda percent: f1[percent]) / 100


def rank_images(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Image indices by descending score, their targets, and the last position of the same score, each (K, n)."""
    ranked, order = scores.T.contiguous().sort(dim=1, descending=True, stable=True)
    is_last = torch.ones_like(order, dtype=torch.bool)
    is_last[:, :-1] = ranked[:, :-1] != ranked[:, 1:]
    position = torch.arange(ranked.shape[1]).expand_as(order)
    ends = torch.where(is_last, position, ranked.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    return order, targets.T.gather(1, order), ends


def _predict(scores: Tensor, threshold: float, top_k: int | None) -> Tensor:
    if math.isnan(threshold):
        raise ConfigError("threshold is NaN; give a number, or -math.inf to predict whatever the score")
    predicted = scores >= torch.tensor(threshold, dtype=scores.dtype)
    if top_k is None:
        return predicted
    num_classes = scores.shape[1]
    if not isinstance(top_k, (int, np.integer)) or not 1 <= top_k <= num_classes:
        raise ConfigError(f"top_k must be an integer from 1 to the number of classes, {num_classes}, got {top_k}")
    highest = scores.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    return predicted & torch.zeros_like(predicted).scatter(1, highest, True)


def _harmonic_mean(precision: float, recall: float) -> float:
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


def check_inputs(scores: Array, targets: Array, seeds_allowed: bool = False) -> tuple[Tensor, Tensor]:
    """Scores (n, K), or (S, n, K) of S seeds, in their own floating dtype and targets as int8, on the CPU."""
    scores = _to_tensor(scores)
    targets = _to_tensor(targets).double()  # a uint8 255 would equal -1
    if targets.ndim != 2 or scores.ndim not in ((2, 3) if seeds_allowed else (2,)):
        shape = "(n, K) or (S, n, K)" if seeds_allowed else "(n, K)"
        found = f"{tuple(scores.shape)} and {tuple(targets.shape)}"
        raise ConfigError(f"scores must be {shape} and targets (n, K), got {found}")
    if scores.shape[-2:] != targets.shape:
        raise ConfigError(f"scores {tuple(scores.shape)} and targets {tuple(targets.shape)} differ in shape")
    if scores.numel() == 0:
        raise ConfigError(f"scores are empty: shape {tuple(scores.shape)}")
    scores = scores if scores.is_floating_point() else scores.double()
    _reject(scores.isnan(), scores, "scores must not be NaN")
    _reject((targets != 1) & (targets != 0) & (targets != -1), targets, "targets must be 1, 0 or -1")
    return scores, targets.to(torch.int8)


def _to_tensor(values: Array) -> Tensor:
    # np.array copies: torch takes neither reversed nor read-only arrays as they are.
    return values.detach().cpu() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))


def _reject(wrong: Tensor, values: Tensor, rule: str) -> None:
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        axes = "(image, class)" if values.ndim == 2 else "(seed, image, class)"
        found = f"{values[first].item():g} at {axes} {first}"
        raise ConfigError(f"{rule}: {int(wrong.sum())} of {wrong.numel()} values are wrong, the first is {found}")
