"""A loaded model is quick to import and to ask, and says what the model that was trained says."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from real_photos import real_voc2007
from torch import nn

from mcar_lib.backbones import build_backbone
from mcar_lib.data import load_voc
from mcar_lib.data.squares import ResizedImages
from mcar_lib.data.transforms import network_input
from mcar_lib.inference import folded, packed
from mcar_lib.model import MCAR, build_mcar
from mcar_lib.released import load_released, models_folder
from mcar_lib.weights import load_named, read_state_dict


def with_statistics(network: nn.Module) -> nn.Module:
    """The network in evaluation mode, its batch normalisations as if they had seen something."""
    for each in network.modules():
        if isinstance(each, nn.BatchNorm2d):
            nn.init.uniform_(each.running_var, 0.5, 2)
            nn.init.uniform_(each.running_mean, -0.5, 0.5)
            nn.init.uniform_(each.weight, 0.5, 1.5)
            nn.init.uniform_(each.bias, -0.5, 0.5)
    return network.eval()


def normalisations(network: nn.Module) -> int:
    return sum(isinstance(each, nn.BatchNorm2d) for each in network.modules())


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet50", "efficientnet_lite0"])
@torch.no_grad()
def test_a_folded_network_computes_the_same_without_batch_normalisation(backbone: str) -> None:
    torch.manual_seed(0)
    network = with_statistics(build_backbone(backbone, "none").features)
    before, images = normalisations(network), torch.randn(2, 3, 96, 96)
    quick = folded(network)
    assert normalisations(quick) == 0
    assert normalisations(network) == before > 0
    wanted = network(images)
    torch.testing.assert_close(quick(images), wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


class Shared(nn.Module):
    """A network whose convolution goes elsewhere too, around the batch normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.conv(x)
        return self.norm(made) + made


class Twice(Shared):
    """A network that goes through its convolution twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)) + self.conv(x)


class Fixed(nn.Sequential):
    """A network for images of 96 px."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(3 * 96 * 96, 2))


class Rectified(Shared):
    """A network whose convolution goes elsewhere too, around the ReLU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        made = self.conv(x)
        return self.norm(nn.functional.relu6(made) + made)


class OneForAll(nn.Module):
    """A network with one ReLU for a convolution and for a sum, as the blocks of ResNet-18 have."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.relu = nn.Conv2d(3, 3, 3, padding=1), nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.relu(self.conv(x)) + x)


class Mirrored(nn.Sequential):
    """A network whose convolutions pad in other ways than by a number of zeros."""

    def __init__(self) -> None:
        mirrored = nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")
        super().__init__(mirrored, nn.ReLU(), nn.Conv2d(4, 4, 3, padding="same"), nn.ReLU6())


KINDS = (Shared, Twice, Fixed, Rectified, OneForAll, Mirrored)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_network_that_cannot_be_folded_stays_as_it_is(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network, images = with_statistics(kind()), torch.randn(2, 3, 96, 96)
    assert torch.equal(folded(network)(images), network(images))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_network_whose_activations_cannot_be_packed_computes_the_same(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network, images = with_statistics(kind()), torch.randn(2, 3, 96, 96)
    torch.testing.assert_close(packed(network)(images), network(images), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN")
@pytest.mark.parametrize(("backbone", "left"), [("mobilenet_v2", 0), ("resnet50", 0), ("efficientnet_lite0", 5)])
@torch.no_grad()
def test_a_packed_network_computes_the_same_for_images_of_any_size_and_number(backbone: str, left: int) -> None:
    torch.manual_seed(0)
    network = with_statistics(build_backbone(backbone, "none").features).to(memory_format=torch.channels_last)
    quick = packed(folded(network))
    # What is left are timm's convolutions that pad by the size of the image.
    assert sum(isinstance(each, nn.Conv2d) for each in quick.modules()) == left
    for shape in ((1, 3, 96, 96), (3, 3, 96, 96), (2, 3, 64, 128), (1, 3, 96, 96)):
        images = torch.randn(shape).contiguous(memory_format=torch.channels_last)
        wanted = network(images)
        torch.testing.assert_close(quick(images), wanted, rtol=0, atol=1e-4 * wanted.abs().max().item())


def test_a_network_stays_as_it_is_where_torch_lacks_an_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_backbone("mobilenet_v2", "none").features
    monkeypatch.delattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    assert packed(network) is network


def loaded() -> MCAR:
    return load_released("voc-photos").model


def plain() -> MCAR:
    """The model that was handed on, by its own features alone."""
    model = loaded()
    model.local_features = None
    return model


IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_a_loaded_model_can_be_trained_and_then_says_what_it_has_learned() -> None:
    model = loaded()
    with torch.no_grad():
        before = model(IMAGES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()(IMAGES).local_logits.sum().backward()
    optimizer.step()
    other = plain()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        found, wanted = model.eval()(IMAGES), other(IMAGES)
    assert torch.equal(found.local_logits, wanted.local_logits)
    assert not torch.equal(found.local_logits, before.local_logits)


def test_a_loaded_model_gives_gradients() -> None:
    model, other = loaded(), plain()
    for each in (model, other):
        each(IMAGES).local_logits.sum().backward()
    one, two = (each.features[0][0].weight.grad for each in (model, other))
    assert one is not None
    assert one.abs().max() > 0
    assert torch.equal(one, two)


@torch.no_grad()
def test_a_loaded_model_that_is_given_other_weights_says_what_they_say() -> None:
    model, other = loaded(), plain()
    weights = {name: value / 2 for name, value in other.state_dict().items()}
    for each in (model, other):
        each.load_state_dict(weights)
    assert torch.equal(model(IMAGES).scores, other(IMAGES).scores)


def test_a_loaded_model_has_the_weights_that_a_model_has() -> None:
    config = load_released("voc-photos").about["config"]
    assert loaded().state_dict().keys() == build_mcar(config["backbone"], 20, "none").state_dict().keys()


@pytest.mark.parametrize("way", ["copied", "pickled"])
@torch.no_grad()
def test_a_loaded_model_that_was_asked_can_be_copied_and_pickled(way: str) -> None:
    released = load_released("voc-photos")
    wanted = released.model(IMAGES).scores
    again = copy.deepcopy(released) if way == "copied" else pickle.loads(pickle.dumps(released))
    assert again.model.local_features is not None
    again.model.features[0][0].weight.zero_()
    assert torch.equal(released.model(IMAGES).scores, wanted)
    assert not torch.equal(again.model(IMAGES).scores, wanted)


@torch.no_grad()
def test_a_loaded_model_stays_quick_until_its_weights_move() -> None:
    released = load_released("voc-photos").on("cpu")
    released.model(IMAGES)
    assert released.model.local_features is not None
    assert released.model.double().local_features is None


def test_a_network_in_training_keeps_its_batch_normalisation() -> None:
    network = build_backbone("mobilenet_v2", "none").features.train()
    folded(network)
    assert network.training
    assert normalisations(network) == 52


@pytest.mark.photos
@torch.no_grad()
def test_a_loaded_model_finds_the_regions_that_the_trained_one_finds() -> None:
    quick = load_released("voc-photos")
    config = quick.about["config"]
    trained = build_mcar(config["backbone"], 20, "none", num_regions=config["num_regions"], pooling=config["pooling"])
    trained.threshold = quick.model.threshold
    load_named(trained, read_state_dict(models_folder() / "voc-photos.safetensors"), "voc-photos")
    photos = ResizedImages(load_voc(real_voc2007(), "2007", "test").select(range(128)), quick.image_size)
    for first in range(0, len(photos), 32):
        images = network_input(trained, photos.batch(range(first, first + 32)))
        wanted, found = trained.eval()(images), quick.model(images)
        assert torch.equal(found.regions.boxes, wanted.regions.boxes)
        torch.testing.assert_close(found.scores, wanted.scores, rtol=0, atol=1e-5)


@pytest.mark.parametrize("module", ["torch._dynamo", "accelerate", "pandas", "sympy"])
def test_a_prediction_does_without(module: str) -> None:
    code = (
        "import sys, numpy, mcar_lib\n"
        "mcar_lib.load('voc-photos')(numpy.zeros((40, 50, 3), 'uint8'))\n"
        f"assert {module!r} not in sys.modules, 'imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_what_torchvision_wants_of_the_compiler_is_there_when_it_is_called() -> None:
    code = (
        "import mcar_lib.lean_torchvision, sys, torch, torchvision\n"
        "assert 'torch._dynamo.utils' not in sys.modules\n"
        "kept = torchvision.ops.roi_align.__globals__['is_compile_supported']('cpu')\n"
        "import torch._dynamo.utils\n"
        "assert kept == torch._dynamo.utils.is_compile_supported('cpu')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
