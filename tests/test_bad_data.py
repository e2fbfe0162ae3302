"""Damaged data from the command line: the error names the file, and nothing that was there before is lost."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from PIL import Image
from test_cli import mcar, metric_lines
from test_data import write_coco, write_photo, write_voc

PROFILE = """
name = "tiny"
title = "one epoch on a few small photos"
seeds = [0]
bootstrap_resamples = 20

[run]
dataset = "{dataset}"
backbone = "{backbone}"
weights = "none"
image_size = 64
num_regions = 2
epochs = 1
batch_size = 2
"""
VOC = "VOCdevkit/VOC2007"
PHOTOS = {"voc2007": f"{VOC}/JPEGImages/t2.jpg", "coco2014": "val2014/30.jpg", "table": "two.png"}


def write_data(root: Path, dataset: str) -> None:
    """Both splits of a data set, a few photos each."""
    if dataset == "voc2007":
        write_voc(root, {"a1": {"dog": 1}, "b2": {"train": 1}, "c3": {"person": 1}}, "trainval")
        write_voc(root, {"t1": {"dog": 1}, "t2": {"cat": 1, "dog": 0}}, "test")
    elif dataset == "coco2014":
        for split in ("train2014", "val2014"):
            path = write_coco(root)
            path.rename(path.with_name(f"instances_{split}.json"))
            for number in (4, 30):
                write_photo(root / split / f"{number}.jpg", number)
    else:
        lines = ("path,labels,split", "one.png,dog,train", "two.png,cat,train", "three.png,dog,test")
        for seed, line in enumerate(lines[1:]):
            write_photo(root / line.partition(",")[0], seed)
        (root / "labels.csv").write_text("\n".join(lines))


class Place(NamedTuple):
    """A data set, and a run on it that is done."""

    root: Path
    results: Path
    options: tuple[object, ...]
    printed: list[str]

    def kept(self) -> dict[str, bytes]:
        """Every file of the results and of the run's weights and scores."""
        artifacts = self.results.parent / "artifacts"
        files = [*self.results.rglob("*"), *artifacts.glob("runs/*/model.safetensors"), *artifacts.glob("runs/*/*.npz")]
        return {str(path): path.read_bytes() for path in files if path.is_file()}


@pytest.fixture
def place(request: pytest.FixtureRequest, tiny_backbone: str, tmp_path: Path) -> Place:
    root, results = tmp_path / "data", tmp_path / "results"
    write_data(root, request.param)
    profile = tmp_path / "tiny.toml"
    profile.write_text(PROFILE.format(dataset=request.param, backbone=tiny_backbone))
    folders = ("--data-root", root, "--results", results, "--artifacts", tmp_path / "artifacts")
    options = ("--profile", profile, *folders)
    done = mcar("train", *options)
    assert done.exit_code == 0, done.output
    return Place(root, results, options, metric_lines(done.output))


def remove(name: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return damage


def cut(name: str, num_bytes: int = 60) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes((root / name).read_bytes()[:-num_bytes]) and None


def replace(name: str, old: str, new: str) -> Callable[[Path], None]:
    def damage(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))

    return damage


def remove_half_of_the_lists(root: Path) -> None:
    for path in sorted((root / VOC / "ImageSets/Main").glob("*_*.txt"))[20:]:
        path.unlink()


def add_category(root: Path) -> None:
    path = root / "annotations/instances_val2014.json"
    content = json.loads(path.read_text())
    content["categories"].append({"id": 91, "name": "unicorn"})
    path.write_text(json.dumps(content))


# Case -> (data set, what is done to it, the words of the error).
DAMAGES: dict[str, tuple[str, Callable[[Path], None], tuple[str, ...]]] = {
    "photo missing": ("voc2007", remove(PHOTOS["voc2007"]), ("t2.jpg: cannot read the image file", "fetch the data")),
    "all photos missing": ("voc2007", remove(f"{VOC}/JPEGImages"), ("3 problems found", "a1.jpg", "c3.jpg")),
    "photo cut": ("voc2007", cut(PHOTOS["voc2007"]), ("t2.jpg: not a complete image file", "fetch it again")),
    "photo empty": ("voc2007", cut(PHOTOS["voc2007"], 10**6), ("t2.jpg: not a complete image file",)),
    "xml missing": ("voc2007", remove(f"{VOC}/Annotations/t2.xml"), ("t2.xml: cannot read the annotation", "again")),
    "xml cut": ("voc2007", cut(f"{VOC}/Annotations/t2.xml", 20), ("t2.xml: cannot read the annotation", "again")),
    "half of the lists": (
        "voc2007",
        remove_half_of_the_lists,
        ("ImageSets/Main/dog_trainval.txt: the label file of class dog is missing", "mend the files"),
    ),
    "list of images missing": (
        "voc2007",
        remove(f"{VOC}/ImageSets/Main/test.txt"),
        ("ImageSets/Main/test.txt: no such image list", "fetch the data again"),
    ),
    "list of a class cut": (
        "voc2007",
        cut(f"{VOC}/ImageSets/Main/dog_test.txt", 6),
        ("dog_test.txt: no label for 1 of 2 images, the first is t2", "mend the files"),
    ),
    "lists folder missing": ("voc2007", remove(f"{VOC}/ImageSets"), ("no VOC2007 here", "--data-root")),
    "coco photo missing": ("coco2014", remove(PHOTOS["coco2014"]), ("val2014/30.jpg: cannot read the image file",)),
    "coco photo cut": ("coco2014", cut(PHOTOS["coco2014"]), ("val2014/30.jpg: not a complete image file",)),
    "coco json missing": (
        "coco2014",
        remove("annotations/instances_val2014.json"),
        ("instances_val2014.json: no such annotation file", "--data-root"),
    ),
    "coco json cut": (
        "coco2014",
        cut("annotations/instances_val2014.json"),
        ("instances_val2014.json: not a COCO instances file", "fetch it again"),
    ),
    "coco unknown category id": (
        "coco2014",
        replace("annotations/instances_val2014.json", '"category_id": 9', '"category_id": 91'),
        ("instances_val2014.json", "annotation 1: unknown category id 91", "mend the files"),
    ),
    "coco category too many": (
        "coco2014",
        add_category,
        ("instances_val2014.json", "category 91: 'unicorn' is not among the 80 classes", "fetch the published file"),
    ),
    "photo of a table missing": ("table", remove(PHOTOS["table"]), ("two.png: cannot read the image file", "put it")),
    "photo of a table cut": ("table", cut(PHOTOS["table"]), ("two.png: not a complete image file",)),
}


@pytest.mark.parametrize(("place", "damage", "words"), DAMAGES.values(), ids=list(DAMAGES), indirect=["place"])
def test_damaged_data_is_named_and_costs_no_result(
    place: Place, damage: Callable[[Path], None], words: tuple[str, ...]
) -> None:
    before = place.kept()
    damage(place.root)
    done = mcar("train", *place.options, "--set", "seed=1")
    assert done.exit_code == 3, done.output
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.output
    assert place.kept() == before
    again = mcar("evaluate", *place.options)  # the record is of the data before it was damaged
    assert again.exit_code == 3, again.output
    assert all(word in again.stderr for word in words), again.stderr


@pytest.mark.parametrize("place", PHOTOS, indirect=True)
def test_a_checkpoint_is_not_scored_on_a_photo_that_is_cut(place: Place) -> None:
    (weights,) = place.results.parent.glob("artifacts/runs/*/model.safetensors")
    names = {"voc2007": PHOTOS["voc2007"], "coco2014": PHOTOS["coco2014"], "table": "three.png"}
    photo = next(place.root / name for name in names.values() if (place.root / name).exists())
    cut(photo.name)(photo.parent)
    before = place.kept()
    done = mcar("evaluate", *place.options, "--checkpoint", weights)
    assert done.exit_code == 3
    assert f"{photo}: not a complete image file" in done.stderr
    assert place.kept() == before


@pytest.mark.parametrize("place", ["voc2007"], indirect=True)
@pytest.mark.parametrize(("mode", "form"), [("L", "JPEG"), ("CMYK", "JPEG"), ("P", "PNG"), ("RGBA", "PNG")])
def test_photos_of_other_colour_modes_are_trained_on(place: Place, mode: str, form: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(place.root / f"{VOC}/JPEGImages/a1.jpg", form)
    done = mcar("train", *place.options, "--set", "seed=1")
    assert done.exit_code == 0, done.output
    assert len(metric_lines(done.output)) == len(place.printed)


@pytest.mark.parametrize("place", ["coco2014"], indirect=True)
def test_a_checkpoint_with_other_classes_costs_no_result(place: Place, tmp_path: Path) -> None:
    (weights,) = place.results.parent.glob("artifacts/runs/*/model.safetensors")
    write_data(tmp_path / "voc", "voc2007")
    before = place.kept()
    other = ("--set", "dataset=voc2007", "--data-root", tmp_path / "voc")
    done = mcar("evaluate", *place.options, *other, "--checkpoint", weights)
    assert done.exit_code == 4
    assert f"{weights} is of 80 classes and the model here of 20" in done.stderr
    assert place.kept() == before


@pytest.mark.parametrize("place", ["table"], indirect=True)
def test_the_top_3_of_two_classes_are_both(place: Place) -> None:
    rows = [line.split() for line in place.printed]
    fused = {" ".join(row[1:-7]): row[-7:] for row in rows if row[0] == "fused"}
    assert fused["0.5 top-3"] == fused["0.5"]
    assert fused["top-3"][4] == "50.00"  # OP: both labels of the one photo, of which one is right
