"""Models as graphs: what they answer, that they are held against PyTorch, and what is said of files that are none."""

import contextlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import IMAGE_SIZE
from PIL import Image
from real_photos import real_voc2007
from torch import Tensor
from typer.testing import CliRunner, Result

import mcar_lib
from mcar_lib import exported
from mcar_lib.cli import app
from mcar_lib.data import load_voc
from mcar_lib.data.transforms import network_input, resize_square
from mcar_lib.errors import ConfigError, WeightsError
from mcar_lib.exported import GraphModel, agreement, drawn_squares, int8_told
from mcar_lib.model import MCAR, build_mcar
from mcar_lib.regions import (
    attention_maps,
    attentional_regions,
    select_classes,
)
from mcar_lib.released import ReleasedModel, export_graph, export_run, load_released
from mcar_lib.runs import RunConfig, Runs

ROOT = Path(__file__).resolve().parent.parent
CLASSES = tuple(f"class {index}" for index in range(20))


def released_of(model: MCAR, side: int = IMAGE_SIZE, backbone: str = "tiny") -> ReleasedModel:
    """A model as load_released gives it, with what a graph's metadata takes from the record of its run."""
    config = {
        "backbone": backbone,
        "pooling": model.pooling,
        "image_size": side,
        "num_regions": model.num_regions,
        "threshold": model.threshold,
        "selection": model.selection,
        "local_stream": model.local_stream,
        "box_source": model.box_source,
    }
    return ReleasedModel(model.eval(), CLASSES, side, {"config": config, "run_id": "0" * 12}, 0.3)


@pytest.fixture(scope="module")
def released(tiny_model: Callable[..., MCAR]) -> ReleasedModel:
    return released_of(_trained_like(tiny_model(threshold=0.45)))  # 0.5 is the very middle of two cells


def _trained_like(model: MCAR) -> MCAR:
    """Class maps with something to localise: an untrained classifier's hardly differ from one another."""
    with torch.no_grad():
        model.convclass.weight.mul_(20)
    return model


@pytest.fixture(scope="module")
def files(released: ReleasedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By suffix, files that no test changes."""
    folder = tmp_path_factory.mktemp("graphs")
    paths = {suffix: folder / f"model{suffix}" for suffix in exported.SUFFIXES}
    for path in paths.values():
        export_graph(released, path)
    return paths


def images(released: ReleasedModel, count: int) -> Tensor:
    return network_input(released.model, drawn_squares(released.image_size, count))


@pytest.mark.parametrize("suffix", exported.SUFFIXES)
@pytest.mark.parametrize("batch", [1, 3, 8])
def test_one_file_answers_batches_of_any_number_as_its_model(
    files: dict[str, Path], released: ReleasedModel, suffix: str, batch: int
) -> None:
    with torch.no_grad():
        expected = released.model(images(released, batch))
    output = mcar_lib.load(files[suffix]).model(images(released, batch))
    assert torch.equal(output.regions.boxes, expected.regions.boxes)  # type: ignore[union-attr]
    assert torch.equal(output.regions.classes, expected.regions.classes)  # type: ignore[union-attr]
    assert torch.allclose(output.regions.scores, expected.regions.scores, atol=1e-5)  # type: ignore[union-attr]
    assert torch.allclose(output.scores, expected.scores, atol=1e-5)


@pytest.mark.parametrize("suffix", exported.SUFFIXES)
def test_a_loaded_file_says_of_photos_what_its_model_does(
    files: dict[str, Path], released: ReleasedModel, suffix: str
) -> None:
    photos = [np.asarray(square.permute(1, 2, 0)) for square in drawn_squares(80, 3)]
    found, expected = mcar_lib.load(files[suffix])(photos), released(photos)
    assert [[each[::2] for each in one.labels] for one in found] == [
        [each[::2] for each in one.labels] for one in expected
    ]
    assert [one.regions for one in found] == [one.regions for one in expected]
    assert any(one.labels for one in found)


@pytest.mark.parametrize("suffix", exported.SUFFIXES)
def test_a_file_says_all_that_a_prediction_depends_on_and_where_it_is_from(
    files: dict[str, Path], released: ReleasedModel, suffix: str
) -> None:
    loaded = load_released(files[suffix])
    assert (loaded.classes, loaded.image_size, loaded.decision_threshold) == (CLASSES, IMAGE_SIZE, 0.3)
    assert (loaded.model.mean, loaded.model.std) == (released.model.mean, released.model.std)
    assert loaded.about["config"] == released.about["config"]
    assert loaded.about["from"] == {"run_id": "0" * 12}
    assert loaded.about["graph"]["precision"] == "fp32"


def test_the_graph_has_the_documented_inputs_and_outputs(files: dict[str, Path]) -> None:
    session = onnxruntime.InferenceSession(files[".onnx"])
    (taken,) = session.get_inputs()
    assert (taken.name, taken.type, taken.shape[1:]) == ("images", "tensor(float)", [3, IMAGE_SIZE, IMAGE_SIZE])
    assert isinstance(taken.shape[0], str)
    given = [(each.name, each.type, each.shape[1:]) for each in session.get_outputs()]
    assert given == [
        ("scores", "tensor(float)", [20]),
        ("boxes", "tensor(int64)", [2, 4]),
        ("classes", "tensor(int64)", [2]),
        ("region_scores", "tensor(float)", [2]),
    ]


class Selected(torch.nn.Module):
    """The classes of four scores in the order in which each selection takes them."""

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return select_classes(images, 4, "top"), select_classes(images, 4, "bottom")


def test_among_equal_scores_a_graph_takes_the_lower_class_too() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0], [0.1, 0.4, 0.3, 0.4]])
    traced = torch.export.export(Selected(), (scores,))
    session = onnxruntime.InferenceSession(exported._onnx(traced, {}, "fp32", None))
    found = [torch.from_numpy(each) for each in session.run(None, {"images": scores.numpy()})]
    assert all(torch.equal(one, other) for one, other in zip(found, Selected()(scores), strict=True))
    assert found[0].tolist() == [[1, 2, 0, 3], [0, 1, 2, 3], [1, 3, 2, 0]]


@pytest.mark.parametrize("suffix", exported.SUFFIXES)
def test_a_baseline_gives_scores_only(tiny_model: Callable[..., MCAR], tmp_path: Path, suffix: str) -> None:
    baseline = released_of(tiny_model(local_stream=False))
    export_graph(baseline, tmp_path / f"baseline{suffix}")
    with torch.no_grad():
        expected = baseline.model(images(baseline, 3)).scores
    output = load_released(tmp_path / f"baseline{suffix}").model(images(baseline, 3))
    assert output.regions is None
    assert torch.allclose(output.scores, expected, atol=1e-6)


# ---- held against PyTorch


def test_a_graph_that_disagrees_is_an_error_and_leaves_the_earlier_file(
    released: ReleasedModel, tiny_model: Callable[..., MCAR], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, other, traced = tmp_path / "model.pt2", tiny_model(), exported._traced
    path.write_text("earlier")
    monkeypatch.setattr(exported, "_traced", lambda _, side: traced(other.eval(), side))
    with pytest.raises(WeightsError, match=r"is not written: the graph disagrees with PyTorch \(boxes equal .* of 32"):
        export_graph(released, path)
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_text() == "earlier"


def test_agreement_counts_boxes_and_tells_scores_of_moved_boxes_apart(released: ReleasedModel) -> None:
    model = released.model

    def one_box_moved(batch: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            output = model(batch)
        boxes, scores = output.regions.boxes.clone(), output.scores.clone()  # type: ignore[union-attr]
        if len(batch) > 1:
            boxes[0, 0, 0] += 1
            scores[0] += 0.25
            scores[1] += 0.125
        return scores, boxes, *output.regions[1:]  # type: ignore[index]

    graph = GraphModel(one_box_moved, IMAGE_SIZE, model.mean, model.std)
    found = agreement(model, graph, drawn_squares(IMAGE_SIZE, 5))
    assert (found.images, found.boxes, found.equal, found.last_bit) == (5, 10, 9, 0)
    assert (found.where_equal, found.anywhere) == pytest.approx((0.125, 0.25), abs=1e-5)


def test_a_box_that_the_last_bit_decides_is_told_apart(
    released: ReleasedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, squares = released.model, drawn_squares(IMAGE_SIZE, 1)
    exact, find = network_input(model, squares), model.pass_over_images

    def undecided(batch: Tensor) -> tuple[Tensor, Any]:
        """The first box is elsewhere where the image is not to the last bit what it was."""
        logits, regions = find(batch)
        assert (batch - exact).abs().max() < 1e-5
        regions.boxes[0, 0, 0] += int(not torch.equal(batch, exact))
        return logits, regions

    def both_boxes_moved(batch: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():
            scores, regions = model(batch).scores, find(batch)[1]
        regions.boxes[0, :, 0] += 1
        return scores, *regions

    monkeypatch.setattr(model, "pass_over_images", undecided)
    found = agreement(model, GraphModel(both_boxes_moved, IMAGE_SIZE, model.mean, model.std), squares)
    assert (found.boxes, found.equal, found.last_bit) == (2, 0, 1)
    assert str(found).startswith("boxes equal 0 of 2, 1 others decided by the last bit, largest")


# ---- fewer bits


def test_fp16_halves_the_kernels_and_moves_scores_little(
    released: ReleasedModel, files: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "half.onnx"
    export_graph(released, path, precision="fp16")
    stored = {each.name: each for each in onnx.load(path).graph.initializer}
    whole = {each.name: each for each in onnx.load(files[".onnx"]).graph.initializer}
    halved = [name for name in stored if name.endswith("_fp16")]
    assert len(halved) >= 6
    assert all(2 * len(stored[name].raw_data) == len(whole[name.removesuffix("_fp16")].raw_data) for name in halved)
    one, other = (load_released(each).model(images(released, 8)).scores for each in (path, files[".onnx"]))
    assert not torch.equal(one, other)
    assert torch.allclose(one, other, atol=0.02)


def test_int8_leaves_the_boxes_and_writes_the_crops_kernels_in_eight_bits(
    released: ReleasedModel, tmp_path: Path, photo_folder: Path
) -> None:
    path = tmp_path / "small.onnx"
    with contextlib.suppress(UserWarning):
        found = export_graph(released, path, precision="int8", calibration=sorted(photo_folder.iterdir()))
    assert found.equal == found.boxes
    kernels = [each for each in onnx.load(path).graph.initializer if each.data_type == onnx.TensorProto.INT8]
    assert len(kernels) >= 5


def test_int8_without_its_instructions_is_told() -> None:
    assert "VNNI" in str(int8_told(frozenset({"avx", "avx2"})))
    assert int8_told(frozenset({"avx2", "avx_vnni"})) is None
    assert int8_told(frozenset({"asimddp"})) is None
    assert int8_told(frozenset()) is None  # not known


def test_loading_int8_without_its_instructions_is_told(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = with_about(files[".onnx"], tmp_path, lambda about: about["graph"].update(precision="int8"))
    monkeypatch.setattr(exported, "_processor_flags", lambda: frozenset({"avx2"}))
    with pytest.warns(UserWarning, match="no instructions for eight-bit products"):
        load_released(path)


# ---- bad input


@pytest.mark.parametrize("suffix", exported.SUFFIXES)
@pytest.mark.parametrize("shape", [(0, 3, 64, 64), (2, 3, 96, 96), (3, 64, 64), (1, 1, 64, 64)], ids=str)
def test_images_that_a_graph_does_not_take_are_one_sentence(
    files: dict[str, Path], suffix: str, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ConfigError, match=r"takes images \(B, 3, 64, 64\) with B above 0, not") as caught:
        load_released(files[suffix]).model(torch.zeros(shape))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", exported.SUFFIXES)
@pytest.mark.parametrize("share", [0, 0.5, 0.99])
def test_a_truncated_file_is_one_sentence(
    files: dict[str, Path], tmp_path: Path, suffix: str, share: float, capfd: pytest.CaptureFixture[str]
) -> None:
    path, content = tmp_path / f"x{suffix}", files[suffix].read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError) as caught:
        load_released(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("suffix", exported.SUFFIXES)
def test_a_file_that_is_not_there_is_one_sentence(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(WeightsError, match=f"none{suffix}: cannot be read"):
        load_released(tmp_path / f"none{suffix}")


def changed(path: Path, folder: Path, change: Callable[[onnx.ModelProto], object]) -> Path:
    graph = onnx.load(path)
    change(graph)
    onnx.save(graph, folder / "changed.onnx")
    return folder / "changed.onnx"


def with_text(path: Path, folder: Path, text: str | None) -> Path:
    """The same graph with another text as metadata, or none."""
    return changed(path, folder, lambda graph: onnx.helper.set_model_props(graph, {"mcar": text} if text else {}))


def with_about(path: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    about = json.loads({each.key: each.value for each in onnx.load(path).metadata_props}["mcar"])
    change(about)
    return with_text(path, folder, json.dumps(about))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "is not a model that mcar export wrote"),
        ("{", "expected a model that mcar export wrote"),
        ("[]", "should be a JSON object"),
        ('{"format": 1}', "not complete or wrong at 'classes'"),
        ('{"format": 2}', "format 2, wanted 1"),
    ],
)
def test_metadata_that_is_missing_or_broken_is_one_sentence(
    files: dict[str, Path], tmp_path: Path, text: str | None, words: str
) -> None:
    with pytest.raises(WeightsError, match=words) as caught:
        load_released(with_text(files[".onnx"], tmp_path, text))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda about: about.pop("graph"), "does not say how the graph was written"),
        (lambda about: about["graph"].update(precision="int4"), "does not say how the graph was written"),
        (lambda about: about["graph"].update(opset=17), "opset 17, wanted 20"),
        (lambda about: about["config"].update(image_size=96), "its metadata says 96 px"),
        (lambda about: about.update(classes=["one"]), r"scores \[20\] classes, its metadata names 1"),
    ],
)
def test_metadata_that_does_not_fit_the_graph_is_one_sentence(
    files: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    with pytest.raises(WeightsError, match=words):
        load_released(with_about(files[".onnx"], tmp_path, change))


@pytest.mark.parametrize("opset", [19, 99])
def test_another_opset_is_one_sentence(
    files: dict[str, Path], tmp_path: Path, opset: int, capfd: pytest.CaptureFixture[str]
) -> None:
    path = changed(files[".onnx"], tmp_path, lambda graph: setattr(graph.opset_import[0], "version", opset))
    with pytest.raises(WeightsError, match=f"opset {opset}, wanted 20") as caught:
        load_released(path)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_graph_that_is_another_s_is_refused(tmp_path: Path) -> None:
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    shape = [onnx.helper.make_tensor_value_info(name, 1, [1]) for name in "xy"]
    opset = [onnx.helper.make_opsetid("", 20)]
    graph = onnx.helper.make_model(onnx.helper.make_graph([node], "g", shape[:1], shape[1:]), opset_imports=opset)
    onnx.save(graph, tmp_path / "x.onnx")
    with pytest.raises(WeightsError, match=r"x\.onnx"):
        load_released(tmp_path / "x.onnx")


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    found = importlib.util.find_spec

    def hide(package: str) -> None:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else found(name))

    return hide


def test_reading_without_onnxruntime_names_the_extra(files: dict[str, Path], without: Callable[[str], None]) -> None:
    without("onnxruntime")
    with pytest.raises(ConfigError, match=r"needs the package onnxruntime.*pip install 'mcar-lib\[onnx\]'"):
        load_released(files[".onnx"])


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_writing_without_a_package_names_the_extra(
    released: ReleasedModel, tmp_path: Path, without: Callable[[str], None], package: str
) -> None:
    without(package)
    with pytest.raises(ConfigError, match=rf"needs the package {package},.*pip install 'mcar-lib\[onnx\]'"):
        export_graph(released, tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize(
    ("options", "name", "precision", "words"),
    [
        ({"selection": "random"}, "x.onnx", "fp32", "drawn at random"),
        ({"box_source": "other photo"}, "x.onnx", "fp32", "another photo"),
        ({}, "x.pb", "fp32", r"ends in \.onnx or \.pt2"),
        ({}, "x.pt2", "fp16", "fp32 only"),
        ({}, "x.onnx", "int8", "int8 needs photos"),
    ],
)
def test_what_cannot_be_a_graph_is_one_sentence(
    tiny_model: Callable[..., MCAR], tmp_path: Path, options: dict[str, str], name: str, precision: Any, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        export_graph(released_of(tiny_model(**options)), tmp_path / name, precision=precision)
    assert list(tmp_path.iterdir()) == []


def test_what_only_a_network_can_is_one_sentence_of_a_graph(files: dict[str, Path], tmp_path: Path) -> None:
    loaded = load_released(files[".onnx"])
    with pytest.raises(ConfigError, match="only predicts, it has no 'class_logits'"):
        loaded.attention_maps(np.zeros((64, 64, 3), np.uint8), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(ConfigError, match="an exported graph already"):
        export_graph(loaded, tmp_path / "again.onnx")
    with pytest.raises(ConfigError, match="runs on the CPU"):
        loaded.on("cuda")
    assert loaded.on() is loaded


# ---- the command line


def mcar(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def photo_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for index, square in enumerate(drawn_squares(80, 3)):
        Image.fromarray(square.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return folder


def test_a_file_of_weights_is_exported_and_the_graph_predicts_the_same(
    runs: Runs, tiny_config: RunConfig, tmp_path: Path, photo_folder: Path
) -> None:
    weights, graph = tmp_path / "mine.safetensors", tmp_path / "new" / "mine.pt2"
    export_run(runs, runs.run(tiny_config.vary(threshold=0.45)), weights)
    done = mcar("export", weights, graph, "--check-photos", photo_folder)
    assert done.exit_code == 0, done.output
    assert "MB, fp32; against PyTorch on 3 photos: boxes equal 6 of 6, largest score difference" in done.stdout
    assert len(done.output.splitlines()) == 1
    one, other = (
        json.loads(mcar("predict", photo_folder, "--model", each, "--json").stdout) for each in (weights, graph)
    )
    assert [each["labels"] and each["labels"][0]["box"] for each in one] == [
        each["labels"] and each["labels"][0]["box"] for each in other
    ]
    for a, b in zip(one, other, strict=True):
        assert list(a["scores"].values()) == pytest.approx(list(b["scores"].values()), abs=1e-5)
    assert mcar("export", weights, graph).exit_code == 0  # over its own


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("voc-photos",), "mcar export RUN model.onnx"),
        (("voc-photos", "x.tflite"), "must end in .safetensors, .onnx or .pt2"),
        (("voc-photos", "x.onnx", "--output", "y.onnx"), "--output and FILE: give one"),
        (("voc-photos", "x.onnx", "--run", "y"), "--run and RUN: give one"),
        (("voc-photos", "x.onnx", "--set", "seed=1"), "leave --row and --set out"),
        (("voc-photos", "x.onnx", "--precision", "int8"), "--calibrate FOLDER"),
        (("voc-photos", "x.safetensors"), "copy it"),
        (("voc-photos", "x.safetensors", "--precision", "fp16"), "are for .onnx and .pt2"),
        (("voc-photo", "x.onnx"), "no model 'voc-photo'"),
    ],
)
def test_what_cannot_be_exported_is_told(
    arguments: tuple[str, ...], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = mcar("export", *arguments)
    assert done.exit_code in (2, 4)
    assert words in " ".join(done.stderr.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", exported.SUFFIXES)
def test_no_file_of_another_kind_is_written_over(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"notes{suffix}").write_text("my notes")
    done = mcar("export", "voc-photos", tmp_path / f"notes{suffix}")
    assert done.exit_code == 2
    assert "is there and is no model that mcar export wrote" in done.stderr
    assert (tmp_path / f"notes{suffix}").read_text() == "my notes"


# ---- the sample, without torch


@pytest.fixture(scope="session")
def without_torch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with what onnxruntime and Pillow need, and nothing else."""
    folder = tmp_path_factory.mktemp("packages")
    for package in ("numpy", "PIL", "onnxruntime", "flatbuffers", "google", "packaging"):
        place = Path(str(importlib.util.find_spec(package).submodule_search_locations[0]))  # type: ignore[union-attr,index]
        (folder / package).symlink_to(place)
        if (place.parent / f"{package.lower()}.libs").is_dir():
            (folder / f"{package.lower()}.libs").symlink_to(place.parent / f"{package.lower()}.libs")
    if (libraries := Path(Image.__file__).parent.parent / "pillow.libs").is_dir():
        (folder / "pillow.libs").symlink_to(libraries)
    return folder


def told_by_sample(packages: Path, *arguments: Path) -> dict[tuple[str, str], tuple[float, tuple[int, ...]]]:
    """Score and box by photo and label. Torch cannot be imported where the sample runs."""
    script = ROOT / "models" / "predict_onnx.py"
    code = (
        f"import runpy, sys; sys.path.append({str(packages)!r})\n"
        "try:\n    import torch\nexcept ImportError: pass\nelse: sys.exit('torch is there')\n"
        f"sys.argv = [{str(script)!r}, *sys.argv[1:]]\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    command = [sys.executable, "-I", "-S", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env={"PATH": os.environ["PATH"]})
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    return {(photo, label): (float(score), tuple(map(int, box))) for photo, label, score, *box in rows}


def told_by_library(model: Path | str, *photos: Path) -> dict[tuple[str, str], tuple[float, tuple[int, ...]]]:
    found = mcar_lib.load(model)(photos)
    return {(one.name, each.name): (each.score, tuple(each.box or ())) for one in found for each in one.labels}


def test_the_sample_says_the_same_without_torch(
    files: dict[str, Path], photo_folder: Path, without_torch: Path
) -> None:
    photos = sorted(photo_folder.iterdir())
    found, expected = told_by_sample(without_torch, files[".onnx"], *photos), told_by_library(files[".onnx"], *photos)
    assert found.keys() == expected.keys()
    assert found
    assert all(found[key][0] == pytest.approx(expected[key][0], abs=0.02) for key in found)


def test_the_sample_is_short() -> None:
    assert len((ROOT / "models" / "predict_onnx.py").read_text().splitlines()) < 60


# ---- real photos


def voc_test_squares(count: int, side: int) -> Tensor:
    test = load_voc(real_voc2007(), "2007", "test")
    return torch.stack([resize_square(test.image(index), side) for index in range(count)])


@pytest.fixture(scope="module")
def voc_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("voc") / "voc.onnx"
    export_graph(load_released("voc-photos"), path)
    return path


@pytest.mark.slow
@pytest.mark.photos
def test_the_released_model_s_graph_agrees_on_photos_but_for_the_last_bit(voc_graph: Path, tmp_path: Path) -> None:
    eager, squares = load_released("voc-photos").model, voc_test_squares(64, 224)
    found = agreement(eager, load_released(voc_graph).model, squares)  # type: ignore[arg-type]
    assert found.boxes == 256
    assert found.equal >= 253
    assert found.where_equal <= 1e-4
    assert boxes_from_its_own_maps(voc_graph, tmp_path, eager, squares) == 256


def boxes_from_its_own_maps(path: Path, folder: Path, model: MCAR, squares: Tensor) -> int:
    """How many boxes of a graph are those that the region module finds in the graph's own class maps, or lie on a
    marginal that differs from a constant in its last digits only."""
    graph = onnx.load(path)
    nodes = list(graph.graph.node)
    crop = next(index for index, node in enumerate(nodes) if node.op_type == "GridSample")
    pooled, maps = [node.output[0] for node in nodes[:crop] if node.op_type == "Conv"][-2:]
    graph.graph.output.extend(onnx.helper.make_tensor_value_info(name, 1, None) for name in (pooled, maps))
    onnx.save(graph, folder / "maps.onnx")
    session, equal = onnxruntime.InferenceSession(folder / "maps.onnx"), 0
    for part in squares.split(8):
        values = network_input(model, part).contiguous().numpy()
        boxes, logits, class_logits = map(torch.from_numpy, session.run(["boxes", pooled, maps], {"images": values}))
        own = attentional_regions(class_logits, logits.flatten(1), (224, 224), model.num_regions, model.threshold)
        found = (own.boxes == boxes).all(dim=-1)
        own_maps = attention_maps(class_logits, own.classes, (224, 224))
        for marginal in (own_maps.amax(dim=-2), own_maps.amax(dim=-1)):
            found |= marginal.amax(dim=-1) - marginal.amin(dim=-1) < 1e-5  # scaled to [0, 1], it is all last bits
        equal += int(found.sum())
    return equal


@torch.no_grad()
def _standardised(model: MCAR, squares: Tensor) -> MCAR:
    """With statistics of these images in its batch normalisations, and class maps with a mean of 0 and a spread of 2:
    those of drawn weights would saturate, or hardly differ from a constant."""
    for each in model.modules():
        if isinstance(each, torch.nn.BatchNorm2d):
            each.momentum = 1.0
    model.train().features(network_input(model, squares))
    class_logits = model.eval().class_logits(model.features(network_input(model, squares)))
    spread = class_logits.std(dim=(0, 2, 3)) / 2
    model.convclass.weight /= spread[:, None, None, None]
    model.convclass.bias.copy_((model.convclass.bias - class_logits.mean(dim=(0, 2, 3))) / spread)
    return model


@pytest.mark.slow
@pytest.mark.photos
@pytest.mark.parametrize(
    ("backbone", "weights", "side"),
    [("mobilenet_v2", "bundled", 128), ("efficientnet_lite0", "bundled", 128), ("resnet50", "none", 128)],
)
def test_each_backbone_s_graph_agrees_on_photos(backbone: str, weights: str, side: int, tmp_path: Path) -> None:
    squares = voc_test_squares(24, side)
    model = _standardised(build_mcar(backbone, len(CLASSES), weights=weights, seed=0), squares)
    released = released_of(model, side, backbone)
    photos = load_voc(real_voc2007(), "2007", "test").paths[:24]
    found = export_graph(released, tmp_path / "model.onnx", photos)
    assert found.images == 24
    assert found.boxes - found.equal - found.last_bit <= 3
    assert found.equal > 0.9 * found.boxes
    assert found.where_equal <= 1e-4
    graph = load_released(tmp_path / "model.onnx").model
    for batch in (1, 3, 8):
        assert graph(network_input(model, squares[:batch])).scores.shape == (batch, 20)


@pytest.mark.slow
@pytest.mark.photos
def test_the_sample_finds_the_labels_of_mcar_predict_in_photos(voc_graph: Path, without_torch: Path) -> None:
    photos = load_voc(real_voc2007(), "2007", "test").paths[:48]
    found, expected = told_by_sample(without_torch, voc_graph, *photos), told_by_library("voc-photos", *photos)
    assert found.keys() == expected.keys()
    # Pillow rounds a pixel otherwise here and there, by which a box may move.
    apart = [abs(found[key][0] - expected[key][0]) for key in found]
    assert sorted(apart)[len(apart) // 2] < 0.005
    assert max(apart) < 0.15
