"""What a data root holds of a published data set, held against the official counts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcar_lib.data import COCO_SPLITS, SPLITS, VOC_SPLITS, ScoredOn, check_options, load_image_set
from mcar_lib.data.coco import COCO_OFFICIAL_SIZES
from mcar_lib.data.image_set import ImageSet
from mcar_lib.data.own import class_counts, overview, read_own
from mcar_lib.data.preparation import Checked, counted, doubts_together, first_of
from mcar_lib.data.voc import VOC_OFFICIAL_SIZES, class_lists, find_voc_folder, load_voc
from mcar_lib.errors import DataError

# Objects that are not difficult (statistics of the VOC 2007 challenge).
VOC_OFFICIAL_OBJECTS = {("2007", "trainval"): 12608, ("2007", "test"): 12032}


@dataclass(frozen=True)
class PublishedSplit:
    """The official counts of a split: images (COCO: those with a label) and objects that are not difficult.

    objects: None where no count is published, or no annotations are.
    """

    title: str
    images: int
    objects: int | None = None


def _voc(year: str, split: str) -> PublishedSplit:
    key = (year, split)
    return PublishedSplit(f"VOC{year} {split}", VOC_OFFICIAL_SIZES[key], VOC_OFFICIAL_OBJECTS.get(key))


PUBLISHED: Mapping[tuple[str, str], PublishedSplit] = {
    **{(f"voc{year}", name): _voc(year, split) for year in ("2007", "2012") for name, split in VOC_SPLITS.items()},
    **{
        ("coco2014", name): PublishedSplit(f"COCO2014 {split}", COCO_OFFICIAL_SIZES[split])
        for name, split in COCO_SPLITS.items()
    },
}
"""(data set, "train" or "test") -> the official counts."""


def load_what_is_there(name: str, split: str, root: Path, **options: object) -> ImageSet | None:
    """As load_image_set, but None for a split whose list is not in a root that has the other split's list.

    VOC2012 test, which has no public labels, comes as an image set with labelled False.
    """
    if (name, split) in PUBLISHED and not _has_list(name, split, root):
        (other,) = set(SPLITS) - {split}
        if _has_list(name, other, root):
            return None
    if (name, split) == ("voc2012", "test") and not _has_voc2012_test_labels(root):
        return load_voc(root, "2012", "test", labelled=False)
    return load_image_set(name, split, root, "test", **options)


def load_scored_split(name: str, root: Path, scored_on: ScoredOn = "test", **options: object) -> ImageSet | None:
    """The split that a run is scored on; None for the test split of VOC2012, whose labels only a server has.

    It is None whether the photos are there or not; where somebody has put label files beside them, they are scored.
    """
    if name == "voc2012" and scored_on == "test" and not _has_voc2012_test_labels(root):
        return None
    return load_image_set(name, "test", root, scored_on, **options)


def _has_voc2012_test_labels(root: Path) -> bool:
    return bool(class_lists(find_voc_folder(root, "2012") / "ImageSets" / "Main", "test"))


def compare_with_published(images: ImageSet, published: PublishedSplit) -> list[str]:
    """One line for each official count, saying what is missing; reads all boxes where the number of images is right."""
    missing = published.images - len(images)
    if missing > 0:
        return [f"{missing:,} of {published.images:,} published images are missing"]
    if missing < 0:
        return [f"{-missing:,} images more than the {published.images:,} that are published"]
    lines = [f"all {published.images:,} published images"]
    if published.objects is not None and images.has_boxes:
        found = sum(int((~images.boxes(index).difficult).sum()) for index in range(len(images)))
        differs = "as published" if found == published.objects else f"published are {published.objects:,}"
        lines.append(f"{found:,} objects that are not difficult, {differs}")
    return lines


def check_data_set(
    name: str, root: Path, check: Callable[[ImageSet], Checked], tell: Callable[[str], object], /, **options: object
) -> dict[str, Sequence[object]]:
    """Checks each split that is in a root, and tells line by line what it holds, what of the published is missing, and
    what is doubtful.

    check: reads a split and returns what it found. Returns the columns of a table: the classes, and for each labelled
    split how many images have each class, and how many have it as difficult only. Raises the DataError of a split.
    """
    if name == "own":
        check_options(name, options)
        return _check_own(root, check, tell, options)
    columns: dict[str, Sequence[object]] = {}
    found: list[tuple[ImageSet, Checked]] = []
    for split in SPLITS:
        images, published = load_what_is_there(name, split, root, **options), PUBLISHED.get((name, split))
        if images is None:
            assert published is not None  # only published data sets are known to have another split
            tell(f"{published.title}: not here, all {published.images:,} published images are missing")
            continue
        found.append((images, check(images)))
        tell(f"{images.title}: {len(images):,} images, fingerprint {found[-1][1].fingerprint}")
        for line in compare_with_published(images, published) if published else ():
            tell(f"  {line}")
        columns["class"] = images.classes
        if images.labelled:
            columns[split] = (images.targets == 1).sum(dim=0).tolist()
            columns[f"{split} difficult"] = (images.targets == -1).sum(dim=0).tolist()
    if doubts := doubts_together(found):
        tell(f"{counted(doubts, 'doubt')}: look at them before you train, which they do not stop")
        for line in first_of(doubts):
            tell(line)
    return columns


def _check_own(
    root: Path,
    check: Callable[[ImageSet], Checked],
    tell: Callable[[str], object],
    options: Mapping[str, object],
) -> dict[str, Sequence[object]]:
    own = read_own(root, **options)
    for line in own.told:
        tell(line)
    checked = {part: check(images) for part, images in own.parts.items()}
    for line in overview(own, checked):
        tell(line)
    return class_counts(own)


def _has_list(name: str, split: str, root: Path) -> bool:
    """Whether the file that says which images are in the split is there."""
    if name == "coco2014":
        return (root / "annotations" / f"instances_{COCO_SPLITS[split]}.json").is_file()
    try:
        folder = find_voc_folder(root, name.removeprefix("voc"))
    except DataError:
        return False
    return (folder / "ImageSets" / "Main" / f"{VOC_SPLITS[split]}.txt").is_file()
