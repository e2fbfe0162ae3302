"""Multi-label metrics of the paper's protocol: AP, mAP, CP/CR/CF1, OP/OR/OF1, and bootstrap intervals of mAP.

The definitions are those of the paper's released code. n is the number of images, K of classes, S of seeds.
Scores are any real numbers of which higher means more likely, infinities included; targets are 1 (present), 0
(absent) and -1 (difficult). Tensors of any device and NumPy arrays are accepted, the arithmetic is float64 on
the CPU, and the metrics are fractions in [0, 1].
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mcar_lib.errors import ConfigError

Array = Tensor | np.ndarray


def average_precision(scores: Array, targets: Array) -> Tensor:
    """Average precision of each class, not interpolated: mean over the positives of precision at their rank.

    Equal scores of a class are ranked by image index, lower first, as in the paper's released code.

    Args:
        scores: (n, K) real numbers.
        targets: (n, K) of 1, 0 and -1; an image with -1 is skipped for that class.

    Returns:
        (K,) float64 in [0, 1]; NaN for a class without positives.

    Raises:
        ConfigError: shapes differ, are not (n, K) or empty; a score is NaN; a target is not 1, 0 or -1.

    >>> scores = torch.tensor([[0.9, 0.2], [0.8, 0.7], [0.4, 0.1], [0.3, 0.6]])
    >>> average_precision(scores, torch.tensor([[1, 0], [0, -1], [1, 0], [0, 1]]))
    tensor([0.8333, 1.0000], dtype=torch.float64)
    """
    _, ranked = _rank(*_check_inputs(scores, targets))
    positive = ranked == 1
    hits = positive.cumsum(dim=1)  # (K, n) positives at this rank or above
    rank = (ranked >= 0).cumsum(dim=1)  # (K, n) images at this rank or above, the skipped ones not counted
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
    scores, targets = _check_inputs(scores, targets)
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


@dataclass(frozen=True)
class BootstrapInterval:
    """mAP of one model and its percentile interval [low, high]."""

    mAP: float  # noqa: N815 (the field's own name)
    low: float
    high: float
    num_resamples: int
    num_images: int


@dataclass(frozen=True)
class BootstrapResult:
    """mAP(a) - mAP(b), its percentile interval [low, high], and the p-value of "no difference"."""

    difference: float
    low: float
    high: float
    p_value: float
    num_resamples: int
    num_images: int


def bootstrap_interval(
    scores: Array, targets: Array, num_resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> BootstrapInterval:
    """Percentile interval of one model's mAP over resamples of the test images.

    It says how far mAP depends on which images were tested, not on the training seed. The copies of an image
    in a resample are one tied group, each with the precision at the group's end; this lifts a resample's mAP
    a little (with few positives a class, by a fraction of the interval's width). A class without positives in
    a resample is left out of its mAP; a resample with no positive at all is left out, and num_resamples
    counts the rest. The source is this project: neither the paper nor its released code gives intervals.

    Args:
        scores: (n, K), or (S, n, K) for S seeds on the same images: the statistic is the mean of their mAPs.
        targets: (n, K) of 1, 0 and -1 (skipped).
        num_resamples: at least 1.
        seed: of the NumPy generator that draws the resamples; the same seed gives the same result.
        confidence: strictly between 0 and 1.

    Raises:
        ConfigError: as average_precision; num_resamples or confidence out of range; no class has a positive.

    >>> scores = torch.arange(40.0)[:, None]
    >>> bootstrap_interval(scores, scores >= 20, num_resamples=100)
    BootstrapInterval(mAP=1.0, low=1.0, high=1.0, num_resamples=100, num_images=40)
    """
    ranking = _RankedColumns.of(*_check_inputs(scores, targets, seeds_allowed=True))
    samples, value, low, high = _bootstrap(
        ranking.mean_average_precision, len(targets), num_resamples, seed, confidence
    )
    return BootstrapInterval(value, low, high, len(samples), len(targets))


def paired_bootstrap(
    scores_a: Array,
    scores_b: Array,
    targets: Array,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
) -> BootstrapResult:
    """Percentile interval and two-sided p-value of mAP(a) - mAP(b), both models on the same resampled images.

    Resamples, ties, empty classes, source and errors are as in bootstrap_interval. The p-value is
    min(1, 2 min(P(difference <= 0), P(difference >= 0))), each P being (count + 1) / (num_resamples + 1).

    Args:
        scores_a: (n, K), or (S, n, K) for S seeds: the statistic is the mean of their mAPs.
        scores_b: as scores_a; S may differ.
        targets: (n, K) of 1, 0 and -1 (skipped).
        num_resamples, seed, confidence: as in bootstrap_interval.

    >>> generator = torch.Generator().manual_seed(0)
    >>> targets = torch.arange(200).remainder(2)[:, None]
    >>> noise = torch.randn(200, 1, generator=generator)
    >>> result = paired_bootstrap(3 * targets + noise, targets + noise, targets, num_resamples=200)
    >>> result.low > 0, round(result.p_value, 3)
    (True, 0.01)
    """
    ranking_a = _RankedColumns.of(*_check_inputs(scores_a, targets, seeds_allowed=True))
    ranking_b = _RankedColumns.of(*_check_inputs(scores_b, targets, seeds_allowed=True))

    def difference(counts: np.ndarray) -> float:
        # Rounded, or float64 noise would decide on which side of 0 two equal models fall.
        return round(ranking_a.mean_average_precision(counts) - ranking_b.mean_average_precision(counts), 12)

    samples, value, low, high = _bootstrap(difference, len(targets), num_resamples, seed, confidence)
    one_sided = (min(int((samples <= 0).sum()), int((samples >= 0).sum())) + 1) / (len(samples) + 1)
    return BootstrapResult(value, low, high, min(1.0, 2 * one_sided), len(samples), len(targets))


@dataclass(frozen=True)
class _RankedColumns:
    """The rankings of all (seed, class) columns with positives, end to end, each cut after its last positive.

    Sorted once; a resample is then only a weight for each image. Every positive closes the segment of images
    ranked between it and the positive before it, so its rank is a running sum over the segments of its
    column.
    """

    images: np.ndarray  # (L,) image index of each ranked entry
    segment_starts: np.ndarray  # (P,) where in images the segment of each positive begins
    positive_images: np.ndarray  # (P,) image index of each positive
    column_starts: np.ndarray  # (C,) first positive of each column
    column_sizes: np.ndarray  # (C,) positives of each column

    @classmethod
    def of(cls, scores: Tensor, targets: Tensor) -> "_RankedColumns":
        """Rank scores (S, n, K) or (n, K) against targets (n, K)."""
        columns = scores.movedim(-2, 0).flatten(start_dim=1)  # (n, S * K)
        order, ranked = _rank(columns, targets.repeat(1, columns.shape[1] // targets.shape[1]))
        positive = ranked == 1
        if not positive.any():
            raise ConfigError("targets have no positive (1) in any class, so there is no mAP to resample")
        positives_from_here = positive.flip(1).cumsum(dim=1).flip(1)
        kept = (ranked >= 0) & (positives_from_here > 0)
        images, is_positive = order[kept].numpy(), positive[kept].numpy()
        segment_ends = np.flatnonzero(is_positive) + 1
        num_positive = positive.sum(dim=1)
        sizes = num_positive[num_positive > 0].numpy()
        return cls(
            images=images,
            segment_starts=np.concatenate([[0], segment_ends[:-1]]),
            positive_images=images[is_positive],
            column_starts=np.cumsum(sizes) - sizes,
            column_sizes=sizes,
        )

    def mean_average_precision(self, counts: np.ndarray) -> float:
        """mAP where image i occurs counts[i] times, mean over seeds; NaN when no positive occurs."""
        copies = counts[self.positive_images]  # (P,)
        hits = self._running_sum(copies)
        rank = self._running_sum(np.add.reduceat(counts[self.images], self.segment_starts))
        precision = copies * hits / np.maximum(rank, 1)
        num_positive = np.add.reduceat(copies, self.column_starts)  # (C,)
        present = num_positive > 0
        if not present.any():
            return math.nan
        # The targets decide which classes are present: the same for every seed, so one mean serves for both.
        return float((np.add.reduceat(precision, self.column_starts)[present] / num_positive[present]).mean())

    def _running_sum(self, values: np.ndarray) -> np.ndarray:
        total = np.cumsum(values)
        before = total[self.column_starts] - values[self.column_starts]
        return total - np.repeat(before, self.column_sizes)


def _bootstrap(
    statistic: Callable[[np.ndarray], float],
    num_images: int,
    num_resamples: int,
    seed: int,
    confidence: float,
) -> tuple[np.ndarray, float, float, float]:
    """The statistic of each resample, of the data itself, and the two ends of its percentile interval."""
    if num_resamples < 1:
        raise ConfigError(f"num_resamples must be at least 1, got {num_resamples}")
    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must lie strictly between 0 and 1, got {confidence}")
    generator = np.random.default_rng(seed)
    samples = np.empty(num_resamples)
    for i in range(num_resamples):
        drawn = generator.integers(num_images, size=num_images)
        samples[i] = statistic(np.bincount(drawn, minlength=num_images))
    samples = samples[~np.isnan(samples)]
    if len(samples) == 0:
        raise ConfigError(f"none of {num_resamples} resamples drew a positive: raise num_resamples or add images")
    low, high = np.quantile(samples, [(1 - confidence) / 2, (1 + confidence) / 2])
    return samples, statistic(np.ones(num_images, dtype=np.int64)), float(low), float(high)


def _rank(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Image indices by descending score, and their targets, each (K, n)."""
    order = scores.T.contiguous().sort(dim=1, descending=True, stable=True).indices
    return order, targets.T.gather(1, order)


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


def _check_inputs(scores: Array, targets: Array, seeds_allowed: bool = False) -> tuple[Tensor, Tensor]:
    """Scores in their own floating dtype and targets as int8, on the CPU."""
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
