"""A cheaper look at the regions: what the model computes, what the study simulates, and what is chosen on val."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from mcar_lib import cheaper
from mcar_lib.cheaper import (
    ALL,
    DEFAULT,
    FLOOR,
    SHARE,
    SIZE,
    Way,
    choose_ways,
    look_at_all,
    looks_of,
    measure_ways,
    together,
    val_record,
    way_differences,
    ways_of,
)
from mcar_lib.cli import app
from mcar_lib.data.squares import ResizedImages
from mcar_lib.errors import ConfigError, NotInProfileError
from mcar_lib.model import EVERYTHING, MCAR, Look, Output
from mcar_lib.regions import crop_regions
from mcar_lib.released import load_released
from mcar_lib.runs import RunConfig, Runs
from mcar_lib.runs.comparisons import ONE_SEED
from mcar_lib.runs.config import Cheaper, Tuning
from mcar_lib.training import network_input

VALUES = Cheaper(floors=(0.1, 0.5), shares=(0.7, 0.4), local_sizes=(32,))
SCORES = torch.tensor([[0.9, 0.5, 0.1], [0.2, 0.1, 0.05], [0.6, 0.6, 0.6]])


def seen(model: MCAR, squares: ResizedImages, look: Look, count: int = 8) -> Output:
    """What a model says of the first squares with a look."""
    images = network_input(model, torch.stack([squares[index] for index in range(count)]))
    model.look = look
    with torch.no_grad():
        found: Output = model.eval()(images)
    return found


@pytest.fixture
def model(tiny_model: Callable[..., MCAR]) -> MCAR:
    return tiny_model(num_regions=3)


@pytest.fixture
def test_squares(scene_squares: tuple[ResizedImages, ResizedImages]) -> ResizedImages:
    return scene_squares[1]


# ---- which regions


def test_a_floor_leaves_out_what_scores_below_it_maybe_all() -> None:
    assert Look(floor=0.5).chosen(SCORES).tolist() == [[True, True, False], [False] * 3, [True] * 3]


@pytest.mark.parametrize(
    ("share", "counts"), [(1.0, [3, 3, 3]), (0.95, [3, 3, 3]), (0.9, [2, 3, 3]), (0.5, [1, 1, 2]), (0.01, [1, 1, 1])]
)
def test_a_share_takes_the_fewest_first_regions_that_make_it_up(share: float, counts: list[int]) -> None:
    chosen = Look(share=share).chosen(SCORES)
    assert chosen.sum(dim=1).tolist() == counts
    assert (chosen.long().diff(dim=1) <= 0).all()


def test_a_share_of_nothing_takes_the_first_region() -> None:
    assert Look(share=0.9).chosen(torch.zeros(1, 3)).tolist() == [[True, False, False]]


@pytest.mark.parametrize("values", [{"floor": -0.1}, {"floor": 1.0}, {"floor": float("nan")}, {"share": 0.0}])
@pytest.mark.parametrize("more", [{}, {"local_size": 33}])
def test_values_out_of_range_are_refused(values: dict[str, float], more: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="must"):
        Look(**values, **more)  # type: ignore[arg-type]


def test_a_profile_refuses_values_that_are_no_look() -> None:
    with pytest.raises(ValidationError, match="multiple of 32"):
        Cheaper(floors=(0.1,), shares=(0.9,), local_sizes=(33,))


# ---- what the model computes


def test_crops_of_a_lower_resolution_are_sampled_from_the_same_boxes() -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[[0, 0, 64, 64]], [[10, 4, 41, 35]]])  # sides of which every second pixel is one of 32
    crops = crop_regions(images, boxes, 32)
    assert crops.shape == (2, 3, 32, 32)
    corners = crops[1][:, [0, 0, -1, -1], [0, -1, 0, -1]]
    torch.testing.assert_close(corners, images[1][:, [4, 4, 34, 34], [10, 40, 10, 40]], rtol=0, atol=1e-4)


def test_the_default_look_is_the_pass_over_all_crops(model: MCAR, test_squares: ResizedImages) -> None:
    found = seen(model, test_squares, EVERYTHING)
    assert found.local_logits is not None and found.regions is not None  # noqa: PT018
    images = network_input(model, torch.stack([test_squares[index] for index in range(8)]))
    with torch.no_grad():
        assert torch.equal(found.local_logits, model.pass_over_crops(images, found.regions.boxes))


def test_where_no_region_is_looked_at_the_prediction_is_the_global_streams(
    model: MCAR, test_squares: ResizedImages
) -> None:
    found = seen(model, test_squares, Look(floor=0.999))
    assert found.local_logits is not None
    assert torch.isneginf(found.local_logits).all()
    assert torch.equal(found.scores, torch.sigmoid(found.global_logits))


def test_training_looks_at_all_regions(model: MCAR, test_squares: ResizedImages) -> None:
    model.look = Look(floor=0.999)
    images = network_input(model, torch.stack([test_squares[index] for index in range(4)]))
    found = model.train()(images)
    assert torch.isfinite(found.local_logits).all()


def test_a_local_size_above_that_of_the_input_is_refused(model: MCAR, test_squares: ResizedImages) -> None:
    with pytest.raises(ConfigError, match="must not be above"):
        seen(model, test_squares, Look(local_size=1024))


def test_only_chosen_crops_are_computed(model: MCAR, test_squares: ResizedImages) -> None:
    crops: list[int] = []
    model.features.register_forward_hook(lambda _module, inputs, _output: crops.append(len(inputs[0])))
    found = seen(model, test_squares, Look(share=0.5))
    assert found.regions is not None
    chosen = model.look.chosen(found.regions.scores)
    assert crops == [8, int(chosen.sum())]
    assert 8 <= crops[1] < 24


def ways(model: MCAR, squares: ResizedImages) -> list[Look]:
    """Looks of each kind that leave out some regions of these squares, and not all."""
    scores = look_at_all(model, squares, [squares.size]).scores
    middle = scores.median().item()
    return [Look(floor=middle), Look(share=0.6), Look(local_size=32), Look(middle, 0.6, 32)]


@pytest.mark.parametrize("number", range(4))
def test_what_is_simulated_is_what_the_model_predicts(number: int, model: MCAR, test_squares: ResizedImages) -> None:
    look = ways(model.eval(), test_squares)[number]
    looks = look_at_all(model, test_squares, [test_squares.size, 32])
    fused, chosen = looks.through(Way("some", 0, look), test_squares.size)
    found = seen(model, test_squares, look, len(test_squares))
    assert found.regions is not None
    torch.testing.assert_close(torch.sigmoid(fused), found.scores, rtol=0, atol=1e-5)
    assert torch.equal(chosen, look.chosen(found.regions.scores))
    assert 0 < chosen.sum() <= chosen.numel()


# ---- the study


@pytest.fixture
def study(runs: Runs) -> Runs:
    runs.profile = runs.profile.model_copy(update={"cheaper": VALUES})
    return runs


def test_a_profile_without_values_says_so(runs: Runs) -> None:
    with pytest.raises(NotInProfileError, match="cheaper"):
        runs.profile.cheaper_values()


def test_the_record_is_made_once_and_counts_what_is_computed(
    study: Runs, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = ways_of(VALUES, tiny_config)
    record = measure_ways(study, tiny_config, tried)
    of_all, of_one = record["ways"][:2]
    run = study.run(tiny_config)
    assert (of_all["way"], of_one["way"]) == (ALL, "N")
    assert of_all["mAP"] == pytest.approx(run.map(), abs=1e-6)
    assert of_all["macs_per_image"] == run.content["cost"]["macs_per_image"]
    assert (of_all["regions"], of_one["regions"]) == (2, 1)
    monkeypatch.delattr(cheaper, "average_precision")
    assert repr(measure_ways(study, tiny_config, tried)) == repr(record)


def test_macs_are_those_that_torch_counts_of_the_model(study: Runs, tiny_config: RunConfig) -> None:
    way = Way(SIZE, 32, Look(local_size=32))
    (row,) = measure_ways(study, tiny_config, [way])["ways"]
    mcar = study.trained_model(tiny_config)
    mcar.look = way.look
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        mcar(torch.zeros(1, 3, tiny_config.image_size, tiny_config.image_size))
    assert row["macs_per_image"] == counter.get_total_flops() // 2


def test_passes_are_kept_and_a_damaged_file_is_made_again(
    study: Runs, tiny_config: RunConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    first = looks_of(study, tiny_config)
    (path,) = (study.artifacts / "looks").glob("*.npz")
    written = path.stat().st_mtime_ns
    assert torch.equal(looks_of(study, tiny_config).scores, first.scores)
    assert path.stat().st_mtime_ns == written
    path.write_bytes(path.read_bytes()[:-40])
    assert torch.equal(looks_of(study, tiny_config).global_logits, first.global_logits)
    assert "made again" in "".join(capsys.readouterr())


def val(**maps: float) -> dict[str, object]:
    rows = [("all regions", None, 0.8, 5), ("floor", 0.1, maps["low"], 4), ("floor", 0.5, maps["high"], 2)]
    rows += [("share", 0.9, maps["share"], 3)]
    names = ("way", "value", "mAP", "macs_per_image")
    return {"ways": [dict(zip(names, row, strict=True)) for row in rows]}


TRIED = [DEFAULT, Way(FLOOR, 0.1, Look(0.1)), Way(FLOOR, 0.5, Look(0.5)), Way(SHARE, 0.9, Look(share=0.9))]


def test_of_each_way_the_cheapest_value_within_half_a_point_is_chosen() -> None:
    assert choose_ways(TRIED, val(low=0.799, high=0.7951, share=0.7951)) == [TRIED[2], TRIED[3]]
    assert choose_ways(TRIED, val(low=0.799, high=0.794, share=0.794)) == [TRIED[1]]
    assert choose_ways(TRIED, None) == [TRIED[1], TRIED[3]]


def test_what_is_chosen_goes_into_one_look() -> None:
    assert together([TRIED[2], TRIED[3], Way("N", 1, num_regions=1)]).look == Look(0.5, 0.9)


def test_the_tuning_run_chooses(study: Runs, tiny_config: RunConfig) -> None:
    tried = ways_of(VALUES, tiny_config)
    assert val_record(study, tiny_config, tried) is None
    tuning = Tuning(rates=(0.02, 0.05), seed=100, widenings=0)
    study.profile = study.profile.model_copy(update={"tuning": tuning})
    record = val_record(study, tiny_config, tried)
    assert record is not None
    assert "-val-" in record["label"]


def test_differences_are_paired_and_zero_where_nothing_is_left_out(study: Runs, tiny_config: RunConfig) -> None:
    configs = [tiny_config, tiny_config.vary(seed=1)]
    same, less = way_differences(study, configs, [Way(FLOOR, 0.0), Way("N", 1, num_regions=1)])
    assert (same["difference"], same["low"], same["high"], same["seeds"]) == (0, 0, 0, "2 pairs")
    maps = [
        [row["mAP"] for row in measure_ways(study, each, [DEFAULT, Way("N", 1, num_regions=1)])["ways"]]
        for each in configs
    ]
    expected = 100 * sum(one - both for both, one in maps) / 2
    assert less["difference"] == pytest.approx(expected, abs=1e-4)
    assert way_differences(study, configs[:1], [Way("N", 1, num_regions=1)])[0]["finding"] == ONE_SEED


# ---- the command


def test_predict_takes_a_cheaper_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mcar_lib.data.samples import sample_photos

    looked: list[Look] = []
    forward = MCAR.look_at

    def look_at(self: MCAR, images: Tensor, regions: object) -> Tensor:
        looked.append(self.look)
        return forward(self, images, regions)  # type: ignore[arg-type]

    monkeypatch.setattr(MCAR, "look_at", look_at)
    photo = str(next(iter(sample_photos().values())))
    found = CliRunner().invoke(app, ["predict", photo, "--floor", "0.01", "--share", "0.9", "--local-size", "160"])
    assert (found.exit_code, looked) == (0, [Look(0.01, 0.9, 160)])
    refused = CliRunner().invoke(app, ["predict", photo, "--share", "0"])
    assert refused.exit_code != 0
    assert "share is 0" in refused.output


def test_a_prediction_tells_the_boxes_that_were_looked_at() -> None:
    from mcar_lib.data.samples import sample_photos

    photo, released = next(iter(sample_photos().values())), load_released("voc-photos")
    everything = released(photo).regions
    released.look_so(Look(floor=0.99))
    less = released(photo)
    assert 0 < len(less.regions) < len(everything) == released.model.num_regions
    assert less.regions == {name: box for name, box in everything.items() if less.scores[name] >= 0.99}
    released.look_so(Look(share=0.01))
    assert len(released(photo).regions) == 1


def test_the_look_is_no_weight(model: MCAR) -> None:
    before = set(model.state_dict())
    model.look = Look(0.5)
    assert set(model.state_dict()) == before
