"""The region module against the release's own outputs, against its rule in plain Python, and against its promises."""

import ast
import inspect
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mcar_lib import regions
from mcar_lib.errors import ConfigError
from mcar_lib.model import MCAR, Output
from mcar_lib.regions import (
    SELECTIONS,
    Selection,
    attention_maps,
    attentional_regions,
    class_marginals,
    crop_regions,
    locate_intervals,
    select_classes,
)
from mcar_lib.runs import RunConfig

GOLDEN = Path(__file__).parent / "golden"
LENGTHS = (64, 97, 224, 256, 448, 576)
CASES = range(5)
seeded = settings(derandomize=True, deadline=None)  # the same cases every time; a busy machine may be slow


# ---- the release's rule, in plain Python


class Localised(NamedTuple):
    """An interval, the segment it was widened from (None: nothing to localise), and the length test that set it."""

    start: int
    end: int
    segment: tuple[int, int] | None
    rule: int | None


def localise(marginal: list[float], tau: float) -> Localised:
    length = len(marginal)
    signs = [(value > tau) - (value < tau) for value in marginal]
    breaks = [i for i in range(length - 1) if abs(signs[i + 1] - signs[i]) == 2]
    if not breaks:
        return Localised(math.ceil(0.125 * length), math.ceil(0.875 * length), None, None)

    segments = [(0, breaks[0])] if breaks[0] > 0 else []
    segments += [(breaks[-1], length)]
    segments += list(itertools.pairwise(breaks))
    best = segments[0]
    for segment in segments[1:]:
        value, best_value = max(marginal[slice(*segment)]), max(marginal[slice(*best)])
        longer = segment[1] - segment[0] > best[1] - best[0]
        if value > best_value or (value == best_value and longer):
            best = segment

    (start, end), minimum, rule = best, math.ceil(0.125 * length), None
    if end - start <= minimum:
        pad = minimum - (end - start)
        half = math.ceil(pad / 2)
        if start > half and length - end > pad:
            start, end, rule = start - half + 1, end + half, 1
        if start < half:
            start, end, rule = 0, minimum, 2
        if length - end < half:
            start, end, rule = length - minimum + 1, length, 3
    return Localised(start, end, best, rule)


def locate(marginal: list[float], tau: float) -> tuple[int, int]:
    start, end = locate_intervals(torch.tensor([marginal], dtype=torch.float32), tau)[0].tolist()
    return start, end


# Multiples of 1/8 are exact in float32, meet tau often, and repeat: equalities, plateaus, equal maxima.
eighths = st.integers(0, 8).map(lambda number: number / 8)


@st.composite
def marginals(draw: st.DrawFn, shortest: int = 2, longest: int = 80) -> list[float]:
    """Runs of equal values: single peaks, plateaus, constants and everything between."""
    length = draw(st.integers(shortest, longest))
    longest_run = draw(st.sampled_from((1, 3, 8, longest)))
    values: list[float] = []
    while len(values) < length:
        values += [draw(eighths)] * draw(st.integers(1, longest_run))
    return values[:length]


taus = st.integers(1, 7).map(lambda number: number / 8)


@pytest.mark.parametrize("length", LENGTHS)
def test_intervals_of_the_release_exactly(length: int) -> None:
    golden = np.load(GOLDEN / "intervals.npz")
    found = locate_intervals(
        torch.from_numpy(golden[f"marginals_{length}"]), torch.from_numpy(golden[f"threshold_{length}"])
    )
    np.testing.assert_array_equal(found.numpy(), golden[f"interval_{length}"])


@settings(seeded, max_examples=300)
@given(marginals(), taus)
def test_intervals_follow_the_rule_of_the_release(marginal: list[float], tau: float) -> None:
    assert locate(marginal, tau) == localise(marginal, tau)[:2]


@settings(seeded, max_examples=50)
@given(st.integers(0, 10_000), st.sampled_from((2, 3, 7, 8, 9, 16, 17, 64, 97)), st.floats(0.0625, 0.9375, width=32))
def test_intervals_follow_the_rule_on_rough_marginals(seed: int, length: int, tau: float) -> None:
    rows = torch.rand(20, length, generator=torch.Generator().manual_seed(seed))
    rows[:, ::5] = tau  # exactly at the threshold here and there
    expected = [localise(row, tau)[:2] for row in rows.tolist()]
    assert [tuple(pair) for pair in locate_intervals(rows, tau).tolist()] == expected


@pytest.mark.parametrize(
    ("marginal", "interval"),
    [
        pytest.param([1.0] * 32, (4, 28), id="constant above"),
        pytest.param([0.25] * 32, (4, 28), id="constant below"),
        pytest.param([0.5] * 32, (4, 28), id="constant at tau"),
        pytest.param([0.0] * 16 + [0.5] + [1.0] * 15, (4, 28), id="a step through an exact equality is no breakpoint"),
        pytest.param([0.0] * 16 + [1.0] * 16, (15, 32), id="a run that begins at 16 gives a segment from 15"),
        pytest.param([1.0] * 8 + [0.0] * 12 + [1.0] * 12, (19, 32), id="equal maxima: the longer"),
        pytest.param([1.0] * 11 + [0.0] * 11 + [1.0] * 10, (21, 32), id="equal maxima, half-open ends decide"),
        pytest.param([1.0] * 12 + [0.0] * 10 + [1.0] * 10, (0, 11), id="equal lengths: the first segment first"),
        pytest.param([0.0] * 4 + ([1.0] * 6 + [0.0] * 4) * 2 + [0.75] * 8, (3, 9), id="equal lengths: the earlier"),
        pytest.param([math.nan] * 32, (4, 28), id="all NaN"),
    ],
)
def test_interval_of_a_marginal_with_a_name(marginal: list[float], interval: tuple[int, int]) -> None:
    assert locate(marginal, 0.5) == interval


# Network inputs are at least 32 wide. At 8 and below the least length is 1 and the first length test can empty it.
@settings(seeded, max_examples=150)
@given(marginals(shortest=9), taus)
def test_intervals_are_inside_and_not_empty(marginal: list[float], tau: float) -> None:
    start, end = locate(marginal, tau)
    assert 0 <= start < end <= len(marginal)


def test_a_marginal_of_eight_can_give_an_empty_interval_as_in_the_release() -> None:
    assert locate([0.875, 0.875, 1.0, 0.0, 0.75, 0.75, 0.75, 0.75], 0.5) == (3, 3)


# The release aims at m = ceil(L / 8). What each way to an interval really leaves:
# none localised: at least m. Longer than m: untouched. Test 1: m - 1 or m. Test 2: m. Test 3: m - 1.
# No test applies (the segment begins just at c, or ends between c and pad before the end): as short as it was.
@settings(seeded, max_examples=150)
@given(marginals(shortest=9), taus)
def test_least_length_of_an_interval(marginal: list[float], tau: float) -> None:
    start, end = locate(marginal, tau)
    _, _, segment, rule = localise(marginal, tau)
    length, minimum = len(marginal), math.ceil(0.125 * len(marginal))
    if segment is None:
        assert end - start >= minimum
    elif rule is not None:
        assert end - start in {1: (minimum - 1, minimum), 2: (minimum,), 3: (minimum - 1,)}[rule]
    elif end - start <= minimum:
        pad = minimum - (end - start)
        half = math.ceil(pad / 2)
        assert start == half or half <= length - end <= pad
    else:
        assert (start, end) == segment


def between(start: int, end: int, length: int) -> list[float]:
    """A marginal with breakpoints at start and end only, and its one maximum in the segment between them."""
    return [0.75] * start + [1.0] + [0.0] * (end - start) + [0.75] * (length - end - 1)


@pytest.mark.parametrize(
    ("segment", "interval"),
    [
        pytest.param((30, 31), (27, 35), id="test 1, odd pad: m"),
        pytest.param((30, 32), (28, 35), id="test 1, even pad: m - 1"),
        pytest.param((30, 38), (31, 38), id="test 1, no pad: m - 1"),
        pytest.param((2, 3), (0, 8), id="test 2: m"),
        pytest.param((5, 6), (0, 8), id="test 1, then test 2: m"),
        pytest.param((4, 5), (4, 5), id="begins at c: as it was"),
        pytest.param((56, 57), (56, 57), id="ends pad before the end: as it was"),
        pytest.param((60, 61), (57, 64), id="test 3: m - 1"),
    ],
)
def test_each_length_test_at_64(segment: tuple[int, int], interval: tuple[int, int]) -> None:
    marginal = between(*segment, length=64)
    assert (localise(marginal, 0.5)[:2], locate(marginal, 0.5)) == (interval, interval)


# ---- intervals of many rows


@settings(seeded, max_examples=50)
@given(st.integers(0, 10_000), st.integers(2, 70), taus)
def test_each_row_is_localised_on_its_own(seed: int, length: int, tau: float) -> None:
    rows = torch.rand(6, length, generator=torch.Generator().manual_seed(seed)).mul(8).round().div(8)
    one_by_one = torch.cat([locate_intervals(row[None], tau) for row in rows])
    assert torch.equal(locate_intervals(rows, tau), one_by_one)


@settings(seeded, max_examples=50)
@given(st.integers(0, 10_000), st.lists(taus, min_size=5, max_size=5))
def test_a_threshold_for_each_row_equals_one_number_for_each(seed: int, each: list[float]) -> None:
    rows = torch.rand(5, 64, generator=torch.Generator().manual_seed(seed))
    one_by_one = torch.cat([locate_intervals(row[None], tau) for row, tau in zip(rows, each, strict=True)])
    assert torch.equal(locate_intervals(rows, torch.tensor(each)), one_by_one)


def test_intervals_are_int64_pairs() -> None:
    found = locate_intervals(torch.rand(3, 32), 0.5)
    assert (found.dtype, tuple(found.shape)) == (torch.int64, (3, 2))


@pytest.mark.parametrize("shape", [(64,), (2, 3, 64), (2, 1)])
def test_marginals_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="L >= 2"):
        locate_intervals(torch.zeros(shape), 0.5)


# ---- marginals


def test_marginals_are_maxima_over_the_other_side() -> None:
    maps = torch.zeros(3, 4)
    maps[1, 2], maps[2, 0] = 1.0, 0.5
    px, py = class_marginals(maps)
    assert (px.tolist(), py.tolist()) == ([0.5, 0.0, 1.0, 0.0], [0.0, 1.0, 0.5])


def test_marginals_are_scaled_by_their_own_extremes() -> None:
    px, _ = class_marginals(torch.tensor([[0.25, 0.5, 0.75]]))
    assert px.tolist() == [0.0, 0.5, 1.0]


def test_a_constant_marginal_becomes_ones() -> None:
    px, _ = class_marginals(torch.full((5, 5), 0.25))
    assert px.tolist() == [1.0] * 5


def attention(seed: int, height: int = 6, width: int = 6) -> Tensor:
    """Maps (2, 3, 32h, 32w) as the module makes them."""
    logits = torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 3
    return attention_maps(logits, torch.arange(3).repeat(2, 1), (32 * height, 32 * width))


def axis_intervals(maps: Tensor) -> tuple[Tensor, Tensor]:
    """The x and the y intervals of maps, each (..., 2)."""
    px, py = class_marginals(maps)
    return locate_intervals(px.flatten(0, 1), 0.5), locate_intervals(py.flatten(0, 1), 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_a_map_upside_down_keeps_its_x_interval(seed: int) -> None:
    maps = attention(seed)
    assert torch.equal(axis_intervals(maps)[0], axis_intervals(maps.flip(-2))[0])


@pytest.mark.parametrize("seed", range(5))
def test_a_mirrored_map_keeps_its_y_interval(seed: int) -> None:
    maps = attention(seed)
    assert torch.equal(axis_intervals(maps)[1], axis_intervals(maps.flip(-1))[1])


@pytest.mark.parametrize("seed", range(5))
def test_a_transposed_map_swaps_x_and_y(seed: int) -> None:
    maps = attention(seed, height=4, width=7)
    x, y = axis_intervals(maps)
    swapped_x, swapped_y = axis_intervals(maps.transpose(-2, -1))
    assert torch.equal(torch.cat((x, y)), torch.cat((swapped_y, swapped_x)))


# ---- classes


SCORES = torch.tensor([[0.1, 0.9, 0.5, 0.9, 0.1], [0.3, 0.2, 0.1, 0.0, 0.4]])


@pytest.mark.parametrize(
    ("selection", "classes"),
    [("top", [[1, 3, 2], [4, 0, 1]]), ("bottom", [[0, 4, 2], [3, 2, 1]])],
)
def test_classes_are_the_extreme_ones_and_ties_go_to_the_lower_index(selection: str, classes: list[list[int]]) -> None:
    assert select_classes(SCORES, 3, selection).tolist() == classes


def test_random_classes_repeat_with_the_generator() -> None:
    once, again = (select_classes(SCORES, 3, "random", torch.Generator().manual_seed(4)) for _ in range(2))
    assert torch.equal(once, again)


def test_random_classes_change_from_call_to_call() -> None:
    generator, scores = torch.Generator().manual_seed(4), torch.zeros(8, 20)
    once, again = (select_classes(scores, 4, "random", generator) for _ in range(2))
    assert not torch.equal(once, again)


def test_random_classes_are_distinct() -> None:
    found = select_classes(torch.zeros(50, 6), 4, "random", torch.Generator().manual_seed(0))
    assert all(len(set(row)) == 4 for row in found.tolist())


def test_random_classes_do_not_depend_on_the_scores() -> None:
    found = [select_classes(scores, 3, "random", torch.Generator().manual_seed(1)) for scores in (SCORES, -SCORES)]
    assert torch.equal(*found)


@pytest.mark.parametrize("num_regions", [0, -1, 6])
def test_a_number_of_regions_outside_the_classes_is_refused(num_regions: int) -> None:
    with pytest.raises(ConfigError, match=r"num_regions is .* 1 \.\. 5"):
        select_classes(SCORES, num_regions)


def test_an_unknown_selection_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of top, bottom, random"):
        select_classes(SCORES, 2, "best")  # type: ignore[arg-type]


def test_there_is_one_list_of_selections() -> None:
    assert get_args(Selection) == SELECTIONS == ("top", "bottom", "random")
    assert RunConfig.model_fields["selection"].annotation == Selection


@pytest.mark.parametrize("selection", SELECTIONS)
def test_every_selection_can_be_chosen(selection: Selection) -> None:
    assert select_classes(SCORES, 2, selection).shape == (len(SCORES), 2)


# ---- the whole module


FORWARD_NAMES = (
    "image",
    "patch_weight",
    "patch_bias",
    "class_weight",
    "class_bias",
    "num_regions",
    "threshold",
    "pooling",
    "global_scores",
    "local_scores",
    "boxes_x1x2y1y2",
    "classes",
)


class Golden(NamedTuple):
    """One whole pass of the release: what went in and what came out, boxes as x1 y1 x2 y2."""

    images: Tensor
    patch_weight: Tensor
    patch_bias: Tensor
    class_weight: Tensor
    class_bias: Tensor
    num_regions: int
    threshold: float
    pooling: str
    global_scores: Tensor
    local_scores: Tensor
    boxes: Tensor
    classes: Tensor

    def features(self, images: Tensor) -> Tensor:
        return F.relu(F.conv2d(images, self.patch_weight, self.patch_bias, stride=32))

    def class_logits(self) -> Tensor:
        return F.conv2d(self.features(self.images), self.class_weight, self.class_bias)


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest) -> Golden:
    with np.load(GOLDEN / "forward.npz") as stored:
        values = {name: stored[f"case{request.param}_{name}"] for name in FORWARD_NAMES}
    tensors = [torch.from_numpy(value) if value.ndim else value.item() for value in values.values()]
    found = Golden(*tensors)
    return found._replace(boxes=found.boxes[..., [0, 2, 1, 3]])  # the file says x1 x2 y1 y2


class Patches(nn.Module):
    """The stub of a backbone that the golden passes were made with."""

    def __init__(self, golden: Golden) -> None:
        super().__init__()
        self.golden = golden

    def forward(self, images: Tensor) -> Tensor:
        return self.golden.features(images)


@pytest.fixture(scope="module")
def model(golden: Golden) -> MCAR:
    channels, num_classes = len(golden.patch_weight), len(golden.class_weight)
    pooling, num_regions, threshold = golden.pooling, golden.num_regions, golden.threshold
    made = MCAR(Patches(golden), channels, num_classes, pooling, num_regions, threshold)  # type: ignore[arg-type]
    made.convclass.load_state_dict({"weight": golden.class_weight, "bias": golden.class_bias})
    return made.eval()


@pytest.fixture(scope="module")
def output(model: MCAR, golden: Golden) -> Output:
    with torch.no_grad():
        return model(golden.images)


def test_model_chooses_the_classes_of_the_release(output: Output, golden: Golden) -> None:
    assert output.regions is not None
    assert torch.equal(output.regions.classes, golden.classes)


def test_model_finds_the_boxes_of_the_release(output: Output, golden: Golden) -> None:
    assert output.regions is not None
    assert torch.equal(output.regions.boxes, golden.boxes)


def test_model_gives_the_global_scores_of_the_release(output: Output, golden: Golden) -> None:
    torch.testing.assert_close(torch.sigmoid(output.global_logits), golden.global_scores, rtol=0, atol=1e-5)


def test_model_gives_the_local_scores_of_the_release(output: Output, golden: Golden) -> None:
    assert output.local_logits is not None
    torch.testing.assert_close(torch.sigmoid(output.local_logits), golden.local_scores, rtol=0, atol=1e-5)


def test_module_finds_the_boxes_of_the_release_from_its_scores(golden: Golden) -> None:
    size = (golden.images.shape[2], golden.images.shape[3])
    found = attentional_regions(golden.class_logits(), golden.global_scores, size, golden.num_regions, golden.threshold)
    assert torch.equal(found.boxes, golden.boxes)


def test_crops_of_the_release_boxes_give_its_local_scores(golden: Golden, model: MCAR) -> None:
    with torch.no_grad():
        logits = model.classify(model.pool(golden.features(crop_regions(golden.images, golden.boxes))))
    local = torch.sigmoid(logits).view(len(golden.images), golden.num_regions, -1).amax(dim=1)
    torch.testing.assert_close(local, golden.local_scores, rtol=0, atol=1e-5)


def module_input(seed: int = 0, batch: int = 3, num_classes: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, num_classes, 3, 3, generator=generator) * 3
    return logits, torch.sigmoid(logits.mean(dim=(2, 3)))


def test_images_of_a_batch_do_not_mix() -> None:
    logits, scores = module_input()
    together = attentional_regions(logits, scores, (96, 96)).boxes
    apart = [attentional_regions(logits[i : i + 1], scores[i : i + 1], (96, 96)).boxes for i in range(len(logits))]
    assert torch.equal(together, torch.cat(apart))


def test_regions_carry_the_global_scores_of_their_classes() -> None:
    logits, scores = module_input()
    found = attentional_regions(logits, scores, (96, 96), num_regions=3)
    assert torch.equal(found.scores, scores.sort(dim=1, descending=True).values[:, :3])


def test_boxes_are_x_then_y_of_a_wide_image() -> None:
    logits = torch.full((1, 1, 2, 4), -10.0)
    logits[0, 0, 0, 3] = 10.0  # the upper right corner
    boxes = attentional_regions(logits, torch.ones(1, 1), (64, 128), num_regions=1).boxes
    x1, y1, x2, y2 = boxes[0, 0].tolist()
    assert (x1 > 64, x2, y1, y2 < 64) == (True, 128, 0, True)


def test_maps_that_vanish_in_float32_still_give_the_default_box() -> None:
    boxes = attentional_regions(torch.full((1, 1, 2, 2), -1e4), torch.ones(1, 1), (64, 64), num_regions=1).boxes
    assert boxes.tolist() == [[[8, 8, 56, 56]]]


def test_only_the_maps_of_the_chosen_classes_are_upsampled(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []

    def note(maps: Tensor, **options: object) -> Tensor:
        shapes.append(tuple(maps.shape))
        return interpolate(maps, **options)

    interpolate: Callable[..., Tensor] = F.interpolate
    monkeypatch.setattr(F, "interpolate", note)
    attentional_regions(*module_input(batch=3, num_classes=7), (96, 96), num_regions=2)
    assert shapes == [(3, 2, 3, 3)]


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.5, 2.0, math.nan])
def test_a_threshold_outside_zero_to_one_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match="strictly between 0 and 1"):
        attentional_regions(*module_input(), (96, 96), threshold=threshold)


@pytest.mark.parametrize(
    ("logits", "scores"),
    [((2, 5, 3, 3), (2, 4)), ((2, 5, 3, 3), (1, 5)), ((5, 3, 3), (2, 5)), ((2, 5, 3, 3), (2, 5, 1))],
)
def test_logits_and_scores_that_do_not_fit_are_refused(logits: tuple[int, ...], scores: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        attentional_regions(torch.zeros(logits), torch.zeros(scores), (96, 96), num_regions=1)


# ---- crops


def random_boxes(batch: int, num_regions: int, height: int, width: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    boxes = np.empty((batch, num_regions, 4), dtype=np.int64)
    for axis, side in ((0, width), (1, height)):
        start = rng.integers(0, side, (batch, num_regions))
        boxes[..., axis] = start
        boxes[..., axis + 2] = rng.integers(start + 1, side + 1)
    return torch.from_numpy(boxes)


@pytest.fixture(scope="module", params=[(64, 64), (64, 96)], ids=["square", "wide"])
def crop_errors(request: pytest.FixtureRequest) -> Tensor:
    """Differences from cropping and resizing box after box."""
    height, width = request.param
    images = torch.randn(3, 3, height, width, generator=torch.Generator().manual_seed(0))
    boxes = random_boxes(3, 8, height, width)
    one_by_one = [
        F.interpolate(image[None, :, y1:y2, x1:x2], (height, width), mode="bilinear", align_corners=True)
        for image, own in zip(images, boxes.tolist(), strict=True)
        for x1, y1, x2, y2 in own
    ]
    return (crop_regions(images, boxes) - torch.cat(one_by_one)).abs()


def test_crops_are_nowhere_far_from_cropping_and_resizing(crop_errors: Tensor) -> None:
    assert crop_errors.max() < 1e-3


def test_crops_equal_cropping_and_resizing_on_average(crop_errors: Tensor) -> None:
    assert crop_errors.mean() < 1e-5


def test_the_whole_image_as_a_box_is_the_image() -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    boxes = torch.tensor([0, 0, 64, 64]).expand(2, 1, 4)
    torch.testing.assert_close(crop_regions(images, boxes), images, rtol=0, atol=1e-4)


def test_a_box_of_one_pixel_is_that_colour_everywhere() -> None:
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    crops = crop_regions(images, torch.tensor([[[5, 9, 6, 10]]]))
    torch.testing.assert_close(crops, images[:, :, 9:10, 5:6].expand_as(crops), rtol=0, atol=1e-4)


def crops_by_pairs(images: Tensor, boxes: Tensor) -> Tensor:
    """crop_regions as the committed runs were trained with it: a grid of pairs, a tall picture, two copies."""
    (batch, channels, height, width), num_regions = images.shape, boxes.shape[1]
    x1, y1, x2, y2 = boxes.to(torch.float32).unbind(-1)

    def points(start: Tensor, end: Tensor, length: int) -> Tensor:
        pixels = start[..., None] + torch.linspace(0, 1, length) * (end - 1 - start)[..., None]
        return pixels * (2 / (length - 1)) - 1

    x, y = points(x1, x2, width)[:, :, None, :], points(y1, y2, height)[:, :, :, None]
    grid = torch.stack((x.expand(-1, -1, height, -1), y.expand(-1, -1, -1, width)), dim=-1)
    tall = F.grid_sample(images, grid.flatten(1, 2), align_corners=True)
    crops = tall.view(batch, channels, num_regions, height, width).transpose(1, 2)
    return crops.reshape(batch * num_regions, channels, height, width)


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("num_regions", [1, 4])
def test_crops_are_those_of_the_committed_runs_bit_by_bit(
    batch: int, num_regions: int, memory_format: torch.memory_format
) -> None:
    images = torch.randn(batch, 3, 96, 64, generator=torch.Generator().manual_seed(batch))
    images = images.contiguous(memory_format=memory_format)
    boxes = random_boxes(batch, num_regions, 96, 64, seed=num_regions)
    crops = crop_regions(images, boxes)
    assert torch.equal(crops, crops_by_pairs(images, boxes))
    assert crops.is_contiguous(memory_format=memory_format)


def test_crops_carry_no_gradient() -> None:
    images = torch.rand(1, 3, 32, 32, requires_grad=True)
    assert not crop_regions(images, random_boxes(1, 2, 32, 32)).requires_grad


# ---- how it is written: nothing waits for the device, nothing runs class by class

TREE = ast.parse(inspect.getsource(regions))


@pytest.mark.parametrize(
    "kind", [ast.For, ast.While, ast.AsyncFor, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp]
)
def test_module_has_no_python_loop(kind: type[ast.AST]) -> None:
    assert [node.lineno for node in ast.walk(TREE) if isinstance(node, kind)] == []  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["item", "nonzero", "tolist", "cpu", "numpy", "masked_select", "unique"])
def test_module_reads_no_value_back_from_the_device(name: str) -> None:
    assert [node.lineno for node in ast.walk(TREE) if isinstance(node, ast.Attribute) and node.attr == name] == []
