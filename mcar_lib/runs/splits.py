"""The images of runs: both splits of a data set, checked and read once a session, and what their bytes hash to."""

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mcar_lib.data import ImageSet, load_image_set, scenes_folder
from mcar_lib.data.preparation import Checked, check_images, counted, doubts_together, without_positives
from mcar_lib.data.published import load_scored_split
from mcar_lib.data.squares import MEMORY_LIMIT, ResizedImages, fits_on_disk, num_bytes
from mcar_lib.data.transforms import resize_square
from mcar_lib.errors import DataError
from mcar_lib.files import content_id
from mcar_lib.progress import Progress, say, speaks
from mcar_lib.runs.config import RunConfig
from mcar_lib.runs.fingerprints import fingerprint
from mcar_lib.runs.records import NO_TEST_LABELS
from mcar_lib.training import processes
from mcar_lib.training.execution import Cache

PARTS = {  # of a published data set: where any of these is, the rest should be
    **{f"voc{year}": (f"VOCdevkit/VOC{year}", f"VOC{year}", "ImageSets/Main") for year in (2007, 2012)},
    "coco2014": ("annotations", "train2014", "val2014"),
    "scenes": (),
    "own": (".",),
}


@dataclass(frozen=True)
class Data:
    """Training and test images of one configuration, checked, with the fingerprints of what was read.

    scored: the test images, or None where their labels are not public.
    """

    train: ImageSet
    scored: ImageSet | None
    train_fingerprint: str
    test_fingerprint: str

    @property
    def num_images(self) -> int:
        """Of both splits."""
        return len(self.train) + (0 if self.scored is None else len(self.scored))

    @property
    def keys(self) -> dict[str, str]:
        """Both fingerprints, as the keys of a run name them."""
        return {"train_data": self.train_fingerprint, "test_data": self.test_fingerprint}

    @property
    def test(self) -> ImageSet:
        """The test images; raises DataError where nothing can be scored."""
        if self.scored is None:
            raise DataError(f"{NO_TEST_LABELS}; mcar submit voc2012 writes what its server scores")
        return self.scored


class Splits:
    """Data sets below one data root; scenes, and the notes of what was checked, lie below artifacts."""

    def __init__(self, artifacts: Path, data_root: Path | None, verbose: bool = True, cache: Cache = "auto") -> None:
        self.artifacts, self.data_root, self.verbose, self.cache = artifacts, data_root, verbose, cache
        self.notes = artifacts / "data" / "checked"
        self._drawn: set[str] = set()
        self._data: dict[str, Data] = {}
        self._squares: dict[tuple[ImageSet, int], ResizedImages] = {}

    def root_of(self, dataset: str) -> Path:
        """Where a data set lies: scenes among the artifacts, any other below the data root, else DataError."""
        if dataset == "scenes":
            return self.artifacts / "data"
        if self.data_root is None:
            raise DataError(f"{dataset} needs a data root; give --data-root DIR or set MCAR_DATA")
        return self.data_root

    def of(self, config: RunConfig) -> Data:
        """Both splits of a configuration's data set, every file checked. Scenes are written first if need be."""
        key = json.dumps([config.dataset, config.scored_on, config.data_options], sort_keys=True)
        if key not in self._data:
            self._data[key] = processes.main_first(lambda: self._read(config))
        return self._data[key]

    def place_of(self, config: RunConfig) -> Path:
        """As root_of, where scenes are drawn now if need be; raises DataError where there is nothing to look at."""
        root = self.root_of(config.dataset)
        if (
            config.dataset == "scenes"
            and (options := json.dumps(config.data_options, sort_keys=True)) not in self._drawn
        ):
            with Progress("drawing scenes", 1, enabled=self.verbose) as progress:
                scenes_folder(root, progress.update, **config.data_options)
            self._drawn.add(options)
        return root

    def holds_any_of(self, config: RunConfig) -> bool:
        """Whether anything of a data set lies below the data root that was named."""
        root, table = self.data_root, str(config.data_options.get("csv", "labels.csv"))
        parts = PARTS.get(config.dataset, (table,))
        return root is not None and (root.is_file() or any((root / part).exists() for part in parts))

    def _read(self, config: RunConfig) -> Data:
        root = self.place_of(config)
        train = load_image_set(config.dataset, "train", root, config.scored_on, **config.data_options)
        test = load_scored_split(config.dataset, root, config.scored_on, **config.data_options)
        found = [(images, self.check(images)) for images in (train, test) if images is not None]
        if self.verbose and speaks():
            _tell_doubts(found, test)
        return Data(train, test, found[0][1].fingerprint, "not public" if test is None else found[1][1].fingerprint)

    def check(self, images: ImageSet, again: bool = False) -> Checked:
        """Reads every image and box, whatever was noted before if again; returns what was found."""
        with Progress(f"checking {images.title}", len(images), enabled=self.verbose) as progress:
            return check_images(images, None if again else self.notes, progress.update)

    def squares(self, images: ImageSet, size: int, once: bool = False) -> ResizedImages:
        """The images of a split as squares, read once a session, or once and for all where they are kept on disk: by
        default if they are too many for memory, few for the disk, and not looked at only once."""
        key = (images, size)
        if key not in self._squares:
            needed, folder = num_bytes(images, size), self.artifacts / "squares"
            large = needed > MEMORY_LIMIT and not once and fits_on_disk(folder, needed)
            on_disk = self.cache == "disk" or (self.cache == "auto" and large)
            limit = {"memory": needed, "none": 0}.get(self.cache, MEMORY_LIMIT)
            with Progress(f"reading {images.title} at {size} px", len(images), enabled=self.verbose) as progress:
                file = folder / f"{self._id_of_squares(images, size)}.u8" if on_disk else None
                make = functools.partial(ResizedImages, images, size, limit, progress.update, file)
                self._squares[key] = processes.main_first(make) if on_disk else make()  # one writes the file
        return self._squares[key]

    def _id_of_squares(self, images: ImageSet, size: int) -> str:
        """What the pixels of squares depend on, in a name: photos, size, and what decodes and resizes them."""
        versions = {name: metadata.version(name) for name in ("pillow", "torchvision")}
        made_by = fingerprint(ImageSet.image, resize_square)
        photos = self.check(images).fingerprint
        return f"{size}px-{content_id({'photos': photos, 'size': size, 'made_by': made_by, **versions})}"


def _tell_doubts(found: Sequence[tuple[ImageSet, Checked]], scored: ImageSet | None) -> None:
    """A line on what the checks of the splits doubt, and one where mAP leaves classes out."""
    if doubts := doubts_together(found):
        say(f"{found[0][0].name}: {counted(doubts, 'doubt')} about the data; mcar data check tells them")
    if scored is not None and (unseen := len(without_positives(scored))):
        rest = len(scored.classes) - unseen
        means = (
            f"mAP is over the {rest} of {len(scored.classes)} classes that have"
            if rest
            else "every mAP is nan, as no class has"
        )
        say(f"{scored.title}: {means} positives")
