"""intervals.py against plain resampling, against worked examples, and against its promises."""

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from random_scores import random_case
from scipy import stats

import mcar_lib.intervals
from mcar_lib.errors import ConfigError
from mcar_lib.intervals import (
    _exact,
    _RankedColumns,
    _resampled,
    _segment_sums,
    holm,
    map_difference,
    map_interval,
    resampled_maps,
    two_level,
)
from mcar_lib.metrics import average_precision, check_inputs, multilabel_metrics

FLOAT64 = 1e-12  # two float64 computations of the same fraction

# Seeds and images together


def naive_resamples(score_sets, targets, num_resamples, seed):
    """mAP (R, S) of each seed on explicitly indexed resamples; those without a positive are left out."""
    num_images, num_classes = targets.shape
    generator = np.random.default_rng(seed)
    columns = np.concatenate(list(score_sets), axis=1)
    samples = []
    for _ in range(num_resamples):
        drawn = generator.integers(num_images, size=num_images)
        aps = average_precision(columns[drawn], np.tile(targets[drawn], len(score_sets)))
        samples.append(aps.view(-1, num_classes).nanmean(dim=1).numpy())
    return np.array([sample for sample in samples if not np.isnan(sample).any()])


def one_by_one(scores, targets, num_resamples, seed):
    """mAP (R, S) as resampled_maps, each resample alone, in whole numbers: what committed comparisons were made by."""
    ranking, generator = (
        _RankedColumns.of(*check_inputs(scores, targets, seeds_allowed=True)),
        np.random.default_rng(seed),
    )

    def running_sum(values):
        total = np.cumsum(values)
        before = total[ranking.column_starts] - values[ranking.column_starts]
        return total - np.repeat(before, np.diff(ranking.column_starts, append=len(values)))

    samples = []
    for _ in range(num_resamples):
        counts = np.bincount(generator.integers(len(targets), size=len(targets)), minlength=len(targets))
        copies = np.add.reduceat(counts[ranking.positive_images], ranking.group_starts)
        rank = running_sum(np.add.reduceat(counts[ranking.images], ranking.segment_starts))
        precision = copies * running_sum(copies) / np.maximum(rank, 1)
        positives = np.add.reduceat(copies, ranking.column_starts)
        present = positives.reshape(ranking.num_seeds, -1)[0] > 0
        if present.any():
            ap = np.add.reduceat(precision, ranking.column_starts) / np.maximum(positives, 1)
            samples.append(ap.reshape(ranking.num_seeds, -1)[:, present].mean(axis=1))
    return np.array(samples)


def mean_covariance(a, b=None):
    """Mean over pairs of columns: of different columns of a, or of any of a with any of b."""
    other = a if b is None else b
    pairs = [(s, t) for s in range(a.shape[1]) for t in range(other.shape[1]) if b is not None or s != t]
    return np.mean([np.cov(a[:, s], other[:, t])[0, 1] for s, t in pairs])


def maps(score_sets, targets):
    return np.array([multilabel_metrics(one, targets)["mAP"] for one in score_sets])


@pytest.mark.parametrize(
    ("num_images", "num_classes", "prevalence"), [(25, 4, 0.3), (12, 3, 0.05), (5, 1, 0.0), (30, 2, 0.9)]
)
def test_an_interval_of_map_is_that_of_explicit_resamples(num_images, num_classes, prevalence):
    scores, targets = random_case(num_images, num_classes, prevalence, 5, difficult=0.15, num_seeds=3)
    scores = scores.round(1)  # with ties
    samples, found = naive_resamples(scores, targets, 60, seed=9), maps(scores, targets)
    result = map_interval(scores, targets, num_resamples=60, seed=9, confidence=0.8)
    seeds, images = found.var(ddof=1) / 3, max(0, mean_covariance(samples))
    freedom = 2 * (1 + images / seeds) ** 2
    reach = stats.t.ppf(0.9, freedom) * math.sqrt(seeds + images)
    assert result.num_resamples == len(samples)
    assert (result.seed_error, result.image_error) == pytest.approx((math.sqrt(seeds), math.sqrt(images)), abs=1e-9)
    assert result.degrees_of_freedom == pytest.approx(freedom)
    assert [result.low, result.high] == pytest.approx([found.mean() - reach, found.mean() + reach], abs=1e-9)


@pytest.mark.parametrize("paired", [False, True])
def test_a_difference_is_that_of_explicit_resamples(paired):
    scores, targets = random_case(25, 4, 0.3, seed=6, difficult=0.15, num_seeds=7)
    a, b = (scores[:3], scores[3:6]) if paired else (scores[:3], scores[3:])
    of_a, of_b = naive_resamples(a, targets, 80, seed=3), naive_resamples(b, targets, 80, seed=3)
    map_a, map_b = maps(a, targets), maps(b, targets)
    if paired:
        parts = [((map_a - map_b).var(ddof=1) / 3, 2)]
        images = mean_covariance(of_a - of_b)
    else:
        parts = [(map_a.var(ddof=1) / 3, 2), (map_b.var(ddof=1) / 4, 3)]
        images = mean_covariance(of_a) + mean_covariance(of_b) - 2 * mean_covariance(of_a, of_b)
    variance = sum(part for part, _ in parts) + max(0, images)
    freedom = variance**2 / sum(part**2 / count for part, count in parts)
    result = map_difference(a, b, targets, num_resamples=80, seed=3, paired=paired)
    difference, reach = map_a.mean() - map_b.mean(), stats.t.ppf(0.975, freedom) * math.sqrt(variance)
    assert result.difference == pytest.approx(difference, abs=1e-11)
    assert [result.low, result.high] == pytest.approx([difference - reach, difference + reach], abs=1e-9)
    assert result.p_value == pytest.approx(2 * stats.t.sf(abs(difference) / math.sqrt(variance), freedom), abs=1e-9)
    assert (result.seeds, result.paired) == ((len(a), len(b)), paired)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    num_images=st.integers(4, 300),
    num_classes=st.integers(1, 12),
    prevalence=st.sampled_from([0.0, 0.01, 0.1, 0.5, 0.95]),
    num_seeds=st.integers(1, 3),
    digits=st.sampled_from([0, 1, 8]),
    seed=st.integers(0, 1000),
)
def test_resamples_together_are_bit_for_bit_those_one_by_one(
    num_images, num_classes, prevalence, num_seeds, digits, seed
):
    """With ties, images that are skipped, classes without positives and resamples without any."""
    scores, targets = random_case(num_images, num_classes, prevalence, seed, difficult=0.1, num_seeds=num_seeds)
    scores = scores.round(digits)
    expected = one_by_one(scores, targets, 40, seed)
    assume(len(expected) > 1)
    samples, _ = resampled_maps(scores, targets, 40, seed)
    assert np.array_equal(samples, expected)


def test_both_models_of_a_difference_see_the_draws_that_each_sees_alone():
    scores, targets = random_case(60, 5, 0.3, seed=3, num_seeds=3)
    both = _resampled((scores[:1], scores[1:]), targets, 40, seed=2)
    for (samples, maps_as_they_are), alone in zip(both, (scores[:1], scores[1:]), strict=True):
        expected = resampled_maps(alone, targets, 40, seed=2)
        assert np.array_equal(samples, expected[0])
        assert np.array_equal(maps_as_they_are, expected[1])


@pytest.mark.parametrize("num_images", [2**24, 2**24 + 1])
def test_sums_of_as_many_draws_as_there_are_images_are_exact(num_images):
    """float32 cannot hold 2**24 + 1; the larger number of images is counted in float64."""
    counts = torch.tensor([[num_images - 1], [1]], dtype=_exact(num_images))
    assert _segment_sums(counts, np.arange(2), np.array([0])).tolist() == [[num_images]]


def test_resamples_of_many_classes_are_worked_on_in_parts(monkeypatch):
    scores, targets = random_case(60, 5, 0.3, seed=3, num_seeds=3)
    whole = resampled_maps(scores, targets, 70, seed=2)[0]
    for name, value in (("IN_CACHE", 1), ("AT_ONCE", 7)):
        monkeypatch.setattr(f"mcar_lib.intervals.{name}", value)
        assert np.array_equal(resampled_maps(scores, targets, 70, seed=2)[0], whole)


def test_an_interval_is_centred_on_the_mean_map_of_the_data():
    """Copies of an image tie and lift the mAP of a resample; the interval must not follow."""
    scores, targets = random_case(50, 6, 0.1, seed=7, difficult=0.1, num_seeds=3)
    targets[:, 2] = 0  # a class without positives
    result = map_interval(scores, targets, num_resamples=50)
    expected = maps(scores, targets).mean()
    assert (result.mAP, (result.low + result.high) / 2) == pytest.approx((expected, expected), abs=1e-11)
    assert naive_resamples(scores, targets, 500, seed=0).mean() > expected + 0.005


def test_seeds_that_differ_widen_what_images_alone_leave_narrow():
    scores, targets = random_case(200, 3, 0.3, seed=1, num_seeds=2)
    same, apart = np.stack((scores[0],) * 3), np.stack((scores[0], scores[0], (targets == 1) + 0.0))
    narrow, wide = (map_interval(each, targets, 100) for each in (same, apart))
    assert narrow.high - narrow.low == pytest.approx(2 * 1.959964 * narrow.image_error, rel=1e-6)
    assert narrow.seed_error < 1e-9 < narrow.image_error
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)


def test_one_seed_has_the_interval_of_the_images_and_no_p_value():
    scores, targets = random_case(60, 5, 0.3, seed=13, num_seeds=3)
    samples = naive_resamples(scores, targets, 50, seed=0)
    alone, pair = map_interval(scores[0], targets, 50), map_difference(scores[0], scores[1:], targets, 50)
    for result, error in (
        (alone, samples[:, 0].std(ddof=1)),
        (pair, (samples[:, 0] - samples[:, 1:].mean(axis=1)).std(ddof=1)),
    ):
        assert result.image_error == pytest.approx(error)
        assert result.high - result.low == pytest.approx(2 * 1.959964 * error, rel=1e-6)
        assert math.isnan(result.seed_error)
    assert math.isnan(pair.p_value)
    assert math.isnan(map_difference(scores[0], scores[1], targets, 50, paired=True).p_value)
    assert (alone.seeds, pair.seeds) == (1, (1, 2))


def test_what_pairs_share_does_not_count():
    scores, targets = random_case(100, 4, 0.3, seed=2, num_seeds=3)
    better = scores + 0.02 * (targets == 1)
    paired, unpaired = (map_difference(better, scores, targets, 100, paired=each) for each in (True, False))
    assert paired.difference == unpaired.difference
    assert paired.p_value < unpaired.p_value


@pytest.mark.parametrize("paired", [False, True])
def test_equal_models_differ_by_exactly_nothing(paired):
    scores, targets = random_case(60, 5, 0.3, seed=9, num_seeds=3)
    result = map_difference(scores, scores if paired else scores[[2, 0, 1]], targets, 50, paired=paired)
    assert (result.difference, result.p_value) == (0.0, 1.0)
    assert -result.low == result.high
    assert (result.high == 0) == paired


def test_models_that_are_right_whatever_the_seed_and_the_images_have_no_width():
    targets = np.repeat([1, 0], 20)[:, None]
    right, wrong = np.stack((targets,) * 2), np.stack((1 - targets,) * 2)
    result = map_interval(right, targets, 50)
    assert (result.low, result.mAP, result.high) == (1, 1, 1)
    assert map_difference(right, wrong, targets, 50).p_value < 1e-6
    assert map_difference(right, right, targets, 50).p_value == 1


def test_swapping_the_models_mirrors_the_result():
    scores, targets = random_case(80, 4, 0.2, seed=11, num_seeds=5)
    forth = map_difference(scores[:2], scores[2:], targets, num_resamples=101)
    back = map_difference(scores[2:], scores[:2], targets, num_resamples=101)
    assert (back.difference, back.seeds) == (-forth.difference, (3, 2))
    assert [back.low, back.high, back.p_value] == pytest.approx([-forth.high, -forth.low, forth.p_value], abs=FLOAT64)


def test_intervals_repeat_by_seed():
    scores, targets = random_case(60, 5, 0.3, seed=12, num_seeds=2)
    first, again, other = (map_interval(scores, targets, 50, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_wider_confidence_gives_wider_interval():
    scores, targets = random_case(60, 5, 0.3, seed=14, num_seeds=2)
    narrow, wide = (map_interval(scores, targets, 100, confidence=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


def test_two_levels_hold_the_true_mean_as_often_as_they_say():
    """Seeds and images drawn anew 1,000 times from a model whose mean is 0: 95 % of intervals hold it, 5 % of p lie
    below 0.05, though one image error is common to all seeds."""
    generator, seeds, trials = np.random.default_rng(3), 3, 1000
    images = generator.normal(size=(400, 1))
    inside = []
    for _ in range(trials):
        estimates = generator.normal(size=seeds) + 0.7 * generator.normal()
        found = two_level(estimates + 0.7 * images, estimates)
        assert (found.low <= 0 <= found.high) == (found.p_value >= 0.05)
        inside.append(found.low <= 0 <= found.high)
    assert 0.93 < np.mean(inside) < 0.97


def test_two_level_leaves_out_resamples_without_a_number():
    generator = np.random.default_rng(0)
    samples, estimates = generator.normal(size=(50, 3)), np.arange(3.0)
    holes = np.vstack((samples, [[math.nan, 0, 0]]))
    assert two_level(holes, estimates) == two_level(samples, estimates)


@pytest.mark.parametrize(("sample", "estimate"), [(math.nan, 1.0), (1.0, math.nan)])
def test_nothing_to_measure_has_no_ends_and_no_p_value(sample, estimate):
    found = two_level(np.full((5, 2), sample), np.array([1.0, estimate]))
    assert np.isnan([found.low, found.high, found.p_value]).all()


# Holm


def test_holm_on_a_worked_example():
    """Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, never below the one before."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_holm_of_nothing_is_nothing():
    assert holm([]) == []


def test_holm_does_not_count_comparisons_without_a_p_value():
    adjusted = holm([math.nan, 0.02, math.nan, 0.03])
    assert adjusted[1::2] == [0.04, 0.04]
    assert np.isnan(adjusted[::2]).all()


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm_lies_between_the_plain_and_the_bonferroni_p(p_values):
    for plain, adjusted in zip(p_values, holm(p_values), strict=True):
        assert plain <= adjusted <= min(1, plain * len(p_values)) + 1e-12 or adjusted == max(holm(p_values))
        assert adjusted <= 1


# Errors


@pytest.mark.parametrize(
    ("scores", "targets", "options", "message"),
    [
        (np.ones((2, 4, 3)), np.ones((4, 2)), {}, "differ in shape"),
        (np.ones((1, 2, 4, 3)), np.ones((4, 3)), {}, r"\(n, K\) or \(S, n, K\)"),
        (np.ones((0, 4, 3)), np.ones((4, 3)), {}, "empty"),
        (np.full((1, 4, 3), np.nan), np.ones((4, 3)), {}, r"\(seed, image, class\) \(0, 0, 0\)"),
        (np.ones((4, 3)), np.zeros((4, 3)), {}, "no positive"),
        (np.ones((4, 3)), np.ones((4, 3)), {"num_resamples": 1}, "num_resamples must be at least 2"),
        (np.ones((4, 3)), np.ones((4, 3)), {"confidence": 1.0}, "confidence must lie strictly between"),
        (np.ones((4, 3)), np.ones((4, 3)), {"confidence": math.nan}, "confidence must lie strictly between"),
    ],
)
def test_wrong_arguments_are_named(scores, targets, options, message):
    with pytest.raises(ConfigError, match=message):
        map_interval(scores, targets, **options)
    with pytest.raises(ConfigError, match=message):
        map_difference(scores, scores, targets, **options)


def test_pairs_need_as_many_seeds_on_both_sides():
    with pytest.raises(ConfigError, match="2 and 3 seeds"):
        map_difference(np.ones((2, 4, 1)), np.ones((3, 4, 1)), np.ones((4, 1)), paired=True)


def test_two_level_names_shapes_that_do_not_fit():
    with pytest.raises(ConfigError, match=r"\(R, S\) and estimates \(S,\), got \(5, 3\) and \(2,\)"):
        two_level(np.zeros((5, 3)), np.zeros(2))


def test_resamples_that_never_draw_a_positive_are_an_error():
    targets = np.zeros((1000, 1))
    targets[0] = 1
    draws = (np.random.default_rng(seed).integers(1000, size=(2, 1000)) for seed in range(50))
    never = next(seed for seed, drawn in enumerate(draws) if 0 not in drawn[0] and 0 not in drawn[1])
    with pytest.raises(ConfigError, match="0 of 2 resamples drew a positive; two are needed"):
        map_interval(np.ones((1000, 1)), targets, num_resamples=2, seed=never)


def test_docstring_examples_hold():
    outcome = doctest.testmod(mcar_lib.intervals)
    assert outcome.attempted == 14
    assert outcome.failed == 0
