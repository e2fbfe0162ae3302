"""Composed scenes: the data set that needs no download.

Each image is a collage of the 20 VOC classes, drawn from the icon fonts that the package qtawesome ships; scenes.toml
says which icons, and which classes keep company. The tree has the VOC layout, so that the reader of the real
photographs reads it too. Objects are small to medium, may cover each other or leave the image, and stand among clutter
and icons of no class. About a quarter of the glyphs of each class are kept for the test split.
"""

import colorsys
import importlib.util
import json
import math
import shutil
import tomllib
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
Random = np.random.Generator

_TABLES = tomllib.loads(Path(__file__).with_name("scenes.toml").read_text(encoding="utf-8"))
_TABLE_OF_CLASS = _TABLES["classes"]


def _glyphs(words: str) -> list[Glyph]:
    return [(font, name) for font, name in (word.split(":") for word in words.split())]


CLASSES: tuple[str, ...] = tuple(_TABLE_OF_CLASS)
"""The 20 VOC classes in the official, alphabetical order."""
TEST_ONLY_GLYPHS = frozenset(glyph for table in _TABLE_OF_CLASS.values() for glyph in _glyphs(table["test_glyphs"]))
GLYPHS: Mapping[str, list[Glyph]] = {
    name: _glyphs(table["glyphs"]) + _glyphs(table["test_glyphs"]) for name, table in _TABLE_OF_CLASS.items()
}
"""Class -> its glyphs, those of the test split included."""
DISTRACTORS = _glyphs(_TABLES["distractors"]["glyphs"])
"""Glyphs of no class."""


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
    made_of = {"config": asdict(config), "version": SCENES_VERSION}
    with FileLock(root / ".scenes.lock"):
        if devkit.exists():
            _check_marker(devkit, made_of)
            return devkit
        fonts = [_font_file(key, ".ttf").name for key in _TABLES["fonts"]]
        marker = made_of | {"made_with": [f"pillow {PIL.__version__}", *fonts]}
        shutil.rmtree(partial, ignore_errors=True)  # left behind by a killed process
        try:
            _write_tree(partial / "VOC2007", config, progress)
            (partial / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
            partial.rename(devkit)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return devkit


def _check_marker(devkit: Path, wanted: Mapping[str, object]) -> None:
    try:
        marker = json.loads((devkit / MARKER).read_text())
        found = {key: marker[key] for key in wanted}
    except (OSError, ValueError, LookupError, TypeError):
        raise DataError(
            f"{devkit} has no readable {MARKER}, so it is no finished tree of scenes; choose another folder"
        ) from None
    if found != wanted:
        raise DataError(f"{devkit} holds scenes of {found}, wanted {wanted}; choose another folder")


def _write_tree(voc: Path, config: ScenesConfig, progress: Callable[[int, int], None] | None) -> None:
    for folder in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (voc / folder).mkdir(parents=True)
    scenes = [("trainval", index) for index in range(config.num_train)]
    scenes += [("test", index) for index in range(config.num_test)]
    annotations: dict[str, list[Annotation]] = {}
    for done, (split, index) in enumerate(scenes, start=1):
        image_id = f"{done:06d}"
        image, annotations[image_id] = draw_scene(plan_scene(config, split, index), config.side)
        image.save(voc / "JPEGImages" / f"{image_id}.jpg", quality=90)
        _write_xml(voc / "Annotations" / f"{image_id}.xml", annotations[image_id], config.side)
        if progress is not None:
            progress(done, len(scenes))
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


def _choose_glyph(rng: Random, name: str, split: str) -> Glyph:
    """One glyph of a class, the earlier in the table the likelier; in the test split one in six is a test-only one."""
    unseen = split == "test" and rng.random() < 1 / 6
    glyphs = _glyphs(_TABLE_OF_CLASS[name]["test_glyphs" if unseen else "glyphs"])
    weights = 1 / np.arange(1, len(glyphs) + 1)
    return glyphs[rng.choice(len(glyphs), p=weights / weights.sum())]


def _choose_classes(rng: Random, num_objects: int) -> list[str]:
    weights = np.array([float(_TABLE_OF_CLASS[name]["frequency"]) for name in CLASSES])
    names: list[str] = []
    while len(names) < num_objects:
        if names and rng.random() < 0.55:
            companions = _TABLE_OF_CLASS[names[rng.integers(len(names))]]["company"].split()
            names.append(companions[rng.integers(len(companions))])
        else:
            names.append(CLASSES[rng.choice(len(CLASSES), p=weights / weights.sum())])
    return names


def _place(rng: Random, name: str | None, glyph: Glyph, extent: float, others: Sequence[SceneObject]) -> SceneObject:
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
    """An object's masks, (h, w) in [0, 1], the part of the image that they cover, and the part of them inside it."""

    item: SceneObject
    ink: Floats
    alpha: Floats  # the icon with its filled holes and its outline
    solid: NDArray[np.bool_]
    window: tuple[slice, ...]
    inside: tuple[slice, ...]


def draw_scene(plan: Sequence[SceneObject], side: int) -> tuple[Image.Image, list[Annotation]]:
    """Paint a planned scene: an RGB image of side x side pixels and the labels of what can be seen in it.

    Objects of which less than a tenth is visible are left out of both. Raises DataError without the fonts.
    """
    rng = np.random.default_rng([item.seed for item in plan])
    canvas = _background(rng, side)
    front = Image.new("L", (side, side))  # in some scenes a few lines pass in front of everything
    for _ in range(rng.integers(1, 4) if rng.random() < 0.3 else 0):
        ends, width = rng.uniform(0, side, 4).tolist(), int(rng.integers(1, max(2, side // 50)))
        ImageDraw.Draw(front).line(ends, fill=255, width=width)
    sprites = [_sprite(item, side) for item in plan]
    while True:
        owner = np.full((side, side), -1)
        for i, sprite in enumerate(sprites):
            owner[sprite.window][sprite.solid[sprite.inside]] = i
        owner[np.asarray(front) > 0] = -1
        seen = np.bincount(owner.ravel() + 1, minlength=len(sprites) + 1)[1:]
        visible = (seen / [max(sprite.solid.sum(), 1) for sprite in sprites]).tolist()
        hidden = [i for i, sprite in enumerate(sprites) if sprite.item.class_name and visible[i] < 0.1]
        if not hidden:
            break
        del sprites[hidden[0]]  # one at a time: it may have been what hid the next
    for sprite in sprites:
        _paint(canvas, sprite)
    canvas += rng.standard_normal((side, side, 1), dtype=np.float32) * np.float32(rng.uniform(0, 9))
    image = Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))
    image.paste(tuple(_colour(rng).astype(int).tolist()), mask=front)
    image = image.filter(ImageFilter.BoxBlur(rng.uniform(0, 0.8) * side / 256))
    found = (_annotate(sprite, owner == i, visible[i]) for i, sprite in enumerate(sprites))
    return image, [annotation for annotation in found if annotation is not None]


def _annotate(sprite: _Sprite, seen: NDArray[np.bool_], visible: float) -> Annotation | None:
    box = Image.fromarray(seen).getbbox()
    if sprite.item.class_name is None or box is None:
        return None
    left, top, right, bottom = box
    truncated = bool(sprite.solid.sum() > sprite.solid[sprite.inside].sum())
    difficult = max(right - left, bottom - top) < 0.09 * len(seen) or visible < 0.35
    return Annotation(sprite.item.class_name, (left + 1, top + 1, right, bottom), truncated, difficult)


def _sprite(item: SceneObject, side: int) -> _Sprite:
    ink, solid = _icon(item.glyph)
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
    start = (np.round(np.multiply(item.centre, side)).astype(int) + low)[::-1]  # row, column
    first, last = np.maximum(start, 0), np.minimum(start + size[::-1], side)
    window, inside = tuple(map(slice, first, last)), tuple(map(slice, first - start, last - start))
    alpha = _unit(whole)
    return _Sprite(item, _unit(drawn), alpha, alpha > 0.4, window, inside)


def _unit(mask: Image.Image) -> Floats:
    return np.asarray(mask, dtype=np.float32) / np.float32(255)


def _paint(canvas: Floats, sprite: _Sprite) -> None:
    rng, class_name = np.random.default_rng(sprite.item.seed), sprite.item.class_name
    ink, alpha = sprite.ink[sprite.inside], sprite.alpha[sprite.inside]
    if not alpha.any():
        return
    under = canvas[sprite.window]
    around = (under * alpha[..., None]).sum((0, 1)) / alpha.sum()
    contrast = rng.uniform(110, 280)  # distance of the colours, 0 to 441: some objects hardly stand out
    # The hue that objects of a class tend to have, as grass is green and buses are red; none for distractors.
    hue = None if class_name is None else CLASSES.index(class_name) * 7 % 20 / 20
    main = _colour_at_distance(rng, around, contrast, hue)
    second = _colour_at_distance(rng, main, rng.uniform(70, 230))
    size = max(sprite.ink.shape)
    light = _ramp(rng, size) * rng.uniform(0, 0.5) + _noise(rng, size, (3, 12)) * rng.uniform(0, 0.15)
    if rng.random() < 0.15:
        light += 0.15 * np.sign(np.sin(_ramp(rng, size) * rng.uniform(10, 30)))
    if rng.random() < 0.4:  # a soft shadow, which is no part of the object
        cover = Image.fromarray((sprite.alpha * 255).astype(np.uint8)).filter(ImageFilter.BoxBlur(size / 30))
        shift = max(1, size // 30)
        shadow = np.roll(_unit(cover), (shift, shift), (0, 1))[sprite.inside]
        under *= 1 - 0.5 * shadow[..., None]
    colour = second + (main - second) * ink[..., None]
    colour = np.clip(colour * (1 + light[sprite.inside][..., None]), 0, 255)
    under += (colour - under) * alpha[..., None]


def _colour(rng: Random, saturation: tuple[float, float] = (0.1, 1.0), hue: float | None = None) -> Floats:
    drawn = rng.random() if hue is None else rng.normal(hue, 0.02) % 1
    hsv = drawn, rng.uniform(*saturation), rng.uniform(0.1 if hue is None else 0.4, 1.0)
    return np.array(colorsys.hsv_to_rgb(*hsv), dtype=np.float32) * np.float32(255)


def _colour_at_distance(rng: Random, other: Floats, distance: float, hue: float | None = None) -> Floats:
    """Of a few colours, the one whose distance from the other is closest to the wanted one; of the hue, if given."""
    saturation = (0.1, 1.0) if hue is None else (0.6, 1.0)
    colours = [_colour(rng, saturation, hue) for _ in range(6)]
    return min(colours, key=lambda colour: abs(float(np.linalg.norm(colour - other)) - distance))


def _ramp(rng: Random, size: int) -> Floats:
    """(size, size) values in [-1, 1] that rise in a random direction."""
    angle = rng.uniform(0, 2 * math.pi)
    line = np.linspace(-1, 1, size, dtype=np.float32)
    ramp: Floats = line[:, None] * math.sin(angle) + line[None] * math.cos(angle)
    return ramp / np.abs(ramp).max()


def _noise(rng: Random, size: int, cells: Sequence[int]) -> Floats:
    """(size, size) smooth noise: a sum of random grids of these numbers of cells, the finer the weaker."""
    total = np.zeros((size, size), dtype=np.float32)
    for octave, cell in enumerate(cells):
        grid = Image.fromarray(rng.standard_normal((cell, cell)).astype(np.float32))
        total += np.asarray(grid.resize((size, size), Image.Resampling.BICUBIC)) / 1.5**octave
    return total


def _background(rng: Random, side: int) -> Floats:
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


def _font_file(key: str, suffix: str) -> Path:
    # find_spec locates the package without importing it, which would need Qt.
    spec = importlib.util.find_spec("qtawesome")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(
            "scenes are drawn with the icon fonts of the package qtawesome, which is not installed; "
            "pip install qtawesome (or pip install 'mcar-lib[bundled]')"
        )
    fonts, name = Path(spec.submodule_search_locations[0]) / "fonts", _TABLES["fonts"][key]
    files = sorted(fonts.glob(f"{name}{'-charmap-' if suffix == '.json' else '-'}[0-9]*{suffix}"))
    if not files:
        raise DataError(f"{fonts} has no {name}*{suffix}; pip install 'qtawesome>=1.4'")
    return files[-1]


@cache
def _font(key: str) -> tuple[ImageFont.FreeTypeFont, dict[str, str]]:
    """A font, and the code of each of its icons by name."""
    font = ImageFont.truetype(_font_file(key, ".ttf"), 320, layout_engine=ImageFont.Layout.BASIC)
    return font, json.loads(_font_file(key, ".json").read_text())


@cache
def _icon(glyph: Glyph) -> tuple[Image.Image, Image.Image]:
    """Tight masks of a glyph, about 300 pixels long: its ink, and its ink with the closed holes filled."""
    key, (name, _, part) = glyph[0], glyph[1].partition("+")
    if key == "drawn":
        ink = _draw_shapes(name)
    else:
        font, codes = _font(key)
        if name not in codes:
            raise DataError(f"qtawesome's font {key} has no icon {name!r}; pip install 'qtawesome>=1.4'")
        ink = Image.new("L", (512, 512))
        ImageDraw.Draw(ink).text((256, 256), chr(int(codes[name], 16)), font=font, fill=255, anchor="mm")
    if part:
        ink = _draw_shapes(part, ink.crop(ink.getbbox()))
    ink = ink.crop(ink.getbbox())
    return ink, _fill_holes(ink)


def _draw_shapes(name: str, icon: Image.Image | None = None) -> Image.Image:
    mask = Image.new("L", (384, 384))
    pen = ImageDraw.Draw(mask)
    for shape in _TABLES["shapes"][name].split(","):
        kind, *numbers = shape.split()
        fill = 0 if kind.startswith("-") else 255
        values = [16 * float(number) for number in numbers]
        match kind.removeprefix("-"):
            case "e":
                pen.ellipse(values, fill=fill)
            case "p":
                pen.polygon(values, fill=fill)
            case "l":
                pen.line(values[1:], fill=fill, width=round(values[0]), joint="curve")
            case "icon" if icon is not None:  # as large as the box allows, on its lower edge
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
