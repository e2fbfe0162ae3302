"""A photo explored: other values of N, tau, size, pooling and selection, and what the region module makes of them.

`Exploration` computes what is to be seen and keeps what a change leaves as it was; `draw_view` makes one picture of it,
fast enough to follow a slider; `explorer` puts widgets around both.
"""

import base64
import copy
import functools
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from mcar_lib.backbones import STRIDE
from mcar_lib.data.image_set import Photo, decode_image, read_image
from mcar_lib.data.samples import sample_photos
from mcar_lib.data.transforms import network_input, resize_square
from mcar_lib.errors import ConfigError, MCARError, printable
from mcar_lib.figures import COLOURS, MODEL_COLOURS, ink_on
from mcar_lib.model import MCAR, POOLINGS, Pooling, check_image_size, fuse
from mcar_lib.pictures import Box, place_labels
from mcar_lib.regions import SELECTIONS, Regions, Selection, attention_maps, class_marginals, crop_regions
from mcar_lib.released import ReleasedModel
from mcar_lib.runs import METHOD

if TYPE_CHECKING:
    import ipywidgets

Stream = Literal["prediction", "global", "local"]
STREAMS: tuple[Stream, ...] = get_args(Stream)
MOST_REGIONS = 8  # of the slider; each is a pass of the network
SIZES = (64, 448)  # pixels; least and most of the slider
TAUS = (0.05, 0.95)


# What is seen ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Choices:
    """What a reader of a photo may choose: N, tau, the side of the network input, pooling, which classes are looked at
    (seed: of random ones), and by which scores the listed classes are ordered."""

    num_regions: int
    threshold: float
    image_size: int
    pooling: Pooling
    selection: Selection = "top"
    seed: int = 0
    stream: Stream = "prediction"


class View(NamedTuple):
    """What is to be seen of one photo, N regions of K classes on a side of S pixels.

    photo: uint8 (3, S, S), as the network gets it; boxes (N, 4), classes (N,); maps (N, S, S) in [0, 1]; crops uint8
    (N, 3, S, S); global_scores (K,) and region_scores (N, K), in [0, 1].
    """

    choices: Choices
    names: tuple[str, ...]
    photo: Tensor
    boxes: Tensor
    classes: Tensor
    maps: Tensor
    crops: Tensor
    global_scores: Tensor
    region_scores: Tensor

    @property
    def scores(self) -> dict[Stream, Tensor]:
        """Each stream's scores (K,), and the prediction that is made of both."""
        local = self.region_scores.amax(dim=0)
        return {"prediction": fuse(self.global_scores, local), "global": self.global_scores, "local": local}

    @property
    def labels(self) -> list[str]:
        """The class of each region."""
        return [printable(self.names[k]) for k in self.classes.tolist()]

    def best(self, count: int) -> list[int]:
        """The classes with the highest scores of the chosen stream."""
        scores = self.scores[self.choices.stream]
        return torch.argsort(scores, descending=True, stable=True)[:count].tolist()


class _Input(NamedTuple):
    """A photo at one size, and what its global pass gave."""

    photo: Tensor  # uint8 (3, S, S)
    images: Tensor  # (1, 3, S, S), normalised
    features: Tensor  # (1, C, h, w)


class Exploration:
    """One photo under a released model, looked at again and again with other choices.

    Only what a change touches is computed: the global pass once for a size, the pass over a crop once for a box, in
    every pooling at once, for that costs nothing more. global_passes, crop_passes: how many images and crops the
    network was given so far. The numbers are those of the model's own forward up to the rounding of another batch.
    Raises DataError for what is no photo, ConfigError for a model without a local stream.
    """

    def __init__(self, released: ReleasedModel, photo: Photo) -> None:
        if not released.model.local_stream:
            raise ConfigError("this model is a global baseline, which has no regions to explore; load an MCAR model")
        self.released = released
        self.image = read_image(photo, upright=True)
        self.global_passes = self.crop_passes = 0
        self._inputs: dict[int, _Input] = {}
        # A few hundred bytes a box, so none is ever thrown away.
        self._crop_logits: dict[tuple[int, tuple[int, ...]], dict[Pooling, Tensor]] = {}

    def choices(self) -> Choices:
        """The model's own."""
        model = self.released.model
        count = min(model.num_regions, MOST_REGIONS)
        return Choices(count, model.threshold, self.released.image_size, model.pooling, model.selection)

    @torch.no_grad()
    def look(self, choices: Choices) -> View:
        """What is to be seen with these choices; raises ConfigError where one of them cannot be."""
        square = (choices.image_size, choices.image_size)
        check_image_size(square)
        model, given = self._model_with(choices), self._input(choices.image_size)
        global_logits = model.classify(model.pool(given.features))
        regions = model.find_regions(given.features, global_logits, square)
        maps = attention_maps(model.class_logits(given.features), regions.classes, square)
        pictures = crop_regions(given.photo[None].float(), regions.boxes.cpu()).round().to(torch.uint8)
        return View(
            choices,
            self.released.classes,
            given.photo,
            regions.boxes[0].cpu(),
            regions.classes[0].cpu(),
            maps[0].cpu(),
            pictures.cpu(),
            torch.sigmoid(global_logits[0]).cpu(),
            torch.sigmoid(self._logits_of_crops(model, given, regions)).cpu(),
        )

    def _model_with(self, choices: Choices) -> MCAR:
        """The same weights under other values; the released model itself stays as it is."""
        if choices.pooling not in POOLINGS:
            raise ConfigError(f"pooling is {choices.pooling!r}; choose one of {', '.join(POOLINGS)}")
        model = copy.copy(self.released.model)
        model.num_regions, model.threshold = choices.num_regions, choices.threshold
        model.pooling, model.selection = choices.pooling, choices.selection
        model.generator = torch.Generator().manual_seed(choices.seed)
        return model

    def _input(self, size: int) -> _Input:
        if size not in self._inputs:
            photo, model = resize_square(self.image, size), self.released.model
            images = network_input(model, photo[None])
            self._inputs[size] = _Input(photo, images, model.features(images))
            self.global_passes += 1
        return self._inputs[size]

    def _logits_of_crops(self, model: MCAR, given: _Input, regions: Regions) -> Tensor:
        """(N, K), of the pooling of the model; boxes that were seen before are not looked at again."""
        keys = [(given.images.shape[-1], tuple(box)) for box in regions.boxes[0].tolist()]
        fresh = [key for key in dict.fromkeys(keys) if key not in self._crop_logits]
        if fresh:
            boxes = torch.tensor([box for _, box in fresh], device=given.images.device)
            features = model.features_of_crops(crop_regions(given.images, boxes[None]))
            self.crop_passes += len(fresh)
            pooled = {each: _pooled(model, each, features) for each in POOLINGS}
            for place, key in enumerate(fresh):
                self._crop_logits[key] = {each: model.classify(pooled[each])[place] for each in POOLINGS}
        return torch.stack([self._crop_logits[key][model.pooling] for key in keys])


def _pooled(model: MCAR, pooling: Pooling, features: Tensor) -> Tensor:
    other = copy.copy(model)
    other.pooling = pooling
    return other.pool(features)


def example_photos() -> dict[str, Photo]:
    """What can be looked at without a photo of one's own, by caption: the photos that installed packages ship, and two
    composed scenes where their icon fonts are installed."""
    from mcar_lib.data.scenes import ScenesConfig, draw_scene, plan_scene

    config, photos = ScenesConfig(), dict[str, Photo](sample_photos())
    for index in range(2):
        try:
            photos[f"composed scene {index + 1}"] = draw_scene(plan_scene(config, "test", index), config.side)[0]
        except MCARError:  # the icon fonts are a package that not everybody has
            break
    return photos


# One picture of it ----------------------------------------------------------------------------------------------------

# matplotlib takes a second for so many axes; this has to follow a slider. Pixels of the page:
PHOTO, MAP, STRIP, GAP, LINE, BAR = 300, 150, 34, 14, 17, 8
HEAD = LINE + GAP  # the line above it all
COLUMNS = 4  # regions in a row
LISTED = 8  # classes with bars
DENSITY = 1.5  # pixels of the picture for one of the page: sharp, and not more than follows a slider
TAG = LINE + 1, LINE + 2  # width and height that the number of a region takes
INK, PAPER, FAINT = (0, 0, 0), (255, 255, 255), (225, 225, 225)
Colour = tuple[int, int, int]


def _rgb(colour: Sequence[float]) -> Colour:
    red, green, blue = (round(255 * float(part)) for part in colour[:3])
    return red, green, blue


REGION_COLOURS = [_rgb(colour) for colour in COLOURS]
CURVE = REGION_COLOURS[0]
BAND = _rgb([1 - 0.3 * (1 - part) for part in COLOURS[2]])
# Both streams are MCAR's, so both have its colour: the global one light, the local one full.
STREAM_COLOURS: dict[Stream, Colour] = {
    "global": _rgb([1 - 0.45 * (1 - part) for part in MODEL_COLOURS[METHOD]]),
    "local": _rgb(MODEL_COLOURS[METHOD]),
}


def draw_view(view: View) -> Image.Image:
    """The photo with its boxes and both streams' scores as bars; beside it, for each region, its class with the global
    score, its map with px above and py to its right (dashed: tau, shaded: the interval), and the crop that the local
    stream gets."""
    count = len(view.boxes)
    columns, rows = min(count, COLUMNS), -(-count // COLUMNS)
    cell_width, cell_height = MAP + STRIP + 2 * GAP, LINE + STRIP + 2 * MAP + 2 * GAP
    width = PHOTO + 2 * GAP + columns * cell_width
    height = HEAD + max(rows * cell_height, PHOTO + 3 * LINE + min(LISTED, len(view.names)) * 2 * LINE) + GAP
    picture = _Picture(width, height)
    picture.text(_headline(view), GAP, GAP, width - 2 * GAP, bold=True)
    _draw_photo(picture, view, HEAD + GAP)
    _draw_bars(picture, view, HEAD + PHOTO + GAP + LINE)
    for index in range(count):
        row, column = divmod(index, COLUMNS)
        _draw_region(picture, view, index, PHOTO + 3 * GAP + column * cell_width, HEAD + row * cell_height)
    return picture.image


def _headline(view: View) -> str:
    chosen = view.choices
    classes = f"{chosen.selection} classes" + (f", seed {chosen.seed}" if chosen.selection == "random" else "")
    head = f"N = {chosen.num_regions}, tau = {chosen.threshold:.2f}, {chosen.image_size} px"
    return f"{head}, {chosen.pooling} pooling, {classes}"


class _Picture:
    """An empty page, drawn on in pixels of the page."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (round(width * DENSITY), round(height * DENSITY)), PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def paste(self, pixels: Image.Image, x: float, y: float, side: int) -> None:
        across = round(side * DENSITY)
        fitted = pixels.resize((across, across), Image.Resampling.BILINEAR)
        self.image.paste(fitted, (round(x * DENSITY), round(y * DENSITY)))

    def line(self, points: Sequence[tuple[float, float]], colour: Colour, width: float = 1) -> None:
        scaled = [(x * DENSITY, y * DENSITY) for x, y in points]
        self.pen.line(scaled, fill=colour, width=round(width * DENSITY), joint="curve")

    def dashed(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        steps = np.linspace(start, end, 26).tolist()
        for one, two in zip(steps[::2], steps[1::2], strict=True):
            self.line([tuple(one), tuple(two)], INK)

    def box(self, corners: Sequence[float], fill: Colour | None = None, outline: Colour | None = None) -> None:
        x1, y1, x2, y2 = (round(each * DENSITY) for each in corners)
        self.pen.rectangle((x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)), fill, outline, width=round(2 * DENSITY))

    def text(self, words: str, x: float, y: float, room: float, bold: bool = False, colour: Colour = INK) -> None:
        """Words from their upper left corner, cut where there is no more room."""
        font = _font(bold)
        while words and font.getlength(words) > room * DENSITY:
            words = words.removesuffix("…")[:-1] + "…" if len(words) > 1 else ""
        self.pen.text((x * DENSITY, y * DENSITY), words, colour, font)

    def width_of(self, words: str, bold: bool = False) -> float:
        return _font(bold).getlength(words) / DENSITY

    def tag(self, words: str, x: float, y: float, colour: Colour) -> None:
        ink = INK if ink_on([part / 255 for part in colour]) == "black" else PAPER
        self.box((x, y, x + LINE - 2, y + LINE), fill=colour)
        self.text(words, x + 3, y, LINE, bold=True, colour=ink)


@functools.cache
def _font(bold: bool) -> ImageFont.FreeTypeFont:
    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name), round(13 * DENSITY))


def _as_image(pixels: Tensor) -> Image.Image:
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def _draw_photo(picture: _Picture, view: View, y: float) -> None:
    scale, places = PHOTO / view.photo.shape[-1], view.boxes.tolist()
    picture.paste(_as_image(view.photo), GAP, y, PHOTO)
    for index, (x1, y1, x2, y2) in enumerate(places):
        sides = GAP + scale * x1, y + scale * y1, GAP + scale * x2, y + scale * y2
        picture.box(sides, outline=REGION_COLOURS[index])
    corners = [(round(scale * x1), round(scale * y1)) for x1, y1, _, _ in places]
    for index, tag in enumerate(place_labels(corners, [TAG] * len(corners), Box(0, 0, PHOTO, PHOTO))):
        if tag is not None:
            picture.tag(str(index + 1), GAP + tag.x1, y + tag.y1, REGION_COLOURS[index])


def _draw_region(picture: _Picture, view: View, index: int, x: float, y: float) -> None:
    colour, side = REGION_COLOURS[index], view.photo.shape[-1]
    picture.tag(str(index + 1), x, y + GAP, colour)
    score = view.global_scores[view.classes[index]]
    picture.text(f"{view.labels[index]}, g = {score:.2f}", x + LINE + 2, y + GAP, MAP + STRIP - LINE)
    top = y + GAP + LINE + 2 + STRIP
    box = [MAP / side * each for each in view.boxes[index].tolist()]
    picture.paste(_map_over_photo(view, index), x, top, MAP)
    picture.box((x + box[0], top + box[1], x + box[2], top + box[3]), outline=colour)
    px, py = class_marginals(view.maps[index])
    _draw_marginal(picture, px, view.choices.threshold, (box[0], box[2]), x, top, across=True)
    _draw_marginal(picture, py, view.choices.threshold, (box[1], box[3]), x, top, across=False)
    picture.paste(_as_image(view.crops[index]), x, top + MAP + GAP / 2, MAP)


def _draw_marginal(
    picture: _Picture, marginal: Tensor, tau: float, interval: tuple[float, float], x: float, y: float, across: bool
) -> None:
    """A marginal beside the map whose corner is at x, y: above it, or to its right."""

    def at(along: float, value: float) -> tuple[float, float]:
        away = 3 + (STRIP - 6) * value
        return (x + along, y - away) if across else (x + MAP + away, y + along)

    (x1, y1), (x2, y2) = at(interval[0], 0), at(interval[1], 1)
    picture.box((min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)), fill=BAND)
    places = np.linspace(0, MAP, len(marginal)).tolist()
    picture.line([at(*each) for each in zip(places, marginal.tolist(), strict=True)], CURVE, 1.5)
    picture.dashed(at(0, tau), at(MAP, tau))
    _, height = at(0, tau)
    if across:
        picture.text("tau", x + MAP + 4, height - LINE / 2, STRIP - 4)
        picture.text("px", x + MAP + 4, y - (LINE if tau > 0.5 else STRIP), STRIP)
    else:
        picture.text("py", x + MAP + 4, y + MAP + 2, STRIP)


def _map_over_photo(view: View, index: int) -> Image.Image:
    """Colours span the map's own range, as its marginals do."""
    values = view.maps[index].numpy()
    spread = (values - values.min()) / max(float(values.max() - values.min()), 1e-12)
    coloured = Image.fromarray(_magma()[(255 * spread).astype(np.uint8)])
    return Image.blend(_as_image(view.photo), coloured, 0.6)


@functools.cache
def _magma() -> np.ndarray:
    """256 colours, uint8 (256, 3)."""
    return (255 * matplotlib.colormaps["magma"](np.arange(256))[:, :3]).astype(np.uint8)


def _draw_bars(picture: _Picture, view: View, y: float) -> None:
    """The classes with the highest scores of the chosen stream: a bar for either stream, and the chosen's number."""
    names_room, bars = 120, PHOTO - 120 - 48
    x, scores, chosen = GAP + names_room, view.scores, view.choices.stream
    for place, (stream, colour) in enumerate(STREAM_COLOURS.items()):
        left = GAP + 100 * place
        picture.box((left, y + 4, left + 10, y + 14), fill=colour)
        picture.text(stream, left + 16, y, 80)
    picture.text(chosen, GAP + PHOTO - picture.width_of(chosen, bold=True), y, 100, bold=True)
    for place, k in enumerate(view.best(LISTED)):
        top = y + LINE + GAP / 2 + 2 * LINE * place
        picture.text(printable(view.names[k]), GAP, top + 4, names_room - 6)
        for row, (stream, colour) in enumerate(STREAM_COLOURS.items()):
            score, under = float(scores[stream][k]), top + row * (BAR + 4) + 2
            picture.box((x, under, x + bars, under + BAR), fill=FAINT)
            picture.box((x, under, x + bars * score, under + BAR), fill=colour)
        picture.text(f"{float(scores[chosen][k]):.2f}", x + bars + 12, top + 4, 40, bold=True)


def describe_view(view: View) -> str:
    """The same in words: the regions with their boxes, and the classes that score highest."""
    regions = [
        f"{index} {label} at x {x1} to {x2}, y {y1} to {y2}"
        for index, (label, (x1, y1, x2, y2)) in enumerate(zip(view.labels, view.boxes.tolist(), strict=True), 1)
    ]
    scores, listed = view.scores, view.best(LISTED)
    told = [
        f"{printable(view.names[k])} {scores['prediction'][k]:.2f} (global {scores['global'][k]:.2f}, "
        f"local {scores['local'][k]:.2f})"
        for k in listed
    ]
    side = view.choices.image_size
    return (
        f"N = {len(regions)}, tau = {view.choices.threshold:.2f}. Regions in the square of {side} pixels: "
        f"{'; '.join(regions)}. Scores: {', '.join(told)}."
    )


def as_jpeg(picture: Image.Image) -> bytes:
    """A picture as a file; as a PNG it takes ten times as long."""
    written = io.BytesIO()
    picture.save(written, "JPEG", quality=85, subsampling=0)
    return written.getvalue()


def as_html(view: View) -> str:
    """An <img> with the picture in it and the words for those who do not see it; asks nothing of any server."""
    picture = draw_view(view)
    source = base64.b64encode(as_jpeg(picture)).decode()
    return (
        f'<img src="data:image/jpeg;base64,{source}" alt="{html.escape(describe_view(view))}" '
        f'style="width: {round(picture.width / DENSITY)}px; max-width: 100%">'
    )


# Widgets --------------------------------------------------------------------------------------------------------------


def explorer(released: ReleasedModel, photos: Mapping[str, Photo] | None = None) -> "ipywidgets.VBox":
    """Widgets to explore photos, or an uploaded one: what is drawn follows each slider.

    photos: by caption, at first those of example_photos. A file or a choice that does not work is told in a sentence
    above the picture, which then stays. Raises ConfigError for a model without a local stream, DataError if the first
    photo cannot be read.
    """
    return _Explorer(released, example_photos() if photos is None else photos).panel


class _Explorer:
    """The widgets, and the photo that they are about. Each has a class of its own, for style sheets and tests."""

    def __init__(self, released: ReleasedModel, photos: Mapping[str, Photo]) -> None:
        import ipywidgets

        self.released, self.photos = released, dict(photos)
        self.exploration = Exploration(released, next(iter(self.photos.values())))
        self.photo = ipywidgets.Dropdown(options=list(self.photos), description="photo")
        self.upload = ipywidgets.FileUpload(
            accept="image/*", description="upload a photo", tooltip="a photo of your own", layout={"width": "auto"}
        )
        self.values = _value_widgets(self.exploration.choices(), len(released.classes))
        self.message, self.picture = ipywidgets.HTML(), ipywidgets.HTML()
        self.panel = self._laid_out()
        self.photo.observe(self._on_photo, "value")
        self.upload.observe(lambda _: self._told(self.take_upload), "value")
        for widget in self.values.values():
            widget.observe(lambda _: self._told(self.show), "value")
        self.show()

    def _laid_out(self) -> Any:
        import ipywidgets

        named = {"photo": self.photo, "upload": self.upload, "message": self.message, "picture": self.picture}
        for name, widget in {**named, **self.values}.items():
            widget.add_class(f"mcar-{name}")
        values = list(self.values.values())
        controls = ([self.photo, self.upload], values[:3], values[3:])
        rows = [ipywidgets.HBox(row, layout={"flex_flow": "row wrap"}) for row in controls]
        panel = ipywidgets.VBox([*rows, self.message, self.picture])
        panel.add_class("mcar-explorer")
        return panel

    def show(self) -> None:
        """Draws the photo as the widgets say."""
        choices = Choices(**{FIELDS[name]: widget.value for name, widget in self.values.items()})
        self.values["seed"].disabled = choices.selection != "random"
        self.picture.value = as_html(self.exploration.look(choices))

    def open(self) -> None:
        """Goes to the photo of the list."""
        self.exploration = Exploration(self.released, self.photos[self.photo.value])
        self.show()

    def take_upload(self) -> None:
        """Adds an uploaded file to the list and goes to it."""
        for file in self.upload.value:
            name = printable(str(file["name"]))
            self.photos[name] = decode_image(bytes(file["content"]), Path(name), upright=True)
            # A list that changes jumps to its first photo, which nobody has asked for.
            self.photo.unobserve(self._on_photo, "value")
            self.photo.options = list(self.photos)
            self.photo.value = name
            self.photo.observe(self._on_photo, "value")
            self.open()

    def _on_photo(self, _: object) -> None:
        self._told(self.open)

    def _told(self, act: Callable[[], None]) -> None:
        """What cannot be done is a sentence on the page: a traceback would go to a log that nobody sees."""
        told = ""
        try:
            act()
        except MCARError as error:
            told = f'<p role="alert">{html.escape(printable(str(error)))}</p>'
        self.message.value = told


# Widget -> what it chooses.
FIELDS = {
    "n": "num_regions",
    "tau": "threshold",
    "size": "image_size",
    "pooling": "pooling",
    "selection": "selection",
    "seed": "seed",
    "stream": "stream",
}


def _value_widgets(own: Choices, num_classes: int) -> dict[str, Any]:
    """A widget for each field of Choices, by its name on the page, set to the model's own."""
    import ipywidgets

    most = min(MOST_REGIONS, num_classes)
    tau = {"min": TAUS[0], "max": TAUS[1], "step": 0.01, "description": "tau", "tooltip": "localisation threshold"}
    size = {"step": STRIDE, "description": "size, px", "tooltip": "side of the network input"}
    seed = {"description": "seed", "tooltip": "of random classes", "disabled": own.selection != "random"}
    return {
        "n": ipywidgets.IntSlider(own.num_regions, 1, most, description="N", tooltip="number of regions"),
        "tau": ipywidgets.FloatSlider(own.threshold, **tau),
        "size": ipywidgets.IntSlider(
            own.image_size, min(SIZES[0], own.image_size), max(SIZES[1], own.image_size), **size
        ),
        "pooling": _buttons("pooling", POOLINGS, own.pooling),
        "selection": _buttons("classes", SELECTIONS, own.selection),
        "seed": ipywidgets.BoundedIntText(own.seed, 0, 9999, **seed),
        "stream": _buttons("scores of", STREAMS, own.stream),
    }


def _buttons(description: str, options: Sequence[str], value: str) -> Any:
    import ipywidgets

    return ipywidgets.ToggleButtons(
        options=list(options), value=value, description=description, style={"button_width": "auto"}
    )
