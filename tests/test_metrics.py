"""metrics.py against the release's outputs, scikit-learn, torchmetrics and plain loops."""

import doctest
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_scores import random_case
from sklearn.metrics import average_precision_score, precision_recall_fscore_support
from torchmetrics.classification import (
    MultilabelAveragePrecision,
    MultilabelF1Score,
    MultilabelPrecision,
    MultilabelRecall,
)

import mcar_lib.metrics
from mcar_lib.errors import ConfigError
from mcar_lib.metrics import average_precision, multilabel_metrics

FLOAT64 = 1e-12  # two float64 computations of the same fraction
FLOAT32 = 1e-6  # one of the two is float32: the release, torchmetrics
GOLDEN = Path(__file__).parent / "golden" / "metrics.npz"
seeded = settings(derandomize=True, deadline=None)  # the same cases every time; a busy machine may be slow
RELEASE_ORDER = ("OP", "OR", "OF1", "CP", "CR", "CF1")


def loop_average_precision(scores, targets):
    """One class by plain loops, equal scores in file order; scores and targets are lists."""
    ranked = sorted(
        (-score, image, target)
        for image, (score, target) in enumerate(zip(scores, targets, strict=True))
        if target >= 0
    )
    hits, precisions = 0, []
    for rank, (_, _, target) in enumerate(ranked, start=1):
        hits += target
        if target:
            precisions.append(hits / rank)
    return sum(precisions) / len(precisions) if precisions else math.nan


def sklearn_average_precision(scores, targets):
    """One class by scikit-learn, difficult images dropped; NaN without a positive."""
    kept = targets >= 0
    return average_precision_score(targets[kept], scores[kept]) if (targets == 1).any() else math.nan


# Against the release


@pytest.mark.parametrize("case", [0, 1, 2])
def test_average_precision_matches_release(case):
    golden = np.load(GOLDEN)
    release_targets = golden[f"case{case}_targets"]  # 1 present, -1 absent, 0 difficult
    targets = np.select([release_targets == 1, release_targets == 0], [1, -1], 0)
    ours = average_precision(golden[f"case{case}_scores"], targets, ties="file order")
    np.testing.assert_allclose(ours, golden[f"case{case}_ap"], atol=FLOAT32, rtol=0)


@pytest.mark.parametrize("case", [0, 1, 2])
@pytest.mark.parametrize(("name", "top_k"), [("all", None), ("top3", 3)])
def test_precision_recall_f1_match_release(case, name, top_k):
    golden = np.load(GOLDEN)
    release_targets = golden[f"case{case}_targets"]
    targets = np.select([release_targets == 1, release_targets == 0], [1, -1], 0)
    ours = multilabel_metrics(golden[f"case{case}_scores"], targets, threshold=0.6, top_k=top_k)
    release = golden[f"case{case}_{name}_OP_OR_OF1_CP_CR_CF1"]
    np.testing.assert_allclose([ours[key] for key in RELEASE_ORDER], release, atol=FLOAT64, rtol=0)


# Against other implementations


@pytest.mark.parametrize(("num_images", "num_classes"), [(7, 1), (60, 5), (500, 20)])
@pytest.mark.parametrize("prevalence", [0.03, 0.3, 0.9])
@pytest.mark.parametrize("difficult", [0.0, 0.2])
def test_average_precision_matches_sklearn(num_images, num_classes, prevalence, difficult):
    scores, targets = random_case(num_images, num_classes, prevalence, seed=1, difficult=difficult)
    expected = [sklearn_average_precision(*pair) for pair in zip(scores.T, targets.T, strict=True)]
    ours = average_precision(scores, targets)
    assert ours.dtype == torch.float64
    np.testing.assert_allclose(ours, expected, atol=FLOAT64, rtol=0)


@pytest.mark.parametrize(("num_images", "num_classes"), [(7, 3), (60, 5), (500, 20)])
@pytest.mark.parametrize("prevalence", [0.03, 0.3, 0.9])
@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.6, 0.99])
@pytest.mark.parametrize("top_k", [None, 1, 3])
def test_precision_recall_f1_match_sklearn(num_images, num_classes, prevalence, threshold, top_k):
    scores, targets = random_case(num_images, num_classes, prevalence, seed=2, difficult=0.1)
    allowed = np.ones_like(targets, dtype=bool)
    if top_k is not None:
        allowed = np.array([[(row > score).sum() < top_k for score in row] for row in scores])
    predicted, positive = (scores >= threshold) & allowed, targets == 1
    ours = multilabel_metrics(scores, targets, threshold, top_k)
    class_precision, class_recall, _, _ = precision_recall_fscore_support(
        positive, predicted, average="macro" if num_classes > 1 else "binary", zero_division=0
    )
    overall = precision_recall_fscore_support(positive, predicted, average="micro", zero_division=0)[:3]
    np.testing.assert_allclose([ours["CP"], ours["CR"]], [class_precision, class_recall], atol=FLOAT64, rtol=0)
    np.testing.assert_allclose([ours["OP"], ours["OR"], ours["OF1"]], overall, atol=FLOAT64, rtol=0)


@pytest.mark.parametrize(("num_images", "num_classes"), [(9, 2), (60, 5), (500, 20)])
@pytest.mark.parametrize("prevalence", [0.05, 0.5])
@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_metrics_match_torchmetrics(num_images, num_classes, prevalence, threshold):
    scores, targets = (torch.from_numpy(x) for x in random_case(num_images, num_classes, prevalence, seed=3))
    ours = multilabel_metrics(scores, targets, threshold)

    def theirs(metric, average, **options):
        return metric(num_classes, average=average, **options)(scores, targets).item()

    for key, metric, average in [
        ("CP", MultilabelPrecision, "macro"),
        ("CR", MultilabelRecall, "macro"),
        ("OP", MultilabelPrecision, "micro"),
        ("OR", MultilabelRecall, "micro"),
        ("OF1", MultilabelF1Score, "micro"),
    ]:
        assert ours[key] == pytest.approx(theirs(metric, average, threshold=threshold), abs=FLOAT32), key
    assert ours["mAP"] == pytest.approx(theirs(MultilabelAveragePrecision, "macro"), abs=FLOAT32)


# Properties of average precision


@st.composite
def cases(draw, tied=False, lowest_target=-1):
    """Scores (n, K) float64 and targets (n, K); untied unless asked."""
    num_images, num_classes = draw(st.integers(1, 12)), draw(st.integers(1, 4))
    size = num_images * num_classes
    if tied:
        flat = draw(st.lists(st.integers(-2, 2), min_size=size, max_size=size))
    else:
        flat = draw(st.permutations(range(size)))
    targets = draw(st.lists(st.integers(lowest_target, 1), min_size=size, max_size=size))
    shape = (num_images, num_classes)
    return np.array(flat, dtype=np.float64).reshape(shape), np.array(targets).reshape(shape)


@seeded
@given(cases(tied=True))
def test_average_precision_in_file_order_equals_plain_loop(case):
    scores, targets = case
    expected = [
        loop_average_precision(column.tolist(), target.tolist())
        for column, target in zip(scores.T, targets.T, strict=True)
    ]
    np.testing.assert_allclose(average_precision(scores, targets, "file order"), expected, atol=FLOAT64, rtol=0)


@seeded
@given(cases(tied=True))
def test_tied_scores_share_a_rank_as_in_sklearn(case):
    expected = [sklearn_average_precision(*pair) for pair in zip(case[0].T, case[1].T, strict=True)]
    np.testing.assert_allclose(average_precision(*case), expected, atol=FLOAT64, rtol=0)


@seeded
@given(cases(tied=True), st.sampled_from([lambda x: 3 * x - 7, np.exp, np.arctan, lambda x: x**3]))
def test_average_precision_ignores_strictly_monotone_transforms(case, transform):
    scores, targets = case
    before, after = average_precision(scores, targets), average_precision(transform(scores), targets)
    np.testing.assert_array_equal(before, after)


@seeded
@given(cases(tied=True), st.randoms(use_true_random=False))
def test_average_precision_ignores_image_order(case, random):
    scores, targets = case
    order = list(range(len(scores)))
    random.shuffle(order)
    before, after = average_precision(scores, targets), average_precision(scores[order], targets[order])
    np.testing.assert_allclose(before, after, atol=FLOAT64, rtol=0)


@seeded
@given(cases(lowest_target=0))
def test_perfect_ranking_has_average_precision_one(case):
    scores, targets = case
    ap = average_precision(scores + scores.size * targets, targets)
    np.testing.assert_allclose(ap[torch.from_numpy((targets == 1).any(axis=0))], 1.0, atol=FLOAT64, rtol=0)


@seeded
@given(cases(tied=True))
def test_difficult_images_count_as_if_dropped(case):
    scores, targets = case
    ap = average_precision(scores, targets)
    for k in range(targets.shape[1]):
        kept = targets[:, k] >= 0
        if kept.any():
            alone = average_precision(scores[kept, k : k + 1], targets[kept, k : k + 1])
            np.testing.assert_allclose(ap[k], alone[0], atol=FLOAT64, rtol=0)
        else:
            assert ap[k].isnan()


def test_constant_scores_have_the_share_of_the_positives():
    scores, targets = np.zeros((4, 2)), np.array([[1, 0], [0, -1], [0, 0], [0, 1]])
    assert average_precision(scores, targets).tolist() == [1 / 4, 1 / 3]


def test_file_order_ranks_tied_scores_by_image_index():
    assert average_precision(np.zeros((2, 2)), np.array([[1, 0], [0, 1]]), "file order").tolist() == [1.0, 0.5]


def test_infinite_scores_rank_first_and_last():
    scores = np.array([[-np.inf], [0.0], [np.inf]])
    assert average_precision(scores, np.array([[0], [1], [1]])).item() == 1.0


# Properties of the thresholded metrics


@seeded
@given(cases(tied=True), st.floats(-3, 3))
def test_top_k_of_all_classes_changes_nothing(case, threshold):
    scores, targets = case
    everything = multilabel_metrics(scores, targets, threshold)
    top = multilabel_metrics(scores, targets, threshold, top_k=scores.shape[1])
    np.testing.assert_array_equal(list(everything.values()), list(top.values()))


@seeded
@given(cases(tied=True), st.floats(-3, 3), st.floats(-3, 3))
def test_recall_never_rises_with_threshold(case, one, other):
    scores, targets = case
    low = multilabel_metrics(scores, targets, min(one, other))
    high = multilabel_metrics(scores, targets, max(one, other))
    assert not high["CR"] > low["CR"] + FLOAT64
    assert not high["OR"] > low["OR"]


def test_difficult_is_skipped_in_ap_and_negative_in_precision():
    result = multilabel_metrics(np.array([[0.9], [0.8]]), np.array([[-1], [1]]))
    assert (result["mAP"], result["CP"], result["OP"]) == (1.0, 0.5, 0.5)


def test_class_without_positives_is_counted_and_left_out_of_map_and_recall():
    scores, targets = np.array([[0.9, 0.9], [0.1, 0.1]]), np.array([[1, 0], [0, -1]])
    result = multilabel_metrics(scores, targets)
    assert result["classes_without_positives"] == 1
    assert average_precision(scores, targets).isnan().tolist() == [False, True]
    assert (result["mAP"], result["CR"], result["CP"]) == (1.0, 1.0, 0.5)


def test_no_positive_at_all_gives_nan_where_undefined():
    result = multilabel_metrics(np.array([[0.9]]), np.array([[0]]))
    undefined = {key for key, value in result.items() if math.isnan(value)}
    assert undefined == {"mAP", "CR", "CF1", "OR", "OF1"}


def test_class_never_predicted_has_precision_zero():
    result = multilabel_metrics(np.array([[0.9, 0.1]]), np.array([[1, 1]]))
    assert (result["CP"], result["CR"], result["CF1"]) == (0.5, 0.5, 0.5)


def test_nothing_predicted_gives_zeros():
    result = multilabel_metrics(np.array([[0.1, 0.1]]), np.array([[1, 1]]))
    assert [result[key] for key in RELEASE_ORDER] == [0.0] * 6


def test_minus_infinity_predicts_all_top_k():
    scores, targets = np.array([[-5.0, -4.0, -9.0]]), np.array([[1, 1, 0]])
    result = multilabel_metrics(scores, targets, threshold=-math.inf, top_k=2)
    assert (result["OP"], result["OR"]) == (1.0, 1.0)


def test_tied_scores_give_top_k_to_lower_class():
    result = multilabel_metrics(np.ones((1, 3)), np.array([[1, 0, 0]]), top_k=1)
    assert result["OP"] == 1.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.6, 0.7])
def test_score_equal_to_threshold_is_predicted_in_every_dtype(dtype, threshold):
    scores = torch.tensor([[threshold]], dtype=dtype)
    assert multilabel_metrics(scores, torch.tensor([[1]]), threshold)["OR"] == 1.0


@pytest.mark.parametrize("target_dtype", [np.int8, np.int64, np.float32, np.float64])
def test_arrays_and_tensors_of_any_dtype_agree(target_dtype):
    scores, targets = random_case(40, 6, 0.3, seed=4, difficult=0.1)
    expected = multilabel_metrics(scores, targets)
    read_only = targets.astype(target_dtype)
    read_only.flags.writeable = False
    assert multilabel_metrics(torch.from_numpy(scores).requires_grad_(), torch.from_numpy(targets)) == expected
    assert multilabel_metrics(scores, read_only) == expected


def test_integer_scores_meet_fractional_threshold():
    assert multilabel_metrics(np.array([[0, 1]]), np.array([[False, True]]), 0.5)["OP"] == 1.0


# Errors


@pytest.mark.parametrize(
    ("scores", "targets", "message"),
    [
        (np.ones((3, 2)), np.ones((2, 3)), r"\(3, 2\) and targets \(2, 3\) differ in shape"),
        (np.ones(3), np.ones(3), r"scores must be \(n, K\).* got \(3,\) and \(3,\)"),
        (np.ones((1, 3, 2)), np.ones((3, 2)), r"scores must be \(n, K\)"),
        (np.ones((0, 2)), np.ones((0, 2)), "empty"),
        (np.ones((2, 0)), np.ones((2, 0)), "empty"),
        (np.array([[0, 1], [np.nan, np.nan]]), np.ones((2, 2)), r"NaN: 2 of 4 .* \(image, class\) \(1, 0\)"),
        (np.ones((2, 2)), np.array([[0, 1], [-1, 2]]), r"1 of 4 .* 2 at \(image, class\) \(1, 1\)"),
        (np.ones((1, 1)), np.array([[np.nan]]), "targets must be 1, 0 or -1"),
        (np.ones((1, 1)), np.array([[255]], dtype=np.uint8), "targets must be 1, 0 or -1"),
    ],
)
@pytest.mark.parametrize("metric", [average_precision, multilabel_metrics])
def test_wrong_inputs_are_named(metric, scores, targets, message):
    with pytest.raises(ConfigError, match=message):
        metric(scores, targets)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": math.nan}, "threshold is NaN"),
        ({"top_k": 0}, "from 1 to the number of classes, 2, got 0"),
        ({"top_k": 3}, "got 3"),
        ({"top_k": 1.5}, "got 1.5"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ConfigError, match=message):
        multilabel_metrics(np.ones((3, 2)), np.ones((3, 2)), **options)


def test_a_rule_for_ties_that_is_none_is_named():
    with pytest.raises(ConfigError, match="ties is 'first'; choose shared or file order"):
        average_precision(np.ones((2, 1)), np.ones((2, 1)), ties="first")


def test_docstring_examples_hold():
    outcome = doctest.testmod(mcar_lib.metrics)
    assert outcome.attempted == 5
    assert outcome.failed == 0
