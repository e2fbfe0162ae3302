"""What a model says of one photo, as people look at it: a line, a picture with boxes, a notebook's cell, JSON."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from PIL import Image
from torch import Tensor

from mcar_lib.data.image_set import PhotoRead
from mcar_lib.pictures import COLOURS, Box, annotated
from mcar_lib.regions import Regions

SHOWN = 640  # longer side of a picture in a notebook, in pixels
BARS = 5  # classes that a notebook shows at least


class Label(NamedTuple):
    """A class that is predicted: its score in [0, 1], and its region where the model looked at one of this class."""

    name: str
    score: float
    box: Box | None

    def __str__(self) -> str:
        return f"{self.name} {100 * self.score:.0f} %"


@dataclass(frozen=True, eq=False)
class Prediction:
    """What a model says of one photo; a notebook shows it as a picture with the scores beside it.

    name: the photo's path, or its place among those that were given. photo: its pixels, upright. scores: of every
    class, in [0, 1]. threshold: the score from which a class is predicted. regions: the boxes of all regions by their
    class, in pixels of the whole photo; of those that were looked at.
    """

    name: str
    photo: PhotoRead
    scores: Mapping[str, float]
    threshold: float
    regions: Mapping[str, Box]

    @cached_property
    def labels(self) -> tuple[Label, ...]:
        """The classes whose score reaches the threshold, the highest first."""
        predicted = [name for name in self.ranked if self.scores[name] >= self.threshold]
        return tuple(Label(name, self.scores[name], self.regions.get(name)) for name in predicted)

    @property
    def ranked(self) -> list[str]:
        """All classes by their score, the highest first."""
        return sorted(self.scores, key=lambda name: -self.scores[name])

    @property
    def notes(self) -> tuple[str, ...]:
        """What is odd about the photo, a few words each."""
        (width, height), read = self.photo.size, tuple(self.photo.pixels.shape[:0:-1])
        found = ["an animation, of which the first frame is looked at"] * self.photo.is_first_frame
        found += [f"{width} x {height} pixels, read at {read[0]} x {read[1]}"] * (read != (width, height))
        found += [f"{width} x {height} pixels, hardly anything to see"] * (min(width, height) < 16)
        return tuple(found)

    def picture(self) -> Image.Image:
        """The photo with the predicted classes, their scores, and their regions (see pictures.annotated)."""
        return annotated(self.photo, [(str(label), label.box) for label in self.labels])

    def as_dict(self) -> dict[str, Any]:
        """For JSON: photo, width, height, labels with score and box (x1, y1, x2, y2; null without a region), the score
        of every class, threshold and notes."""
        return {
            "photo": self.name,
            "width": self.photo.size[0],
            "height": self.photo.size[1],
            "labels": [{"label": name, "score": score, "box": box and list(box)} for name, score, box in self.labels],
            "scores": dict(self.scores),
            "threshold": self.threshold,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        return ", ".join(map(str, self.labels)) or "none of its classes"

    def __repr__(self) -> str:
        return f"<{self.name}: {self}>"

    def _repr_html_(self) -> str:
        shown, file = self.picture(), io.BytesIO()
        shown.thumbnail((SHOWN, SHOWN))
        shown.save(file, "JPEG", quality=88)
        source = base64.b64encode(file.getvalue()).decode()
        bars = "".join(map(self._bar, range(max(BARS, len(self.labels))), self.ranked))
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        return (
            '<div style="display:flex;flex-wrap:wrap;gap:1em;align-items:flex-start">'
            f'<img src="data:image/jpeg;base64,{source}" alt="{html.escape(f"{self.name}: {self}")}" '
            'style="max-width:100%">'
            f"<div><p><b>{html.escape(self.name)}</b></p><table>{bars}</table>"
            f"<p>A class is predicted from {100 * self.threshold:.0f} %.</p>{notes}</div></div>"
        )

    def _bar(self, place: int, name: str) -> str:
        """A row: the class, its score as a bar in the colour of its box, and in words."""
        colour = COLOURS[place % len(COLOURS)] if place < len(self.labels) else "#bbbbbb"
        width = f"{100 * self.scores[name]:.0f}"
        return (
            f'<tr><td style="text-align:right">{html.escape(name)}</td><td style="min-width:100px">'
            f'<div style="background:{colour};width:{width}px;height:0.8em"></div></td>'
            f'<td style="text-align:right">{width} %</td></tr>'
        )


class Predictions(tuple[Prediction, ...]):
    """Those of several photos, in their order; a notebook shows them one below another."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return "".join(each._repr_html_() for each in self)


def prediction_of(
    name: str,
    photo: PhotoRead,
    classes: Sequence[str],
    scores: Tensor,
    regions: Regions | None,
    side: int,
    threshold: float,
) -> Prediction:
    """A model's output for one photo. scores: (K,); regions: those of a batch of one, boxes (1, N, 4) in pixels of the
    square of that side to which the photo was resized; None of a baseline."""
    boxes: dict[str, Box] = {}
    if regions is not None:
        for at, box in zip(regions.classes[0].tolist(), regions.boxes[0].tolist(), strict=True):
            boxes[classes[at]] = _on_photo(box, side, photo.size)
    return Prediction(name, photo, dict(zip(classes, scores.tolist(), strict=True)), threshold, boxes)


def _on_photo(box: Sequence[int], side: int, size: tuple[int, int]) -> Box:
    """The pixels of the photo that a box of the square touches."""
    (x1, y1, x2, y2), (width, height) = box, size
    return Box(x1 * width // side, y1 * height // side, -(-x2 * width // side), -(-y2 * height // side))
