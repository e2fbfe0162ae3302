"""intervals.py against plain resampling, against worked examples, and against its promises."""

import doctest
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_scores import random_case
from sklearn.metrics import average_precision_score

import mcar_lib.intervals
from mcar_lib.errors import ConfigError
from mcar_lib.intervals import bootstrap_interval, holm, mean_intervals, paired_bootstrap
from mcar_lib.metrics import multilabel_metrics

FLOAT64 = 1e-12  # two float64 computations of the same fraction

# Bootstrap


def naive_bootstrap(score_sets, targets, num_resamples, seed):
    """Mean mAP over seeds of each explicitly indexed resample, by scikit-learn, where equal scores share a rank."""
    num_images, num_classes = targets.shape
    generator = np.random.default_rng(seed)
    samples = []
    for _ in range(num_resamples):
        drawn = generator.integers(num_images, size=num_images)
        seed_maps = []
        for scores in score_sets:
            aps = []
            for k in range(num_classes):
                kept = drawn[targets[drawn, k] >= 0]
                if (targets[kept, k] == 1).any():
                    aps.append(average_precision_score(targets[kept, k], scores[kept, k]))
            seed_maps.append(sum(aps) / len(aps) if aps else math.nan)
        samples.append(sum(seed_maps) / len(seed_maps))
    return np.array([sample for sample in samples if not math.isnan(sample)])


@pytest.mark.parametrize(
    ("num_images", "num_classes", "prevalence", "num_seeds"),
    [(25, 4, 0.3, 2), (12, 3, 0.05, 1), (3, 1, 0.0, 1), (30, 2, 0.9, 3)],
)
def test_bootstrap_interval_equals_naive_resampling(num_images, num_classes, prevalence, num_seeds):
    scores, targets = random_case(num_images, num_classes, prevalence, 5, difficult=0.15, num_seeds=num_seeds)
    scores = scores.round(1)  # with ties
    samples = naive_bootstrap(scores, targets, num_resamples=60, seed=9)
    result = bootstrap_interval(scores, targets, num_resamples=60, seed=9, confidence=0.8)
    assert result.num_resamples == len(samples)
    assert [result.low, result.high] == pytest.approx(np.quantile(samples, [0.1, 0.9]), abs=FLOAT64)


def test_paired_bootstrap_equals_naive_resampling():
    scores, targets = random_case(25, 4, 0.3, seed=6, difficult=0.15, num_seeds=5)
    a, b = scores[:2], scores[2:]
    differences = naive_bootstrap(a, targets, 80, seed=3) - naive_bootstrap(b, targets, 80, seed=3)
    result = paired_bootstrap(a, b, targets, num_resamples=80, seed=3)
    smaller_side = min((differences <= 0).sum(), (differences >= 0).sum())
    assert [result.low, result.high] == pytest.approx(np.quantile(differences, [0.025, 0.975]), abs=1e-11)
    assert result.p_value == pytest.approx(min(1, 2 * (smaller_side + 1) / 81), abs=FLOAT64)


def test_bootstrap_centres_on_the_map_of_the_data():
    scores, targets = random_case(50, 6, 0.2, seed=7, difficult=0.1, num_seeds=3)
    targets[:, 2] = 0  # a class without positives
    expected = np.mean([multilabel_metrics(one, targets)["mAP"] for one in scores])
    assert bootstrap_interval(scores, targets, num_resamples=1).mAP == pytest.approx(expected, abs=FLOAT64)


def test_paired_difference_is_map_a_minus_map_b():
    scores, targets = random_case(50, 6, 0.2, seed=8, num_seeds=3)
    maps = [multilabel_metrics(one, targets)["mAP"] for one in scores]
    result = paired_bootstrap(scores[:2], scores[2], targets, num_resamples=1)
    assert result.difference == pytest.approx((maps[0] + maps[1]) / 2 - maps[2], abs=1e-11)


def test_identical_models_differ_by_exactly_nothing():
    scores, targets = random_case(60, 5, 0.3, seed=9, num_seeds=3)
    result = paired_bootstrap(scores, scores[[2, 0, 1]], targets, num_resamples=50)
    assert (result.difference, result.low, result.high, result.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_clearly_better_model_has_interval_above_zero():
    weak, targets = random_case(300, 5, 0.2, seed=10, skill=0.1)
    strong, _ = random_case(300, 5, 0.2, seed=10, skill=1.0)
    result = paired_bootstrap(strong, weak, targets, num_resamples=200)
    assert 0 < result.low < result.difference < result.high
    assert result.p_value == pytest.approx(2 / 201, abs=FLOAT64)


def test_swapping_the_models_mirrors_the_result():
    scores, targets = random_case(80, 4, 0.2, seed=11, num_seeds=2)
    forth = paired_bootstrap(scores[0], scores[1], targets, num_resamples=101)
    back = paired_bootstrap(scores[1], scores[0], targets, num_resamples=101)
    assert (forth.difference, forth.p_value) == (-back.difference, back.p_value)
    assert [forth.low, forth.high] == pytest.approx([-back.high, -back.low], abs=FLOAT64)


def test_constant_scores_are_resampled_to_the_share_of_the_positives():
    targets = np.repeat([1, 0], 50)[:, None]
    result = bootstrap_interval(np.zeros((100, 1)), targets, num_resamples=200)
    assert result.mAP == 0.5
    assert 0.35 < result.low < 0.5 < result.high < 0.65


def test_the_order_of_the_images_does_not_change_map():
    scores, targets = random_case(60, 5, 0.3, seed=12)
    orders = [
        bootstrap_interval(scores.round(1)[order], targets[order], 1) for order in (slice(None), slice(None, None, -1))
    ]
    assert orders[0].mAP == pytest.approx(orders[1].mAP, abs=FLOAT64)


def test_bootstrap_repeats_by_seed():
    scores, targets = random_case(60, 5, 0.3, seed=12)
    first, again, other = (bootstrap_interval(scores, targets, 50, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_one_seed_axis_equals_no_seed_axis():
    scores, targets = random_case(60, 5, 0.3, seed=13)
    assert bootstrap_interval(scores[None], targets, 50) == bootstrap_interval(scores, targets, 50)


def test_wider_confidence_gives_wider_interval():
    scores, targets = random_case(60, 5, 0.3, seed=14)
    narrow, wide = (bootstrap_interval(scores, targets, 100, confidence=level) for level in (0.5, 0.99))
    assert wide.low < narrow.low < narrow.high < wide.high


# Means of objects


def test_mean_intervals_equal_a_plain_loop_over_resamples():
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 12, 40))
    values = torch.from_numpy(generator.random((40, 2)))
    weights = np.random.default_rng(5).multinomial(12, np.full(12, 1 / 12), 200)
    means = []
    for weight in weights:
        copies = np.repeat(np.arange(40), weight[images.numpy()])
        means.append(values.numpy()[copies].mean(axis=0))
    mean, low, high = mean_intervals(values, images, 12, num_resamples=200, seed=5)
    np.testing.assert_allclose(mean, values.mean(dim=0))
    np.testing.assert_allclose([low, high], np.quantile(means, [0.025, 0.975], axis=0))


def test_mean_intervals_resample_images_not_objects():
    values, images = torch.tensor([[0.0]] * 500 + [[1.0]] * 500), torch.tensor([0] * 500 + [1] * 500)
    assert mean_intervals(values, images, 2)[:, 0].tolist() == [0.5, 0, 1]


def test_an_interval_is_as_wide_as_the_normal_approximation():
    values = torch.arange(400).remainder(2).double()[:, None]
    _, low, high = mean_intervals(values, torch.arange(400), 400, num_resamples=4000)[:, 0]
    assert (low, high) == pytest.approx((0.5 - 1.96 * 0.025, 0.5 + 1.96 * 0.025), abs=0.004)


def test_nothing_to_measure_gives_no_number():
    empty = mean_intervals(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 4)
    assert empty.shape == (3, 3)
    assert np.isnan(empty).all()


# Holm


def test_holm_on_a_worked_example():
    """Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, never below the one before."""
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_holm_of_nothing_is_nothing():
    assert holm([]) == []


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
        (np.ones((4, 3)), np.ones((4, 3)), {"num_resamples": 0}, "num_resamples must be at least 1"),
        (np.ones((4, 3)), np.ones((4, 3)), {"confidence": 1.0}, "confidence must lie strictly between"),
        (np.ones((4, 3)), np.ones((4, 3)), {"confidence": math.nan}, "confidence must lie strictly between"),
    ],
)
def test_wrong_bootstrap_arguments_are_named(scores, targets, options, message):
    with pytest.raises(ConfigError, match=message):
        bootstrap_interval(scores, targets, **options)
    with pytest.raises(ConfigError, match=message):
        paired_bootstrap(scores, scores, targets, **options)


def test_resamples_that_never_draw_a_positive_are_an_error():
    targets = np.zeros((1000, 1))
    targets[0] = 1
    never_draws_it = next(s for s in range(50) if 0 not in np.random.default_rng(s).integers(1000, size=1000))
    with pytest.raises(ConfigError, match="none of 1 resamples drew a positive"):
        bootstrap_interval(np.ones((1000, 1)), targets, num_resamples=1, seed=never_draws_it)


def test_docstring_examples_hold():
    outcome = doctest.testmod(mcar_lib.intervals)
    assert outcome.attempted == 9
    assert outcome.failed == 0
