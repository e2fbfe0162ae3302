"""What a model says of photos: labels, boxes in the photo's own pixels, pictures; and of files that are no photos."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor, ImageFont
from real_photos import real_voc2007
from typer.testing import CliRunner, Result

import mcar_lib
from mcar_lib.cli import app
from mcar_lib.data import load_voc
from mcar_lib.data.image_set import PhotoRead, read_image, read_photo
from mcar_lib.data.photo_files import find_photos, picture_paths
from mcar_lib.errors import DataError, WeightsError
from mcar_lib.metrics import best_threshold, multilabel_metrics
from mcar_lib.pictures import COLOURS, Box, annotated, label_font, place_labels
from mcar_lib.prediction import Prediction, Predictions, prediction_of
from mcar_lib.regions import Regions
from mcar_lib.released import ReleasedModel, card_text, export_run
from mcar_lib.runs import RunConfig, Runs

ORIENTATION = 0x0112


def mcar(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["predict", *map(str, arguments)])


def noise(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def released() -> ReleasedModel:
    return mcar_lib.load("voc-photos")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with photos of every awkward kind, and one file that is none."""
    folder = tmp_path / "my photos ä"
    (folder / "below").mkdir(parents=True)
    noise(120, 80).save(folder / "a b ü.jpg")
    noise(60, 90).save(folder / "below" / "a b ü.png")
    noise(1, 1).save(folder / "dot.png")
    noise(40, 30).save(folder / "moving.gif", save_all=True, append_images=[Image.new("RGB", (40, 30))])
    (folder / "text.jpg").write_text("no photo\n")
    (folder / "notes.txt").write_text("no photo either\n")
    (folder / "._a b ü.jpg").write_bytes(b"\0")  # as a Mac leaves them
    return folder


# ---- the library


def test_labels_are_the_classes_from_the_threshold_up_and_the_highest_first() -> None:
    scores = torch.tensor([0.2, 0.9, 0.66, 0.6599])
    boxes = torch.tensor([[[0, 0, 32, 64], [16, 16, 33, 48]]])
    regions = Regions(boxes, torch.tensor([[1, 3]]), torch.zeros(1, 2))
    photo = PhotoRead(torch.zeros(3, 100, 200, dtype=torch.uint8), (200, 100))
    found = prediction_of("x.jpg", photo, ["a", "b", "c", "d"], scores, regions, 64, 0.66)
    # 33 of 64 pixels touch the 104th of 200; c has no region, d a region and no label.
    assert found.labels == (("b", pytest.approx(0.9), (0, 0, 100, 100)), ("c", pytest.approx(0.66), None))
    assert found.regions["d"] == (50, 25, 104, 75)
    assert str(found) == "b 90 %, c 66 %"


def test_a_prediction_is_the_model_s_own_output(released: ReleasedModel, photos: Path) -> None:
    path = photos / "a b ü.jpg"
    output, found = released.predict(path), released(path, threshold=0)
    assert torch.equal(torch.tensor(list(found.scores.values())), output.scores[0])
    assert len(found.labels) == len(released.classes)
    first = released.classes[output.regions.classes[0, 0]]
    x1, y1, x2, y2 = output.regions.boxes[0, 0].tolist()
    side = released.image_size
    low, high = (x1 / side * 120, y1 / side * 80), (x2 / side * 120, y2 / side * 80)
    box = found.regions[first]
    assert all(wanted - 1 < corner <= wanted for corner, wanted in zip(box[:2], low, strict=True))
    assert all(wanted <= corner < wanted + 1 for corner, wanted in zip(box[2:], high, strict=True))


def test_a_turned_photo_has_boxes_as_it_is_seen(released: ReleasedModel, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    noise(80, 40).save(tmp_path / "turned.png", exif=exif)
    noise(80, 40).transpose(Image.Transpose.ROTATE_270).save(tmp_path / "upright.png")
    turned, upright = (released(tmp_path / f"{name}.png") for name in ("turned", "upright"))
    assert turned.photo.size == upright.photo.size == (40, 80)
    assert (turned.scores, turned.regions) == (upright.scores, upright.regions)


def test_batches_make_no_difference_and_what_is_no_photo_keeps_its_place(released: ReleasedModel, photos: Path) -> None:
    files = [*find_photos([photos]), photos / "gone.jpg"]
    one, three = (list(released.each(files, batch_size=size)) for size in (1, 3))
    assert [str(each) for each in one] == [str(each) for each in three]
    assert [path.name for path, each in zip(files, one, strict=True) if isinstance(each, DataError)] == [
        "text.jpg",
        "gone.jpg",
    ]
    with pytest.raises(DataError, match=r"text\.jpg: not an image file"):
        released(files)


def test_forms_other_than_paths_are_named_by_their_place(released: ReleasedModel) -> None:
    found = released([noise(50, 40), np.zeros((10, 20), np.uint8)])
    assert isinstance(found, Predictions)
    assert [each.name for each in found] == ["photos[0]", "photos[1]"]
    assert [each.photo.size for each in found] == [(50, 40), (20, 10)]
    with pytest.raises(DataError, match=r"photos\[0\]: an array"):
        released([np.zeros((9, 9, 9))])


def test_a_run_is_loaded_by_its_id_with_the_threshold_that_its_validation_images_chose(
    runs: Runs, tiny_config: RunConfig
) -> None:
    record = runs.run(tiny_config.vary(scored_on="val"))
    found = mcar_lib.released.load_released(record.run_id, runs.local, runs.artifacts)
    scores, val = runs.scores(record.config).fused, runs.data(record.config).test
    assert found.decision_threshold == record.content["decision_threshold"] == best_threshold(scores, val.targets)
    output = found.predict([val.image(index) for index in range(len(val))])
    assert torch.allclose(output.scores, torch.sigmoid(scores), atol=1e-6)
    assert "decision_threshold" not in runs.run(tiny_config).content  # nothing is chosen on test images
    with pytest.raises(WeightsError, match="no record of a run 000000000000"):
        mcar_lib.load("0" * 12)


def test_the_card_of_a_run_on_validation_images_says_that_its_scores_are_of_these(
    runs: Runs, tiny_config: RunConfig, tmp_path: Path
) -> None:
    record = runs.run(tiny_config.vary(scored_on="val"))
    card = card_text("own", export_run(runs, record, tmp_path / "own.safetensors").about)
    assert "the same that the scores below are of: the score from which a label is predicted, " in card
    assert f"{record.content['decision_threshold']:g}, which had" in card
    assert "**Scores.** mAP of this file" in card
    assert "Test mAP" not in card


def test_the_threshold_is_where_f1_is_highest() -> None:
    generator = torch.Generator().manual_seed(0)
    targets = (torch.rand(60, 4, generator=generator) < 0.3).to(torch.int8)
    scores = torch.randn(60, 4, generator=generator) + 2 * targets
    chosen = best_threshold(scores, targets)

    def f1(probability: float) -> float:
        return multilabel_metrics(torch.sigmoid(scores.double()), targets, probability)["OF1"]

    tried = {percent / 100: f1(percent / 100) for percent in range(1, 100)}
    assert f1(chosen) == max(tried.values())
    assert all(value < f1(chosen) for probability, value in tried.items() if probability < chosen)


# ---- what is shown


def shown(labels: dict[str, Box | None], width: int = 300, height: int = 200) -> Image.Image:
    pixels = torch.full((3, height, width), 90, dtype=torch.uint8)
    return annotated(PhotoRead(pixels, (width, height)), list(labels.items()))


def count_of(image: Image.Image, colour: str) -> int:
    return int((np.asarray(image) == ImageColor.getrgb(colour)).all(axis=2).sum())


def test_boxes_that_coincide_and_their_words_are_all_visible() -> None:
    box = Box(20, 20, 280, 180)
    one = shown({"a 100 %": box})
    four = shown(dict.fromkeys(("a 100 %", "b 100 %", "c 100 %", "d 100 %"), box))
    for colour in COLOURS[:4]:
        assert count_of(four, colour) > 0.7 * count_of(one, COLOURS[0])


BOXES = st.tuples(st.integers(0, 639), st.integers(0, 479))
SIZES = st.tuples(st.integers(1, 200), st.integers(1, 40))


@given(st.lists(st.tuples(BOXES, SIZES), min_size=1, max_size=8))
def test_no_label_covers_another_or_leaves_the_picture(labels: list[tuple[tuple[int, int], tuple[int, int]]]) -> None:
    whole = Box(0, 0, 640, 480)
    places = place_labels([at for at, _ in labels], [size for _, size in labels], whole)
    assert None not in places  # eight of these always fit
    for index, place in enumerate(places):
        assert place.lies_in(whole)
        assert (place.x2 - place.x1, place.y2 - place.y1) == labels[index][1]
        assert not any(place.overlaps(other) for other in places[:index])


def test_a_label_without_room_is_left_out_and_the_others_stay() -> None:
    places = place_labels([(0, 0), (0, 0), (5, 5)], [(10, 10), (30, 30), (10, 10)], Box(0, 0, 20, 20))
    assert places[0] == (0, 0, 10, 10)
    assert places[1] is None
    assert places[2] is not None


@pytest.mark.parametrize(
    ("size", "picture"), [((1, 1), (640, 640)), ((300, 200), (600, 400)), ((1000, 20), (1000, 200)), ((700, 500),) * 2]
)
def test_a_picture_is_large_enough_to_read(size: tuple[int, int], picture: tuple[int, int]) -> None:
    assert shown({"person 100 %": Box(0, 0, *size)}, *size).size == picture


def test_a_class_without_a_region_is_written_at_the_lower_left() -> None:
    made = shown({"person 90 %": None}, 640, 480)
    below = made.crop((0, 440, 320, 480))
    assert count_of(below, COLOURS[0]) == count_of(made, COLOURS[0]) > 500


def test_words_are_in_letters_that_their_font_has() -> None:
    font = label_font("Köter Ωж", 20)
    if isinstance(font, ImageFont.FreeTypeFont) and font.getname()[0] != "Aileron":
        assert bytes(font.getmask("ö")) != bytes(font.getmask("\uffff"))
    assert count_of(shown({"\U0010ffff ö 50 %": Box(0, 0, 300, 200)}), COLOURS[0]) > 500


def test_a_notebook_shows_the_picture_and_no_name_breaks_the_page(released: ReleasedModel) -> None:
    photo = PhotoRead(torch.zeros(3, 20, 30, dtype=torch.uint8), (30, 20), is_first_frame=True)
    scores = {"<b>cat": 0.9, "dog": 0.1}
    page = Predictions([Prediction('"><script>.jpg', photo, scores, 0.5, {"<b>cat": Box(0, 0, 30, 20)})])._repr_html_()
    assert 'src="data:image/jpeg;base64,' in page
    assert 'alt="&quot;&gt;&lt;script&gt;.jpg: &lt;b&gt;cat 90 %"' in page
    assert "<script" not in page
    assert "<b>cat" not in page
    assert page.count("<tr>") == 2
    assert "first frame" in page


# ---- large photos


@pytest.mark.parametrize("name", ["x.jpg", "x.png"])
def test_a_photo_above_the_limit_is_read_at_reduced_size(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture = noise(6, 4).resize((600, 400), Image.Resampling.NEAREST)
    picture.save(tmp_path / name, exif=exif, quality=95)
    whole = read_image(tmp_path / name, upright=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100_000)
    monkeypatch.setattr("mcar_lib.data.image_set.REDUCED_SIDE", 200)
    read = read_photo(tmp_path / name)
    assert read.size == (400, 600)
    assert max(read.pixels.shape) == (300 if name == "x.jpg" else 200)  # JPEG's decoder halves, and 300 // 200 is 1
    expected = torch.nn.functional.adaptive_avg_pool2d(whole.double(), read.pixels.shape[1:])
    assert (read.pixels - expected).abs().mean() < 5


def test_a_photo_above_what_memory_should_hold_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise(60, 40).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr("mcar_lib.data.image_set.LARGEST", 2000)
    with pytest.raises(DataError, match=r"x\.png: too large .* million pixels, the limit is .*; make it smaller"):
        read_photo(tmp_path / "x.png")


# ---- the command


def test_the_command_says_what_the_library_does(released: ReleasedModel, photos: Path) -> None:
    result = mcar(photos, "--json", "--threshold", 0.01)
    told = json.loads(result.stdout)
    files = [path for path in find_photos([photos]) if path.name != "text.jpg"]
    assert told == json.loads(json.dumps([each.as_dict() for each in released(files, 0.01)]))
    assert [Path(each["photo"]).name for each in told] == ["a b ü.jpg", "a b ü.png", "dot.png", "moving.gif"]
    assert result.exit_code == 3
    assert "text.jpg: not an image file of any known format; give a JPEG or PNG" in result.stderr
    assert "dot.png: 1 x 1 pixels, hardly anything to see" in result.stderr
    assert "moving.gif: an animation, of which the first frame is looked at" in result.stderr


def test_a_table_for_other_programs_has_a_row_for_each_label(photos: Path) -> None:
    arguments = (photos / "a b ü.jpg", photos / "dot.png")
    rows = list(csv.DictReader(io.StringIO(mcar(*arguments, "--csv", "--threshold", 0).stdout)))
    assert len(rows) == 40
    assert {len(row) for row in rows} == {7}
    assert sum(bool(row["x1"]) for row in rows) == 8
    nothing = list(csv.DictReader(io.StringIO(mcar(*arguments, "--csv", "--threshold", 1).stdout)))
    assert [row["label"] for row in nothing] == ["", ""]


def test_the_terminal_shows_a_table(photos: Path) -> None:
    result = mcar(photos / "dot.png", "--threshold", 1)
    assert result.exit_code == 0
    assert "voc-photos: 20 classes; a label from 1" in result.stdout
    assert "dot.png" in result.stdout
    assert "none" in result.stdout


def test_pictures_are_written_beside_nothing_of_the_readers(photos: Path) -> None:
    before = {path: path.read_bytes() for path in photos.rglob("*") if path.is_file()}
    for _ in range(2):  # pictures that were made here are no photos
        assert mcar(photos, "--pictures", photos).exit_code == 3
    assert all(path.read_bytes() == content for path, content in before.items())
    made = sorted(path.name for path in photos.rglob("*") if path.is_file() and path not in before)
    assert made == ["a b ü-2.mcar.jpg", "a b ü.mcar.jpg", "dot.mcar.jpg", "moving.mcar.jpg"]


def test_names_of_pictures_are_never_the_same() -> None:
    names = picture_paths([Path("a/x.jpg"), Path("x.png"), Path("x-2.jpg"), Path("b/x.jpg")], Path("out"))
    assert [path.name for path in names] == ["x.mcar.jpg", "x-2.mcar.jpg", "x-2-2.mcar.jpg", "x-3.mcar.jpg"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda folder: [folder], "no photos in this folder; their names should end in .jpg"),
        (lambda folder: [folder / "gone.jpg"], "gone.jpg: cannot read the image file"),
        (lambda folder: [folder, "--model", "nothing"], "no photos in this folder"),
    ],
    ids=["an empty folder", "a file that is not there", "both wrong"],
)
def test_nothing_to_look_at_is_a_sentence(make: Callable[[Path], list[object]], words: str, tmp_path: Path) -> None:
    result = mcar(*make(tmp_path))
    assert result.exit_code == 3
    assert words in result.stderr
    assert "Traceback" not in result.output


def test_a_device_that_is_not_there_is_a_sentence(photos: Path) -> None:
    result = mcar(photos / "dot.png", "--device", "nowhere")
    assert result.exit_code == 2
    assert "device 'nowhere' cannot be used here" in result.stderr


@pytest.mark.photos
def test_the_shipped_model_is_right_about_most_labels_of_real_photos(released: ReleasedModel) -> None:
    """At its own threshold, on the first forty test photos."""
    test = load_voc(real_voc2007(), "2007", "test").select(range(40))
    found = [{label.name for label in each.labels} for each in released(test.paths)]
    wanted = [{test.classes[k] for k in row.eq(1).nonzero().flatten().tolist()} for row in test.targets]
    right = sum(len(one & other) for one, other in zip(found, wanted, strict=True))
    assert right / sum(map(len, found)) > 0.7
    assert right / sum(map(len, wanted)) > 0.6
