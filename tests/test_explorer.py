"""Explore a photo: what is seen is the model's own, only what changed is computed, and the widgets follow."""

import datetime
import io
import re
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mcar_lib.data.scenes import CLASSES
from mcar_lib.data.transforms import network_input, resize_square
from mcar_lib.errors import ConfigError, DataError
from mcar_lib.explorer import (
    DENSITY,
    FIELDS,
    GAP,
    HEAD,
    MOST_REGIONS,
    PHOTO,
    REGION_COLOURS,
    Choices,
    Exploration,
    View,
    _Explorer,
    describe_view,
    draw_view,
    example_photos,
    explorer,
)
from mcar_lib.model import MCAR
from mcar_lib.released import ReleasedModel

OWN = Choices(num_regions=2, threshold=0.5, image_size=64, pooling="avg")


def photo(seed: int = 0) -> Tensor:
    """A photo with shapes coarse enough to be seen by a map of few cells."""
    cells = torch.randint(0, 256, (3, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return cells.repeat_interleave(20, dim=1).repeat_interleave(20, dim=2)


@pytest.fixture
def released(tiny_model: Callable[..., MCAR]) -> ReleasedModel:
    return ReleasedModel(tiny_model().eval(), CLASSES, 64, {})


@pytest.fixture
def exploration(released: ReleasedModel) -> Exploration:
    return Exploration(released, photo())


# ---- what is seen


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"threshold": 0.2},
        {"threshold": 0.9, "num_regions": 8},
        {"image_size": 160},
        {"pooling": "gwp"},
        {"selection": "bottom", "pooling": "max"},
        {"selection": "random", "seed": 7, "num_regions": 5, "image_size": 128},
    ],
    ids=str,
)
def test_what_is_seen_is_what_the_model_computes_with_these_values(
    exploration: Exploration, tiny_model: Callable[..., MCAR], changes: dict[str, Any]
) -> None:
    choices = replace(OWN, **changes)
    exploration.look(OWN)  # what was kept of another look does no harm
    view = exploration.look(choices)
    options = {name: getattr(choices, name) for name in ("num_regions", "threshold", "pooling", "selection")}
    model = tiny_model(**options, generator=torch.Generator().manual_seed(choices.seed)).eval()
    with torch.no_grad():
        output = model(network_input(model, resize_square(photo(), choices.image_size)[None]))
    assert torch.equal(view.boxes, output.regions.boxes[0])
    assert torch.equal(view.classes, output.regions.classes[0])
    torch.testing.assert_close(view.global_scores, torch.sigmoid(output.global_logits[0]))
    torch.testing.assert_close(view.scores["local"], torch.sigmoid(output.local_logits[0]))
    torch.testing.assert_close(view.scores["prediction"], output.scores[0])


def test_the_model_itself_stays_as_it_is(released: ReleasedModel) -> None:
    before = released.predict(photo())
    exploration = Exploration(released, photo())
    exploration.look(Choices(5, 0.1, 96, "max", "random", 3))
    assert exploration.choices() == OWN
    after = released.predict(photo())
    assert torch.equal(before.scores, after.scores)
    assert torch.equal(before.regions.boxes, after.regions.boxes)


def test_a_global_pass_serves_all_looks_at_one_size(exploration: Exploration) -> None:
    for changes in ({}, {"threshold": 0.3}, {"num_regions": 4}, {"pooling": "max"}, {"selection": "random"}):
        exploration.look(replace(OWN, **changes))
    assert exploration.global_passes == 1
    exploration.look(replace(OWN, image_size=96))
    exploration.look(OWN)
    assert exploration.global_passes == 2


def test_a_crop_is_passed_on_once_for_each_box(exploration: Exploration) -> None:
    seen: set[tuple[int, ...]] = set()
    for threshold in (0.5, 0.2, 0.9, 0.5, 0.2):
        for count in (1, 4, 8):
            boxes = exploration.look(replace(OWN, threshold=threshold, num_regions=count)).boxes
            seen |= {tuple(box) for box in boxes.tolist()}
            assert exploration.crop_passes == len(seen)
    exploration.look(replace(OWN, image_size=96))
    assert exploration.crop_passes > len(seen)  # a box of another size is another crop


def test_another_pooling_of_the_same_boxes_costs_no_pass_and_gives_other_scores(exploration: Exploration) -> None:
    every = len(CLASSES)  # so that pooling cannot choose other classes
    first = exploration.look(replace(OWN, num_regions=every))
    passes = exploration.crop_passes
    second = exploration.look(replace(OWN, num_regions=every, pooling="max"))
    assert exploration.crop_passes == passes
    assert not torch.allclose(first.scores["local"], second.scores["local"])


def test_random_classes_stay_while_tau_moves_and_follow_the_seed(exploration: Exploration) -> None:
    random = replace(OWN, selection="random", num_regions=5)
    one, two = (exploration.look(replace(random, threshold=tau)).classes for tau in (0.3, 0.8))
    assert torch.equal(one, two)
    assert not torch.equal(one, exploration.look(replace(random, seed=1)).classes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_regions": 21}, "num_regions is 21.*1 .. 20"),
        ({"threshold": 1.0}, "tau"),
        ({"image_size": 100}, "multiple of 32"),
        ({"pooling": "min"}, "pooling is 'min'"),
        ({"selection": "best"}, "selection is 'best'"),
    ],
)
def test_a_choice_that_cannot_be_is_a_sentence(exploration: Exploration, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        exploration.look(replace(OWN, **changes))


def test_a_global_baseline_has_nothing_to_explore(tiny_model: Callable[..., MCAR]) -> None:
    baseline = ReleasedModel(tiny_model(local_stream=False).eval(), CLASSES, 64, {})
    with pytest.raises(ConfigError, match="no regions to explore"):
        Exploration(baseline, photo())


def test_what_is_no_photo_is_a_sentence(released: ReleasedModel, tmp_path: Path) -> None:
    (tmp_path / "x.jpg").write_text("no photo")
    with pytest.raises(DataError, match=r"x\.jpg: not an image file"):
        Exploration(released, tmp_path / "x.jpg")


def test_there_is_something_to_look_at_on_a_fresh_machine() -> None:
    photos = example_photos()
    assert len(photos) >= 3
    assert any("scene" in caption for caption in photos)


# ---- what is drawn


def view_of(boxes: list[list[int]], names: tuple[str, ...] = CLASSES) -> View:
    """A black photo of 64 pixels with these boxes of the first classes."""
    count, black = len(boxes), torch.zeros(3, 64, 64, dtype=torch.uint8)
    scores = torch.linspace(0.1, 0.9, len(names))
    rows = scores.flip(0).expand(count, -1)
    maps, crops = torch.zeros(count, 64, 64), black.expand(count, -1, -1, -1)
    choices = replace(OWN, num_regions=count)
    return View(choices, names, black, torch.tensor(boxes), torch.arange(count), maps, crops, scores, rows)


def test_the_picture_shows_the_number_of_each_of_equal_boxes() -> None:
    picture = np.asarray(draw_view(view_of([[60, 0, 64, 8]] * MOST_REGIONS)))
    top, left, side = (round(DENSITY * each) for each in (HEAD + GAP, GAP, PHOTO))
    shown = picture[top : top + side, left : left + side]
    for colour in REGION_COLOURS[:MOST_REGIONS]:
        assert (shown == colour).all(axis=2).sum() > 100


def test_the_picture_in_words_has_regions_and_the_scores_of_both_streams() -> None:
    view = view_of([[1, 2, 30, 40]], ("cat", "dog", "<b>"))
    told = describe_view(view)
    assert "N = 1, tau = 0.50" in told
    assert "1 cat at x 1 to 30, y 2 to 40" in told
    assert "dog 0.50 (global 0.50, local 0.50)" in told


def test_classes_are_listed_in_the_order_of_the_chosen_stream() -> None:
    view = view_of([[0, 0, 8, 8]], ("a", "b", "c"))  # global scores rise, local ones fall
    for stream, expected in {"global": [2, 1, 0], "local": [0, 1, 2]}.items():
        chosen = replace(view.choices, stream=stream)  # type: ignore[arg-type]
        assert view._replace(choices=chosen).best(3) == expected


# ---- the widgets


def source_of(shown: _Explorer) -> str:
    return re.search(r'<img src="data:image/jpeg;base64,([^"]+)"', shown.picture.value)[1]


def upload(shown: _Explorer, name: str, content: bytes) -> None:
    now = datetime.datetime.now(datetime.UTC)
    file = {"name": name, "type": "", "size": len(content), "content": memoryview(content), "last_modified": now}
    shown.upload.value = (file,)


def png(colour: str) -> bytes:
    written = io.BytesIO()
    Image.new("RGB", (50, 30), colour).save(written, "PNG")
    return written.getvalue()


@pytest.fixture
def shown(released: ReleasedModel) -> _Explorer:
    return _Explorer(released, {"one": photo(1), "two": photo(2)})


def test_every_choice_has_a_widget() -> None:
    assert set(FIELDS.values()) == {field.name for field in fields(Choices)}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 3),
        ("tau", 0.9),
        ("size", 96),
        ("pooling", "max"),
        ("selection", "bottom"),
        ("selection", "random"),
        ("stream", "global"),
        ("photo", "two"),
    ],
)
def test_the_picture_follows_a_widget_and_comes_back(shown: _Explorer, name: str, value: object) -> None:
    before, widget = source_of(shown), {**shown.values, "photo": shown.photo}[name]
    own, widget.value = widget.value, value
    assert source_of(shown) != before
    widget.value = own
    assert source_of(shown) == before


def test_the_widgets_start_at_the_model_s_own_values_and_have_names_for_style_sheets(released: ReleasedModel) -> None:
    panel = explorer(released, {"one": photo()})
    found: dict[str, Any] = {}

    def collect(widget: Any) -> None:
        found.update(dict.fromkeys(widget._dom_classes, widget))
        for child in getattr(widget, "children", ()):
            collect(child)

    collect(panel)
    names = ("explorer", "photo", "upload", "message", "picture", *FIELDS)
    assert set(found) == {f"mcar-{name}" for name in names}
    assert (found["mcar-n"].value, found["mcar-tau"].value, found["mcar-size"].value) == (2, 0.5, 64)
    assert 'alt="N = 2, tau = 0.50.' in found["mcar-picture"].value


def test_n_goes_no_further_than_the_classes(tiny_model: Callable[..., MCAR]) -> None:
    few = ReleasedModel(tiny_model(num_classes=3).eval(), ("a", "b", "c"), 64, {})
    shown = _Explorer(few, {"one": photo()})
    shown.values["n"].value = 8
    assert shown.values["n"].value == 3
    assert "N = 3" in shown.picture.value


def test_an_uploaded_photo_is_shown_and_joins_the_list(shown: _Explorer) -> None:
    before = source_of(shown)
    upload(shown, "red.png", png("red"))
    assert source_of(shown) != before
    assert (shown.photo.value, list(shown.photo.options)) == ("red.png", ["one", "two", "red.png"])
    upload(shown, "red.png", png("blue"))  # another photo of the same name takes its place
    red, green, blue = shown.exploration.image.flatten(1).T[0].tolist()
    assert (red, green, blue) == (0, 0, 255)


def test_an_upload_that_is_no_photo_is_a_sentence_and_the_picture_stays(shown: _Explorer) -> None:
    before = source_of(shown)
    upload(shown, "a <b>.jpg", b"this is a text, not a photo")
    assert "a &lt;b&gt;.jpg: not an image file of any known format" in shown.message.value
    assert 'role="alert"' in shown.message.value
    assert source_of(shown) == before
    assert list(shown.photo.options) == ["one", "two"]
    shown.values["tau"].value = 0.9  # the next thing that works takes the sentence away
    assert shown.message.value == ""


def test_a_class_name_is_text_on_the_page(tiny_model: Callable[..., MCAR]) -> None:
    named = ReleasedModel(tiny_model(num_classes=2).eval(), ('<script>"', "b"), 64, {})
    page = _Explorer(named, {"one": photo()}).picture.value
    assert "<script>" not in page
    assert "&lt;script&gt;&quot;" in page
