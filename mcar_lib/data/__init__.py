"""Data sets by name: each gives (image uint8 (3, H, W), target int8 (K,), image id)."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

from mcar_lib.data.coco import load_coco
from mcar_lib.data.image_set import Boxes, ImageSet, read_image
from mcar_lib.data.preparation import Problems, prepare
from mcar_lib.data.table import load_table
from mcar_lib.data.voc import load_voc
from mcar_lib.errors import ConfigError, DataError

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


def load_image_set(name: str, split: str, root: Path | str, **options: object) -> ImageSet:
    """Load the split "train" or "test" of a data set of DATA_SETS.

    root: where the data is; for "scenes" the folder in which scenes are written if they are not there yet.
    options: scenes: num_train, num_test, side, seed. table: csv, image_root, classes. The others take none.
    Raises ConfigError for an unknown name, split or option, DataError for data that is missing or wrong.
    """
    if name not in DATA_SETS:
        raise ConfigError(f"unknown data set {name!r}; choose one of {', '.join(DATA_SETS)}")
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    allowed, load = DATA_SETS[name]
    unknown = sorted(set(options) - set(allowed))
    if unknown:
        known = ", ".join(allowed) or "it takes none"
        raise ConfigError(f"data set {name} does not know the option {', '.join(unknown)}; options: {known}")
    root = Path(root).expanduser()
    if name != "scenes" and not root.exists():
        raise DataError(
            f"{root}: no such data root. Expected {EXPECTED[name]} in it. "
            "Name the place of the data with --data-root or MCAR_DATA"
        )
    return load(root, split, options)


def scenes_folder(root: Path | str, progress: Callable[[int, int], None] | None = None, **options: object) -> Path:
    """The folder below root of the composed scenes with these options; they are written first if need be.

    options: num_train, num_test, side, seed (see ScenesConfig). progress is called with (images done, images in all).
    Raises DataError when root cannot be written.
    """
    from mcar_lib.data.scenes import SCENES_VERSION, ScenesConfig, write_scenes

    config = ScenesConfig(**options)  # type: ignore[arg-type]
    described = json.dumps([SCENES_VERSION, dataclasses.asdict(config)], sort_keys=True)
    folder = Path(root).expanduser() / f"scenes-{hashlib.sha256(described.encode()).hexdigest()[:12]}"
    # The tree gets its name when it is complete; looking first lets a filled data root be read-only.
    if not (folder / "VOCdevkit").is_dir():
        try:
            write_scenes(folder, config, progress)
        except OSError as error:
            raise DataError(f"{folder}: cannot write scenes here ({error}); use another --data-root") from error
    return folder


def _load_scenes(root: Path, split: str, options: Mapping[str, object]) -> ImageSet:
    folder = scenes_folder(root, None, **options)
    return load_voc(folder, "2007", VOC_SPLITS[split], name="scenes", official_size=None)


def _load_voc2007(root: Path, split: str, options: Mapping[str, object]) -> ImageSet:
    return load_voc(root, "2007", VOC_SPLITS[split])


def _load_voc2012(root: Path, split: str, options: Mapping[str, object]) -> ImageSet:
    return load_voc(root, "2012", VOC_SPLITS[split])


def _load_coco2014(root: Path, split: str, options: Mapping[str, object]) -> ImageSet:
    return load_coco(root, COCO_SPLITS[split])


def _load_table(root: Path, split: str, options: Mapping[str, object]) -> ImageSet:
    """root is the CSV file, or the folder of the CSV that the option `csv` names."""
    csv_path = root if root.is_file() else root / str(options.get("csv", "labels.csv"))
    rest = {key: value for key, value in options.items() if key != "csv"}
    return load_table(csv_path, split, **rest)  # type: ignore[arg-type]


VOC_SPLITS = {"train": "trainval", "test": "test"}
COCO_SPLITS = {"train": "train2014", "test": "val2014"}
EXPECTED = {
    "voc2007": "VOCdevkit/VOC2007",
    "voc2012": "VOCdevkit/VOC2012",
    "coco2014": "train2014, val2014, annotations/instances_train2014.json and instances_val2014.json",
    "table": "labels.csv with the columns path, labels and split",
}

Loader = Callable[[Path, str, Mapping[str, object]], ImageSet]
DATA_SETS: Mapping[str, tuple[tuple[str, ...], Loader]] = {
    "scenes": (("num_train", "num_test", "side", "seed"), _load_scenes),
    "voc2007": ((), _load_voc2007),
    "voc2012": ((), _load_voc2012),
    "coco2014": ((), _load_coco2014),
    "table": (("csv", "image_root", "classes"), _load_table),
}
"""Name -> (its options, its loader)."""
