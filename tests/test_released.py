"""Models that are handed on: the file, what it predicts, its card, and the one that is committed."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_CHANNELS, build_tiny
from mutations import mutated
from PIL import Image
from real_photos import real_voc2007
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mcar_lib
from mcar_lib.backbones import BACKBONES, Entry, build_backbone
from mcar_lib.data import load_voc, read_image
from mcar_lib.data.transforms import normalise, resize_square
from mcar_lib.data.voc import VOC_CLASSES
from mcar_lib.errors import DataError, WeightsError
from mcar_lib.figures import photos_figure
from mcar_lib.metrics import average_precision
from mcar_lib.model import MCAR
from mcar_lib.released import METADATA, ReleasedModel, card_text, export_run, load_released
from mcar_lib.runs import Profile, RunConfig, Runs, comparisons, make_config, read_records
from mcar_lib.weights import Source

ROOT = Path(__file__).resolve().parent.parent
MODELS = sorted((ROOT / "models").glob("*.safetensors"))


@pytest.fixture
def exported(runs: Runs, tiny_config: RunConfig, tmp_path: Path) -> tuple[Path, ReleasedModel]:
    path = tmp_path / "new" / "model.safetensors"
    return path, export_run(runs, runs.run(tiny_config), path)


def test_a_file_predicts_what_its_run_does_up_to_the_rounding(
    exported: tuple[Path, ReleasedModel], runs: Runs, tiny_config: RunConfig
) -> None:
    path, _ = exported
    released, test = mcar_lib.load(path), runs.data(tiny_config).test
    output = released.predict([test.image(index) for index in range(len(test))])
    expected = torch.sigmoid(runs.scores(tiny_config).fused)
    assert output.scores.shape == expected.shape
    assert torch.allclose(output.scores, expected, atol=5e-3)
    assert not torch.equal(output.scores, expected)  # it is rounded
    assert output.regions is not None
    assert output.regions.boxes.shape == (len(test), tiny_config.num_regions, 4)
    assert released.classes == test.classes
    assert released.image_size == tiny_config.image_size


def test_a_file_says_what_it_scores_itself(
    exported: tuple[Path, ReleasedModel], runs: Runs, tiny_config: RunConfig
) -> None:
    path, released = exported
    test = runs.data(tiny_config).test
    scores = released.predict([test.image(index) for index in range(len(test))]).scores
    assert released.about["mAP"] == pytest.approx(average_precision(scores, test.targets).nanmean().item(), abs=1e-6)
    assert released.about["run_mAP"] == runs.run(tiny_config).map()
    in_fp32 = sum(4 * value.numel() for value in released.model.state_dict().values())
    assert path.stat().st_size < 0.75 * in_fp32 + 20_000  # the metadata


@pytest.mark.parametrize("pooling", ["avg", "gwp"])
def test_an_exported_baseline_predicts_what_its_run_does_up_to_the_rounding(
    runs: Runs, tiny_config: RunConfig, tmp_path: Path, pooling: str
) -> None:
    config = tiny_config.vary(local_stream=False, pooling=pooling)
    released = export_run(runs, runs.run(config), tmp_path / "baseline.safetensors")
    test = runs.data(config).test
    output = released.predict([test.image(index) for index in range(len(test))])
    assert (output.local_logits, output.regions) == (None, None)
    assert torch.allclose(output.scores, torch.sigmoid(runs.scores(config).global_scores), atol=2e-3)
    assert torch.equal(output.scores, torch.sigmoid(output.global_logits))
    card = card_text("baseline", released.about)
    assert "The global baseline of MCAR over tiny" in card
    assert "regions" not in card.partition("**Data.**")[0]


def test_a_run_in_bf16_is_scored_as_its_file_computes(runs: Runs, tiny_config: RunConfig, tmp_path: Path) -> None:
    config = tiny_config.vary(precision="bf16")
    released = export_run(runs, runs.run(config), tmp_path / "model.safetensors")
    test = runs.data(config).test
    scores = released.predict([test.image(index) for index in range(len(test))]).scores
    assert released.about["mAP"] == pytest.approx(average_precision(scores, test.targets).nanmean().item(), abs=1e-6)


# ---- what the header says is what is computed


@pytest.fixture(scope="module")
def written(tiny_profile: Profile, scenes_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that no test changes."""
    folder = tmp_path_factory.mktemp("written")
    shutil.copytree(scenes_data, folder / "artifacts" / "data", copy_function=shutil.copy2)
    runs = Runs(tiny_profile, folder / "results", artifacts=folder / "artifacts", verbose=False)
    export_run(runs, runs.run(tiny_profile.run), folder / "model.safetensors")
    return folder / "model.safetensors"


def rewritten(path: Path, other: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """Another file with the same tensors below a changed header."""
    with safe_open(path, framework="pt") as stored:
        about = json.loads(stored.metadata()[METADATA])
    change(about)
    save_file(load_file(path), other, {METADATA: json.dumps(about)})
    return other


def predicted(path: Path, photos: list[Tensor]) -> dict[str, Tensor]:
    released = load_released(path)
    output = released.predict(photos)
    found = dict(zip(released.classes, output.scores.T, strict=True))
    return found if output.regions is None else {**found, "regions": output.regions.boxes}


def predicted_by_hand(path: Path, photos: list[Tensor]) -> dict[str, Tensor]:
    """From the header and the tensors, without mcar_lib.released."""
    with safe_open(path, framework="pt") as stored:
        about = json.loads(stored.metadata()[METADATA])
    config, built = about["config"], build_backbone(about["config"]["backbone"], "none")
    names = ("pooling", "num_regions", "threshold", "selection", "local_stream")
    options = {name: config[name] for name in names}
    model = MCAR(built.features, built.num_features, len(about["classes"]), generator=torch.Generator(), **options)
    model.load_state_dict({key: value.to(model.state_dict()[key].dtype) for key, value in load_file(path).items()})
    squares = torch.stack([resize_square(photo, config["image_size"]) for photo in photos])
    with torch.no_grad():
        output = model.eval()(normalise(squares, about["mean"], about["std"]))
    found = dict(zip(about["classes"], output.scores.T, strict=True))
    return found if output.regions is None else {**found, "regions": output.regions.boxes}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and torch.allclose(a[k], b[k], atol=1e-5) for k in a)


def with_tanh() -> nn.Module:
    """The tiny backbone with another activation: its tensors have the same names and shapes."""
    return nn.Sequential(*(nn.Tanh() if isinstance(layer, nn.ReLU) else layer for layer in build_tiny()))


HEADER = {
    "backbone": "tanh",
    "pooling": "max",
    "num_regions": 3,
    "threshold": 0.2,
    "selection": "bottom",
    "local_stream": False,
    "image_size": 96,
    "classes": list(reversed(VOC_CLASSES)),
    "mean": [0.1, 0.2, 0.3],
    "std": [0.5, 0.4, 0.3],
}


def part_with(key: str, about: dict[str, Any]) -> dict[str, Any]:
    """The part of a header in which a key is."""
    part: dict[str, Any] = about["config"] if key in RunConfig.model_fields else about
    return part


@pytest.mark.parametrize(("key", "value"), HEADER.items(), ids=HEADER)
def test_each_value_of_the_header_that_a_prediction_depends_on_is_used(
    written: Path, key: str, value: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(BACKBONES, "tanh", Entry(with_tanh, TINY_CHANNELS[-1], Source("tanh")))
    random = torch.Generator().manual_seed(0)
    photos = [torch.randint(0, 256, (3, 80, 120), dtype=torch.uint8, generator=random) for _ in range(2)]
    other = rewritten(written, tmp_path / "other.safetensors", lambda about: part_with(key, about).update({key: value}))
    assert same(predicted(written, photos), predicted_by_hand(written, photos))
    assert same(predicted(other, photos), predicted_by_hand(other, photos))
    assert not same(predicted(other, photos), predicted(written, photos))


@pytest.mark.parametrize("key", HEADER)
def test_a_header_without_one_of_these_values_is_refused(written: Path, key: str, tmp_path: Path) -> None:
    other = rewritten(written, tmp_path / "other.safetensors", lambda about: part_with(key, about).pop(key))
    with pytest.raises(WeightsError, match=f"not complete.*'{key}'"):
        load_released(other)


WRONG = {
    "classes": ["dog", [1, 2], [], ["dog", "dog"], None],
    "config": [[], "x", None],
    "mean": [[0.5, 0.5], ["a", "b", "c"], [0.1, float("nan"), 0.1]],
    "std": [[0, 0, 0], 1],
    "format": [True, "1", None],
    "pooling": ["min", 1],
    "image_size": [33, 0, "224", True],
    "num_regions": [0, 10**9, True],
    "threshold": [2.0, "0.5"],
    "backbone": ["vgg", 1],
    "local_stream": ["yes", 1],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values], ids=str)
def test_a_header_with_a_wrong_value_is_one_sentence(written: Path, key: str, value: object, tmp_path: Path) -> None:
    other = rewritten(written, tmp_path / "other.safetensors", lambda about: part_with(key, about).update({key: value}))
    with pytest.raises(WeightsError) as caught:
        load_released(other)
    assert str(other) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda value: value * float("nan"), "NaN or infinite"),
        (lambda value: value.int(), "floats wanted, torch.int32 found"),
        (lambda value: value[:-1], r"convclass.bias: \(20,\) wanted|20 and|of 19 classes"),
    ],
)
def test_weights_that_cannot_be_right_are_refused(
    written: Path, change: Callable[[Tensor], Tensor], words: str, tmp_path: Path
) -> None:
    with safe_open(written, framework="pt") as stored:
        metadata = stored.metadata()
    state = load_file(written)
    save_file({**state, "convclass.bias": change(state["convclass.bias"])}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(WeightsError, match=words):
        load_released(tmp_path / "x.safetensors")


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_named(written: Path, tmp_path: Path) -> None:
    path, content = tmp_path / "x.safetensors", written.read_bytes()
    for damaged in mutated(content[:4096]):
        path.write_bytes(damaged + content[4096:])
        try:
            load_released(path)
        except WeightsError as error:
            assert str(path) in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017


def test_a_home_folder_is_found(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(written.parent))
    assert load_released(f"~/{written.name}").image_size == load_released(written).image_size


@pytest.mark.parametrize("key", ["AP", "environment", "data", "run_id"])
def test_a_card_of_metadata_without_a_key_is_a_sentence(written: Path, key: str) -> None:
    about = {name: value for name, value in load_released(written).about.items() if name != key}
    with pytest.raises(WeightsError, match=f"lacks what a card says.*{key}"):
        card_text("x", about)


# ---- photos of every kind


def test_photos_in_every_form_get_the_scores_of_their_file(written: Path, tmp_path: Path) -> None:
    released, random = load_released(written), torch.Generator().manual_seed(0)
    tensor = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8, generator=random)
    image = Image.fromarray(tensor.permute(1, 2, 0).numpy())
    image.save(tmp_path / "x.png")
    forms = [tmp_path / "x.png", str(tmp_path / "x.png"), image, tensor, tensor / 255, tensor.permute(1, 2, 0).numpy()]
    scores = released.predict(forms).scores
    assert all(torch.equal(row, scores[0]) for row in scores)
    for one in (*forms, tensor[None]):
        assert torch.allclose(released.predict(one).scores, scores[:1], atol=1e-6)
    classes = torch.zeros(1, 1, dtype=torch.int64)
    assert torch.equal(released.attention_maps(forms[0], classes), released.attention_maps([tensor], classes))


def test_a_phone_s_photo_is_predicted_upright(written: Path, tmp_path: Path) -> None:
    released, exif = load_released(written), Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(torch.arange(60, dtype=torch.uint8).view(6, 10).numpy()).save(tmp_path / "x.png", exif=exif)
    photos = [tmp_path / "x.png", Image.open(tmp_path / "x.png"), read_image(tmp_path / "x.png", upright=True)]
    scores = released.network_input(photos)
    assert torch.equal(scores[0], scores[2])
    assert torch.equal(scores[1], scores[2])


@pytest.mark.parametrize(
    ("photos", "words"),
    [
        ([], "no photos"),
        ([torch.zeros(3, 4, 4, dtype=torch.uint8), torch.zeros(3, 4, 4).long()], r"photos\[1\]: .*int64"),
        ("nowhere.jpg", r"photos\[0\]: nowhere\.jpg: cannot read"),
    ],
)
def test_what_is_no_photo_is_named_by_its_place(written: Path, photos: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        load_released(written).predict(photos)


def test_a_baseline_s_photos_are_shown_with_their_best_classes(written: Path, tmp_path: Path) -> None:
    baseline = load_released(
        rewritten(written, tmp_path / "x.safetensors", lambda about: about["config"].update(local_stream=False))
    )
    Image.new("RGB", (40, 30)).save(tmp_path / "x.png")
    made = photos_figure(baseline, {"black": tmp_path / "x.png"})
    (title,) = [axes.get_title() for axes in made.axes]
    assert title.startswith("black: ")
    assert title.count("%)") == 3


def test_loading_a_model_imports_neither_runs_nor_training() -> None:
    code = "import sys, mcar_lib; mcar_lib.load('voc-photos'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = {name for name in done.stdout.split() if name.startswith("mcar_lib.")}
    assert "mcar_lib.released" in loaded
    assert not [name for name in loaded if name.startswith(("mcar_lib.runs", "mcar_lib.training"))]


def test_photos_of_any_size_and_no_training_mode(exported: tuple[Path, ReleasedModel]) -> None:
    released = exported[1]
    photos = [torch.zeros(3, 40, 90, dtype=torch.uint8), torch.full((3, 200, 33), 255, dtype=torch.uint8)]
    assert not released.model.training
    one, two = (released.predict(photos).scores for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (2, len(released.classes))


def test_an_unknown_name_lists_the_models_that_are_there() -> None:
    with pytest.raises(WeightsError, match=r"'imagenet-21k'.*there: .*\.safetensors"):
        load_released("imagenet-21k")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    with pytest.raises(WeightsError, match=r"weights\.safetensors"):
        load_released(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(WeightsError, match="mcar export"):
        load_released(path)
    save_file({"a": torch.zeros(1)}, path, {"mcar": json.dumps({"format": 99})})
    with pytest.raises(WeightsError, match="format 99"):
        load_released(path)
    about = {"format": 1, "classes": ["a"], "mean": [0, 0, 0], "std": [1, 1, 1]}
    save_file({"a": torch.zeros(1)}, path, {"mcar": json.dumps(about)})
    with pytest.raises(WeightsError, match="'config'"):
        load_released(path)


def test_a_write_that_fails_leaves_the_earlier_file(
    exported: tuple[Path, ReleasedModel],
    runs: Runs,
    tiny_config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, _ = exported
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(WeightsError, match=r"No space left.*the disk is full, [0-9,]+ bytes are free"):
        export_run(runs, runs.run(tiny_config), path)
    assert path.read_bytes() == before


# ---- the models of this repository


def test_there_is_the_model_that_the_readme_names() -> None:
    assert "voc-photos" in [path.stem for path in MODELS]


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_committed_model_is_small_and_belongs_to_a_committed_run(path: Path) -> None:
    about = mcar_lib.load(path.stem).about
    assert path.stat().st_size <= 5e6
    runs = Runs(about["profile"], ROOT / "results", verbose=False)
    (record,) = (each for each in read_records(runs.folder) if each.run_id == about["run_id"])
    chosen = {name: about["config"][name] for name in ("num_regions", "threshold")}
    assert about["run_mAP"] == comparisons.tested(runs, record, **chosen).map()
    assert make_config(about["config"]) == record.config.vary(**chosen)  # the file may lack options that came later
    assert about["mAP"] == pytest.approx(about["run_mAP"], abs=0.01)  # rounding moves the sides of regions


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_the_card_of_a_committed_model_is_what_its_file_says(path: Path) -> None:
    assert path.with_suffix(".md").read_text(encoding="utf-8") == card_text(path.stem, mcar_lib.load(path).about)


@pytest.mark.photos
@pytest.mark.slow
def test_the_committed_model_scores_what_its_card_says() -> None:
    released = mcar_lib.load("voc-photos")
    test = load_voc(real_voc2007(), "2007", "test")
    batches = [range(first, min(first + 32, len(test))) for first in range(0, len(test), 32)]
    scores = torch.cat([released.predict([test.image(index) for index in batch]).scores for batch in batches])
    assert released.classes == VOC_CLASSES
    assert average_precision(scores, test.targets).nanmean().item() == pytest.approx(released.about["mAP"], abs=0.002)
