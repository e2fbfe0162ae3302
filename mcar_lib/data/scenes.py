"""Composed scenes: the data set that needs no download.

Each image is a collage of the 20 VOC classes, drawn from the icon fonts that the package qtawesome ships. The
tree has the VOC layout, so that the reader of the real photographs reads it too. Objects are small to medium,
may cover each other or leave the image, and stand among clutter and icons of no class. About a quarter of the
glyphs of each class are kept for the test split.
"""

import colorsys
import importlib.util
import json
import math
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import PIL
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont, ImageOps

from mcar_lib.errors import ConfigError, DataError

# Raise it when the drawing changes: trees of another version are refused.
SCENES_VERSION = 1
MARKER = "scenes.json"
SPLITS = ("trainval", "test")
Glyph = tuple[str, str]  # (font key, icon name)
Floats = NDArray[np.float32]

_FONTS = {
    "fa5": "fontawesome5-solid-webfont",
    "fa6": "fontawesome6-solid-webfont",
    "mdi": "materialdesignicons6-webfont",
    "ph": "phosphor",
    "ri": "remixicon",
}

# class = glyphs of both splits | glyphs of the test split only. "font:icon+part" puts the icon on a drawn
# part; the font "drawn" is the table of shapes below, for classes of which the fonts hold too few icons.
_GLYPH_TABLE = """
aeroplane = fa6:plane fa6:plane-departure fa6:plane-arrival mdi:airplane mdi:airplane-landing
    ph:airplane-fill ph:airplane-tilt-bold ph:airplane-in-flight-fill ri:plane-fill | fa6:jet-fighter
    ph:airplane-tilt-fill ri:flight-takeoff-fill;
bicycle = fa6:bicycle mdi:bicycle mdi:bicycle-basket mdi:bicycle-cargo ph:bicycle-bold ph:bicycle-fill
    ri:bike-fill | mdi:bicycle-penny-farthing ri:bike-line;
bird = fa6:crow fa6:dove mdi:bird mdi:duck mdi:owl mdi:penguin ph:bird-fill ph:bird-bold | fa6:kiwi-bird
    mdi:turkey;
boat = fa6:sailboat fa6:ship mdi:ferry mdi:sail-boat ph:boat-fill ri:ship-2-fill ri:ship-line
    ri:sailboat-line | fa6:ferry ph:boat-bold ri:sailboat-fill;
bottle = fa6:bottle-droplet fa6:bottle-water fa6:wine-bottle mdi:bottle-soda mdi:bottle-soda-classic
    mdi:bottle-tonic mdi:bottle-wine-outline mdi:bottle-tonic-skull mdi:baby-bottle | mdi:bottle-wine
    mdi:bottle-soda-classic-outline mdi:bottle-tonic-plus;
bus = fa6:bus mdi:bus mdi:bus-side mdi:bus-double-decker ph:bus-fill ph:bus-bold ri:bus-2-fill ri:bus-line |
    fa6:bus-simple mdi:bus-articulated-front ri:bus-fill;
car = fa6:car fa6:car-side fa6:taxi mdi:car mdi:car-side mdi:car-sports mdi:car-convertible mdi:car-estate
    mdi:car-pickup ph:car-fill ph:car-bold ri:car-fill ri:taxi-line | fa6:car-rear mdi:car-hatchback
    ph:jeep-fill ri:roadster-fill;
cat = fa6:cat fa5:cat mdi:cat ph:cat-fill drawn:cat-walking drawn:cat-lying | ph:cat-bold
    drawn:cat-from-behind;
chair = fa6:chair mdi:chair-rolling mdi:chair-school mdi:seat mdi:stool mdi:sofa-single ph:armchair-fill |
    mdi:stool-outline mdi:sofa-single-outline drawn:chair-side;
cow = fa6:cow mdi:cow drawn:cow-standing drawn:cow-grazing | drawn:cow-face drawn:cow-walking;
diningtable = mdi:table-furniture mdi:table-picnic drawn:table-round drawn:table-cloth drawn:table-set |
    drawn:table-pedestal drawn:table-oblique;
dog = fa6:dog fa5:dog mdi:dog mdi:dog-side ph:dog-fill | ph:dog-bold mdi:dog-service;
horse = fa6:horse fa5:horse fa6:horse-head mdi:horse ph:horse-fill | mdi:horse-variant ph:horse-bold;
motorbike = fa6:motorcycle fa5:motorcycle mdi:moped mdi:motorbike ri:motorbike-fill ri:e-bike-fill
    ri:e-bike-2-fill | mdi:moped-outline ri:motorbike-line ri:e-bike-line;
person = fa6:person fa6:person-dress fa6:person-walking fa6:person-running fa6:person-hiking
    fa6:child-reaching fa6:user mdi:human-male mdi:human-female mdi:human-handsdown mdi:human-greeting
    mdi:walk mdi:run mdi:karate mdi:account ph:person-fill ph:person-bold ph:person-simple-walk-bold
    ri:walk-fill | fa6:child fa6:person-praying fa6:person-cane mdi:human-female-dance mdi:yoga ri:run-fill
    ri:user-fill;
pottedplant = ri:plant-fill ri:plant-line fa6:seedling+pot mdi:flower+pot mdi:flower-tulip+pot
    mdi:palm-tree+pot ri:cactus-fill+pot | fa6:plant-wilt+pot mdi:cactus+pot mdi:grass+pot;
sheep = mdi:sheep fa6:cloud+sheep mdi:cloud+sheep ri:cloud-fill+ram drawn:sheep-face | ph:cloud-fill+sheep
    fa6:cloud+ram;
sofa = fa6:couch mdi:sofa drawn:sofa-three drawn:sofa-chaise mdi:sofa-outline | fa5:couch drawn:sofa-legs;
train = fa6:train fa6:train-subway fa6:train-tram mdi:train mdi:train-variant mdi:tram mdi:tram-side
    ph:train-fill ph:train-regional-fill ri:train-line ri:subway-fill | mdi:subway-variant
    ph:train-regional-bold ri:train-fill;
tvmonitor = fa6:desktop fa6:tv mdi:desktop-classic mdi:monitor mdi:television mdi:television-classic
    ph:desktop-fill ph:television-bold ph:television-simple-fill ri:tv-line ri:computer-fill | fa6:display
    ph:television-fill ri:tv-fill ri:tv-2-line;
"""

_DISTRACTOR_TABLE = """
fa6:star fa6:heart fa6:gear fa6:arrow-right fa6:bell fa6:key fa6:lightbulb fa6:umbrella fa6:music fa6:gift
fa6:lock fa6:scissors fa6:moon fa6:sun fa6:bolt fa6:flag fa6:fire fa6:puzzle-piece fa6:snowflake fa6:crown
fa6:camera fa6:clock fa6:envelope fa6:glasses fa6:hammer fa6:pen fa6:phone fa6:trophy fa6:wrench fa6:fish
fa6:frog fa6:spider fa6:rocket fa6:tree fa6:anchor fa6:bed fa6:guitar fa6:tractor fa6:house fa6:mug-hot
mdi:rabbit mdi:elephant mdi:turtle mdi:lamp mdi:fridge mdi:hat-fedora mdi:tent mdi:mushroom
ph:arrow-bend-up-left-bold ri:scissors-fill ri:compass-3-fill ri:basketball-line
"""

# name = shapes on a 24 x 24 grid: "e" ellipse in a box, "p" polygon, "l" line of a width; "-" in front cuts
# out; "icon" is the box that a font's icon is fitted into.
_SHAPE_TABLE = """
cat-walking = e 5 10 20 17, e 1 6 8 13, p 1 8 2 3 5 6.5, p 8 8 7.5 3 4.5 6.5, l 2 6 15 5 22, l 2 9 15 10 22,
    l 2 16 15 15 22, l 2 18 14 20 22, l 1.8 19 13 22 10 21.5 5 23 3, -e 2.3 8.5 3.5 9.7, -e 5.2 8.5 6.4 9.7;
cat-lying = e 5 11 22 20, e 1 8 9 16, p 1.2 11 1.5 5 5 8.5, p 8.8 11 8.5 5 5 8.5, l 2 20 17 23 20 14 20.5 6
    20, l 2.4 7 18 2 19, -e 2.8 11 4 12.2, -e 6 11 7.2 12.2, -l 0.7 12 19 14 16 18 15;
cat-from-behind = e 6 9 18 23, e 7 3 17 12, p 7 7 7 0 11 4, p 17 7 17 0 13 4, l 2 15 21.5 20 21.5 22 18 20.5
    14;
chair-side = l 2 6 1 7 12, l 2.4 6 12 17 12, l 2 7 12 5 23, l 2 16 12 18 23, l 1.2 6 17.5 17 17.5;
cow-standing = p 6 7 20 7 22 9 22 15 7 15 5 11, p 1 7 6 5.5 8 10 4 13 1 12, l 0.9 2.5 6.5 1 3, l 0.9 5 6 6.5
    3, p 6.5 14 9 14 8.5 22 6.5 22, p 10 14 12 14 12 22 10 22, p 17 14 19 14 19 22 17 22, p 20 14 22 14 22
    22 20 22, e 13.5 13 17 17, l 0.9 21.5 8 23.4 10 23 16, -e 9 8 13.5 12, -p 16 8 20 8.5 19 12 15.5 11;
cow-grazing = p 7 6 21 6 22.5 9 22 14 8 14 6 11, p 8 8 4 12 1 18 3 21 6 19 9 13, l 0.9 3.6 13 1 12, l 0.9
    5.5 12 4.5 9, l 2.2 9 13 9 22, l 2.2 12 13 12 22, l 2.2 18.5 13 18.5 22, l 2.2 21 13 21 22, e 14 12 17.5
    16, l 0.9 22 7 23.5 10 23 16, -e 16 7 20 11, -e 10 7.5 14 12.5;
cow-walking = p 4 7 18 6 19 10 18 15 4 15 2 10, p 17 5 22 4 23.5 9 21 11.5 17 11, l 1 18.5 5 17.5 2, l 1
    21.5 4.5 23 2, l 2.2 4 14 2 22, l 2.2 7 14 8.5 22, l 2.2 14 14 13 22, l 2.2 17 14 19 22, l 0.9 3 8 1 11
    1 15, -e 7 8 12 12, -e 13 10 16 13;
cow-face = p 6.5 5 17.5 5 16.5 17 7.5 17, e 5.5 13.5 18.5 22, e 0.5 6 8 10, e 16 6 23.5 10, l 1.6 8 5.5 4.5
    4.5 4.5 1.5, l 1.6 16 5.5 19.5 4.5 19.5 1.5, -e 8 8 10.3 10.5, -e 13.7 8 16 10.5, -e 8.7 16.5 10.7 19,
    -e 13.3 16.5 15.3 19;
sheep-face = e 5 1 12 8, e 12 1 19 8, e 3 4 9 10, e 15 4 21 10, e 8 0 16 8, e 6.5 5 17.5 22, e 1 9 8 12.5, e
    16 9 23 12.5, -e 9 11 10.8 13, -e 13.2 11 15 13, -l 0.7 10.5 17 12 18.5 13.5 17, -l 0.7 12 18.5 12 20.5,
    -l 0.7 7.5 9 10 7.5 12 9 14 7.5 16.5 9;
sofa-three = p 3 6 21 6 21 12 3 12, e 2 4.5 5 9, e 19 4.5 22 9, p 0 10 4 10 4 19 0 19, p 20 10 24 10 24 19
    20 19, p 3 13 21 13 21 19 3 19, p 2 19 4 19 4 21 2 21, p 20 19 22 19 22 21 20 21, -l 0.5 9 13 9 17, -l
    0.5 15 13 15 17, -l 0.6 4 12.7 20 12.7;
sofa-chaise = p 1 3 4 2 6 12 23 12 23 17 2 17, l 1.4 3 17 2.4 21, l 1.4 21 17 21.6 21, e 20 9.5 24 14, -l
    0.6 5.5 13.5 21 13.5, e 5 9 11 12.5;
sofa-legs = p 3 5 11.6 5 11.6 12 3 12, p 12.4 5 21 5 21 12 12.4 12, e 0 8 4.5 13, e 19.5 8 24 13, p 0.5 11 4
    11 4 17 0.5 17, p 20 11 23.5 11 23.5 17 20 17, p 3 13 21 13 21 17 3 17, l 1 2 17 1 21, l 1 22 17 23 21;
table-round = e 1 4 23 11, l 1.6 4 9 3 22, l 1.6 20 9 21 22, l 1.4 9 10 9 19, l 1.4 15 10 15 19, -e 4 5 9
    7.5, -e 13.5 5 19 7.5, -e 9 7.6 15 10;
table-cloth = p 3 6 21 6 24 16 21 15 18 17 15 15 12 17 9 15 6 17 3 15 0 16, p 3 15 5 15 5 22 3 22, p 19 15
    21 15 21 22 19 22, -l 0.6 2.4 9 21.6 9;
table-set = p 0 11 24 11 24 13.5 0 13.5, l 1.8 3 13 2 23, l 1.8 21 13 22 23, p 10.5 6 13.5 6 13 11 11 11, e
    9.5 1.5 14.5 6.5, p 2.5 9.5 8.5 9.5 7.5 11 3.5 11, p 15.5 9.5 21.5 9.5 20.5 11 16.5 11;
table-pedestal = p 0 5 24 5 24 8 0 8, p 10.5 8 13.5 8 13 18 11 18, p 12 16 19 22 5 22, -p 12 19 15 22 9 22;
table-oblique = p 6 4 23 4 18 11 1 11, p 1 11 18 11 18 13 1 13, p 18 11 23 4 23 6 18 13, l 1.7 2 12 2 22, l
    1.7 17 12 17 22, l 1.7 22 5 22 16, l 1.4 7.5 12 7.5 16;
pot = icon 4 0 20 15, p 4.5 14 19.5 14 19 17 18 17 16.8 24 7.2 24 6 17 5 17, -l 0.5 5 17.2 19 17.2;
sheep = icon 5 3 24 17, l 1.8 10 15 10 22, l 1.8 13 15 13 22, l 1.8 18 15 18 22, l 1.8 21 15 21 22, -e 1.4 6
    9.6 15, e 2 6.5 9 14.5, l 1.3 7 7.5 10 6.5, -e 3.6 9 4.8 10.2;
ram = icon 0 3 19 17, l 2 3 15 2.5 22, l 2 6 15 6.5 22, l 2 11.5 15 11 22, l 2 15 15 15.5 22, -e 14 4 24 15,
    p 15 6 20 5 24 11 21 14 17 12, e 13 4 19.5 10.5, -e 14.7 5.7 18 9, e 15.6 6.5 17.4 8.2;
"""

# class = how often it starts a scene or joins one by chance (VOC2007's image counts, flattened so that none
# is rare), then what tends to stand beside it.
_COMPANY_TABLE = """
aeroplane = 22 aeroplane car person bus;
bicycle = 18 person person person bicycle car;
bird = 24 bird bird boat person;
boat = 20 person boat bird;
bottle = 18 diningtable bottle person chair;
bus = 22 car car person bicycle;
car = 34 car person bus motorbike;
cat = 28 sofa cat dog chair pottedplant;
chair = 16 diningtable chair tvmonitor sofa person;
cow = 21 cow cow person dog;
diningtable = 13 chair chair chair bottle person pottedplant;
dog = 25 person person dog sofa sheep cat;
horse = 20 person person person horse dog;
motorbike = 18 person person person motorbike car;
person = 40 bicycle horse motorbike chair bottle car dog boat diningtable person;
pottedplant = 20 chair sofa diningtable tvmonitor pottedplant;
sheep = 21 sheep sheep dog person;
sofa = 18 chair tvmonitor person cat pottedplant;
train = 23 person person car train;
tvmonitor = 19 chair sofa person tvmonitor;
"""


def _entries(table: str) -> dict[str, str]:
    pairs = (entry.partition("=") for entry in table.split(";") if entry.strip())
    return {name.strip(): value for name, _, value in pairs}


def _glyphs(words: str) -> list[Glyph]:
    return [(font, name) for font, _, name in (word.partition(":") for word in words.split())]


CLASSES = tuple(_entries(_GLYPH_TABLE))
"""The 20 VOC classes in the official, alphabetical order."""
GLYPHS: Mapping[str, list[Glyph]] = {
    name: _glyphs(words.replace("|", " ")) for name, words in _entries(_GLYPH_TABLE).items()
}
"""Class -> its glyphs, those of the test split included."""
TEST_ONLY_GLYPHS = frozenset(
    glyph for words in _entries(_GLYPH_TABLE).values() for glyph in _glyphs(words.partition("|")[2])
)
DISTRACTORS = _glyphs(_DISTRACTOR_TABLE)
"""Glyphs of no class."""
_SHAPES = _entries(_SHAPE_TABLE)
_COMPANY = {name: words.split() for name, words in _entries(_COMPANY_TABLE).items()}


@dataclass(frozen=True)
class ScenesConfig:
    """Number of images of the splits trainval and test, side of the square images in pixels, and seed."""

    num_train: int = 800
    num_test: int = 400
    side: int = 192
    seed: int = 2007

    def __post_init__(self) -> None:
        for name, least in (("num_train", 1), ("num_test", 1), ("side", 64), ("seed", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"ScenesConfig.{name} = {getattr(self, name)!r}: it must be {least} or more")


@dataclass(frozen=True)
class SceneObject:
    """One icon of a scene; lengths are fractions of the image side; class_name is None for a distractor."""

    class_name: str | None
    glyph: Glyph
    extent: float
    centre: tuple[float, float]
    angle: float  # radians
    flip: bool
    shear: float
    tilt: tuple[float, float]  # perspective, in 1 / extent
    filled: bool  # closed holes of the icon get a colour of their own
    outlined: bool
    seed: int  # of the colours and the texture


@dataclass(frozen=True)
class Annotation:
    """One labelled object; box is (xmin, ymin, xmax, ymax) of its visible part, 1-based and inclusive."""

    class_name: str
    box: tuple[int, int, int, int]
    truncated: bool
    difficult: bool


def write_scenes(root: Path, config: ScenesConfig, progress: Callable[[int, int], None] | None = None) -> Path:
    """Write the scenes as root/VOCdevkit/VOC2007, unless that tree is there already; return root/VOCdevkit.

    Splits: trainval (cut into train and val, 80/20) and test. The same config gives the same bytes. progress
    is called with (images done, images in all). The tree appears under its name only when it is complete.
    Raises DataError if the package qtawesome is missing or root/VOCdevkit holds something else.
    """
    root = Path(root)
    root.mkdir(parents=True, exist_ok=True)
    devkit, partial = root / "VOCdevkit", root / "VOCdevkit.partial"
    with FileLock(root / ".scenes.lock"):
        if devkit.exists():
            _check_marker(devkit, config)
            return devkit
        fonts = _fonts_folder()
        if partial.exists():
            shutil.rmtree(partial)  # left behind by a killed process
        try:
            _write_tree(partial / "VOC2007", config, progress)
            marker = {"config": asdict(config), "version": SCENES_VERSION}
            made_with = [
                f"pillow {PIL.__version__}",
                *(_font_file(fonts, key, ".ttf").name for key in _FONTS),
            ]
            (partial / MARKER).write_text(json.dumps(marker | {"made_with": made_with}, indent=2) + "\n")
            partial.rename(devkit)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    return devkit


def _check_marker(devkit: Path, config: ScenesConfig) -> None:
    try:
        marker = json.loads((devkit / MARKER).read_text())
        found = {"config": marker["config"], "version": marker["version"]}
    except (OSError, ValueError, LookupError, TypeError):
        raise DataError(
            f"{devkit} has no readable {MARKER}, so it is no finished tree of scenes; choose another folder"
        ) from None
    wanted = {"config": asdict(config), "version": SCENES_VERSION}
    if found != wanted:
        raise DataError(f"{devkit} holds scenes of {found}, wanted {wanted}; choose another folder")


def _write_tree(voc: Path, config: ScenesConfig, progress: Callable[[int, int], None] | None) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    splits = [(SPLITS[0], index) for index in range(config.num_train)]
    splits += [(SPLITS[1], index) for index in range(config.num_test)]
    annotations: dict[str, list[Annotation]] = {}
    for done, (split, index) in enumerate(splits, start=1):
        image_id = f"{done:06d}"
        image, annotations[image_id] = draw_scene(plan_scene(config, split, index), config.side)
        image.save(voc / "JPEGImages" / f"{image_id}.jpg", quality=90)
        _write_xml(voc / "Annotations" / f"{image_id}.xml", annotations[image_id], config.side)
        if progress is not None:
            progress(done, len(splits))
    ids = list(annotations)
    trainval, test = ids[: config.num_train], ids[config.num_train :]
    shuffled = np.random.default_rng((config.seed, 2)).permutation(trainval).tolist()
    val = sorted(shuffled[: config.num_train // 5])
    train = sorted(set(trainval) - set(val))
    for split, members in {"trainval": trainval, "train": train, "val": val, "test": test}.items():
        _write_lists(voc / "ImageSets/Main", split, {image_id: annotations[image_id] for image_id in members})


def _write_lists(folder: Path, split: str, annotations: dict[str, list[Annotation]]) -> None:
    (folder / f"{split}.txt").write_text("".join(f"{image_id}\n" for image_id in annotations))
    for name in CLASSES:
        lines = []
        for image_id, objects in annotations.items():
            difficult = [item.difficult for item in objects if item.class_name == name]
            label = -1 if not difficult else 0 if all(difficult) else 1
            lines.append(f"{image_id} {label:2d}\n")
        (folder / f"{name}_{split}.txt").write_text("".join(lines))


def _write_xml(path: Path, objects: Sequence[Annotation], side: int) -> None:
    def add(parent: ET.Element, **children: object) -> None:
        for tag, text in children.items():
            ET.SubElement(parent, tag).text = str(text)

    root = ET.Element("annotation")
    add(root, folder="VOC2007", filename=f"{path.stem}.jpg")
    add(ET.SubElement(root, "size"), width=side, height=side, depth=3)
    add(root, segmented=0)
    for item in objects:
        node = ET.SubElement(root, "object")
        add(node, name=item.class_name, pose="Unspecified")
        add(node, truncated=int(item.truncated), difficult=int(item.difficult))
        corners = zip(("xmin", "ymin", "xmax", "ymax"), item.box, strict=True)
        add(ET.SubElement(node, "bndbox"), **dict(corners))
    ET.indent(root, "\t")
    path.write_text(ET.tostring(root, encoding="unicode") + "\n")


def plan_scene(config: ScenesConfig, split: str, index: int) -> list[SceneObject]:
    """Choose what stands where in image `index` of a split ("trainval" or "test"), bottom layer first.

    It depends on (config.seed, split, index) only. The topmost object is labelled and not small, so that
    every image has at least one label. Raises ConfigError for another split.
    """
    if split not in SPLITS:
        raise ConfigError(f"unknown split {split!r} of the scenes; choose one of {', '.join(SPLITS)}")
    rng = np.random.default_rng((config.seed, SPLITS.index(split), index))
    num_objects = int(rng.choice([1, 2, 3, 4, 5, 6], p=[0.27, 0.33, 0.2, 0.11, 0.06, 0.03]))
    median = 0.4 if num_objects <= 2 else 0.28
    plan: list[SceneObject] = []
    for name in _choose_classes(rng, num_objects):
        least = 0.2 if len(plan) == num_objects - 1 else 0.08
        extent = float(np.clip(median * math.exp(0.5 * rng.standard_normal()), least, 0.6))
        plan.append(_place(rng, name, _choose_glyph(rng, name, split), extent, plan))
    for _ in range(rng.integers(0, 3)):
        glyph = DISTRACTORS[rng.integers(len(DISTRACTORS))]
        distractor = _place(rng, None, glyph, float(rng.uniform(0.06, 0.25)), plan)
        plan.insert(int(rng.integers(0, len(plan))), distractor)
    return plan


def _choose_glyph(rng: np.random.Generator, name: str, split: str) -> Glyph:
    """One glyph of a class, the earlier in the table the likelier; in the test split one in six is a test-only one."""
    unseen = split == "test" and rng.random() < 1 / 6
    glyphs = [glyph for glyph in GLYPHS[name] if (glyph in TEST_ONLY_GLYPHS) == unseen]
    weights = 1 / np.arange(1, len(glyphs) + 1)
    return glyphs[rng.choice(len(glyphs), p=weights / weights.sum())]


def _choose_classes(rng: np.random.Generator, num_objects: int) -> list[str]:
    weights = np.array([float(_COMPANY[name][0]) for name in CLASSES])
    names: list[str] = []
    while len(names) < num_objects:
        if names and rng.random() < 0.55:
            companions = _COMPANY[names[rng.integers(len(names))]][1:]
            names.append(companions[rng.integers(len(companions))])
        else:
            names.append(CLASSES[rng.choice(len(CLASSES), p=weights / weights.sum())])
    return names


def _place(
    rng: np.random.Generator, name: str | None, glyph: Glyph, extent: float, others: Sequence[SceneObject]
) -> SceneObject:
    margin = extent * (0.2 if rng.random() < 0.2 else 0.5)  # one in five may leave the image
    places = rng.uniform(margin, 1 - margin, size=(6, 2))

    def overlap(place: NDArray[np.float64]) -> float:
        gaps = [np.abs(place - other.centre).max() - (extent + other.extent) / 2 for other in others]
        return -min(gaps, default=0.0)

    # Most objects take a free place, some the first one and so cover what is there.
    x, y = min(places, key=overlap) if rng.random() < 0.7 else places[0]
    turn = np.clip(rng.normal(0, 11), -25, 25) if rng.random() < 0.9 else rng.uniform(-60, 60)
    return SceneObject(
        class_name=name,
        glyph=glyph,
        extent=extent,
        centre=(float(x), float(y)),
        angle=math.radians(turn),
        flip=bool(rng.random() < 0.5),
        shear=float(rng.normal(0, 0.08)),
        tilt=(float(rng.uniform(-0.2, 0.2)), float(rng.uniform(-0.2, 0.2))),
        filled=bool(rng.random() < 0.5),
        outlined=bool(rng.random() < 0.3),
        seed=int(rng.integers(2**32)),
    )


@dataclass(frozen=True)
class _Sprite:
    """An object's masks, (h, w) in [0, 1], and where their left top corner lies in the image, in pixels."""

    ink: Floats
    alpha: Floats  # the icon with its filled holes and its outline
    left: int
    top: int

    @property
    def solid(self) -> NDArray[np.bool_]:
        return self.alpha > 0.4

    def windows(self, side: int) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """The part of the image that the sprite covers, and the part of the sprite inside the image."""
        top, left = max(self.top, 0), max(self.left, 0)
        bottom, right = (
            min(start + length, side) for start, length in zip((self.top, self.left), self.ink.shape, strict=True)
        )
        rows, columns = slice(top - self.top, bottom - self.top), slice(left - self.left, right - self.left)
        return (slice(top, bottom), slice(left, right)), (rows, columns)


def draw_scene(plan: Sequence[SceneObject], side: int) -> tuple[Image.Image, list[Annotation]]:
    """Paint a planned scene: an RGB image of side x side pixels and the labels of what can be seen in it.

    Objects of which less than a tenth is visible are left out of both. Raises DataError without the fonts.
    """
    fonts = _fonts_folder()
    rng = np.random.default_rng([item.seed for item in plan])
    canvas = _background(rng, side)
    front = Image.new("L", (side, side))  # in some scenes a few lines pass in front of everything
    for _ in range(rng.integers(1, 4) if rng.random() < 0.3 else 0):
        ends, width = rng.uniform(0, side, 4).tolist(), int(rng.integers(1, max(2, side // 50)))
        ImageDraw.Draw(front).line(ends, fill=255, width=width)
    layers = [(item, _sprite(item, side, fonts)) for item in plan]
    while True:
        owner = np.full((side, side), -1)
        for i, (_, sprite) in enumerate(layers):
            window, inside = sprite.windows(side)
            owner[window][sprite.solid[inside]] = i
        owner[np.asarray(front) > 0] = -1
        seen = np.bincount(owner.ravel() + 1, minlength=len(layers) + 1)[1:]
        visible = seen / [max(sprite.solid.sum(), 1) for _, sprite in layers]
        hidden = [i for i, (item, _) in enumerate(layers) if item.class_name and visible[i] < 0.1]
        if not hidden:
            break
        del layers[hidden[0]]  # one at a time: it may have been what hid the next
    for item, sprite in layers:
        _paint(canvas, sprite, item)
    canvas += rng.standard_normal((side, side, 1), dtype=np.float32) * np.float32(rng.uniform(0, 9))
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    image.paste(tuple(_colour(rng).astype(int).tolist()), mask=front)
    image = image.filter(ImageFilter.BoxBlur(rng.uniform(0, 0.8) * side / 256))
    return image, [
        _annotate(item.class_name, owner == i, float(visible[i]), sprite)
        for i, (item, sprite) in enumerate(layers)
        if item.class_name is not None
    ]


def _annotate(name: str, seen: NDArray[np.bool_], visible: float, sprite: _Sprite) -> Annotation:
    side = len(seen)
    rows, columns = np.flatnonzero(seen.any(1)), np.flatnonzero(seen.any(0))
    box = (int(columns[0]) + 1, int(rows[0]) + 1, int(columns[-1]) + 1, int(rows[-1]) + 1)
    size = max(box[2] - box[0], box[3] - box[1]) + 1
    truncated = bool(sprite.solid.sum() > sprite.solid[sprite.windows(side)[1]].sum())
    return Annotation(name, box, truncated, difficult=bool(size < 0.09 * side or visible < 0.35))


def _sprite(item: SceneObject, side: int, fonts: Path) -> _Sprite:
    ink, solid = _icon(fonts, item.glyph)
    scale = 2 * item.extent * side / max(ink.size)  # drawn at twice the size, then halved: smooth edges
    width, height = (max(2, round(length * scale)) for length in ink.size)
    cos, sin = math.cos(item.angle), math.sin(item.angle)
    centred = np.array([[1, 0, -width / 2], [0, 1, -height / 2], [0, 0, 1]])
    shape = np.array([[-1 if item.flip else 1, item.shear, 0], [0, 1, 0], [0, 0, 1]])
    turn = np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]])
    tilt = np.array([[1, 0, 0], [0, 1, 0], [*(t / max(width, height) for t in item.tilt), 1]])
    forward = tilt @ turn @ shape @ centred
    corners = forward @ np.array([[0, width, 0, width], [0, 0, height, height], [1, 1, 1, 1]])
    corners = corners[:2] / corners[2]
    low = np.floor(corners.min(1) / 2).astype(int) - 3  # 3 pixels of room for the outline
    size = np.ceil(corners.max(1) / 2).astype(int) + 3 - low
    back = np.linalg.inv(np.array([[1, 0, -2 * low[0]], [0, 1, -2 * low[1]], [0, 0, 1]]) @ forward)
    coefficients = (back / back[2, 2]).ravel()[:8].tolist()

    def warp(mask: Image.Image) -> Image.Image:
        resized = mask.resize((width, height), Image.Resampling.BOX)
        method, smooth = Image.Transform.PERSPECTIVE, Image.Resampling.BILINEAR
        return resized.transform((2 * size[0], 2 * size[1]), method, coefficients, smooth).reduce(2)

    drawn = warp(ink)
    whole = warp(solid) if item.filled else drawn
    if item.outlined:
        whole = whole.filter(ImageFilter.MaxFilter(3 if item.extent < 0.25 else 5))
    left, top = (round(centre * side) + int(start) for centre, start in zip(item.centre, low, strict=True))
    return _Sprite(_unit(drawn), _unit(whole), left, top)


def _unit(mask: Image.Image) -> Floats:
    return np.asarray(mask, dtype=np.float32) / np.float32(255)


def _paint(canvas: Floats, sprite: _Sprite, item: SceneObject) -> None:
    rng = np.random.default_rng(item.seed)
    window, inside = sprite.windows(len(canvas))
    ink, alpha = sprite.ink[inside], sprite.alpha[inside]
    if not alpha.any():
        return
    under = canvas[window]
    around = (under * alpha[..., None]).sum((0, 1)) / alpha.sum()
    contrast = rng.uniform(110, 280)  # distance of the colours, 0 to 441: some objects hardly stand out
    main = _colour_at_distance(rng, around, contrast, _hue(item.class_name))
    second = _colour_at_distance(rng, main, rng.uniform(70, 230))
    size = max(sprite.ink.shape)
    light = _ramp(rng, size) * rng.uniform(0, 0.5) + _noise(rng, size, (3, 12)) * rng.uniform(0, 0.15)
    if rng.random() < 0.15:
        light += 0.15 * np.sign(np.sin(_ramp(rng, size) * rng.uniform(10, 30)))
    if rng.random() < 0.4:  # a soft shadow, which is no part of the object
        cover = Image.fromarray((sprite.alpha * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(size / 30))
        shift = max(1, size // 30)
        shadow = np.roll(_unit(cover), (shift, shift), (0, 1))[inside]
        under *= 1 - 0.5 * shadow[..., None]
    colour = second + (main - second) * ink[..., None]
    colour = np.clip(colour * (1 + light[inside][..., None]), 0, 255)
    under += (colour - under) * alpha[..., None]


def _hue(class_name: str | None) -> float | None:
    """The hue that objects of a class tend to have, as grass is green and buses are red; none for distractors."""
    return None if class_name is None else CLASSES.index(class_name) * 7 % 20 / 20


def _colour(rng: np.random.Generator, saturation: tuple[float, float] = (0.1, 1.0), hue: float | None = None) -> Floats:
    drawn = rng.random() if hue is None else rng.normal(hue, 0.02) % 1
    hsv = drawn, rng.uniform(*saturation), rng.uniform(0.1 if hue is None else 0.4, 1.0)
    return np.array(colorsys.hsv_to_rgb(*hsv), dtype=np.float32) * np.float32(255)


def _colour_at_distance(rng: np.random.Generator, other: Floats, distance: float, hue: float | None = None) -> Floats:
    """Of a few colours, the one whose distance from the other is closest to the wanted one; of the hue, if given."""
    saturation = (0.1, 1.0) if hue is None else (0.6, 1.0)
    colours = [_colour(rng, saturation, hue) for _ in range(6)]
    return min(colours, key=lambda colour: abs(float(np.linalg.norm(colour - other)) - distance))


def _ramp(rng: np.random.Generator, size: int) -> Floats:
    """(size, size) values in [-1, 1] that rise in a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    line = np.linspace(-1, 1, size, dtype=np.float32)
    ramp: Floats = line[:, None] * math.sin(angle) + line[None] * math.cos(angle)
    ramp /= np.abs(ramp).max()
    return ramp


def _noise(rng: np.random.Generator, size: int, cells: Sequence[int]) -> Floats:
    """(size, size) smooth noise: a sum of random grids of these numbers of cells, the finer the weaker."""
    total = np.zeros((size, size), dtype=np.float32)
    for octave, cell in enumerate(cells):
        grid = Image.fromarray(rng.standard_normal((cell, cell)).astype(np.float32))
        total += np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)) / 1.5**octave
    return total


def _background(rng: np.random.Generator, side: int) -> Floats:
    """(side, side, 3) values from 0 to 255: a gradient, noise and half-transparent shapes."""
    first, second = _colour(rng, (0.0, 0.3)), _colour(rng, (0.0, 0.3))
    half = side // 2  # smooth enough to be enlarged, and four times as quick
    canvas = first + (second - first) * ((_ramp(rng, half)[..., None] + 1) / 2)
    canvas += _noise(rng, half, (4, 10, 28, 80))[..., None] * rng.uniform(5, 24)
    canvas += _noise(rng, half, (5,))[..., None] * ((_colour(rng) - 128) * rng.uniform(0, 0.3))
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8)).resize((side, side))
    pen = ImageDraw.Draw(image, "RGBA")
    for _ in range(rng.integers(2, 8)):
        colour = (*_colour(rng, (0.0, 0.4)).astype(int).tolist(), int(rng.integers(50, 200)))
        centre, radius = rng.uniform(0, side, 2), rng.uniform(0.03, 0.3) * side
        kind = rng.integers(3)
        if kind == 0:
            angles = np.sort(rng.uniform(0, 2 * math.pi, rng.integers(3, 7)))
            corners = centre + radius * np.stack([np.cos(angles), np.sin(angles)], 1)
            pen.polygon(corners.ravel().tolist(), fill=colour)
        elif kind == 1:
            stretch = radius * rng.uniform(0.4, 1, 2)
            pen.ellipse([*(centre - stretch), *(centre + stretch)], fill=colour)
        else:
            ends = rng.uniform(0, side, 4).tolist()
            pen.line(ends, fill=colour, width=int(rng.integers(1, max(2, side // 25))))
    return np.array(image, dtype=np.float32)


def _fonts_folder() -> Path:
    # find_spec locates the package without importing it, which would need Qt.
    spec = importlib.util.find_spec("qtawesome")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "scenes are drawn with the icon fonts of the package qtawesome, which is not installed; "
            "pip install qtawesome (or pip install 'mcar-lib[bundled]')"
        )
    return Path(spec.submodule_search_locations[0]) / "fonts"


def _font_file(fonts: Path, key: str, suffix: str) -> Path:
    middle = "-charmap-" if suffix == ".json" else "-"
    files = sorted(fonts.glob(f"{_FONTS[key]}{middle}[0-9]*{suffix}"))
    if not files:
        raise DataError(f"{fonts} has no {_FONTS[key]}*{suffix}; pip install 'qtawesome>=1.4'")
    return files[-1]


@cache
def _charmap(fonts: Path, key: str) -> dict[str, str]:
    charmap: dict[str, str] = json.loads(_font_file(fonts, key, ".json").read_text())
    return charmap


@cache
def _font(fonts: Path, key: str) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(_font_file(fonts, key, ".ttf"), 320, layout_engine=ImageFont.Layout.BASIC)


@cache
def _icon(fonts: Path, glyph: Glyph) -> tuple[Image.Image, Image.Image]:
    """Tight masks of a glyph, about 300 pixels long: its ink, and its ink with the closed holes filled."""
    font, name = glyph
    name, _, part = name.partition("+")
    if font == "drawn":
        ink = _draw_shapes(_SHAPES[name])
    else:
        code = _charmap(fonts, font).get(name)
        if code is None:
            raise DataError(f"qtawesome's font {font} has no icon {name!r}; pip install 'qtawesome>=1.4'")
        ink = Image.new("L", (512, 512))
        letter = chr(int(code, 16))
        ImageDraw.Draw(ink).text((256, 256), letter, font=_font(fonts, font), fill=255, anchor="mm")
    if part:
        ink = _draw_shapes(_SHAPES[part], ink.crop(ink.getbbox()))
    ink = ink.crop(ink.getbbox())
    return ink, _fill_holes(ink)


def _draw_shapes(shapes: str, icon: Image.Image | None = None) -> Image.Image:
    mask = Image.new("L", (384, 384))
    pen = ImageDraw.Draw(mask)
    for shape in shapes.split(","):
        kind, *numbers = shape.split()
        fill = 0 if kind.startswith("-") else 255
        values = [16 * float(number) for number in numbers]
        if kind.endswith("e"):
            pen.ellipse(values, fill=fill)
        elif kind.endswith("p"):
            pen.polygon(values, fill=fill)
        elif kind.endswith("l"):
            pen.line(values[1:], fill=fill, width=round(values[0]), joint="curve")
        elif icon is not None:  # as large as the box allows, on its lower edge
            x0, y0, x1, y1 = values
            fitted = ImageOps.contain(icon, (round(x1 - x0), round(y1 - y0)))
            mask.paste(fitted, (round((x0 + x1 - fitted.width) / 2), round(y1) - fitted.height))
    return mask


def _fill_holes(ink: Image.Image) -> Image.Image:
    """The mask with what the ink encloses added; found at a sixth of the size, where that is quick."""
    small = ImageOps.expand(ink.reduce(6).point(lambda value: 255 * (value > 60)), border=1)
    ImageDraw.floodfill(small, (0, 0), 255)
    holes = ImageOps.invert(small).filter(ImageFilter.MaxFilter(3))
    return ImageChops.lighter(ink, ImageOps.crop(holes, border=1).resize(ink.size))
