"""Data sets: real photos where there are some, and small trees made here for everything that can be wrong."""

import dataclasses
import json
import os
import pickle
import re
import shutil
import sys
import types
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from real_photos import real_coco2014, real_voc2007

from mcar_lib.data import (
    ImageSet,
    load_coco,
    load_image_set,
    load_table,
    load_voc,
    prepare,
    read_image,
)
from mcar_lib.data.coco import COCO_CLASSES
from mcar_lib.data.voc import VOC_CLASSES
from mcar_lib.errors import ConfigError, DataError

# ---- made trees


def write_photo(path: Path, seed: int = 0, side: int = 12) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def voc_object(name: str, corners: tuple[float, ...] = (1, 1, 12, 12), difficult: int = 0, inside: str = "") -> str:
    keys = ("xmin", "ymin", "xmax", "ymax")
    box = "".join(f"<{key}>{value}</{key}>" for key, value in zip(keys, corners, strict=True))
    flag = f"<difficult>{difficult}</difficult>"
    return f"<object><name>{name}</name>{flag}<bndbox>{box}</bndbox>{inside}</object>"


def write_voc(root: Path, labels: dict[str, dict[str, int]], split: str = "trainval", year: str = "2007") -> Path:
    """A VOC tree: image id -> {class: label}; unnamed classes are -1. Returns ImageSets/Main."""
    folder = root / "VOCdevkit" / f"VOC{year}"
    lists = folder / "ImageSets" / "Main"
    lists.mkdir(parents=True, exist_ok=True)
    (folder / "Annotations").mkdir(exist_ok=True)
    (lists / f"{split}.txt").write_text("".join(f"{image_id}\n" for image_id in labels))
    for name in VOC_CLASSES:
        lines = [f"{image_id} {found.get(name, -1):2d}\n" for image_id, found in labels.items()]
        (lists / f"{name}_{split}.txt").write_text("".join(lines))
    for seed, (image_id, found) in enumerate(labels.items()):
        write_photo(folder / "JPEGImages" / f"{image_id}.jpg", seed)
        objects = "".join(voc_object(name, difficult=int(label == 0)) for name, label in found.items())
        (folder / "Annotations" / f"{image_id}.xml").write_text(f"<annotation>{objects}</annotation>")
    return lists


LABELS = {"b1": {"dog": 1, "cat": 0}, "a2": {"train": 1}, "c3": {"person": 1, "dog": 1}}


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    write_voc(tmp_path, LABELS)
    return tmp_path


def lists_of(root: Path) -> Path:
    return root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"


def photo_of(root: Path, image_id: str) -> Path:
    return root / "VOCdevkit" / "VOC2007" / "JPEGImages" / f"{image_id}.jpg"


# ---- VOC


def test_voc_labels_order_and_boxes(voc: Path) -> None:
    images = load_voc(voc, "2007", "trainval")
    assert images.ids == ("b1", "a2", "c3")
    assert images.classes == VOC_CLASSES
    assert images.targets.dtype == torch.int8
    found = {
        image_id: {VOC_CLASSES[k]: int(row[k]) for k in row.nonzero().flatten().tolist()}
        for image_id, row in zip(images.ids, images.targets, strict=True)
    }
    assert found == {"b1": {"dog": 1, "cat": -1}, "a2": {"train": 1}, "c3": {"person": 1, "dog": 1}}
    boxes = images.boxes(0)
    assert boxes.classes.tolist() == [VOC_CLASSES.index("dog"), VOC_CLASSES.index("cat")]
    assert boxes.difficult.tolist() == [False, True]
    assert boxes.xyxy.tolist() == [[0, 0, 12, 12]] * 2


def test_the_class_train_is_not_taken_for_the_split_train(tmp_path: Path) -> None:
    write_voc(tmp_path, {"x": {"train": 1}}, split="train")
    write_voc(tmp_path, {"y": {"dog": 1}}, split="val")
    write_voc(tmp_path, {"x": {"train": 1}, "y": {"dog": 1}}, split="trainval")
    train = load_voc(tmp_path, "2007", "train")
    assert train.ids == ("x",)
    assert train.targets.sum() == train.targets[0, VOC_CLASSES.index("train")] == 1
    assert load_voc(tmp_path, "2007", "val").ids == ("y",)


@pytest.mark.parametrize("below", [".", "VOCdevkit", "VOCdevkit/VOC2007"])
def test_voc_root_may_be_any_of_three_folders(voc: Path, below: str) -> None:
    assert len(load_voc(voc / below, "2007", "trainval")) == 3


def test_voc_folder_of_another_year_is_not_taken(voc: Path) -> None:
    with pytest.raises(DataError, match="no VOC2012 here"):
        load_voc(voc / "VOCdevkit" / "VOC2007", "2012", "trainval")


def test_parts_of_a_person_are_no_objects_and_fractions_round_outward(tmp_path: Path) -> None:
    write_voc(tmp_path, {"b1": {"person": 1}})
    part = "<part><name>head</name><bndbox><xmin>2</xmin></bndbox></part>"
    xml = f"<annotation>{voc_object('person', (2.5, 3, 7.2, 9), inside=part)}</annotation>"
    (tmp_path / "VOCdevkit/VOC2007/Annotations/b1.xml").write_text(xml)
    assert load_voc(tmp_path, "2007", "trainval").boxes(0).xyxy.tolist() == [[1, 2, 8, 9]]


def test_voc2012_test_without_labels_says_so(tmp_path: Path) -> None:
    lists = write_voc(tmp_path, {"x": {}}, split="test", year="2012")
    assert load_voc(tmp_path, "2012", "test").targets.sum() == 0
    for path in lists.glob("*_test.txt"):
        path.unlink()
    with pytest.raises(DataError, match="VOC2012 test has no public labels"):
        load_voc(tmp_path, "2012", "test")


def test_voc_list_that_is_not_there_names_those_that_are(voc: Path) -> None:
    with pytest.raises(DataError, match=r"test\.txt: no such image list; lists in this folder: trainval"):
        load_voc(voc, "2007", "test")


# Case -> (file, the text that is replaced, what it becomes, the message); a text of None removes the file.
BROKEN_LISTS: dict[str, tuple[str, str | None, str, str]] = {
    "class file missing": ("cow", None, "", "cow_trainval.txt: the label file of class cow is missing"),
    "empty split": ("", "b1\na2\nc3\n", "\n", "trainval.txt: the split has no images"),
    "image twice": ("", "c3", "c3\nb1", "trainval.txt:4: image b1 is already listed in line 1"),
    "two fields in a list": ("", "c3", "c3\nd4 1", "trainval.txt:4: expected one image id, found 'd4 1'"),
    "label of a stranger": ("dog", "c3", "z9  1\nc3", "dog_trainval.txt:3: image z9 is not in the split"),
    "no label for one": (
        "dog",
        "a2 -1\n",
        "",
        "dog_trainval.txt: no label for 1 of 3 images, the first is a2",
    ),
    "label twice": ("dog", "c3", "b1 -1\nc3", "dog_trainval.txt:3: image b1 is labelled twice"),
    "malformed label": (
        "dog",
        "a2 -1",
        "a2 yes",
        "dog_trainval.txt:2: expected '<image id> 1, 0 or -1', found",
    ),
}


@pytest.mark.parametrize("case", BROKEN_LISTS)
def test_broken_voc_lists_are_reported_with_file_and_line(voc: Path, case: str) -> None:
    class_name, old, new, message = BROKEN_LISTS[case]
    path = lists_of(voc) / f"{class_name}_trainval.txt".removeprefix("_")
    if old is None:
        path.unlink()
    else:
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new))
    with pytest.raises(DataError, match=re.escape(message)):
        load_voc(voc, "2007", "trainval")


def test_label_file_of_an_unknown_class_is_reported(voc: Path) -> None:
    shutil.copy(lists_of(voc) / "dog_trainval.txt", lists_of(voc) / "unicorn_trainval.txt")
    with pytest.raises(DataError, match=r"unicorn_trainval.txt: labels of a class that is not among the 20"):
        load_voc(voc, "2007", "trainval")


def test_ten_problems_are_shown_and_all_are_counted(voc: Path) -> None:
    for path in lists_of(voc).glob("*_trainval.txt"):
        path.unlink()
    with pytest.raises(DataError, match="20 problems found") as caught:
        load_voc(voc, "2007", "trainval")
    lines = str(caught.value).splitlines()
    assert len(lines) == 12
    assert lines[-1].strip() == "... and 10 more"


# ---- preparation


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (voc_object("unicorn"), "a2.xml: object of the unknown class 'unicorn'"),
        (voc_object("dog", (5, 5, 4, 4)), "a2.xml: an object has an empty box"),
        ("<object><name>dog</name></object>", "a2.xml: an object has no complete bndbox"),
        ("<object>", "a2.xml: cannot read the annotation"),
        (None, "a2.xml: cannot read the annotation"),
    ],
)
def test_prepare_reports_broken_annotations(voc: Path, content: str | None, message: str) -> None:
    path = voc / "VOCdevkit/VOC2007/Annotations/a2.xml"
    path.unlink() if content is None else path.write_text(f"<annotation>{content}</annotation>")
    with pytest.raises(DataError, match=message):
        prepare(load_voc(voc, "2007", "trainval"))


def test_prepare_reports_missing_truncated_and_foreign_files_together(voc: Path) -> None:
    photo_of(voc, "b1").unlink()
    photo_of(voc, "a2").write_bytes(photo_of(voc, "a2").read_bytes()[:-60])
    photo_of(voc, "c3").write_text("this is a web page")
    with pytest.raises(DataError, match="3 problems found") as caught:
        prepare(load_voc(voc, "2007", "trainval"))
    report = str(caught.value)
    assert re.search(r"b1\.jpg: cannot read the image file \(No such file", report)
    assert re.search(r"a2\.jpg: not a complete image file \(.*truncated", report)
    assert re.search(r"c3\.jpg: not an image file of any known format", report)


def test_prepare_reports_repeated_images_and_empty_splits(voc: Path) -> None:
    images = load_voc(voc, "2007", "trainval")
    with pytest.raises(DataError, match=r"b1\.jpg: listed 2 times"):
        prepare(images.select([0, 1, 0]))
    with pytest.raises(DataError, match="the split has no images"):
        prepare(images.select([]))


def test_fingerprint_depends_on_neither_place_nor_date(voc: Path, tmp_path: Path) -> None:
    before = prepare(load_voc(voc, "2007", "trainval"))
    shutil.copytree(voc / "VOCdevkit", tmp_path / "elsewhere" / "VOC" / "VOCdevkit")
    os.utime(tmp_path / "elsewhere/VOC/VOCdevkit/VOC2007/JPEGImages/b1.jpg", (1, 1))
    assert prepare(load_voc(tmp_path / "elsewhere" / "VOC", "2007", "trainval")) == before
    assert re.fullmatch("[0-9a-f]{16}", before)


def test_fingerprint_changes_with_one_byte_of_one_image(voc: Path) -> None:
    images = load_voc(voc, "2007", "trainval")
    before = prepare(images)
    with photo_of(voc, "c3").open("ab") as file:
        file.write(b"\0")
    assert prepare(images) != before


def test_fingerprint_changes_with_one_label_a_name_a_class_and_the_order(voc: Path) -> None:
    images = load_voc(voc, "2007", "trainval")
    targets = images.targets.clone()
    targets[0, 0] = 1
    variants = [
        images,
        dataclasses.replace(images, targets=targets),
        dataclasses.replace(images, name="other"),
        dataclasses.replace(images, split="other"),
        dataclasses.replace(images, classes=("airplane", *VOC_CLASSES[1:])),
        dataclasses.replace(images, ids=("b1", "a2", "c4")),
        images.select([0, 2, 1]),
        images.select([0, 1]),
    ]
    assert len({prepare(variant) for variant in variants}) == len(variants)


def test_second_prepare_decodes_nothing(voc: Path, tmp_path: Path) -> None:
    cache, steps = tmp_path / "new" / "cache", []
    images = load_voc(voc, "2007", "trainval")
    first = prepare(images, cache, lambda done, total: steps.append((done, total)))
    assert steps == [(1, 3), (2, 3), (3, 3)]
    assert prepare(images, cache, lambda done, total: steps.append((done, total))) == first
    assert len(steps) == 3
    assert [path.suffix for path in cache.iterdir()] == [".json"]


@pytest.mark.parametrize("change", ["image", "annotation"])
def test_stamp_does_not_hide_a_changed_file(voc: Path, tmp_path: Path, change: str) -> None:
    images = load_voc(voc, "2007", "trainval")
    prepare(images, tmp_path / "cache")
    path = photo_of(voc, "a2") if change == "image" else voc / "VOCdevkit/VOC2007/Annotations/a2.xml"
    path.write_text("broken")
    with pytest.raises(DataError, match="1 problem found"):
        prepare(images, tmp_path / "cache")


def test_failed_check_leaves_no_stamp(voc: Path, tmp_path: Path) -> None:
    photo_of(voc, "a2").write_text("broken")
    images = load_voc(voc, "2007", "trainval")
    for _ in range(2):
        with pytest.raises(DataError):
            prepare(images, tmp_path / "cache")


def test_unusable_cache_is_not_fatal(voc: Path, tmp_path: Path) -> None:
    images = load_voc(voc, "2007", "trainval")
    expected = prepare(images, tmp_path / "cache")
    for stamp in (tmp_path / "cache").iterdir():
        stamp.write_text("[")
    assert prepare(images, tmp_path / "cache") == expected
    (tmp_path / "file").write_text("in the way")
    assert prepare(images, tmp_path / "file") == expected


# ---- image sets and images


def test_select_keeps_rows_boxes_and_title_together(voc: Path) -> None:
    images = load_voc(voc, "2007", "trainval", name="scenes", official_size=None)
    chosen = images.select([2, 0])
    assert chosen.ids == ("c3", "b1")
    assert torch.equal(chosen.targets, images.targets[[2, 0]])
    assert torch.equal(chosen.boxes(1).classes, images.boxes(0).classes)
    assert torch.equal(chosen[0][0], images[2][0])
    assert images.title == "scenes trainval"
    assert chosen.title == "scenes trainval, subset of 2 of 3 images"
    assert chosen.select([0]).ids == ("c3",)


def test_image_sets_can_be_sent_to_worker_processes(voc: Path) -> None:
    images = pickle.loads(pickle.dumps(load_voc(voc, "2007", "trainval").select([1, 2])))
    assert images.boxes(0).classes.tolist() == [VOC_CLASSES.index("train")]


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK", "I;16"])
def test_every_colour_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    grey = (204, 204, 204) if mode != "1" else (255, 255, 255)  # 204: a colour of Pillow's fixed palette
    image = Image.new("I;16", (5, 4), 204 * 257) if mode == "I;16" else Image.new("RGB", (5, 4), grey).convert(mode)
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image.save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode
    pixels = read_image(path)
    assert pixels.shape == (3, 4, 5)
    assert pixels.dtype == torch.uint8
    assert (pixels.int() - grey[0]).abs().max() <= 2


def test_transparent_palette_entries_keep_their_colour(tmp_path: Path) -> None:
    image = Image.new("P", (2, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    image.save(tmp_path / "image.png", transparency=1)
    assert read_image(tmp_path / "image.png")[:, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("mode", ["L", "P", "CMYK"])
def test_colours_are_those_of_pillow(tmp_path: Path, mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    path = tmp_path / ("image.png" if mode == "P" else "image.jpg")
    Image.fromarray(pixels).convert(mode).save(path)
    with Image.open(path) as stored:
        assert stored.mode == mode
        expected = np.array(stored.convert("RGB"))
    assert np.array_equal(read_image(path).permute(1, 2, 0).numpy(), expected)


def write_sideways(path: Path) -> None:
    """A phone's photo, held upright: 6 x 4 stored pixels, red on the left, to be turned clockwise for viewing."""
    image = Image.new("RGB", (6, 4))
    image.paste((255, 0, 0), (0, 0, 3, 4))
    exif = image.getexif()
    exif[0x0112] = 6
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, exif=exif, quality=100, subsampling=0)


def test_exif_orientation_is_not_applied_where_boxes_refer_to_stored_pixels(voc: Path, tmp_path: Path) -> None:
    write_sideways(photo_of(voc, "b1"))
    assert load_voc(voc, "2007", "trainval").image(0).shape == (3, 4, 6)
    write_coco(tmp_path)
    write_sideways(tmp_path / "val2014" / "4.jpg")
    assert load_coco(tmp_path, "val2014").image(0).shape == (3, 4, 6)


def test_exif_orientation_is_applied_to_photos_of_a_table(tmp_path: Path) -> None:
    write_sideways(tmp_path / "one.jpg")
    (tmp_path / "labels.csv").write_text("path,labels\none.jpg,dog\n")
    images = load_table(tmp_path / "labels.csv")
    red = images.image(0)[0] > 128
    assert red.shape == (6, 4)
    assert red[:3].all()  # what was on the left is at the top
    assert not red[3:].any()
    assert prepare(images) != prepare(dataclasses.replace(images, upright=False))


# ---- names


def test_unknown_names_splits_and_options_list_the_known_ones(voc: Path) -> None:
    with pytest.raises(ConfigError, match="scenes, voc2007, voc2012, coco2014, table"):
        load_image_set("voc2008", "train", voc)
    with pytest.raises(ConfigError, match="choose one of train, test"):
        load_image_set("voc2007", "trainval", voc)
    with pytest.raises(ConfigError, match="num_train, num_test, side, seed"):
        load_image_set("scenes", "train", voc, colour="red")


@pytest.mark.parametrize("name", ["voc2007", "voc2012", "coco2014", "table"])
@pytest.mark.parametrize("present", [True, False])
def test_missing_data_says_what_was_expected_and_how_to_name_it(tmp_path: Path, name: str, present: bool) -> None:
    root = tmp_path / "data"
    if present:
        root.mkdir()
    with pytest.raises(DataError) as caught:
        load_image_set(name, "train", root)
    assert str(root) in str(caught.value)
    assert "MCAR_DATA" in str(caught.value)
    assert "--data-root" in str(caught.value)


def test_logical_splits_map_to_the_published_ones(voc: Path) -> None:
    write_voc(voc, {"t1": {"dog": 1}}, split="test")
    assert load_image_set("voc2007", "train", voc).title == "VOC2007 trainval, subset of 3 of 5,011 images"
    assert load_image_set("voc2007", "test", voc).ids == ("t1",)


# ---- scenes, with a stand-in for the composer


def stand_in(monkeypatch: pytest.MonkeyPatch, fail: bool = False) -> list[Path]:
    @dataclasses.dataclass(frozen=True)
    class ScenesConfig:
        num_train: int = 2
        seed: int = 0

    written: list[Path] = []

    def write_scenes(root: Path, config: ScenesConfig, progress: object = None) -> Path:
        if fail:
            raise OSError("disk full")
        written.append(root)
        write_voc(root, {f"s{number}": {"dog": 1} for number in range(config.num_train)})
        return root

    module = types.ModuleType("mcar_lib.data.scenes")
    vars(module).update(SCENES_VERSION=1, ScenesConfig=ScenesConfig, write_scenes=write_scenes)
    monkeypatch.setitem(sys.modules, "mcar_lib.data.scenes", module)
    return written


def test_scenes_are_written_once_for_each_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written = stand_in(monkeypatch)
    root = tmp_path / "new"
    assert load_image_set("scenes", "train", root).title == "scenes trainval"
    assert len(load_image_set("scenes", "train", root, num_train=2)) == 2
    assert len(written) == 1
    assert len(load_image_set("scenes", "train", root, num_train=3)) == 3
    assert len(written) == 2
    assert len([path for path in root.iterdir() if path.name.startswith("scenes-")]) == 2


def test_scenes_that_cannot_be_written_name_the_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stand_in(monkeypatch, fail=True)
    with pytest.raises(DataError, match=r"cannot write scenes here .*disk full"):
        load_image_set("scenes", "train", tmp_path)


@pytest.mark.skipif(find_spec("qtawesome") is None, reason="the scenes are drawn with the fonts of qtawesome")
def test_composed_scenes_are_read_as_voc(tmp_path: Path) -> None:
    options = {"num_train": 3, "num_test": 2, "side": 64, "seed": 1}
    train, test = (load_image_set("scenes", split, tmp_path, **options) for split in ("train", "test"))
    assert (len(train), len(test)) == (3, 2)
    assert train.classes == VOC_CLASSES
    assert train[0][0].shape == (3, 64, 64)
    assert len(train.boxes(0)) >= 1
    assert prepare(train) != prepare(test)


# ---- tables


def write_table(folder: Path, text: str) -> Path:
    for seed, name in enumerate(("one.png", "two.png", "three.png")):
        write_photo(folder / name, seed)
    (folder / "labels.csv").write_text(text, encoding="utf-8-sig")
    return folder / "labels.csv"


TABLE = "path,labels,split\none.png,dog; cat,train\ntwo.png,,train\nthree.png,bird,test\n"


def test_table_of_own_images(tmp_path: Path) -> None:
    write_table(tmp_path, TABLE)
    train, test = (load_image_set("table", split, tmp_path) for split in ("train", "test"))
    assert train.classes == test.classes == ("bird", "cat", "dog")
    assert train.targets.tolist() == [[0, 1, 1], [0, 0, 0]]
    assert test.ids == ("three.png",)
    assert len(prepare(train)) == 16
    assert len(load_table(tmp_path / "labels.csv")) == 3
    with pytest.raises(DataError, match="has no boxes"):
        train.boxes(0)


def test_table_options_reach_the_table(tmp_path: Path) -> None:
    write_table(tmp_path / "photos", "")
    (tmp_path / "mine.csv").write_text("path,labels,split\none.png,dog,train\n")
    options = {"csv": "mine.csv", "image_root": tmp_path / "photos", "classes": ("dog", "cow")}
    train = load_image_set("table", "train", tmp_path, **options)
    assert train.classes == ("dog", "cow")
    assert train[0][1].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("text", "split", "message"),
    [
        ("path,labels\none.png,dog\n", "train", "no column split"),
        ("", None, "no column path, labels"),
        ("path,labels\n", None, "no images"),
        (TABLE, "val", "no images of the split 'val'; splits found: test, train"),
        ("path,labels\n,dog\n", None, "row 2: the path is empty"),
        ("path,labels\none.png,dog\ntwo.png\n", None, "row 3: two.png has no labels column"),
        ("path,labels\none.png,dog,cat\n", None, "row 2: one.png has too many columns"),
        ("path,labels\none.png,dog\ntwo.png,\none.png,\n", None, "row 4: one.png is already listed in row 2"),
        ("path,labels\none.png,\n", None, "no labels at all"),
        ('path,labels\n"one.png,dog\n', None, "cannot read this table as a CSV file"),
    ],
)
def test_broken_tables_are_reported_by_row(tmp_path: Path, text: str, split: str | None, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load_table(write_table(tmp_path, text), split)


def test_table_label_outside_the_given_classes(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 4: unknown class 'bird'; classes: cat, dog"):
        load_table(write_table(tmp_path, TABLE), classes=("cat", "dog"))


# ---- COCO


def write_coco(root: Path, **changes: object) -> Path:
    content: dict[str, object] = {
        "images": [{"id": n, "file_name": f"{n}.jpg", "width": 12, "height": 10} for n in (30, 4, 7)],
        "categories": [{"id": 9, "name": "zebra"}, {"id": 2, "name": "apple"}],
        "annotations": [
            {"id": 1, "image_id": 30, "category_id": 9, "bbox": [1.2, 2.0, 3.1, 4.5], "iscrowd": 0},
            {"id": 2, "image_id": 4, "category_id": 2, "bbox": [11.0, 9.0, 0, 5.0], "iscrowd": 1},
            {"id": 3, "image_id": 30, "category_id": 9, "bbox": [0, 0, 12, 10]},
        ],
    }
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    path = root / "annotations" / "instances_val2014.json"
    path.write_text(json.dumps(content | changes))
    return path


def test_coco_order_crowds_and_unlabelled_images(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_coco(tmp_path)
    images = load_coco(tmp_path, "val2014", ("apple", "zebra"))
    assert images.classes == ("apple", "zebra")
    assert images.ids == ("4", "30")
    assert images.paths == (tmp_path / "val2014" / "4.jpg", tmp_path / "val2014" / "30.jpg")
    assert images.targets.tolist() == [[1, 0], [0, 1]]
    assert images.boxes(0).difficult.tolist() == [True]
    assert images.boxes(0).xyxy.tolist() == [[11, 9, 12, 10]]
    assert images.boxes(1).xyxy.tolist() == [[1, 2, 5, 7], [0, 0, 12, 10]]
    assert capsys.readouterr().out == ""


def test_coco_has_its_80_classes_whatever_the_file_lacks(tmp_path: Path) -> None:
    write_coco(tmp_path)
    images = load_coco(tmp_path, "val2014")
    assert images.classes == COCO_CLASSES
    assert [images.classes[column] for column in images.targets.nonzero()[:, 1]] == ["apple", "zebra"]


def test_coco_categories_beyond_its_80_are_named_with_the_file(tmp_path: Path) -> None:
    path = write_coco(tmp_path, categories=[{"id": 9, "name": "zebra"}, {"id": 2, "name": "unicorn"}, {"id": 3}])
    with pytest.raises(DataError, match="2 problems") as caught:
        load_coco(tmp_path, "val2014")
    assert str(path) in str(caught.value)
    assert "category 2: 'unicorn' is not among the 80 classes; fetch the published file again" in str(caught.value)


def test_coco_annotations_that_fit_nothing_are_named(tmp_path: Path) -> None:
    good: dict[str, object] = {"image_id": 4, "category_id": 2, "bbox": [0, 0, 1, 1]}
    broken: list[dict[str, object]] = [
        {"category_id": 91},
        {"image_id": 5},
        {"bbox": [1, 2, 3]},
        {"bbox": None},
        {"bbox": [0, 0, -1, 1]},
    ]
    annotations = [good | {"id": 100 + n} | change for n, change in enumerate(broken)]
    write_coco(tmp_path, annotations=annotations)
    with pytest.raises(DataError, match="5 problems") as caught:
        load_coco(tmp_path, "val2014")
    assert "annotation 100: unknown category id 91" in str(caught.value)
    assert "annotation 101: unknown image id 5" in str(caught.value)
    assert str(caught.value).count("bbox should be") == 3


def test_coco_images_listed_twice_or_without_size_are_named(tmp_path: Path) -> None:
    image = {"id": 4, "file_name": "4.jpg", "width": 12, "height": 10}
    annotation = {"id": 1, "image_id": 4, "category_id": 2, "bbox": [0, 0, 1, 1]}
    images = [image, image, {"id": 8, "file_name": "8.jpg"}]
    write_coco(tmp_path, images=images, annotations=[annotation])
    with pytest.raises(DataError, match="image 4: listed 2 times") as caught:
        load_coco(tmp_path, "val2014")
    assert "image 8: no width, height" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"images": []}', '{"images": [], "annotations": [{}]}'])
def test_files_that_are_no_coco_instances_are_named(tmp_path: Path, text: str) -> None:
    write_coco(tmp_path).write_text(text)
    with pytest.raises(DataError, match=r"instances_val2014\.json"):
        load_coco(tmp_path, "val2014")


# ---- real photos


@pytest.fixture(scope="module", params=["trainval", "test"])
def real_voc(request: pytest.FixtureRequest) -> ImageSet:
    return load_voc(real_voc2007(), "2007", request.param)


def test_real_voc_counts_are_those_of_the_label_files(real_voc: ImageSet) -> None:
    lists = real_voc2007() / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    assert len(real_voc) == {"trainval": 765, "test": 400}[real_voc.split]
    for column, name in enumerate(VOC_CLASSES):
        text = (lists / f"{name}_{real_voc.split}.txt").read_text()
        for label, target in (("1", 1), ("0", -1), ("-1", 0)):
            count = len(re.findall(rf"^\S+ +{label}$", text, flags=re.MULTILINE))
            assert int((real_voc.targets[:, column] == target).sum()) == count, (name, label)
    assert int((real_voc.targets == -1).sum()) > 0
    assert real_voc.is_subset


def test_real_voc_boxes_lie_in_the_image_and_agree_with_the_labels(real_voc: ImageSet) -> None:
    for index in range(len(real_voc)):
        boxes = real_voc.boxes(index)
        with Image.open(real_voc.paths[index]) as image:
            width, height = image.size
        assert boxes.xyxy.min() >= 0
        assert (boxes.xyxy[:, :2] < boxes.xyxy[:, 2:]).all()
        assert (boxes.xyxy[:, 2:] <= torch.tensor([width, height])).all()
        expected = torch.zeros(20, dtype=torch.int8)
        expected[boxes.classes[boxes.difficult]] = -1
        expected[boxes.classes[~boxes.difficult]] = 1
        assert torch.equal(real_voc.targets[index], expected), real_voc.ids[index]


def test_real_voc_passes_the_check(real_voc: ImageSet) -> None:
    assert len(prepare(real_voc)) == 16


def test_real_coco_classes_labels_and_boxes() -> None:
    root = real_coco2014()
    images = load_image_set("coco2014", "test", root)
    assert images.title == "COCO2014 val2014, subset of 299 of 40,137 images"
    assert [images.classes[index] for index in (0, 49, 79)] == ["airplane", "person", "zebra"]
    assert len(images.classes) == 80
    assert int(images.targets.sum(1).min()) >= 1
    content = json.loads((root / "annotations" / "instances_val2014.json").read_text())
    names = {category["id"]: category["name"] for category in content["categories"]}
    pairs = {(str(item["image_id"]), names[item["category_id"]]) for item in content["annotations"]}
    found = {(images.ids[row], images.classes[column]) for row, column in images.targets.nonzero().tolist()}
    assert found == pairs
    for index in range(len(images)):
        boxes = images.boxes(index)
        height, width = images[index][0].shape[1:]
        assert boxes.xyxy.min() >= 0
        assert (boxes.xyxy[:, 2:] <= torch.tensor([width, height])).all()
        assert (boxes.xyxy[:, :2] < boxes.xyxy[:, 2:]).all()


def test_real_coco_image_whose_annotations_are_gone_is_dropped(tmp_path: Path) -> None:
    content = json.loads((real_coco2014() / "annotations" / "instances_train2014.json").read_text())
    dropped = content["images"][0]["id"]
    content["annotations"] = [item for item in content["annotations"] if item["image_id"] != dropped]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train2014.json").write_text(json.dumps(content))
    images = load_coco(tmp_path, "train2014")
    assert len(images) == len(content["images"]) - 1
    assert str(dropped) not in images.ids
