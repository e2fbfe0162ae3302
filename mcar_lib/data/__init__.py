"""Data sets by name: each gives (image uint8 (3, H, W), target int8 (K,), image id)."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mcar_lib.data.coco import load_coco
from mcar_lib.data.image_set import Boxes, ImageSet, read_image
from mcar_lib.data.own import FORMATS, load_own
from mcar_lib.data.preparation import Problems, prepare
from mcar_lib.data.table import load_table
from mcar_lib.data.voc import load_voc
from mcar_lib.errors import ConfigError, DataError
from mcar_lib.files import OTHER_ARTIFACTS

__all__ = [
    "DATA_SETS",
    "Boxes",
    "ImageSet",
    "Problems",
    "load_coco",
    "load_image_set",
    "load_table",
    "load_voc",
    "prepare",
    "read_image",
    "scenes_folder",
]

SPLITS = ("train", "test")
"""The published protocol: train on trainval (VOC) or train2014 (COCO), score test or val2014."""
ScoredOn = Literal["test", "val"]


def load_image_set(
    name: str, split: str, root: Path | str, scored_on: ScoredOn = "test", **options: object
) -> ImageSet:
    """Load the split "train" or "test" of a data set of DATA_SETS.

    root: where the data is; for "scenes" the folder in which scenes are written if they are not there yet.
    scored_on: "val" trains on the official train list and scores the val list, so that nothing is chosen on the test
    images.
    options: scenes: num_train, num_test, side, seed. table: csv, image_root, classes (a list). own: see read_own. The
    others take none.
    Raises ConfigError for an unknown name, split or option or an option of a wrong type, DataError for data that is
    missing or wrong.
    """
    if name not in DATA_SETS:
        raise ConfigError(f"unknown data set {name!r}; choose one of {', '.join(DATA_SETS)}")
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    known = DATA_SETS[name]
    check_options(name, options)
    splits = splits_of(name, scored_on)
    root = Path(root).expanduser()
    if known.expected and not root.exists():
        raise DataError(
            f"{root}: no such data root. Expected {known.expected} in it. "
            "Name the place of the data with --data-root or MCAR_DATA"
        )
    return known.load(root, split=splits[split], **options)


def splits_of(name: str, scored_on: ScoredOn = "test") -> Mapping[str, str]:
    """The data set's own names of "train" and "test"; raises ConfigError where it has no validation list."""
    if scored_on == "test":
        return DATA_SETS[name].splits
    if not DATA_SETS[name].tuning:
        have = ", ".join(each for each, known in DATA_SETS.items() if known.tuning)
        raise ConfigError(f"data set {name} has no validation split (scored_on = 'val'); {have} have one")
    return DATA_SETS[name].tuning


def check_options(name: str, options: Mapping[str, object]) -> None:
    """Raises ConfigError for an option that a data set does not know, or of a wrong type."""
    known = DATA_SETS[name].options
    if unknown := sorted(set(options) - set(known)):
        options_of = ", ".join(known) or "it takes none"
        raise ConfigError(f"data set {name} does not know the option {', '.join(unknown)}; options: {options_of}")
    for option, value in options.items():
        expected, holds = known[option]
        if not holds(value):
            raise ConfigError(f"data set {name}: the option {option} should be {expected}, found {value!r}")


def scenes_folder(root: Path | str, progress: Callable[[int, int], None] | None = None, **options: object) -> Path:
    """The folder below root of the composed scenes with these options; they are written first if need be.

    options: num_train, num_test, side, seed (see ScenesConfig). progress is called with (images done, images in all).
    Raises ConfigError for options that it does not know or of a wrong type, DataError when root cannot be written.
    """
    from mcar_lib.data.scenes import SCENES_VERSION, ScenesConfig, write_scenes

    check_options("scenes", options)
    config = ScenesConfig(**options)  # type: ignore[arg-type]
    described = json.dumps([SCENES_VERSION, asdict(config)], sort_keys=True)
    folder = Path(root).expanduser() / f"scenes-{hashlib.sha256(described.encode()).hexdigest()[:12]}"
    # The tree gets its name when it is complete; looking first lets a filled data root be read-only.
    if not (folder / "VOCdevkit").is_dir():
        try:
            write_scenes(folder, config, progress)
        except OSError as error:
            reason = error.strerror or error
            raise DataError(f"{folder}: cannot write scenes here ({reason}); {OTHER_ARTIFACTS}") from error
    return folder


def _load_scenes(root: Path, split: str, **options: object) -> ImageSet:
    return load_voc(scenes_folder(root, None, **options), "2007", split, name="scenes", official_size=None)


def _load_table(root: Path, split: str, csv: str = "labels.csv", **options: Any) -> ImageSet:
    """root is the CSV file, or the folder of the CSV that the option `csv` names."""
    return load_table(root if root.is_file() else root / Path(csv).expanduser(), split, **options)


@dataclass(frozen=True)
class DataSet:
    """How a data set is read: load(root, split=its own name of the split, **options)."""

    load: Callable[..., ImageSet]
    splits: Mapping[str, str]  # "train" and "test" -> its own name of that split
    expected: str  # what has to be in its root; nothing for scenes, which are written there
    # Its options: what each should be, in words and as a test of a value.
    options: Mapping[str, tuple[str, Callable[[object], bool]]] = field(default_factory=dict)
    tuning: Mapping[str, str] = field(default_factory=dict)  # as splits, where values are chosen: scored on val


def _is_whole_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_path(value: object) -> bool:
    return isinstance(value, str | Path)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_list_of_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


VOC_SPLITS = {"train": "trainval", "test": "test"}
VOC_TUNING = {"train": "train", "test": "val"}
COCO_SPLITS = {"train": "train2014", "test": "val2014"}
WHOLE = "a whole number", _is_whole_number
NAMES = 'a list of names, as in ["cat", "dog"]', _is_list_of_names
DATA_SETS: Mapping[str, DataSet] = {
    "scenes": DataSet(
        _load_scenes,
        VOC_SPLITS,
        "",
        dict.fromkeys(("num_train", "num_test", "side", "seed"), WHOLE),
        tuning=VOC_TUNING,
    ),
    "voc2007": DataSet(partial(load_voc, year="2007"), VOC_SPLITS, "VOCdevkit/VOC2007", tuning=VOC_TUNING),
    "voc2012": DataSet(partial(load_voc, year="2012"), VOC_SPLITS, "VOCdevkit/VOC2012", tuning=VOC_TUNING),
    "coco2014": DataSet(
        load_coco, COCO_SPLITS, "train2014, val2014, annotations/instances_train2014.json and instances_val2014.json"
    ),
    "table": DataSet(
        _load_table,
        {split: split for split in SPLITS},
        "labels.csv with the columns path, labels and split",
        {
            "csv": ("the name of a file", _is_path),
            "image_root": ("a folder", _is_path),
            "classes": NAMES,
        },
    ),
    "own": DataSet(
        load_own,
        VOC_SPLITS,
        "photos of your own: a CSV, a COCO .json, folders of classes, a YOLO or a VOC folder",
        {
            "format": (f"one of {', '.join(FORMATS)}", lambda value: value in FORMATS),
            "classes": NAMES,
            "without": NAMES,
            "image_root": ("a folder", _is_path),
            "image_column": ("the name of a column", _is_text),
            "label_columns": NAMES,
            "separator": ("a text", _is_text),
        },
        tuning=VOC_TUNING,
    ),
}
