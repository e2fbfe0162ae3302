"""Configurations and profiles: what is refused, with which words, and what the shipped profiles vary."""

from pathlib import Path

import pytest

import mcar_lib.profiles
from mcar_lib.errors import ConfigError
from mcar_lib.model import POOLINGS
from mcar_lib.regions import SELECTIONS
from mcar_lib.runs import BASELINE, METHOD, Profile, load_profile, make_config

PROFILES = sorted(path.stem for path in Path(mcar_lib.profiles.__file__).parent.glob("*.toml"))
AXES = ["pooling", "image_size", "backbone", "num_regions", "selection", "threshold"]

# ---- configurations


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"topN": 4}, "topN: no such key; did you mean num_regions\\? There are epochs, .*scored_on$"),
        ({"epochs": "6"}, "epochs: give a whole number, not"),
        ({"epochs": True}, "epochs: give a whole number, not"),
        ({"epochs": 6.5}, "epochs: give a whole number, not"),
        ({"epochs": 0}, "epochs: .* greater than or equal to 1"),
        ({"flip": 1}, "flip: give true or false, not 1"),
        ({"learning_rate": "fast"}, "learning_rate: give a number, not .fast"),
        ({"learning_rate": 0}, "learning_rate: .* greater than 0"),
        ({"precision": "fp8"}, "precision: .*'fp32', 'bf16' or 'fp16'"),
        ({"milestones": [50, 30]}, "milestones must ascend"),
        ({"image_size": "448"}, "image_size: give a whole number, not"),
        ({"image_size": 100}, "image_size: .*image size 100: each side must be a positive multiple of 32"),
        ({"image_size": 0}, "image_size: .* positive multiple of 32"),
        ({"num_regions": 0}, "num_regions: .* greater than or equal to 1"),
        ({"threshold": 0.0}, "threshold: .*threshold .tau. is 0.0"),
        ({"threshold": 1.0}, "threshold: .*threshold .tau. is 1.0"),
        ({"pooling": "sum"}, "pooling: .*'avg', 'max' or 'gwp'"),
        ({"selection": "best"}, "selection: .*'top', 'bottom' or 'random'"),
        ({"backbone": "resnet5"}, "backbone: .*unknown backbone 'resnet5'; choose one of mobilenet_v2"),
        ({"dataset": "imagenet"}, "dataset: .*unknown data set; choose one of scenes, voc2007"),
        ({"seed": -1}, "seed: .* greater than or equal to 0"),
        (
            {"data_options": {"side": 1.5}},
            "data_options.side: give a whole number or a text or a list, as in .*, not 1.5$",
        ),
        ({"int": 1}, "int: no such key; "),
        ({"milestones": 30}, "milestones: give a list, as in .*, not 30"),
        ({"lr": 0.1}, "lr: no such key; did you mean learning_rate\\? There are epochs, "),
        ({"tau": 0.1}, "tau: no such key; did you mean threshold\\? "),
        ({"size": 96}, "size: no such key; did you mean .*image_size\\? "),
        ({"colour": "red"}, "colour: no such key; there are epochs"),
        ({"epochs": Path("six")}, "run configuration: .*not JSON serializable"),
    ],
)
def test_an_impossible_value_is_refused_with_its_key(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config(values)


def test_all_impossible_values_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"epochs: .*; .*image_size: .*; .*colour: "):
        make_config({"epochs": 0, "image_size": 33, "colour": "red"})


def test_a_configuration_is_the_recipe_of_the_release_by_default() -> None:
    config = make_config({})
    found = (config.epochs, config.batch_size, config.learning_rate, config.milestones, config.num_regions)
    assert found == (60, 16, 0.01, (30, 50), 4)


def test_a_varied_configuration_is_checked_like_any_other() -> None:
    with pytest.raises(ConfigError, match="num_regions"):
        make_config({}).vary(num_regions=0)


def test_a_varied_configuration_differs_only_there() -> None:
    base = make_config({"epochs": 7, "milestones": [2, 5]})
    assert base.vary(seed=3).vary(seed=0) == base


def test_labels_tell_runs_apart() -> None:
    base = make_config({"backbone": "timm:resnet18"})
    changes: list[dict[str, object]] = [
        {},
        {"seed": 1},
        {"local_stream": False},
        {"num_regions": 2},
        {"threshold": 0.3},
        {"selection": "bottom"},
        {"pooling": "gwp"},
        {"image_size": 224},
    ]
    assert len({base.vary(**change).label for change in changes}) == len(changes)


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:org/model.tag"])
def test_labels_can_be_file_names(name: str) -> None:
    assert not set(make_config({"backbone": name}).label) & set("/:\\ ")


def test_a_run_is_of_one_of_two_models() -> None:
    assert [make_config({"local_stream": on}).model for on in (False, True)] == [BASELINE, METHOD]


# ---- profiles


@pytest.mark.parametrize("name", PROFILES)
def test_a_shipped_profile_loads_under_its_own_name(name: str) -> None:
    assert load_profile(name).name == name


def test_shipped_profiles() -> None:
    assert PROFILES == ["mini", "own", "paper", "photos", "photos-coco", "smoke"]


def test_an_unknown_profile_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"'maxi': no such profile; choose one of mini, own, paper, photos, photos-coco, smoke, or"
    ):
        load_profile("maxi")


GOOD_PROFILE = 'name = "own"\ntitle = "own"\nseeds = [0]\nbootstrap_resamples = 10\n[run]\nepochs = 1\n'


def test_a_profile_of_one_s_own_loads(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(GOOD_PROFILE)
    assert load_profile(str(tmp_path / "own.toml")).run.epochs == 1


@pytest.mark.parametrize(
    ("wrong", "right", "message"),
    [
        ("seeds = [0", "seeds = [0]", "own.toml: expected valid TOML"),
        (
            "sedes = [0]",
            "seeds = [0]",
            "own.toml: seeds: this key is missing; sedes: no such key; did you mean seeds",
        ),
        ('seeds = ["0"]', "seeds = [0]", "own.toml: seeds.0: give a whole number, not"),
        ('epochs = "1"', "epochs = 1", "own.toml: run.epochs: give a whole number, not"),
        ("epochs = true", "epochs = 1", "own.toml: run.epochs: give a whole number, not"),
        ("epoch = 1", "epochs = 1", "own.toml: run.epoch: no such key; did you mean epochs\\? There are epochs, "),
        ("image_size = 100", "epochs = 1", "own.toml: run.image_size: .* multiple of 32"),
        ("epochs = 2007-01-01", "epochs = 1", "own.toml: .*not JSON serializable"),
    ],
)
def test_a_wrong_profile_is_refused_with_file_and_key(tmp_path: Path, wrong: str, right: str, message: str) -> None:
    (tmp_path / "own.toml").write_text(GOOD_PROFILE.replace(right, wrong))
    with pytest.raises(ConfigError, match=message):
        load_profile(str(tmp_path / "own.toml"))


def test_a_profile_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_bytes(GOOD_PROFILE.encode("utf-16"))
    with pytest.raises(ConfigError, match=r"own\.toml: expected valid TOML"):
        load_profile(str(tmp_path / "own.toml"))


def test_a_profile_without_an_axis_says_which_it_has(tiny_profile: Profile) -> None:
    with pytest.raises(ConfigError, match=r"profile tiny has no \[ablations\] for pooling; it has none"):
        tiny_profile.base("pooling")


@pytest.mark.parametrize("name", ["smoke", "photos", "paper"])
def test_a_shipped_profile_has_every_axis(name: str) -> None:
    assert set(load_profile(name).ablations) == set(AXES)


@pytest.mark.parametrize("name", ["photos", "paper"])
def test_a_profile_varies_what_the_paper_varies(name: str) -> None:
    values = {axis: set(load_profile(name).ablations[axis].values) for axis in AXES}
    assert values["pooling"] == set(POOLINGS)
    assert len(values["image_size"]) >= 3
    assert len(values["backbone"]) == 3
    assert values["num_regions"] == {1, 2, 4, 6, 8}
    assert values["selection"] == set(SELECTIONS)
    assert values["threshold"] == {0.3, 0.4, 0.5, 0.6, 0.7}


def test_the_paper_profile_has_the_paper_s_backbones() -> None:
    assert set(load_profile("paper").ablations["backbone"].values) == {"mobilenet_v2", "resnet50", "resnet101"}


def test_axes_share_the_runs_they_can_share() -> None:
    profile = load_profile("photos")
    shared = {axis: profile.base(axis).model_dump_json() for axis in profile.ablations}
    assert len(set(shared.values())) == 2
    assert shared["image_size"] == shared["threshold"] == profile.run.model_dump_json()


def test_an_axis_changes_the_run_to_stay_in_its_budget() -> None:
    profile = load_profile("photos")
    assert (profile.run.image_size, profile.base("pooling").image_size) == (224, 160)


AXIS = "[ablations.num_regions]\nvalues = [4, {value}]\n{change}"


@pytest.mark.parametrize(
    ("value", "change", "message"),
    [
        ("0", "", r"ablations\.num_regions: .*num_regions: .* greater than or equal to 1"),
        ("2", "change = { epoch = 1 }", r"ablations\.num_regions: .*epoch: no such key; did you mean epochs\?"),
        ("2", "change = { num_regions = 3 }", "ablations.num_regions: 3, the run's own value, is not among them"),
        ("2", "seeds = []", r"ablations\.num_regions\.seeds: .* at least 1 item"),
    ],
    ids=["impossible value", "unknown key", "own value missing", "no seed"],
)
def test_an_axis_that_cannot_be_run_is_refused(tmp_path: Path, value: str, change: str, message: str) -> None:
    (tmp_path / "own.toml").write_text(GOOD_PROFILE + AXIS.format(value=value, change=change))
    with pytest.raises(ConfigError, match=message):
        load_profile(str(tmp_path / "own.toml"))


def test_an_unknown_axis_is_refused(tmp_path: Path) -> None:
    (tmp_path / "own.toml").write_text(GOOD_PROFILE + "[ablations.jitter]\nvalues = [0.3]\n")
    with pytest.raises(ConfigError, match=r"ablations\.jitter"):
        load_profile(str(tmp_path / "own.toml"))
