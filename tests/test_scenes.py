"""The composed scenes: deterministic, complete, labelled as they are drawn, and never half-written."""

import hashlib
import importlib.util
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mcar_lib.data import scenes
from mcar_lib.data.scenes import (
    CLASSES,
    DISTRACTORS,
    GLYPHS,
    TEST_ONLY_GLYPHS,
    ScenesConfig,
    draw_scene,
    plan_scene,
    write_scenes,
)
from mcar_lib.data.voc import VOC_CLASSES, load_voc
from mcar_lib.errors import ConfigError, DataError

SMALL = ScenesConfig(num_train=20, num_test=10, side=96, seed=3)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def read_objects(path: Path) -> list[tuple[str, int, tuple[int, ...]]]:
    """(class, difficult, (xmin, ymin, xmax, ymax)) of each object of an annotation file."""
    return [
        (
            node.findtext("name", ""),
            int(node.findtext("difficult", "")),
            tuple(int(node.findtext(f"bndbox/{corner}", "")) for corner in ("xmin", "ymin", "xmax", "ymax")),
        )
        for node in ET.parse(path).iter("object")
    ]


@pytest.fixture(scope="module")
def voc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_scenes(tmp_path_factory.mktemp("scenes"), SMALL) / "VOC2007"


def test_same_config_gives_the_same_bytes(voc: Path, tmp_path: Path) -> None:
    assert digests(write_scenes(tmp_path, SMALL)) == digests(voc.parent)


def test_an_image_depends_on_seed_split_and_index_only() -> None:
    def pixels(seed: int, split: str, index: int) -> bytes:
        config = ScenesConfig(num_train=1 + index, num_test=1, side=64, seed=seed)
        return draw_scene(plan_scene(config, split, index), config.side)[0].tobytes()

    assert pixels(1, "test", 0) == pixels(1, "test", 0)
    images = {pixels(seed, split, index) for seed in (1, 2) for split in scenes.SPLITS for index in (0, 1)}
    assert len(images) == 8


def test_tree_has_one_image_and_one_annotation_per_listed_id(voc: Path) -> None:
    lists = {
        split: (voc / f"ImageSets/Main/{split}.txt").read_text().split()
        for split in ("trainval", "train", "val", "test")
    }
    assert {split: len(ids) for split, ids in lists.items()} == {
        "trainval": 20,
        "train": 16,
        "val": 4,
        "test": 10,
    }
    assert sorted(lists["train"] + lists["val"]) == lists["trainval"]
    ids = lists["trainval"] + lists["test"]
    assert ids == [f"{number:06d}" for number in range(1, 31)]
    assert sorted(path.stem for path in (voc / "JPEGImages").iterdir()) == ids
    assert sorted(path.stem for path in (voc / "Annotations").iterdir()) == ids
    with Image.open(voc / "JPEGImages/000001.jpg") as image:
        assert (image.size, image.mode) == ((96, 96), "RGB")


def test_boxes_lie_inside_the_image(voc: Path) -> None:
    for path in (voc / "Annotations").iterdir():
        objects = read_objects(path)
        assert objects
        for name, _, (xmin, ymin, xmax, ymax) in objects:
            assert name in CLASSES
            assert 1 <= xmin <= xmax <= 96
            assert 1 <= ymin <= ymax <= 96


@pytest.mark.parametrize("split", ["trainval", "train", "val", "test"])
def test_class_lists_agree_with_the_annotations(voc: Path, split: str) -> None:
    ids = (voc / f"ImageSets/Main/{split}.txt").read_text().split()
    objects = {image_id: read_objects(voc / f"Annotations/{image_id}.xml") for image_id in ids}
    for name in CLASSES:
        expected = ""
        for image_id in ids:
            flags = {difficult for found, difficult, _ in objects[image_id] if found == name}
            label = " 1" if 0 in flags else " 0" if flags else "-1"
            expected += f"{image_id} {label}\n"
        assert (voc / f"ImageSets/Main/{name}_{split}.txt").read_text() == expected


def test_a_class_with_difficult_instances_only_is_listed_as_zero(tmp_path: Path) -> None:
    def cat(difficult: bool) -> scenes.Annotation:
        return scenes.Annotation("cat", (1, 1, 9, 9), truncated=False, difficult=difficult)

    annotations = {"000001": [cat(True)], "000002": [cat(True), cat(False)], "000005": []}
    scenes._write_lists(tmp_path, "test", annotations)
    assert (tmp_path / "cat_test.txt").read_text() == "000001  0\n000002  1\n000005 -1\n"


def test_the_voc_reader_reads_the_tree(voc: Path) -> None:
    image_set = load_voc(voc.parent.parent, "2007", "test", name="scenes", official_size=None)
    assert len(image_set) == 10
    assert CLASSES == VOC_CLASSES


def test_glyphs_of_the_test_split_are_never_in_training_scenes() -> None:
    config = ScenesConfig()
    drawn = {split: Counter[scenes.Glyph]() for split in scenes.SPLITS}
    for split in scenes.SPLITS:
        for index in range(400):
            plan = plan_scene(config, split, index)
            drawn[split].update(item.glyph for item in plan if item.class_name is not None)
    assert not TEST_ONLY_GLYPHS & set(drawn["trainval"])
    assert len(TEST_ONLY_GLYPHS & set(drawn["test"])) > 0.8 * len(TEST_ONLY_GLYPHS)


def test_every_class_has_six_glyphs_and_a_third_of_them_at_most_for_test() -> None:
    for name, glyphs in GLYPHS.items():
        kept = [glyph for glyph in glyphs if glyph in TEST_ONLY_GLYPHS]
        assert len(set(glyphs)) == len(glyphs) >= 6, name
        assert 1 <= len(kept) <= len(glyphs) / 3, name
    everything = [glyph for glyphs in GLYPHS.values() for glyph in glyphs] + DISTRACTORS
    assert len(set(everything)) == len(everything)  # a glyph of two classes would be a wrong label


def test_every_glyph_draws_something_of_its_own() -> None:
    shapes = set()
    glyphs = [glyph for glyphs in GLYPHS.values() for glyph in glyphs] + DISTRACTORS
    for glyph in glyphs:
        ink, solid = scenes._icon(glyph)
        assert max(ink.size) > 150, glyph
        assert (np.asarray(solid) >= np.asarray(ink)).all(), glyph
        assert 0.05 < np.asarray(ink).mean() / 255 < 0.95, glyph
        shapes.add((ink.size, ink.tobytes()))
    assert len(shapes) == len(glyphs)  # a missing icon would be the same empty box as another


def test_labels_say_what_is_visible() -> None:
    def square(name: str, extent: float, centre: tuple[float, float]) -> scenes.SceneObject:
        glyph = ("fa6", "square")
        return scenes.SceneObject(name, glyph, extent, centre, 0.0, False, 0.0, (0.0, 0.0), True, False, seed=1)

    hidden, partly, small, outside, cover = (
        square("cat", 0.2, (0.3, 0.3)),
        square("dog", 0.4, (0.42, 0.3)),
        square("cow", 0.05, (0.8, 0.8)),
        square("bus", 0.3, (1.0, 0.2)),
        square("car", 0.4, (0.3, 0.3)),
    )
    _, labels = draw_scene([hidden, partly, small, outside, cover], 200)
    found = {label.class_name: label for label in labels}
    assert set(found) == {"dog", "cow", "bus", "car"}
    assert found["bus"].truncated
    assert found["bus"].box[2] == 200
    assert not found["car"].truncated
    assert found["cow"].difficult
    assert not found["car"].difficult
    assert found["dog"].difficult
    assert found["dog"].box[0] > found["car"].box[2] - 10
    assert found["dog"].box[2] in range(121, 126)


def test_a_finished_tree_is_not_drawn_again(voc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("drawn again")

    monkeypatch.setattr(scenes, "draw_scene", fail)
    assert write_scenes(voc.parent.parent, SMALL) == voc.parent


def test_another_config_needs_another_folder(voc: Path) -> None:
    before = digests(voc.parent)
    with pytest.raises(DataError, match="choose another folder"):
        write_scenes(voc.parent.parent, ScenesConfig(num_train=20, num_test=10, side=96, seed=4))
    assert digests(voc.parent) == before


def test_a_foreign_tree_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "VOCdevkit").mkdir()
    (tmp_path / "VOCdevkit/photo.jpg").write_bytes(b"mine")
    with pytest.raises(DataError, match="choose another folder"):
        write_scenes(tmp_path, SMALL)
    assert list(digests(tmp_path / "VOCdevkit")) == ["photo.jpg"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_an_interrupted_build_leaves_nothing_and_can_be_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    config = ScenesConfig(num_train=3, num_test=2, side=64)

    def stop(done: int, _: int) -> None:
        if done == 3:
            raise error

    with pytest.raises(type(error)):
        write_scenes(tmp_path, config, stop)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []
    (tmp_path / "VOCdevkit.partial/VOC2007/JPEGImages").mkdir(parents=True)  # as a killed process leaves it
    steps: list[tuple[int, int]] = []
    devkit = write_scenes(tmp_path, config, lambda done, total: steps.append((done, total)))
    assert steps == [(done, 5) for done in range(1, 6)]
    assert len(list((devkit / "VOC2007/JPEGImages").iterdir())) == 5
    assert not (tmp_path / "VOCdevkit.partial").exists()


def test_missing_fonts_are_an_error_that_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install qtawesome"):
        write_scenes(tmp_path, SMALL)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


@pytest.mark.parametrize("wrong", [{"num_train": 0}, {"num_test": 0}, {"side": 10}, {"seed": -1}])
def test_a_config_that_cannot_work_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ScenesConfig(**wrong)


def test_classes_are_long_tailed_and_each_has_enough_examples() -> None:
    config = ScenesConfig()
    for split, number in (("trainval", config.num_train), ("test", config.num_test)):
        images: Counter[str] = Counter()
        for index in range(number):
            images.update({item.class_name for item in plan_scene(config, split, index) if item.class_name})
        assert images.most_common(1)[0][0] == "person"
        assert images["person"] > 4 * min(images[name] for name in CLASSES)
        assert min(images[name] for name in CLASSES) >= 20
