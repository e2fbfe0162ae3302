"""Loading weights into a model by name, ours and those in the key layout of the paper's released code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from mcar_lib.errors import CheckpointError, WeightsError
from mcar_lib.weights import read_state_dict

Model = TypeVar("Model", bound=nn.Module)


def load_release_checkpoint(path_or_dict: str | Path | Mapping[str, Any], model: Model) -> Model:
    """Loads weights in the key layout of the released checkpoints into a model, and returns it.

    path_or_dict: a file (read with weights_only) or a dict, either {'state_dict': ...} or the state dict itself. The
    keys of ResNets are ours already; MobileNet-v2 is split into features.0 (its blocks) and features.1 (its last
    convolution block). A "module." prefix of data parallelism is dropped.
    Raises CheckpointError naming the first keys that differ.
    """
    if isinstance(path_or_dict, Mapping):
        loaded: Mapping[str, Any] = path_or_dict.get("state_dict", path_or_dict)
    else:
        try:
            loaded = read_state_dict(Path(path_or_dict))
        except WeightsError as error:
            raise CheckpointError(str(error)) from error
    named = {key.removeprefix("module."): value for key, value in loaded.items()}
    load_named(model, {_own_key(key, model): value for key, value in named.items()}, "release checkpoint")
    return model


def _own_key(key: str, model: nn.Module) -> str:
    """A released key in our names. MobileNet-v2's features are flat here: block i is features.i, the last is 18."""
    parts = key.split(".")
    is_mobilenet = "features.18.0.weight" in model.state_dict()
    if not is_mobilenet or parts[0] != "features":
        return key
    block = parts[2] if parts[1] == "0" else "18"
    rest = parts[3:] if parts[1] == "0" else parts[2:]
    return ".".join(["features", block, *rest])


def load_named(model: nn.Module, loaded: Mapping[str, Tensor], what: str) -> None:
    """Loads a state dict strictly; raises CheckpointError that names the first keys that differ and how."""
    own = model.state_dict()
    missing = [key for key in own if key not in loaded and not key.endswith("num_batches_tracked")]
    unexpected = [key for key in loaded if key not in own]
    reshaped = [key for key in own if key in loaded and own[key].shape != loaded[key].shape]
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
