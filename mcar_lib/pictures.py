"""Photos with boxes and words on them that people can read: at half size too, and where boxes nearly coincide."""

import functools
import importlib.util
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, to_pil_image
from torchvision.utils import draw_bounding_boxes

from mcar_lib.data.image_set import PhotoRead

# Told apart by people who see few colours too (seaborn's "colorblind"), the first of them dark.
COLOURS = ("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#ca9161", "#fbafe4", "#949494", "#ece133", "#56b4e9")
WHITE_ON = (COLOURS[0],)  # where white words have more contrast than black ones
SMALLEST, LARGEST = 640, 4096  # longer side of a picture, in pixels; photos between are drawn as they are
NARROWEST = 200  # where words still fit
# Those of a machine that have most letters come first; Pillow's own knows ASCII alone.
FONTS = ("NotoSansCJK-Regular.ttc", "DejaVuSans.ttf", "Arial Unicode.ttf", "arial.ttf")


class Box(NamedTuple):
    """Pixels, half-open: [x1, x2) x [y1, y2)."""

    x1: int
    y1: int
    x2: int
    y2: int

    def overlaps(self, other: "Box") -> bool:
        return self.x1 < other.x2 and other.x1 < self.x2 and self.y1 < other.y2 and other.y1 < self.y2

    def lies_in(self, other: "Box") -> bool:
        return other.x1 <= self.x1 and other.y1 <= self.y1 and self.x2 <= other.x2 and self.y2 <= other.y2


def annotated(photo: PhotoRead, marks: Sequence[tuple[str, Box | None]]) -> Image.Image:
    """A photo with words, each with a box in pixels of the whole photo, or none: those stand at the lower left.

    No word covers another; they become smaller until that can be, and what finds no room even so is left out. A very
    small photo is enlarged by a whole factor, one above 4096 pixels reduced, a strip put on white.
    """
    image = to_pil_image(photo.pixels)
    if (factor := SMALLEST // max(image.size)) > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((LARGEST, LARGEST))
    across, down = (shown / whole for shown, whole in zip(image.size, photo.size, strict=True))
    boxes = [
        box and Box(round(box.x1 * across), round(box.y1 * down), round(box.x2 * across), round(box.y2 * down))
        for _, box in marks
    ]
    if min(image.size) < NARROWEST:
        strip, image = image, Image.new("RGB", tuple(max(side, NARROWEST) for side in image.size), "white")
        image.paste(strip)
    line = max(2, round(max(image.size) / 250))
    image = to_pil_image(_with_boxes(pil_to_tensor(image), boxes, line))
    _write(image, [words for words, _ in marks], boxes, line)
    return image


def _with_boxes(pixels: Tensor, boxes: Sequence[Box | None], line: int) -> Tensor:
    """Of boxes that nearly coincide, each is drawn inside of those before it. A white line around each keeps it visible
    on whatever is below it."""
    height, width = pixels.shape[1:]
    for index, box in reversed(list(enumerate(boxes))):
        if box is None:
            continue
        before = [other for other in boxes[:index] if other]
        near = sum(max(abs(a - b) for a, b in zip(box, other, strict=True)) < 2 * line for other in before)
        inset = min(2 * line * near, (box.x2 - box.x1) // 2, (box.y2 - box.y1) // 2)
        x1, y1 = min(box.x1 + inset, width - 2), min(box.y1 + inset, height - 2)
        x2, y2 = max(x1 + 1, min(box.x2, width) - inset - 1), max(y1 + 1, min(box.y2, height) - inset - 1)
        corners = torch.tensor([[x1, y1, x2, y2]])
        for colour, wide in (("white", 2 * line), (COLOURS[index % len(COLOURS)], line)):
            pixels = draw_bounding_boxes(pixels, corners, colors=colour, width=wide)
    return pixels


def _write(image: Image.Image, words: Sequence[str], boxes: Sequence[Box | None], line: int) -> None:
    draw, whole = ImageDraw.Draw(image), Box(0, 0, *image.size)
    targets = [(box.x1 + line, box.y1 + line) if box else (0, image.height) for box in boxes]
    for size in range(max(16, round(math.sqrt(image.width * image.height) / 22)), 7, -2):
        font = label_font("".join(words), size)
        texts = [_in_letters_of(font, text) for text in words]
        sizes = [(round(draw.textlength(text, font=font)) + size // 2, round(1.4 * size)) for text in texts]
        places = place_labels(targets, sizes, whole)
        if None not in places:
            break
    for index, (place, text) in enumerate(zip(places, texts, strict=True)):
        if place is not None:
            colour = COLOURS[index % len(COLOURS)]
            draw.rectangle((place.x1, place.y1, place.x2 - 1, place.y2 - 1), fill=colour, outline="white")
            middle = ((place.x1 + place.x2) / 2, (place.y1 + place.y2) / 2)
            draw.text(middle, text, "white" if colour in WHITE_ON else "black", font, "mm")


def place_labels(targets: Sequence[tuple[int, int]], sizes: Sequence[tuple[int, int]], whole: Box) -> list[Box | None]:
    """Where labels of these sizes (width, height) go: inside the whole, on no other label, the upper left corner as
    near to its target (x, y) as that allows; None for one that finds no room."""
    places: list[Box | None] = []
    for (x, y), (width, height) in zip(targets, sizes, strict=True):
        taken = [place for place in places if place]
        across = {min(x, whole.x2 - width), whole.x1, *(side for each in taken for side in (each.x2, each.x1 - width))}
        down = {min(y, whole.y2 - height), whole.y1, *(side for each in taken for side in (each.y2, each.y1 - height))}
        found = [Box(left, top, left + width, top + height) for left in across for top in down]
        free = [each for each in found if each.lies_in(whole) and not any(each.overlaps(other) for other in taken)]
        places.append(min(free, key=lambda at: (abs(at.x1 - x) + abs(at.y1 - y), at), default=None))
    return places


@functools.lru_cache(maxsize=64)
def label_font(text: str, size: int) -> Any:
    """A font of this machine that has every letter of a text, else Pillow's own, which has those of ASCII."""
    spec = importlib.util.find_spec("matplotlib")
    packaged = [f"{Path(spec.origin).parent}/mpl-data/fonts/ttf/DejaVuSans.ttf"] if spec and spec.origin else []
    for place in (*FONTS, *packaged):
        try:
            font = ImageFont.truetype(place, size)
        except OSError:  # not on this machine
            continue
        if all(_has(font, letter) for letter in set(text)):
            return font
    return ImageFont.load_default(size)


def _has(font: Any, letter: str) -> bool:
    """Whether a font has a letter: in place of any that it lacks it draws the same sign."""
    return letter.isspace() or bytes(font.getmask(letter)) != bytes(font.getmask("\uffff"))


def _in_letters_of(font: Any, text: str) -> str:
    """A text in the letters that a font has: without accents, and else as question marks."""
    return "".join(
        letter
        if _has(font, letter)
        else unicodedata.normalize("NFKD", letter).encode("ascii", "ignore").decode() or "?"
        for letter in text
    )
