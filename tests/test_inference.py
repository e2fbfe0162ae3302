"""A loaded model is quick to import and to ask, and says what the model that was trained says."""

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
from mcar_lib.inference import folded
from mcar_lib.model import build_mcar
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


@pytest.mark.parametrize("kind", [Shared, Twice, Fixed])
@torch.no_grad()
def test_a_network_that_cannot_be_folded_stays_as_it_is(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    network, images = with_statistics(kind()), torch.randn(2, 3, 96, 96)
    assert torch.equal(folded(network)(images), network(images))


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
    plain = build_mcar(config["backbone"], 20, "none", num_regions=config["num_regions"], pooling=config["pooling"])
    plain.threshold = quick.model.threshold
    load_named(plain, read_state_dict(models_folder() / "voc-photos.safetensors"), "voc-photos")
    photos = ResizedImages(load_voc(real_voc2007(), "2007", "test").select(range(64)), quick.image_size)
    images = network_input(plain, photos.batch(range(64)))
    wanted, found = plain.eval()(images), quick.model(images)
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
