"""Photos of one's own: every format is recognised and read alike, what is wrong gets a sentence, a training works."""

import csv
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from real_photos import real_coco2014, real_voc2007
from test_cli import mcar
from test_data import voc_object

from mcar_lib.backbones import build_backbone, weights_fingerprint
from mcar_lib.data.own import HELD_OUT, class_counts, overview, read_own
from mcar_lib.data.preparation import check_images
from mcar_lib.errors import ConfigError, DataError, WeightsError
from mcar_lib.files import shipped
from mcar_lib.runs import RunConfig, Runs, make_config
from mcar_lib.runs.own import check_own, own_config
from mcar_lib.runs.proposal import Cost, _chosen
from mcar_lib.runs.trainer import dry_run

LABELS = {"one.png": ("cat",), "two.png": ("cat", "dog"), "three.png": ("dog",), "four.png": ()}


def photo(path: Path, seed: int = 0, size: tuple[int, int] = (40, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def photos(folder: Path, names: Sequence[str] = tuple(LABELS)) -> None:
    for seed, name in enumerate(names):
        photo(folder / name, seed)


def table(folder: Path, text: str, name: str = "labels.csv", encoding: str = "utf-8") -> Path:
    photos(folder)
    (folder / name).write_bytes(text.encode(encoding))
    return folder


def labels_of(root: Path, **options: object) -> dict[str, tuple[str, ...]]:
    """Photo -> labels, over all parts."""
    return {
        Path(name).name: tuple(np.array(images.classes)[(row == 1).numpy()].tolist())
        for images in read_own(root, **options).parts.values()
        for name, row in zip(images.ids, images.targets, strict=True)
    }


# ---- CSV


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "path,labels\none.png,cat\ntwo.png,cat;dog\nthree.png,dog\nfour.png,\n",
            "labels in 'labels', separated by ';'",
        ),
        ('image,tags\none.png,cat\ntwo.png,"cat, dog"\nthree.png,dog\nfour.png,\n', "separated by ','"),
        ("filename;labels\none.png;cat\ntwo.png;cat|dog\nthree.png;dog\nfour.png;\n", "columns separated by ';'"),
        (
            "img,label_1,label_2\none.png,cat,\ntwo.png,cat,dog\nthree.png,,dog\nfour.png,,\n",
            "labels in the columns label_1, label_2",
        ),
        ("file,cat,dog\none.png,1,0\ntwo.png,1,1\nthree.png,0,1\nfour.png,0,0\n", "a column of 0 and 1 for each of 2"),
        ("Image Path\tcat\tdog\none.png\t1\t-1\ntwo.png\t1\t1\nthree.png\t-1\t1\nfour.png\t-1\t-1\n", "of 0 and 1"),
        ("path,label,label\none.png,cat,\ntwo.png,cat,dog\nthree.png,dog,\nfour.png,,\n", "columns label, label"),
        ("photo of it,what\none.png,cat\ntwo.png,cat;dog\nthree.png,dog\nfour.png,\n", "labels in 'what'"),
        ("path,width,cat,dog\none.png,40,1,0\ntwo.png,40,1,1\nthree.png,40,0,1\nfour.png,40,0,0\n", "not used: width"),
    ],
)
def test_every_dialect_of_csv_gives_the_same_labels_and_is_told(tmp_path: Path, text: str, told: str) -> None:
    root = table(tmp_path, text)
    assert labels_of(root) == LABELS
    assert told in read_own(root).told[0]
    assert "data_options.format=" in read_own(root).told[0]


def test_excels_semicolons_windows_line_ends_backslashes_and_byte_order_mark_work(tmp_path: Path) -> None:
    text = "Path;Labels\r\nmeine fotos\\größe 1.png;cat\r\nmeine fotos\\two.png;cat,dog\r\n"
    root = table(tmp_path, text, "meine labels.csv", "utf-8-sig")
    photo(root / "meine fotos" / "größe 1.png")
    photo(root / "meine fotos" / "two.png", 1)
    own = read_own(root)
    assert labels_of(root) == {"größe 1.png": ("cat",), "two.png": ("cat", "dog")}
    for images in own.parts.values():
        check_images(images)


def test_a_table_names_its_splits_as_others_spell_them(tmp_path: Path) -> None:
    rows = "one.png,cat,Training\ntwo.png,cat;dog,VALID\nthree.png,dog,test\nfour.png,dog,train\n"
    own = read_own(table(tmp_path, "path,labels,subset\n" + rows))
    assert {part: images.ids for part, images in own.parts.items()} == {
        "train": ("one.png", "four.png"),
        "val": ("two.png",),
        "test": ("three.png",),
    }
    assert len(own.told) == 1  # nothing is held out


def test_tables_called_train_and_val_are_the_splits(tmp_path: Path) -> None:
    table(tmp_path, "image_path,labels\none.png,cat\nthree.png,dog\n", "train.csv")
    table(tmp_path, "image_path,labels\ntwo.png,cat;dog\n", "val.csv")
    assert {part: len(images) for part, images in read_own(tmp_path).parts.items()} == {"train": 2, "val": 1}


def test_labels_that_are_numbers_count_through_the_classes(tmp_path: Path) -> None:
    root = table(tmp_path, "path,class_id\none.png,0\ntwo.png,0;1\nthree.png,1\nfour.png,\n")
    assert labels_of(root, classes=["cat", "dog"]) == LABELS


def test_photos_of_a_table_may_lie_in_a_folder_images_beside_it(tmp_path: Path) -> None:
    photos(tmp_path / "images")
    (tmp_path / "labels.csv").write_text("path,labels\none.png,cat\ntwo.png,cat;dog\nthree.png,dog\n")
    own = read_own(tmp_path)
    assert all(path.is_file() for images in own.parts.values() for path in images.paths)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (
            "path,width\none.png,40\ntwo.png,30\n",
            {"label_columns": ["labels"]},
            "no column 'labels', which label_colum",
        ),
        ("labels\ncat\ndog\n", {}, "no column of images; the first line reads labels"),
        (
            "path,width,height\none.png,40,32\ntwo.png,40,32\n",
            {},
            "no column of labels; the first line reads path,width",
        ),
        ("path,labels\none.png,cat\none.png,dog\n", {}, "row 3: one.png is already listed in row 2"),
        (
            "path,labels\none.png,cow\ntwo.png,cat\n",
            {"classes": ["cat"]},
            "row 2: unknown label 'cow'; the classes are",
        ),
        ("path,labels,split\none.png,cat,train\ntwo.png,cat,fold\n", {}, "row 3: the split 'fold' is none of train"),
        ("path,labels\none.png,cat,dog\n", {}, "row 2: 3 columns, the first line has 2; put quotation marks"),
        ("path,labels\n", {}, "the table has no rows below its first line"),
        ("", {}, "the table is empty"),
        ("path,labels\n,cat\n", {}, "row 2: the path of the image is empty"),
        ("path,labels\none.png,\ntwo.png,\n", {}, "no labels at all"),
        ("path,labels,split\none.png,cat,test\n", {}, "no photos for training, only for test"),
        ("path,labels\none.png,cat\n", {}, "too few to hold some out"),
        (
            "path,labels,split\none.png,,train\ntwo.png,cat,val\n",
            {},
            "no photo for training shows any of the 1 classes",
        ),
        ("path,cat,dog\none.png,1,0\ntwo.png,-1,1\n", {}, "columns of classes hold 1, 0 and -1"),
    ],
)
def test_a_table_that_cannot_be_meant_so_gets_a_sentence(
    tmp_path: Path, text: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError) as caught:
        read_own(table(tmp_path, text), **options)
    assert message in str(caught.value)


def test_several_tables_or_an_encoding_of_old_are_told(tmp_path: Path) -> None:
    table(tmp_path / "two", "path,labels\none.png,cat\n", "a.csv")
    table(tmp_path / "two", "path,labels\none.png,cat\n", "b.csv")
    with pytest.raises(DataError, match=re.escape("2 tables (a.csv, b.csv); name the one that is meant")):
        read_own(tmp_path / "two")
    table(tmp_path / "old", "path,labels\none.png,Kätzchen\n", encoding="cp1252")
    with pytest.raises(DataError, match="CSV UTF-8"):
        read_own(tmp_path / "old")


# ---- the other formats


def write_coco(root: Path, name: str = "annotations/instances_train.json", start: int = 0) -> Path:
    names = [f"{start + number}.jpg" for number in range(4)]
    photos(root / "images", names)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    boxes = [(0, 7), (1, 7), (1, 3), (2, 3)]  # image, category
    content = {
        "images": [{"id": n, "file_name": each, "width": 40, "height": 32} for n, each in enumerate(names)],
        "categories": [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}, {"id": 9, "name": "unicorn"}],
        "annotations": [
            {"id": n, "image_id": image, "category_id": kind, "bbox": [2, 3, 10, 20]}
            for n, (image, kind) in enumerate(boxes)
        ],
    }
    (root / name).write_text(json.dumps(content))
    return root / name


def test_coco_files_of_any_categories_keep_boxes_and_photos_without_labels(tmp_path: Path) -> None:
    write_coco(tmp_path)
    write_coco(tmp_path, "annotations/instances_val.json", 10)
    own = read_own(tmp_path)
    train = own.parts["train"]
    assert train.classes == ("cat", "dog", "unicorn")
    assert labels_of(tmp_path)["1.jpg"] == ("cat", "dog")
    assert labels_of(tmp_path)["3.jpg"] == ()
    assert train.boxes(1).xyxy.tolist() == [[2, 3, 12, 23], [2, 3, 12, 23]]
    assert not train.upright
    assert len(own.parts["val"]) == 4
    told = overview(own, {part: check_images(images) for part, images in own.parts.items()})
    assert "no training photo shows unicorn: kept, but not learnt; their scores mean nothing" in told
    assert any("have no label and count as showing no class" in line for line in told)


def test_one_coco_file_can_be_named_and_is_divided(tmp_path: Path) -> None:
    path = write_coco(tmp_path, "export.json")
    assert (
        labels_of(path)
        == labels_of(tmp_path)
        == dict(zip(("0.jpg", "1.jpg", "2.jpg", "3.jpg"), LABELS.values(), strict=True))
    )


def test_a_photo_in_two_folders_of_classes_has_both_labels(tmp_path: Path) -> None:
    for name, seed in (("a.png", 1), ("b.png", 2), ("c.png", 3)):
        photo(tmp_path / "cat" / name, seed)
    shutil.copy(tmp_path / "cat" / "b.png", photo(tmp_path / "dog" / "other name.png").parent / "other name.png")
    photo(tmp_path / "dog" / "a.png", 4)  # another photo of the same name
    (tmp_path / ".DS_Store").write_text("x")
    assert labels_of(tmp_path)["b.png"] == ("cat", "dog")
    own = read_own(tmp_path)
    assert sum(map(len, own.parts.values())) == 4
    assert "1 files are the same photo as another, whose labels are joined" in own.told[0]
    assert own.parts["train"].upright


def test_folders_of_classes_below_folders_of_splits(tmp_path: Path) -> None:
    for part, seed in (("train", 0), ("valid", 10), ("test", 20)):
        for shift, name in enumerate(("cat", "dog")):
            photo(tmp_path / part / name / "1.png", seed + shift)
    own = read_own(tmp_path)
    assert {part: images.ids for part, images in own.parts.items()} == {
        "train": ("train/cat/1.png", "train/dog/1.png"),
        "val": ("valid/cat/1.png", "valid/dog/1.png"),
        "test": ("test/cat/1.png", "test/dog/1.png"),
    }


def write_yolo(root: Path, **described: object) -> Path:
    lines = {
        "one.png": "0 0.5 0.5 0.25 0.5\n",
        "two.png": "0 0.5 0.5 1 1\n1 0.1 0.1 0.3 0.1 0.3 0.4\n",
        "three.png": "1 .5 .5 .2 .2",
    }
    photos(root / "images")
    (root / "labels").mkdir(exist_ok=True)
    for name, text in lines.items():
        (root / "labels" / Path(name).with_suffix(".txt")).write_text(text)
    content = {"path": str(root), "train": "images", "names": {0: "cat", 1: "dog"}, **described}
    (root / "data.yaml").write_text(json.dumps(content))  # which is YAML too
    return root


def test_yolo_photos_show_the_classes_of_their_boxes(tmp_path: Path) -> None:
    root = write_yolo(tmp_path)
    assert labels_of(root) == labels_of(root / "data.yaml") == LABELS
    boxes = {
        Path(images.ids[index]).name: images.boxes(index).xyxy.tolist()
        for images in read_own(root).parts.values()
        for index in range(len(images))
    }
    assert boxes["one.png"] == [[15, 8, 25, 24]]
    assert boxes["two.png"] == [[0, 0, 40, 32], [4, 3, 12, 13]]
    assert boxes["four.png"] == []
    for images in read_own(root).parts.values():
        check_images(images)


def test_yolo_exports_that_say_two_dots_are_found(tmp_path: Path) -> None:
    for part, seed in (("train", 0), ("valid", 5)):
        write_yolo(tmp_path / part)
        (tmp_path / part / "data.yaml").unlink()
        photo(tmp_path / part / "images" / "one.png", seed)
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\ntrain: ../train/images\nval: ../valid/images\n")
    assert {part: len(images) for part, images in read_own(tmp_path).parts.items()} == {"train": 4, "val": 4}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("7 .5 .5 .2 .2", "one.txt:1: class 7 is none of the 2 names, which count from 0"),
        ("0 .5 .5", "one.txt:1: expected a class and the middle and sides of its box, found '0 .5 .5'"),
        ("0 20 30 10 10", "one.txt:1: expected a box in fractions of the photo's sides"),
    ],
)
def test_a_wrong_line_of_a_yolo_label_file_is_named(tmp_path: Path, line: str, message: str) -> None:
    (write_yolo(tmp_path) / "labels" / "one.txt").write_text(line)
    with pytest.raises(DataError) as caught:
        read_own(tmp_path)
    assert message in str(caught.value)


def test_a_voc_tree_of_other_classes_and_only_difficult_objects(tmp_path: Path) -> None:
    (tmp_path / "Annotations").mkdir()
    objects = {"a": voc_object("yak") + voc_object("emu", difficult=1), "b": voc_object("emu"), "c": voc_object("yak")}
    for seed, (name, text) in enumerate(objects.items()):
        (tmp_path / "Annotations" / f"{name}.xml").write_text(f"<annotation>{text}</annotation>")
        photo(tmp_path / "JPEGImages" / f"{name}.png", seed)
    lists = tmp_path / "ImageSets" / "Main"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("a\nb\n")
    (lists / "val.txt").write_text("c\n")
    train = read_own(tmp_path).parts["train"]
    assert train.classes == ("emu", "yak")
    assert train.targets.tolist() == [[-1, 1], [1, 0]]
    assert train.boxes(0).difficult.tolist() == [False, True]
    shutil.rmtree(lists)
    assert sum(len(images) for images in read_own(tmp_path).parts.values()) == 3


@pytest.mark.photos
def test_the_real_voc_tree_is_read_as_the_voc_reader_does() -> None:
    from mcar_lib.data import load_voc

    own = read_own(real_voc2007())
    assert own.format == "voc"
    for part in ("train", "val", "test"):
        theirs, ours = load_voc(real_voc2007(), "2007", part), own.parts[part]
        assert ours.ids == theirs.ids
        assert torch.equal(ours.targets, theirs.targets)
        assert torch.equal(ours.boxes(3).xyxy, theirs.boxes(3).xyxy)


@pytest.mark.photos
def test_the_real_coco_files_are_read_as_the_coco_reader_does() -> None:
    from mcar_lib.data import load_coco

    own = read_own(real_coco2014())
    assert own.format == "coco"
    for part, split in (("train", "train2014"), ("val", "val2014")):
        theirs, ours = load_coco(real_coco2014(), split), own.parts[part]
        assert ours.classes == theirs.classes
        labelled = (ours.targets == 1).any(dim=1)
        assert int(labelled.sum()) == len(theirs)
        assert torch.equal(ours.targets.sum(dim=0), theirs.targets.sum(dim=0))
        assert all(path.is_file() for path in ours.paths)


# ---- recognition


def test_an_empty_folder_a_folder_of_nothing_known_and_no_folder_get_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder is empty\. Known are yolo: a data.yaml"):
        read_own(tmp_path / "empty")
    photo(tmp_path / "flat" / "a.png")
    with pytest.raises(DataError, match="no data set that is known here"):
        read_own(tmp_path / "flat")
    with pytest.raises(DataError, match="no such file or folder"):
        read_own(tmp_path / "nowhere")


def test_a_format_can_be_forced_and_what_else_it_could_be_is_told(tmp_path: Path) -> None:
    root = table(write_yolo(tmp_path), "path,labels\nimages/one.png,bird\nimages/two.png,bird\n")
    assert read_own(root).format == "yolo"
    assert "it could be csv too" in read_own(root).told[0]
    assert read_own(root, format="csv").parts["train"].classes == ("bird",)
    with pytest.raises(DataError, match="not of the format voc, which needs Annotations"):
        read_own(root, format="voc")


# ---- division


def many(root: Path, count: int = 60) -> Path:
    rows = [("path", "labels")]
    for number in range(count):
        photo(root / f"{number}.png", number // 2)  # each photo is there under two names
        labels = [name for name, every in (("often", 2), ("seldom", 10), ("twice", 25)) if number % every < 1]
        rows.append((f"{number}.png", ";".join(labels)))
    with (root / "labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return root


def test_a_fifth_is_held_out_always_the_same_with_copies_together_and_every_class_left(tmp_path: Path) -> None:
    own, again = read_own(many(tmp_path / "a")), read_own(many(tmp_path / "b"))
    train, val = own.parts["train"], own.parts["val"]
    assert val.ids == again.parts["val"].ids
    assert len(val) == pytest.approx(HELD_OUT * 60, abs=4)
    assert ((train.targets == 1).sum(dim=0) > 0).all()
    assert ((val.targets == 1).sum(dim=0) > 0).all()
    groups = [{int(Path(name).stem) // 2 for name in images.ids} for images in (train, val)]
    assert not groups[0] & groups[1]


def test_the_same_photo_in_two_splits_is_told(tmp_path: Path) -> None:
    root = table(tmp_path, "path,labels,split\none.png,cat,train\ntwo.png,cat,val\nthree.png,cat,train\n")
    shutil.copy(root / "one.png", root / "two.png")
    shutil.copy(root / "one.png", root / "three.png")
    own = read_own(root)
    lines = overview(own, {part: check_images(images) for part, images in own.parts.items()})
    assert any("two.png: the same photo is in the split train" in line for line in lines)
    assert any("three.png: the same photo as" in line for line in lines)
    assert any(line.startswith("rare, with fewer than 10 training photos") and "cat (2)" in line for line in lines)
    assert class_counts(own) == {"class": ("cat",), "train": [2], "val": [1]}


# ---- what cannot be read


def damaged(root: Path) -> Path:
    """Thirty photos, of which one is a text and one is not there."""
    rows = "".join(f"{number}.jpg,{'cat' if number % 2 else 'dog'}\n" for number in range(30))
    photos(root, [f"{number}.jpg" for number in range(30)])
    (root / "labels.csv").write_text("path,labels\n" + rows)
    (root / "3.jpg").write_text("this is no photo")
    (root / "4.jpg").unlink()
    return root


OWN = {"dataset": "own", "scored_on": "val"}


def test_photos_that_cannot_be_read_are_listed_or_left_out(tmp_path: Path, open_runs: Callable[..., object]) -> None:
    runs = open_runs(data_root=damaged(tmp_path / "mine"))
    config = make_config(OWN)
    with pytest.raises(DataError) as caught:
        check_own(runs, config)  # type: ignore[arg-type]
    assert "2 photos cannot be read" in str(caught.value)
    assert "3.jpg: not an image file" in str(caught.value)
    assert "4.jpg: cannot read the image file" in str(caught.value)
    found = check_own(runs, config, skip_unreadable=True)  # type: ignore[arg-type]
    assert found.options["without"] == ("3.jpg", "4.jpg")
    assert sum(len(images) for images in found.own.parts.values()) == 28
    chosen = own_config(config, found)
    assert (chosen.num_regions, chosen.learning_rate) == (2, 0.1 * config.learning_rate)  # 2 classes of 20
    assert own_config(config, found, ["learning_rate"]).learning_rate == config.learning_rate


def test_a_photo_of_one_pixel_is_read(tmp_path: Path) -> None:
    root = table(tmp_path, "path,labels,split\none.png,cat,train\ntwo.png,cat,val\n")
    photo(root / "one.png", size=(1, 1))
    own = read_own(root)
    assert any("the photo is of one colour" in doubt for doubt in check_images(own.parts["train"]).doubts)


# ---- the command


def exits(tmp_path: Path, *arguments: str) -> tuple[int, str]:
    done = mcar("train", *arguments, "--results", str(tmp_path / "results"), "--artifacts", str(tmp_path / "artifacts"))
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("path,labels\none.png,cat\none.png,dog\n", 3, "row 3: one.png is already listed in row 2"),
        ("labels\ncat\ndog\n", 3, "no column of images"),
        ("path,labels\none.png,cat\nmissing.png,cat\nthree.png,cat\n", 3, "1 photo cannot be read"),
    ],
)
def test_what_is_wrong_is_a_sentence_and_exit_code_3(tmp_path: Path, text: str, code: int, message: str) -> None:
    found, output = exits(tmp_path, "--data", str(table(tmp_path / "mine", text)))
    assert (found, message in output, "Traceback" in output) == (code, True, False), output


def test_options_that_contradict_data_are_refused(tmp_path: Path) -> None:
    root = str(table(tmp_path / "mine", "path,labels\none.png,cat\n"))
    for more in (["--data-root", root], ["--set", "dataset=table"], ["--set", "scored_on=test"]):
        assert exits(tmp_path, "--data", root, *more)[0] == 2
    assert exits(tmp_path, "--minutes", "3")[0] == 2


@pytest.mark.slow
def test_a_training_on_own_photos_is_told_proposed_scored_and_found_again(tmp_path: Path) -> None:
    root = tmp_path / "mine"
    rows = "".join(f"{n}.jpg,{'cat' if n % 2 else 'dog'},{'test' if n > 22 else 'train'}\n" for n in range(28))
    photos(root, [f"{number}.jpg" for number in range(28)])
    (root / "labels.csv").write_text("path,labels,split\n" + rows)
    asked = ("--data", str(root), "--from", "voc-photos", "--set", "epochs=1", "--set", "image_size=64")
    code, output = exits(tmp_path, *asked)
    assert code == 0, output
    for part in (
        "taken for a CSV table",
        "training photos are held out",
        "rare, with fewer than 10",
        "proposed: 64 px, batch 16, 1 epoch: about",
        "labels are predicted from a score of",
        "the same model on own test, 5 images",
        "next: mcar predict --model ",
    ):
        assert part in output, part
    (record,) = (tmp_path / "results" / "own" / "runs").glob("*.json")
    config = json.loads(record.read_text())["config"]
    assert (config["num_regions"], config["weights"], config["scored_on"]) == (2, "voc-photos", "val")
    code, again = exits(tmp_path, *asked)
    assert "as proposed before for this data" in again
    shutil.rmtree(tmp_path / "artifacts" / "proposals")
    code, again = exits(tmp_path, *asked)
    assert "as in the run of this data that is here" in again
    assert str(record) in again.replace("\n", "")


@pytest.mark.parametrize("option", ["format", "data_options.format"])
def test_own_photos_are_checked_without_a_training(tmp_path: Path, option: str) -> None:
    root = table(tmp_path / "mine", "path,labels\none.png,cat\ntwo.png,cat;dog\nthree.png,dog\n")
    done = mcar("data", "check", "own", "--data-root", str(root), "--set", f"{option}=csv")
    assert done.exit_code == 0, done.output
    assert "taken for a CSV table" in done.output
    assert re.search(r"class +train +val", done.output)


def test_a_link_that_leads_back_is_not_followed(tmp_path: Path) -> None:
    for seed in range(2):
        photo(tmp_path / "cat" / f"{seed}.png", seed)
    (tmp_path / "cat" / "again").symlink_to(tmp_path, target_is_directory=True)
    assert sum(map(len, read_own(tmp_path).parts.values())) == 2


# ---- proposals


def test_a_dry_run_tells_the_time_of_the_whole_run(runs: Runs, tiny_config: RunConfig) -> None:
    found = dry_run(runs.splits, tiny_config.vary(epochs=5, evaluate_every=2))
    assert (found.train_images, found.train_total, found.test_total, found.num_tests) == (16, 24, 16, 3)
    train, test = found.result.train_seconds / 16, found.result.test_seconds / 16
    assert found.total_seconds == pytest.approx(5 * 24 * train + 3 * 16 * test)
    assert any(line.startswith("the whole run: about ") and "3 tests of 16" in line for line in found.lines)


def cost(**changes: object) -> Cost:
    values = {"train_images": 1000, "test_images": 200, "train_seconds": 1e-6, "test_seconds": 5e-7, "memory": 1e3}
    return Cost(**{**values, "fixed_memory": 0, **changes})  # type: ignore[arg-type]


GIB = 2**30


@pytest.mark.parametrize(
    ("changes", "fixed", "seconds", "free", "expected"),
    [
        ({}, (), 1e6, 100 * GIB, (224, 16, 4)),
        ({}, (), 1e6, GIB, (224, 8, 4)),  # 0.8 GiB at a batch of 16, of which 0.7 may be taken
        ({}, (), 60, 100 * GIB, (128, 16, 3)),  # a larger square, and most of the 4 epochs that are wished
        ({}, (), 1, 100 * GIB, (96, 16, 3)),  # longer than asked, which is told
        ({}, ("image_size", "epochs"), 60, 100 * GIB, (448, 16, 60)),
        ({"train_images": 40}, (), 1e6, 100 * GIB, (224, 16, 20)),
        ({"memory": None}, (), 1e6, 0, (224, 16, 4)),
    ],
)
def test_the_largest_size_that_fits_time_and_memory_is_proposed(
    changes: dict[str, object], fixed: Sequence[str], seconds: float, free: int, expected: tuple[int, int, int]
) -> None:
    values, line = _chosen(cost(**changes), make_config({"schedule": "onecycle"}), fixed, seconds, free)
    assert tuple(values.values()) == expected
    assert line.startswith(f"proposed: {expected[0]} px, batch {expected[1]}, {expected[2]} epochs: about")


def test_a_machine_without_the_memory_for_any_gets_a_sentence() -> None:
    with pytest.raises(ConfigError, match=r"96 px in batches of 4 need about 0\.0 GiB"):
        _chosen(cost(), make_config({}), (), 60, 1000)


# ---- starting weights


def test_a_released_models_backbone_is_a_start_and_known_by_its_content(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    file = shipped("models") / "voc-photos.safetensors"
    features = build_backbone("mobilenet_v2", "voc-photos").features.state_dict()
    stored = load_file(file)["features.0.0.weight"]
    assert torch.equal(features["0.0.weight"], stored.float())
    copy = tmp_path / "mine.safetensors"
    shutil.copy(file, copy)
    known = weights_fingerprint("mobilenet_v2", "voc-photos")
    assert known == weights_fingerprint("mobilenet_v2", str(copy)) != weights_fingerprint("mobilenet_v2", "bundled")
    with pytest.raises(WeightsError, match="one of imagenet, bundled, none, voc-photos"):
        weights_fingerprint("mobilenet_v2", "voc-fotos")
    with pytest.raises(WeightsError, match="do not fit"):
        build_backbone("resnet50", "voc-photos")


def test_fewer_classes_than_regions_says_what_to_set(tmp_path: Path, open_runs: Callable[..., object]) -> None:
    rows = "".join(f"{n}.jpg,cat,{'train' if n < 6 else 'val'}\n" for n in range(9))
    photos(tmp_path / "mine", [f"{number}.jpg" for number in range(9)])
    (tmp_path / "mine" / "labels.csv").write_text("path,labels,split\n" + rows)
    runs = open_runs(data_root=tmp_path / "mine")
    small = {"image_size": 64, "epochs": 1, "batch_size": 4, "backbone": "tiny", "weights": "none"}
    config = make_config({**OWN, **small})
    with pytest.raises(ConfigError, match=r"num_regions is 4; own train has 1 classes.* --set num_regions=1, or less"):
        runs.run(config)  # type: ignore[attr-defined]
    assert runs.run(config.vary(num_regions=1)).is_scored  # type: ignore[attr-defined]
