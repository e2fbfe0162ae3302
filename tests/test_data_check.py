"""What a check of the data finds before hours of training: errors that stop, doubts that are told, no traceback."""

import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from mutations import mutated
from PIL import Image
from test_cli import mcar
from test_data import lists_of, photo_of, voc_object, write_coco, write_photo, write_table, write_voc

from mcar_lib.data import load_coco, load_image_set, load_table, load_voc, scenes_folder
from mcar_lib.data.preparation import _read_stamp, check_images, doubts_together, share_inside
from mcar_lib.errors import ConfigError, DataError
from mcar_lib.localisation import annotated_objects
from mcar_lib.runs import make_config
from mcar_lib.runs.splits import Splits

# ---- tables


def table(folder: Path, *rows: str) -> Path:
    return write_table(folder, "\n".join(["path,labels,split", *rows, ""]))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("one.png,dog,Train", "two.png,cat,train"), "row 2: the split 'Train' should be spelt train"),
        (("one.png,dog,train", "two.png,cat,TEST "), "row 3: the split 'TEST' should be spelt test"),
        (("one.png,dog,train", "two.png,cat,"), "row 3: two.png has no split; write train or test"),
        (("one.png,dog,train", "two.png,cat"), "row 3: two.png has no split; write train or test"),
        (
            ("one.png,dog,train", "./one.png,dog,test"),
            "row 3: ./one.png is already listed in row 2, in the split train",
        ),
        (('one.png,"dog, cat",train', "two.png,dog;cat,test"), "row 2: the label 'dog, cat' looks like several"),
        (("one.png,dog|cat,train", "two.png,dog,train", "three.png,cat,test"), "separate labels by ';'"),
        (("one.png,\"['dog']\",train",), "row 2: the label \"['dog']\" looks like several"),
        (("one.png,'dog',train",), "row 2: the label \"'dog'\" looks like several"),
    ],
)
def test_rows_that_cannot_be_meant_so_are_errors(tmp_path: Path, rows: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError) as caught:
        load_table(table(tmp_path, *rows), "train")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("rows", "doubt"),
    [
        (
            ("one.png,dog,train", "two.png,cat,valid"),
            "1 of 2 rows are neither in train nor in test, the first is row 3",
        ),
        (("one.png,dog,train", "two.png,Dog,test"), "the classes 'Dog' and 'dog' differ in spelling only"),
        (("one.png,hot dog,train", "two.png,hotdog,test"), "the classes 'hot dog' and 'hotdog' differ in spelling"),
        (("one.png,fox|red,train", "two.png,fox,test"), "row 2: is the label 'fox|red' one, or several"),
        (("one.png,dog cat,train", "two.png,dog;cat,test"), "row 2: is the label 'dog cat' one, or several"),
    ],
)
def test_rows_that_may_be_meant_so_are_doubts(tmp_path: Path, rows: tuple[str, ...], doubt: str) -> None:
    path = table(tmp_path, *rows)
    (told,) = load_table(path, "train").doubts
    assert told.startswith(f"{path}: ")
    assert doubt in told


@pytest.mark.parametrize("rows", [("one.png,rock'n'roll,train",), ('one.png,"beach, sandy",train',)])
def test_unusual_labels_alone_are_no_doubt(tmp_path: Path, rows: tuple[str, ...]) -> None:
    assert load_table(table(tmp_path, *rows), "train").doubts == ()


def test_a_column_that_is_there_twice_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the column labels is there more than once"):
        load_table(write_table(tmp_path, "path,labels,split,labels\none.png,dog,train,cat\n"), "train")


def test_both_unicode_forms_of_a_label_are_one_class(tmp_path: Path) -> None:
    forms = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    images = load_table(table(tmp_path, f"one.png,{forms[0]},train", f"two.png,{forms[1]},train"), "train")
    assert images.classes == (forms[0],)
    assert images.targets.tolist() == [[1], [1]]


def test_classes_of_a_table_can_be_given_to_a_run(tmp_path: Path) -> None:
    table(tmp_path, "one.png,dog,train", "two.png,cat,test")
    config = make_config({"dataset": "table", "data_options": {"classes": ["dog", "cat"]}})
    assert Splits(tmp_path / "artifacts", tmp_path, verbose=False).of(config).train.classes == ("dog", "cat")
    assert config.vary(seed=1).vary(seed=0) == config


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ("table", {"classes": "dog;cat"}, "the option classes should be a list of names"),
        ("table", {"csv": 3}, "the option csv should be the name of a file, found 3"),
        ("scenes", {"num_train": "x"}, "the option num_train should be a whole number, found 'x'"),
        ("scenes", {"side": True}, "the option side should be a whole number"),
        ("scenes", {"num_trian": 3}, "does not know the option num_trian; options: num_train"),
    ],
)
def test_a_wrong_option_of_a_data_set_is_refused_wherever_it_is_given(
    tmp_path: Path, dataset: str, options: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_image_set(dataset, "train", tmp_path, **options)
    if dataset == "scenes":
        with pytest.raises(ConfigError, match=message):
            scenes_folder(tmp_path, **options)


def test_paths_in_options_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    table(tmp_path / "photos", "one.png,dog,train")
    options = {"csv": "~/photos/labels.csv", "image_root": "~/photos"}
    assert load_image_set("table", "train", tmp_path, **options).paths == (tmp_path / "photos" / "one.png",)


# ---- VOC


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    write_voc(tmp_path, {"b1": {"dog": 1}, "a2": {"cat": 1, "dog": 0}})
    return tmp_path


def annotate(root: Path, image_id: str, content: str, encoding: str = "utf-8", declared: str = "") -> Path:
    path = root / "VOCdevkit/VOC2007/Annotations" / f"{image_id}.xml"
    path.write_bytes(
        f'<?xml version="1.0" encoding="{declared or encoding}"?><annotation>{content}</annotation>'.encode(encoding)
    )
    return path


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (voc_object("cat"), "an object of the class cat, and the list of that class says that there is none"),
        ("", "no object of the class dog, and the list of that class says that there is one"),
        (f"<objects>{voc_object('dog')}</objects>", "1 objects stand in other tags; expected each directly in <annot"),
        (voc_object("dog", (0.1, 0.1, 0.8, 0.9)), "the box 0.1 to 0.8 by 0.1 to 0.9 is in fractions of the photo"),
        (voc_object("dog", (100, 100, 120, 120)), "the box [99, 99, 120, 120] of class dog lies outside the photo"),
        (voc_object("dog", (1, 1, 900, 900)), "lies outside the photo, which has 12 x 12 pixels; was it resized?"),
        (voc_object("dog", (float("nan"), 1, 9, 9)), "an object has no complete bndbox"),
    ],
)
def test_annotations_that_contradict_list_or_photo_are_errors(voc: Path, content: str, message: str) -> None:
    annotate(voc, "b1", content)
    with pytest.raises(DataError) as caught:
        check_images(load_voc(voc, "2007", "trainval"))
    assert message in str(caught.value)
    assert "b1" in str(caught.value)


def test_objects_of_another_difficulty_than_the_list_are_a_doubt(voc: Path) -> None:
    path = annotate(voc, "b1", voc_object("dog", difficult=1))
    doubt = "only difficult objects of the class dog, and the list of that class says others too"
    assert f"{path}: {doubt}" in check_images(load_voc(voc, "2007", "trainval")).doubts


def test_a_box_that_reaches_out_of_the_photo_is_a_doubt_and_counts_to_its_edge(voc: Path) -> None:
    annotate(voc, "b1", voc_object("dog", (1, 1, 15, 12)))
    images = load_voc(voc, "2007", "trainval")
    assert any(
        "b1.jpg: the box [0, 0, 15, 12] of class dog reaches out" in doubt for doubt in check_images(images).doubts
    )
    assert annotated_objects(images, 24).boxes[0].tolist() == [0, 0, 24, 24]


@pytest.mark.parametrize("encoding", ["gb2312", "shift_jis", "utf-8-sig", "utf-16"])
def test_annotations_in_any_encoding_that_python_knows_are_read(voc: Path, encoding: str) -> None:
    annotate(voc, "b1", f"<folder>中国</folder>{voc_object('dog')}", encoding, encoding.removesuffix("-sig"))
    assert len(load_voc(voc, "2007", "trainval").boxes(0)) == 1


def test_an_annotation_in_an_unknown_encoding_is_named(voc: Path) -> None:
    annotate(voc, "b1", voc_object("dog"), declared="utf8mb4")
    with pytest.raises(DataError, match=r"b1\.xml: cannot read the annotation \(unknown encoding: utf8mb4\)"):
        check_images(load_voc(voc, "2007", "trainval"))


def test_lists_with_a_byte_order_mark_and_files_of_other_systems_beside_them_are_read(voc: Path) -> None:
    expected = load_voc(voc, "2007", "trainval")
    for path in lists_of(voc).glob("*.txt"):
        path.write_text(path.read_text(), encoding="utf-8-sig")
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7")
    (lists_of(voc) / "Thumbs.db").write_bytes(b"\xd0\xcf")
    found = load_voc(voc, "2007", "trainval")
    assert (found.ids, found.targets.tolist()) == (expected.ids, expected.targets.tolist())


# ---- COCO

GOOD: dict[str, object] = {"id": 1, "image_id": 30, "category_id": 9, "bbox": [1, 1, 5, 5]}


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("annotations", {"bbox": [float("nan"), 1, 2, 2]}, "annotation 1: bbox should be [x, y, width, height], found"),
        ("annotations", {"bbox": [1, 1, float("inf"), 2]}, "annotation 1: bbox should be"),
        ("annotations", {"bbox": ["1", "1", "2", "2"]}, "annotation 1: bbox should be"),
        ("annotations", {"bbox": "1 1 2 2"}, "annotation 1: bbox should be"),
        ("annotations", {"bbox": [50, 50, 2, 2]}, "annotation 1: bbox [50, 50, 2, 2] lies outside image 30"),
        ("annotations", {"bbox": [0.1, 0.1, 0.5, 0.5]}, "every bbox is in fractions of the image's sides"),
        ("annotations", {"image_id": [30]}, "annotations[0]: id, image_id, category_id should be ids, found image_id"),
        ("images", {"width": "12"}, "image 30: width and height should be whole numbers of pixels, found '12', 10"),
        ("images", {"width": 0}, "image 30: width and height should be whole numbers of pixels, found 0, 10"),
        ("images", {"file_name": 3}, "image 30: file_name should be the name of a file, found 3"),
    ],
)
def test_wrong_entries_of_a_coco_file_are_named(
    tmp_path: Path, part: str, change: dict[str, object], message: str
) -> None:
    content = {"annotations": GOOD, "images": {"id": 30, "file_name": "30.jpg", "width": 12, "height": 10}}
    content[part] = content[part] | change
    path = write_coco(tmp_path, **{name: [item] for name, item in content.items()})
    with pytest.raises(DataError) as caught:
        load_coco(tmp_path, "val2014")
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("box", "doubt"),
    [
        ([1, 1, 0, 5], "has no area; it counts as a pixel"),
        ([1, 1, 14, 5], "reaches out of image 30, which has 12 x 10 pixels"),
    ],
)
def test_odd_boxes_of_coco_are_doubts(tmp_path: Path, box: list[float], doubt: str) -> None:
    path = write_coco(tmp_path, annotations=[GOOD, GOOD | {"id": 2, "bbox": box}])
    assert load_coco(tmp_path, "val2014").doubts == (f"{path}: annotation 2: bbox {box} {doubt}",)


def test_a_coco_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    path = write_coco(tmp_path)
    path.write_text(path.read_text(), encoding="utf-8-sig")
    assert len(load_coco(tmp_path, "val2014")) == 2


@pytest.mark.parametrize(
    ("box", "share"), [((0, 0, 4, 4), 1), ((-1, 0, 11, 10), 1), ((5, 0, 15, 10), 0.5), ((10, 0, 12, 5), 0)]
)
def test_share_of_a_box_inside_a_photo(box: tuple[int, ...], share: float) -> None:
    assert share_inside(box, 10, 10) == share


# ---- photos, splits and stamps


def test_a_photo_of_one_colour_is_a_doubt(voc: Path) -> None:
    Image.new("RGB", (12, 12), (9, 8, 7)).save(photo_of(voc, "b1"))
    assert (
        f"{photo_of(voc, 'b1')}: the photo is of one colour" in check_images(load_voc(voc, "2007", "trainval")).doubts
    )


def test_a_photo_that_two_splits_share_is_a_doubt_under_any_name(tmp_path: Path) -> None:
    table(tmp_path, "one.png,dog,train", "two.png,dog,test", "copy.png,dog,test")
    (tmp_path / "copy.png").write_bytes((tmp_path / "one.png").read_bytes())
    splits = [load_image_set("table", split, tmp_path) for split in ("train", "test")]
    doubts = doubts_together([(images, check_images(images)) for images in splits])
    assert doubts == (f"{tmp_path}/copy.png: the same photo is in the split train: {tmp_path}/one.png",)


def test_a_class_that_no_image_shows_is_a_doubt(tmp_path: Path) -> None:
    table(tmp_path, "one.png,dog;cat,train", "two.png,dog,test", "three.png,,test")
    (doubt,) = check_images(load_image_set("table", "test", tmp_path)).doubts
    assert doubt == "table test: no image shows cat; where this split is scored, mAP is over the 1 others"


def test_a_stamp_keeps_the_doubts(voc: Path, tmp_path: Path) -> None:
    Image.new("RGB", (12, 12)).save(photo_of(voc, "b1"))
    images, steps = load_voc(voc, "2007", "trainval"), []
    first = check_images(images, tmp_path / "checked")
    again = check_images(images, tmp_path / "checked", lambda done, _: steps.append(done))
    assert again == first
    assert any("of one colour" in doubt for doubt in again.doubts)
    assert not steps


def test_a_damaged_stamp_is_not_believed(voc: Path, tmp_path: Path) -> None:
    Image.new("RGB", (12, 12)).save(photo_of(voc, "b1"))
    images = load_voc(voc, "2007", "trainval")
    check_images(images, tmp_path / "checked")
    (stamp,) = (tmp_path / "checked").iterdir()
    good, known = stamp.read_bytes(), _read_stamp(stamp, images)
    assert known is not None
    passed_over = 0
    for content in mutated(good):
        stamp.write_bytes(content)
        found = _read_stamp(stamp, images)
        assert found in (None, known)
        passed_over += found is None
    assert passed_over > 300


def test_a_data_set_with_a_broken_stamp_is_checked_anew(voc: Path, tmp_path: Path) -> None:
    images = load_voc(voc, "2007", "trainval")
    expected = check_images(images, tmp_path / "checked")
    (stamp,) = (tmp_path / "checked").iterdir()
    stamp.write_text(stamp.read_text().replace(expected.fingerprint, "0" * 16))
    assert check_images(images, tmp_path / "checked") == expected


def test_a_run_tells_doubts_in_one_line_and_which_classes_make_up_map(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table(tmp_path, "one.png,dog;cat,train", "two.png,dog,test", "three.png,dog,valid")
    Splits(tmp_path / "artifacts", tmp_path).of(make_config({"dataset": "table"}))
    assert capsys.readouterr().out.splitlines() == [
        "table: 2 doubts about the data; mcar data check tells them",
        "table test: mAP is over the 1 of 2 classes that have positives",
    ]


def test_data_check_prints_ten_doubts_and_counts_all(tmp_path: Path) -> None:
    rows = [f"{number}.png,dog,train" for number in range(12)]
    for number in range(12):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
    table(tmp_path, *rows, "one.png,dog,test")
    done = mcar("data", "check", "table", "--data-root", tmp_path, "--artifacts", tmp_path / "artifacts")
    assert done.exit_code == 0, done.output
    assert "12 doubts" in done.output
    assert done.output.count("of one colour") == 10
    assert "... and 2 more" in done.output


# ---- damaged files


def write_tiny_table(root: Path) -> Path:
    return table(root, "one.png,dog;café,train", "two.png,,train", "three.png,dog,test")


def write_tiny_coco(root: Path) -> Path:
    for split in ("train2014", "val2014"):
        path = write_coco(root)
        path.rename(path.with_name(f"instances_{split}.json"))
        for number in (4, 30):
            write_photo(root / split / f"{number}.jpg", number)
    return root / "annotations" / "instances_train2014.json"


def write_tiny_voc(root: Path) -> Path:
    write_voc(root, {"t1": {"dog": 1}}, "test")
    write_voc(root, {"b1": {"dog": 1}, "a2": {"cat": 1, "dog": 0}})
    return root / "VOCdevkit/VOC2007"


READERS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "table": ("table", write_tiny_table),
    "coco": ("coco2014", write_tiny_coco),
    "voc xml": ("voc2007", lambda root: write_tiny_voc(root) / "Annotations/a2.xml"),
    "voc list": ("voc2007", lambda root: write_tiny_voc(root) / "ImageSets/Main/trainval.txt"),
    "voc labels": ("voc2007", lambda root: write_tiny_voc(root) / "ImageSets/Main/dog_trainval.txt"),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_damaged_file_is_read_or_answered_with_one_error(tmp_path: Path, reader: str) -> None:
    dataset, write = READERS[reader]
    path, answers = write(tmp_path), []
    for content in mutated(path.read_bytes()):
        path.write_bytes(content)
        try:
            check_images(load_image_set(dataset, "train", tmp_path))
        except DataError as error:
            answers.append(str(error))
    assert len(answers) > 50
    assert max(len(answer.splitlines()) for answer in answers) <= 12
    assert all(str(tmp_path) in answer for answer in answers)


@pytest.mark.parametrize("reader", ["table", "coco", "voc xml", "voc list"])
def test_data_check_ends_with_exit_code_3_for_a_cut_file(tmp_path: Path, reader: str) -> None:
    dataset, write = READERS[reader]
    path = write(tmp_path)
    path.write_bytes(b'"' + path.read_bytes()[:20])
    done = mcar("data", "check", dataset, "--data-root", tmp_path, "--artifacts", tmp_path / "artifacts")
    assert done.exit_code == 3, done.output
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.output
