"""Loading weights into a model by name, ours and those in the key layout of the paper's released code."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from mcar_lib.errors import CheckpointError, WeightsError
from mcar_lib.weights import read_state_dict

Model = TypeVar("Model", bound=nn.Module)

RELEASE_NAME = re.compile(
    r"(?P<dataset>voc2007|voc2012|coco2014)"
    r"-(?P<backbone>mobilenet[-_]?v2|resnet[-_]?50|resnet[-_]?101)"
    r"-(?P<pooling>avg|gap|max|gmp|gwp)"
    r"-(?P<image_size>\d+)-(?P<num_regions>\d+)-(?P<threshold>\d*\.?\d+)"
    r"(?:[._-]\D.*)?",  # .pth, .pth.tar, -best
    re.IGNORECASE,
)
NESTED_BLOCK = re.compile(r"features\.0\.\d+\.conv\.\d+\.\d+\.")
SPELLINGS = {"mobilenetv2": "mobilenet_v2", "gap": "avg", "gmp": "max"}
DATA_SETS_OF = {20: "voc2007 or voc2012", 80: "coco2014"}
"""Number of classes -> the published data sets that have as many."""


def release_settings(path: str | Path) -> dict[str, str | int | float]:
    """What the name of a released checkpoint says: dataset, backbone, pooling, image_size, num_regions, threshold.

    The name is <dataset>-<backbone>-<pooling>-<size>-<N>-<tau>, of the file (with any extension) or else of the folder
    that holds it: the release saves model_best.pth.tar in a folder of that name, and publishes
    coco2014-resnet101-gwp-448-4-0.5 (PAPER.md section 2). The file is not looked into. Returns {} where neither name
    is of that form.
    """
    path = Path(path)
    for name in (path.name, path.absolute().parent.name):
        found = RELEASE_NAME.fullmatch(name)
        if found:
            backbone = re.sub("[-_]", "", found["backbone"].lower())
            pooling = found["pooling"].lower()
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
    keys of ResNets are ours already; those of MobileNet-v2 are renamed. A "module." prefix of data parallelism is
    dropped.
    Raises CheckpointError naming the file, and both numbers of classes or the first keys that differ.
    """
    if isinstance(path_or_dict, Mapping):
        what, loaded = "release checkpoint", path_or_dict.get("state_dict", path_or_dict)
    else:
        try:
            what, loaded = str(path_or_dict), read_state_dict(Path(path_or_dict))
        except WeightsError as error:
            raise CheckpointError(str(error)) from error
    named = {key.removeprefix("module."): value for key, value in loaded.items()}
    if "features.18.0.weight" in model.state_dict():
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


def load_named(model: nn.Module, loaded: Mapping[str, Tensor], what: str) -> None:
    """Loads a state dict strictly; raises CheckpointError that names both numbers of classes, if only those differ,
    or else the first keys that differ and how. The model is then as it was."""
    own = model.state_dict()
    missing = [key for key in own if key not in loaded and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in loaded if key not in own]
    reshaped = [key for key in own if key in loaded and own[key].shape != loaded[key].shape]
    if reshaped == ["convclass.weight", "convclass.bias"] and not missing and not unexpected:
        raise CheckpointError(_other_classes(what, len(loaded["convclass.bias"]), len(own["convclass.bias"])))
    if missing or unexpected or reshaped:
        reasons = [f"lacks {', '.join(missing[:3])}"] if missing else []
        reasons += [f"has unknown {', '.join(unexpected[:3])}"] if unexpected else []
        reasons += [
            f"{key} is {tuple(loaded[key].shape)} where the model has {tuple(own[key].shape)}" for key in reshaped[:3]
        ]
        raise CheckpointError(
            f"{what} belongs to another architecture ({len(missing) + len(unexpected) + len(reshaped)} keys differ): "
            f"{'; '.join(reasons)}. Build the model with the backbone and number of classes of the checkpoint"
        )
    model.load_state_dict({key: loaded.get(key, value) for key, value in own.items()})


def _other_classes(what: str, found: int, wanted: int) -> str:
    of_wanted = f", as {DATA_SETS_OF[wanted]}" if wanted in DATA_SETS_OF else ""
    start = f"{what} is of {found} classes and the model here of {wanted}{of_wanted}"
    if found not in DATA_SETS_OF:
        return f"{start}; choose the data set that the checkpoint was trained on"
    example = DATA_SETS_OF[found].partition(" ")[0]
    return f"{start}; {found} classes is {DATA_SETS_OF[found]}: choose that data set, with --set dataset={example}"
