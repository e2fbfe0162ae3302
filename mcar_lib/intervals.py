"""Intervals and p-values of mAP: bootstrap over the test images, paired where two models are compared, and Holm.

The source is this project: neither the paper nor its released code gives intervals. n is the number of images, K of
classes, S of seeds; scores and targets are those of mcar_lib.metrics.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mcar_lib.errors import ConfigError
from mcar_lib.metrics import Array, check_inputs, rank_images


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

    It says how far mAP depends on which images were tested, not on the training seed. Equal scores share one rank, as
    in average_precision, and so do the copies of an image in a resample; this lifts a resample's mAP
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

    >>> import torch
    >>> scores = torch.arange(40.0)[:, None]
    >>> bootstrap_interval(scores, scores >= 20, num_resamples=100)
    BootstrapInterval(mAP=1.0, low=1.0, high=1.0, num_resamples=100, num_images=40)
    """
    ranking = _RankedColumns.of(*check_inputs(scores, targets, seeds_allowed=True))
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

    >>> import torch
    >>> generator = torch.Generator().manual_seed(0)
    >>> targets = torch.arange(200).remainder(2)[:, None]
    >>> noise = torch.randn(200, 1, generator=generator)
    >>> result = paired_bootstrap(3 * targets + noise, targets + noise, targets, num_resamples=200)
    >>> result.low > 0, round(result.p_value, 3)
    (True, 0.01)
    """
    ranking_a = _RankedColumns.of(*check_inputs(scores_a, targets, seeds_allowed=True))
    ranking_b = _RankedColumns.of(*check_inputs(scores_b, targets, seeds_allowed=True))

    def difference(counts: np.ndarray) -> float:
        # Rounded, or float64 noise would decide on which side of 0 two equal models fall.
        return round(ranking_a.mean_average_precision(counts) - ranking_b.mean_average_precision(counts), 12)

    samples, value, low, high = _bootstrap(difference, len(targets), num_resamples, seed, confidence)
    one_sided = (min(int((samples <= 0).sum()), int((samples >= 0).sum())) + 1) / (len(samples) + 1)
    return BootstrapResult(value, low, high, min(1.0, 2 * one_sided), len(samples), len(targets))


@dataclass(frozen=True)
class _RankedColumns:
    """The rankings of all (seed, class) columns with positives, end to end, each cut after its last positive.

    Sorted once; a resample is then only a weight for each image. A group is the images of one score among which is a
    positive. It closes the segment of images ranked after the group before it, so its rank is a running sum over the
    segments of its column.
    """

    images: np.ndarray  # (L,) image index of each ranked entry
    segment_starts: np.ndarray  # (G,) where in images the segment of each group begins
    positive_images: np.ndarray  # (P,) image index of each positive
    group_starts: np.ndarray  # (G,) first positive of each group
    column_starts: np.ndarray  # (C,) first group of each column
    column_sizes: np.ndarray  # (C,) groups of each column

    @classmethod
    def of(cls, scores: Tensor, targets: Tensor) -> "_RankedColumns":
        """Rank scores (S, n, K) or (n, K) against targets (n, K)."""
        columns = scores.movedim(-2, 0).flatten(start_dim=1)  # (n, S * K)
        order, ranked, ends = rank_images(columns, targets.repeat(1, columns.shape[1] // targets.shape[1]))
        positive = ranked == 1
        if not positive.any():
            raise ConfigError("targets have no positive (1) in any class, so there is no mAP to resample")
        last = torch.where(positive, ends, -1).amax(dim=1, keepdim=True)
        kept = (ranked >= 0) & (ends <= last)
        num_columns, num_images = ranked.shape
        same_score = (ends + num_images * torch.arange(num_columns)[:, None])[kept].numpy()  # ascends
        images, is_positive = order[kept].numpy(), positive[kept].numpy()
        groups, group_starts = np.unique(same_score[is_positive], return_index=True)
        segment_ends = np.searchsorted(same_score, groups, side="right")
        sizes = np.unique(groups // num_images, return_counts=True)[1]
        return cls(
            images=images,
            segment_starts=np.concatenate([[0], segment_ends[:-1]]),
            positive_images=images[is_positive],
            group_starts=group_starts,
            column_starts=np.cumsum(sizes) - sizes,
            column_sizes=sizes,
        )

    def mean_average_precision(self, counts: np.ndarray) -> float:
        """mAP where image i occurs counts[i] times, mean over seeds; NaN when no positive occurs."""
        copies = np.add.reduceat(counts[self.positive_images], self.group_starts)  # (G,)
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


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for how many there are, by Holm's step-down method (Scandinavian J. of Statistics 6, 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def mean_intervals(
    values: Tensor, images: Tensor, num_images: int, num_resamples: int = 1000, seed: int = 0
) -> np.ndarray:
    """Mean of each column and its 95 % percentile interval by bootstrap over images, since the objects of one image
    stand or fall together. values: (m, C); images: (m,), the image of each row. Returns (3, C): mean, low, high.

    A resample without any row is left out; without rows, or where a column holds a NaN, all three are NaN.
    """
    totals = np.zeros((num_images, values.shape[1]))
    np.add.at(totals, images.numpy(), values.double().numpy())
    counts = np.bincount(images.numpy(), minlength=num_images)
    weights = np.random.default_rng(seed).multinomial(num_images, np.full(num_images, 1 / num_images), num_resamples)
    drawn = weights @ counts
    if len(values) == 0 or not drawn.any():
        return np.full((3, values.shape[1]), np.nan)
    samples = (weights @ totals)[drawn > 0] / drawn[drawn > 0, None]
    ends = np.quantile(samples, [0.025, 0.975], axis=0)
    # Rounded, or float64 noise would decide on which side of 0 two equal ways fall.
    return np.round(np.vstack((totals.sum(axis=0) / counts.sum(), ends)), 12)
