"""Intervals and p-values that hold training seeds and test images together, and Holm.

A mAP would be another one with other seeds and with other test images. Both are held as readers and cases are in
multi-reader multi-case studies, where every reader (here: a seed) judges the same cases (here: test images):
Obuchowski and Rockette, Communications in Statistics - Simulation and Computation 24 (1995) 285-308. The variance of a
mean over S seeds is s2 / S + Cov2: s2 is the sample variance over seeds on the test images as they are, Cov2 the mean
covariance between two seeds when images are resampled. Only covariances come from resamples, so an interval has its
estimate in the middle, though copies of an image tie and lift the mAP of a resample. Degrees of freedom as in Hillis,
Statistics in Medicine 26 (2007) 596-619; two arms whose runs are different trainings are readers nested in a test,
Hillis, Statistics in Medicine 33 (2014) 330-360.

benchmarks/calibration.py counts how often they err: an arm held against other seeds of itself came out different
(p < 0.05) in 4 to 5 % of draws, with three seeds or with five; by images alone in 32 to 52 %. A Welch t test over seeds
alone does as well there, where the images that both sides share cancel; it has no part for images that suit one arm
and not the other, nor for a single mAP. Intervals of that came out a little wide: they held in 95 to 97 %.

The use here is this project's: neither the paper nor its released code gives intervals. n is the number of images, K of
classes, S of seeds, R of resamples; scores and targets are those of mcar_lib.metrics.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from mcar_lib.errors import ConfigError
from mcar_lib.metrics import Array, check_inputs, rank_images

DIGITS = 12  # kept of an estimate: float64 noise would decide on which side of 0 two equal models fall
AT_ONCE = 32  # resamples that are summed together: one image's counts are two lines of a processor's cache
IN_CACHE = 2**17  # numbers of an array that are worked on together
WHOLE_IN_FLOAT32 = 2**24  # up to here float32 holds every whole number


@dataclass(frozen=True)
class TwoLevelInterval:
    """A mean over seeds, its t interval [low, high], and the two-sided p-value of "it is 0".

    seed_error, image_error: the parts of its standard error, whose squares add up. With one seed the first cannot be
    known: seed_error and p_value are NaN, and the interval holds the images alone. degrees_of_freedom: of the t
    distribution; infinite where only images vary.
    """

    estimate: float
    low: float
    high: float
    p_value: float
    seeds: int
    seed_error: float
    image_error: float
    degrees_of_freedom: float


@dataclass(frozen=True)
class MapInterval:
    """mAP of one model, the mean over its seeds, with the interval of TwoLevelInterval."""

    mAP: float  # noqa: N815 (the field's own name)
    low: float
    high: float
    num_resamples: int
    num_images: int
    seeds: int
    seed_error: float
    image_error: float
    degrees_of_freedom: float


@dataclass(frozen=True)
class MapDifference:
    """mAP(a) - mAP(b), each the mean over its seeds, with interval and p-value as in TwoLevelInterval; seeds: of a and
    of b; paired: whether both are the same training runs."""

    difference: float
    low: float
    high: float
    p_value: float
    num_resamples: int
    num_images: int
    seeds: tuple[int, int]
    seed_error: float
    image_error: float
    degrees_of_freedom: float
    paired: bool


def map_interval(
    scores: Array, targets: Array, num_resamples: int = 2000, seed: int = 0, confidence: float = 0.95
) -> MapInterval:
    """Interval of one model's mAP over seeds and test images.

    Equal scores share one rank, as in average_precision. A class without positives in a resample of the images is left
    out of its mAP; a resample with no positive at all is left out, and num_resamples counts the rest.

    Args:
        scores: (n, K), or (S, n, K) for S seeds on the same images.
        targets: (n, K) of 1, 0 and -1 (skipped).
        num_resamples: at least 2.
        seed: of the NumPy generator that draws the resamples; the same seed gives the same result.
        confidence: strictly between 0 and 1.

    Raises:
        ConfigError: as average_precision; num_resamples or confidence out of range; no class has a positive.

    >>> import torch
    >>> noise = torch.randn(3, 200, 1, generator=torch.Generator().manual_seed(0))
    >>> targets = torch.arange(200).remainder(2)[:, None]
    >>> result = map_interval(targets + noise, targets, num_resamples=200)
    >>> result.seeds, result.low < result.mAP < result.high
    (3, True)
    """
    samples, maps = resampled_maps(scores, targets, num_resamples, seed)
    found = two_level(samples, maps, confidence)
    shared = {name: value for name, value in asdict(found).items() if name not in ("estimate", "p_value")}
    return MapInterval(mAP=found.estimate, num_resamples=len(samples), num_images=len(targets), **shared)


def map_difference(
    scores_a: Array,
    scores_b: Array,
    targets: Array,
    num_resamples: int = 2000,
    seed: int = 0,
    confidence: float = 0.95,
    paired: bool = False,
) -> MapDifference:
    """Interval and p-value of mAP(a) - mAP(b) over seeds and test images, both models on the same resampled images.

    Resamples, ties, empty classes and errors are as in map_interval.

    Args:
        scores_a: (n, K), or (S, n, K) for S seeds.
        scores_b: as scores_a; S may differ unless paired.
        targets: (n, K) of 1, 0 and -1 (skipped).
        num_resamples, seed, confidence: as in map_interval.
        paired: scores_a[s] and scores_b[s] come from one training run (another stream, other values in the test), so
            that what varies over seeds is their difference.

    >>> import torch
    >>> noise = torch.randn(2, 3, 200, 1, generator=torch.Generator().manual_seed(0))
    >>> targets = torch.arange(200).remainder(2)[:, None]
    >>> result = map_difference(3 * targets + noise[0], targets + noise[1], targets, num_resamples=200)
    >>> result.low > 0, result.p_value < 0.01, result.seeds
    (True, True, (3, 3))
    """
    (samples_a, maps_a), (samples_b, maps_b) = _resampled((scores_a, scores_b), targets, num_resamples, seed)
    seeds = (len(maps_a), len(maps_b))
    if paired and seeds[0] != seeds[1]:
        raise ConfigError(f"paired models have one score for each run, got {seeds[0]} and {seeds[1]} seeds")
    if paired:
        found = two_level(samples_a - samples_b, maps_a - maps_b, confidence)
    else:
        found = two_level_difference(samples_a, maps_a, samples_b, maps_b, confidence)
    counted = {"num_resamples": len(samples_a), "num_images": len(targets), "seeds": seeds, "paired": paired}
    shared = {name: value for name, value in asdict(found).items() if name not in ("estimate", "seeds")}
    return MapDifference(difference=found.estimate, **shared, **counted)  # type: ignore[arg-type]


def resampled_maps(
    scores: Array, targets: Array, num_resamples: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """mAP of each seed on resamples of the test images, (R, S), and on the images as they are, (S,).

    One seed draws the same images for any model. Arguments and errors are those of map_interval; R is num_resamples
    less the resamples with no positive.
    """
    return _resampled((scores,), targets, num_resamples, seed)[0]


def _resampled(
    models: Sequence[Array], targets: Array, num_resamples: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """resampled_maps of each model, all on the same draws."""
    checked = [check_inputs(scores, targets, seeds_allowed=True) for scores in models]
    if num_resamples < 2:
        raise ConfigError(f"num_resamples must be at least 2, got {num_resamples}")
    rankings, num_images = [_RankedColumns.of(*each) for each in checked], len(targets)
    parts: list[list[np.ndarray]] = [[] for _ in rankings]
    for counts in _drawn_counts(num_images, num_resamples, seed):
        for found, ranking in zip(parts, rankings, strict=True):
            found.append(ranking.mean_average_precisions(counts))
    as_they_are = torch.ones(1, num_images, dtype=_exact(num_images))
    return [
        (_with_a_positive(np.concatenate(found)), ranking.mean_average_precisions(as_they_are)[0])
        for found, ranking in zip(parts, rankings, strict=True)
    ]


def _drawn_counts(num_images: int, num_resamples: int, seed: int) -> Iterator[Tensor]:
    """How often each resample draws each image, (r, n): of AT_ONCE resamples, and then of the next."""
    generator = np.random.default_rng(seed)
    for first in range(0, num_resamples, AT_ONCE):
        counts = torch.empty(min(AT_ONCE, num_resamples - first), num_images, dtype=_exact(num_images))
        for row in counts.numpy():
            row[:] = np.bincount(generator.integers(num_images, size=num_images), minlength=num_images)
        yield counts


def _exact(largest: int) -> torch.dtype:
    """A dtype that holds every whole number up to this one, and in which torch sums on all its threads."""
    return torch.float32 if largest <= WHOLE_IN_FLOAT32 else torch.float64


def _with_a_positive(samples: np.ndarray) -> np.ndarray:
    """The resamples (R, S) that drew a positive: which did is the same for all seeds."""
    kept = samples[~np.isnan(samples[:, 0])]
    if len(kept) < 2:
        drew = f"{len(kept)} of {len(samples)} resamples drew a positive"
        raise ConfigError(f"{drew}; two are needed: raise num_resamples or add images")
    return kept


def two_level(samples: np.ndarray, estimates: np.ndarray, confidence: float = 0.95) -> TwoLevelInterval:
    """Interval and p-value of the mean over seeds of any statistic of the test images, or of a difference that each
    seed has of its own (paired).

    Its variance is s2 / S + max(0, Cov2), its degrees of freedom (S - 1) (variance / (s2 / S))^2.

    Args:
        samples: (R, S), the statistic of each seed on each resample of the images, the same images for all seeds;
            rows with a NaN are left out.
        estimates: (S,), the statistic of each seed on the images as they are.
        confidence: strictly between 0 and 1.

    Returns:
        All numbers NaN where an estimate is, or where fewer than two resamples are left.

    Raises:
        ConfigError: the shapes do not fit; confidence out of range.

    >>> generator = np.random.default_rng(0)
    >>> images, seeds = generator.normal(size=(2000, 1)), np.array([0.9, 1.0, 1.1])
    >>> found = two_level(seeds + 0.2 * images, seeds)
    >>> round(found.estimate, 3), round(found.seed_error, 3), round(found.image_error, 1), found.low > 0
    (1.0, 0.058, 0.2, True)
    """
    covariance = _covariance(_whole_samples(samples, estimates))
    image_variance = _between(covariance) if len(estimates) > 1 else float(covariance[0, 0])
    return _t_interval(float(np.mean(estimates)), [estimates], image_variance, confidence)


def two_level_difference(
    samples_a: np.ndarray,
    estimates_a: np.ndarray,
    samples_b: np.ndarray,
    estimates_b: np.ndarray,
    confidence: float = 0.95,
) -> TwoLevelInterval:
    """Interval and p-value of mean(a) - mean(b), where the seeds of each side are runs of its own.

    Its variance is s2_a / S_a + s2_b / S_b + max(0, Cov2_a + Cov2_b - 2 Cov3), Cov3 being the mean covariance of a seed
    of a and one of b. With one seed on a side it is that of the resampled difference.

    Args:
        samples_a, estimates_a: (R, S_a) and (S_a,), as in two_level; the resamples are the same for both sides.
        samples_b, estimates_b: (R, S_b) and (S_b,).
        confidence: strictly between 0 and 1.

    Returns:
        seeds is the smaller of both numbers; NaN as in two_level.

    Raises:
        ConfigError: the shapes do not fit; confidence out of range.
    """
    samples = _whole_samples(np.hstack((samples_a, samples_b)), np.concatenate((estimates_a, estimates_b)))
    count, groups = len(estimates_a), (estimates_a, estimates_b)
    covariance = _covariance(samples)
    if min(map(len, groups)) > 1:
        within = _between(covariance[:count, :count]) + _between(covariance[count:, count:])
        image_variance = within - 2 * float(covariance[:count, count:].mean())
    else:
        image_variance = float((samples[:, :count].mean(axis=1) - samples[:, count:].mean(axis=1)).var(ddof=1))
    return _t_interval(float(estimates_a.mean() - estimates_b.mean()), groups, image_variance, confidence)


def _whole_samples(samples: np.ndarray, estimates: np.ndarray) -> np.ndarray:
    """The resamples without a NaN; all NaN where there are not two."""
    if samples.ndim != 2 or estimates.shape != samples.shape[1:] or not len(estimates):
        raise ConfigError(f"samples must be (R, S) and estimates (S,), got {samples.shape} and {estimates.shape}")
    whole = samples[~np.isnan(samples).any(axis=1)]
    return whole if len(whole) > 1 else np.full((2, len(estimates)), np.nan)


def _covariance(samples: np.ndarray) -> np.ndarray:
    """(R, S) -> (S, S)."""
    return np.atleast_2d(np.cov(samples, rowvar=False))


def _between(covariance: np.ndarray) -> float:
    """Mean covariance of two different seeds."""
    count = len(covariance)
    return float((covariance.sum() - covariance.trace()) / (count * (count - 1)))


def _t_interval(
    estimate: float, groups: Sequence[np.ndarray], image_variance: float, confidence: float
) -> TwoLevelInterval:
    """groups: the statistic of each seed, (S,), of each independent group of runs."""
    from scipy import stats  # only where intervals are asked for: training does without

    if not 0 < confidence < 1:
        raise ConfigError(f"confidence must lie strictly between 0 and 1, got {confidence}")
    estimate, image_variance = round(estimate, DIGITS), float(np.maximum(image_variance, 0.0))  # a NaN stays
    known = all(len(group) > 1 for group in groups)
    parts = [float(group.var(ddof=1)) / len(group) for group in groups] if known else []
    variance = sum(parts) + image_variance
    # Satterthwaite's, the part of the images taken as known
    doubt = sum(part**2 / (len(group) - 1) for part, group in zip(parts, groups, strict=known))
    freedom = variance**2 / doubt if doubt > 0 else math.inf
    error = math.sqrt(variance)
    reach = error * float(stats.t.ppf((1 + confidence) / 2, freedom))
    if not known:
        p_value = math.nan
    elif error == 0:
        p_value = float(estimate == 0)
    else:
        p_value = float(2 * stats.t.sf(abs(estimate) / error, freedom))
    return TwoLevelInterval(
        estimate=estimate,
        low=estimate - reach,
        high=estimate + reach,
        p_value=p_value,
        seeds=min(map(len, groups)),
        seed_error=math.sqrt(sum(parts)) if known else math.nan,
        image_error=math.sqrt(image_variance),
        degrees_of_freedom=freedom,
    )


@dataclass(frozen=True)
class _RankedColumns:
    """The rankings of all (seed, class) columns with positives, end to end, each cut after its last positive.

    Sorted once; a resample is then only a weight for each image, and many are weighed together. A group is the images
    of one score among which is a positive. It closes the segment of images ranked after the group before it, so its
    rank is a running sum over the segments of its column.
    """

    images: np.ndarray  # (L,) image index of each ranked entry
    segment_starts: np.ndarray  # (G,) where in images the segment of each group begins
    positive_images: np.ndarray  # (P,) image index of each positive
    group_starts: np.ndarray  # (G,) first positive of each group
    column_starts: np.ndarray  # (C,) first group of each column
    num_seeds: int

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
            num_seeds=columns.shape[1] // targets.shape[1],
        )

    def mean_average_precisions(self, counts: Tensor) -> np.ndarray:
        """mAP of each resample and seed, (r, S), where resample j holds image i counts[j, i] times, counts (r, n); NaN
        where no positive occurs."""
        of_images = counts.T.contiguous()  # (n, r)
        copies = _segment_sums(of_images, self.positive_images, self.group_starts)
        drawn = _segment_sums(of_images, self.images, self.segment_starts)
        rows = max(1, IN_CACHE // len(self.group_starts))
        parts = [self._of_some(copies[at : at + rows], drawn[at : at + rows]) for at in range(0, len(copies), rows)]
        return np.concatenate(parts)

    def _of_some(self, copies: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """mAP (r, S) of resamples: of each group the copies of its positives, and of all images of its segment, both
        (r, G) whole numbers."""
        hits, num_positive = self._running_sum(copies)
        rank, _ = self._running_sum(drawn)
        precision = hits.astype(np.float64)
        precision *= copies
        precision /= np.maximum(rank, 1, out=rank)
        ap = np.add.reduceat(precision, self.column_starts, axis=1) / np.maximum(num_positive, 1)  # (r, C)
        # The targets decide which classes have a column and a positive: the same for every seed.
        present = num_positive.reshape(len(ap), self.num_seeds, -1)[:, 0] > 0
        return np.array([self._means(*each) for each in zip(ap, present, strict=True)])

    def _means(self, ap: np.ndarray, present: np.ndarray) -> np.ndarray:
        """AP of each column, (C,), and whether a class occurs, (C / S,) -> mAP of each seed, (S,)."""
        if not present.any():
            return np.full(self.num_seeds, math.nan)
        means: np.ndarray = ap.reshape(self.num_seeds, -1)[:, present].mean(axis=1)
        return means

    def _running_sum(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of values (r, G) within each column, and the sum of each column (r, C)."""
        steps = values.astype(np.int32)  # there are fewer images than that holds, and no sum is larger
        sums = np.add.reduceat(steps, self.column_starts, axis=1, dtype=steps.dtype)
        steps[:, self.column_starts[1:]] -= sums[:, :-1]  # begins again at 0
        return np.cumsum(steps, axis=1, dtype=steps.dtype, out=steps), sums


def _segment_sums(counts: Tensor, images: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Sums of counts[images] over the segments that begin at starts, (r, G), for counts (n, r) of n drawn images.

    torch gathers and adds all r at once. Sums are whole numbers, at most n: exact.
    """
    indices, offsets = torch.from_numpy(images), torch.from_numpy(starts)
    sums = torch.nn.functional.embedding_bag(indices, counts, offsets, mode="sum")  # (G, r)
    found: np.ndarray = sums.T.contiguous().numpy()
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for how many there are, by Holm's step-down method (Scandinavian J. of Statistics 6, 1979).

    A NaN (there is no p-value) stays one and does not count.
    """
    order = sorted((i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i])
    adjusted, highest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        highest = max(highest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted
