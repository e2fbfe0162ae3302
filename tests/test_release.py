"""Checkpoints of the paper's release from the command line: what their names say, and the scores they get."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import mutated
from safetensors.torch import save_file
from submissions import read_submission
from test_cli import mcar, metric_lines
from test_data import write_coco, write_photo, write_voc
from test_model import released_key
from torch import nn

from mcar_lib.data import ImageSet, load_coco, load_image_set, load_voc
from mcar_lib.data.coco import COCO_CLASSES
from mcar_lib.data.squares import ResizedImages
from mcar_lib.data.voc import VOC_CLASSES
from mcar_lib.errors import WeightsError
from mcar_lib.metrics import average_precision, multilabel_metrics
from mcar_lib.model import MCAR, build_mcar
from mcar_lib.runs import OPERATING_POINTS, STREAMS
from mcar_lib.submission import write_voc2012_submission
from mcar_lib.training import StreamScores, evaluate
from mcar_lib.weights import load_release_checkpoint, read_state_dict, release_settings

SIDE = 64
VOC_LABELS = {"a1": {"dog": 1, "cat": 0}, "b2": {"train": 1}, "c3": {"person": 1, "dog": 1}, "d4": {"aeroplane": 1}}
COCO_LABELS = {4: ("apple", "zebra"), 7: ("airplane",), 30: ("person", "apple"), 31: ("zebra",)}
NUM_CLASSES = {"voc2007": 20, "coco2014": 80}
SPELLINGS = {
    **dict.fromkeys(("mobilenetv2", "mobilenet_v2", "mobilenet-v2", "MobileNetV2"), "mobilenet_v2"),
    **dict.fromkeys(("resnet50", "ResNet-50", "resnet_50"), "resnet50"),
    **dict.fromkeys(("resnet101", "ResNet-101"), "resnet101"),
}
POOLINGS = {"avg": "avg", "gap": "avg", "max": "max", "gmp": "max", "gwp": "gwp", "GWP": "gwp"}


def write_labelled_coco(root: Path, categories: list[dict[str, object]]) -> None:
    number_of = {category["name"]: category["id"] for category in categories}
    write_coco(
        root,
        images=[{"id": n, "file_name": f"{n}.jpg", "width": 12, "height": 12} for n in COCO_LABELS],
        categories=categories,
        annotations=[
            {"id": 100 * n + k, "image_id": n, "category_id": number_of[name], "bbox": [0, 0, 5, 5]}
            for n, names in COCO_LABELS.items()
            for k, name in enumerate(names)
        ],
    )
    for n in COCO_LABELS:
        write_photo(root / "val2014" / f"{n}.jpg", n)


def numbered(names: list[str]) -> list[dict[str, object]]:
    return [{"id": 3 * number + 1, "name": name} for number, name in enumerate(names)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test splits of VOC 2007 and COCO 2014, and VOC 2012 test without labels, four small photos each."""
    folder = tmp_path_factory.mktemp("data")
    write_voc(folder, VOC_LABELS, "test")
    lists = write_voc(folder, VOC_LABELS, "test", "2012")
    for path in lists.glob("*_test.txt"):
        path.unlink()
    write_labelled_coco(folder, numbered(list(COCO_CLASSES)))
    return folder


def build(backbone: str, num_classes: int, pooling: str = "gwp", num_regions: int = 4, tau: float = 0.5) -> MCAR:
    """A seeded model whose scores spread over (0, 1); its batch statistics matter, as those of a trained one do."""
    torch.manual_seed(3)
    model = build_mcar(backbone, num_classes, "none", pooling=pooling, num_regions=num_regions, threshold=tau)
    for module in model.features.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train().features(torch.randn(8, 3, SIDE, SIDE))
        model.convclass.weight *= 8
    return model.eval()


def write_release(model: MCAR, path: Path, backbone: str) -> Path:
    """The file as the release writes it: its keys, its other entries, and the format of its torch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {released_key(key, backbone): value for key, value in model.state_dict().items()}
    content = {"epoch": 60, "arch": None, "state_dict": state, "best_score": torch.tensor(83.8)}
    torch.save(content, path, _use_new_zipfile_serialization=False)
    return path


def score(model: MCAR, images: ImageSet) -> StreamScores:
    return evaluate(model, ResizedImages(images, SIDE), verbose=False)


def expected_lines(scores: StreamScores, targets: torch.Tensor) -> list[str]:
    lines = []
    for name, stream in zip(STREAMS, (*scores, scores.fused), strict=True):
        for point, (threshold, top_k) in OPERATING_POINTS.items():
            logit = math.log(threshold / (1 - threshold)) if threshold > 0 else threshold
            found = multilabel_metrics(stream, targets, logit, top_k)
            values = " ".join(f"{100 * found[key]:.2f}" for key in ("mAP", "CP", "CR", "CF1", "OP", "OR", "OF1"))
            lines.append(f"{name} {point} {values}")
    return lines


def printed_lines(output: str) -> list[str]:
    return [" ".join(line.split()) for line in metric_lines(output)]


# ---- names


@pytest.mark.parametrize(
    "path",
    [
        "coco2014-resnet101-gwp-448-4-0.5",
        "coco2014-resnet101-gwp-448-4-0.5.pth",
        "models/coco2014-resnet101-gwp-448-4-0.5.pth.tar",
        "coco2014-resnet101-gwp-448-4-0.5/model_best.pth.tar",
        "coco2014-resnet101-gwp-448-4-0.5/model_best_83.8000.pth.tar",
        "voc2007-resnet50-avg-256-4-0.5/coco2014-resnet101-gwp-448-4-0.5-best.pth",
    ],
)
def test_a_name_says_the_settings_of_the_file_or_else_its_folder(path: str) -> None:
    expected = {"dataset": "coco2014", "backbone": "resnet101", "pooling": "gwp"}
    assert release_settings(path) == {**expected, "image_size": 448, "num_regions": 4, "threshold": 0.5}


@given(
    st.sampled_from(("voc2007", "voc2012", "coco2014")),
    st.sampled_from(sorted(SPELLINGS)),
    st.sampled_from(sorted(POOLINGS)),
    st.integers(1, 40).map(lambda number: 32 * number),
    st.integers(1, 80),
    st.integers(1, 99).map(lambda number: number / 100),
    st.sampled_from(("", ".pth", ".pth.tar", ".pt", ".safetensors", "/model_best.pth.tar")),
)
def test_every_name_of_the_release_is_read_back(
    dataset: str, backbone: str, pooling: str, size: int, num_regions: int, tau: float, ending: str
) -> None:
    assert release_settings(f"{dataset}-{backbone}-{pooling}-{size}-{num_regions}-{tau}{ending}") == {
        "dataset": dataset,
        "backbone": SPELLINGS[backbone],
        "pooling": POOLINGS[pooling],
        "image_size": size,
        "num_regions": num_regions,
        "threshold": tau,
    }


@pytest.mark.parametrize(
    "name",
    ["model_best.pth.tar", "resnet101-gwp-448-4-0.5.pth", "coco2014-vgg16-gwp-448-4-0.5", "coco2014-resnet101-gwp-448"],
)
def test_a_name_of_another_form_says_nothing(name: str) -> None:
    assert release_settings(f"/downloads/{name}") == {}


# ---- the order of classes


def test_classes_are_in_the_order_of_the_release() -> None:
    assert tuple(sorted(VOC_CLASSES)) == VOC_CLASSES
    assert len(VOC_CLASSES) == 20
    assert tuple(sorted(COCO_CLASSES)) == COCO_CLASSES
    assert len(COCO_CLASSES) == 80
    assert [COCO_CLASSES.index(name) for name in ("airplane", "person", "zebra")] == [0, 49, 79]


def test_coco_categories_in_another_order_get_the_same_scores_for_each_class(root: Path, tmp_path: Path) -> None:
    names = list(COCO_CLASSES)
    random.Random(0).shuffle(names)
    write_labelled_coco(tmp_path, numbered(names))
    listed = json.loads((tmp_path / "annotations" / "instances_val2014.json").read_text())["categories"]
    assert [category["name"] for category in listed] != sorted(names)
    first, second = load_coco(root, "val2014"), load_coco(tmp_path, "val2014")
    scores = score(build("mobilenet_v2", 80), second).fused
    assert first.classes == second.classes
    by_class = [average_precision(scores, images.targets) for images in (first, second)]
    assert torch.equal(by_class[0].nan_to_num(-1), by_class[1].nan_to_num(-1))
    assert by_class[0].isnan().sum() == 80 - 4


# ---- scores


@pytest.mark.parametrize("backbone", ["mobilenetv2", "resnet50", "resnet101"])
@pytest.mark.parametrize(
    ("dataset", "settings", "form"),
    [("voc2007", "gwp-64-4-0.5", "{}.pth"), ("coco2014", "avg-64-3-0.4", "{}/model_best.pth.tar")],
    ids=["voc2007", "coco2014"],
)
def test_a_release_checkpoint_gets_the_scores_of_its_model(
    backbone: str, dataset: str, settings: str, form: str, root: Path, tmp_path: Path
) -> None:
    ours = SPELLINGS[backbone]
    pooling, _, num_regions, tau = settings.split("-")
    model = build(ours, NUM_CLASSES[dataset], pooling, int(num_regions), float(tau))
    path = write_release(model, tmp_path / form.format(f"{dataset}-{backbone}-{settings}"), ours)
    done = mcar("evaluate", "--release", "--checkpoint", path, "--data-root", root, "--artifacts", tmp_path)
    assert done.exit_code == 0, done.output
    images = load_image_set(dataset, "test", root)
    assert printed_lines(done.stdout) == expected_lines(score(model, images), images.targets)
    for key, value in (("dataset", dataset), ("backbone", ours), ("pooling", pooling), ("threshold", tau)):
        assert f"{key} = {value}, from the name" in done.stdout
    assert "selection = top, from the profile paper" in done.stdout
    assert "precision = fp32, from the release" in done.stdout


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release checkpoint of MobileNet-v2 for VOC."""
    path = tmp_path_factory.mktemp("small") / "voc2007-mobilenetv2-gwp-64-4-0.5.pth.tar"
    return write_release(build("mobilenet_v2", 20), path, "mobilenet_v2")


def test_options_win_over_the_name(small: Path, root: Path, tmp_path: Path) -> None:
    settings = ("--set", "pooling=avg", "--set", "num_regions=2", "--set", "threshold=0.3")
    places = ("--data-root", root, "--artifacts", tmp_path)
    done = mcar("evaluate", "--release", "--checkpoint", small, *settings, *places)
    assert done.exit_code == 0, done.output
    for line in ("pooling = avg", "num_regions = 2", "threshold = 0.3"):
        assert f"{line}, from an option" in done.stdout
    assert "image_size = 64, from the name" in done.stdout
    images = load_image_set("voc2007", "test", root)
    lines = expected_lines(score(build("mobilenet_v2", 20, "avg", 2, 0.3), images), images.targets)
    assert printed_lines(done.stdout) == lines
    assert lines != expected_lines(score(build("mobilenet_v2", 20), images), images.targets)


def test_what_neither_name_nor_option_says_is_the_profile_s(small: Path, root: Path, tmp_path: Path) -> None:
    path = tmp_path / "downloaded.pth"
    path.write_bytes(small.read_bytes())
    settings = ("--set", "backbone=mobilenet_v2", "--set", "image_size=64")
    places = ("--data-root", root, "--artifacts", tmp_path)
    done = mcar("evaluate", "--release", "--checkpoint", path, *settings, *places)
    assert done.exit_code == 0, done.output
    assert f"{path}: the name does not say <dataset>-<backbone>-" in done.stderr
    for line in ("dataset = voc2007", "pooling = gwp", "num_regions = 4", "threshold = 0.5"):
        assert f"{line}, from the profile paper" in done.stdout
    images = load_image_set("voc2007", "test", root)
    assert printed_lines(done.stdout) == expected_lines(score(build("mobilenet_v2", 20), images), images.targets)


def test_a_profile_that_is_named_is_the_one_that_fills_in(small: Path, root: Path, tmp_path: Path) -> None:
    places = ("--data-root", root, "--artifacts", tmp_path)
    done = mcar("evaluate", "--release", "--profile", "photos", "--checkpoint", small, *places)
    assert done.exit_code == 0, done.output
    assert "selection = top, from the profile photos" in done.stdout
    assert "pooling = gwp, from the name" in done.stdout


def test_a_checkpoint_of_voc2012_is_pointed_to_the_server(small: Path, root: Path, tmp_path: Path) -> None:
    path = tmp_path / "voc2012-mobilenetv2-gwp-64-4-0.5.pth"
    path.write_bytes(small.read_bytes())
    places = ("--data-root", root, "--artifacts", tmp_path)
    done = mcar("evaluate", "--release", "--checkpoint", path, *places)
    assert done.exit_code == 3
    assert "mcar submit voc2012" in done.stderr
    assert mcar("evaluate", "--release", "--checkpoint", path, "--set", "dataset=voc2007", *places).exit_code == 0


def test_another_number_of_classes_names_both_and_the_data_set_that_has_as_many(
    small: Path, root: Path, tmp_path: Path
) -> None:
    path = tmp_path / "coco2014-mobilenetv2-gwp-64-4-0.5.pth"
    path.write_bytes(small.read_bytes())
    done = mcar("evaluate", "--release", "--checkpoint", path, "--data-root", root, "--artifacts", tmp_path)
    assert done.exit_code == 4
    assert f"{path} is of 20 classes and the model here of 80, as coco2014" in done.stderr
    assert "20 classes is voc2007 or voc2012: choose that data set, with --set dataset=voc2007" in done.stderr


def test_weights_of_our_own_with_another_number_of_classes_get_the_same_message(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save(build("mobilenet_v2", 80).state_dict(), path)
    settings = ("--set", "dataset=voc2007", "--set", "image_size=64", "--data-root", root, "--artifacts", tmp_path)
    done = mcar("evaluate", "--checkpoint", path, *settings)
    assert done.exit_code == 4
    assert f"{path} is of 80 classes and the model here of 20" in done.stderr
    assert "--set dataset=coco2014" in done.stderr


# ---- the server's archive


def test_submit_takes_the_settings_from_the_name(root: Path, tmp_path: Path) -> None:
    model = build("mobilenet_v2", 20, "max", 2, 0.4)
    path = write_release(model, tmp_path / "voc2012-mobilenet-v2-gmp-64-2-0.4" / "model_best.pth.tar", "mobilenet_v2")
    output = tmp_path / "scores.tar.gz"
    places = ("--data-root", root, "--artifacts", tmp_path, "--output", output)
    done = mcar("submit", "voc2012", "--release", "--checkpoint", path, *places)
    assert done.exit_code == 0, done.output
    assert "pooling = max, from the name" in done.stdout
    assert "dataset = " not in done.stdout
    expected = score(model, load_voc(root, "2012", "test", labelled=False)).fused
    assert torch.equal(read_submission(output).scores.float(), expected)


def test_submit_refuses_a_checkpoint_of_coco_and_writes_nothing(root: Path, tmp_path: Path) -> None:
    path = tmp_path / "coco2014-mobilenetv2-gwp-64-4-0.5.pth"
    write_release(build("mobilenet_v2", 80), path, "mobilenet_v2")
    output = tmp_path / "scores.tar.gz"
    write_voc2012_submission(output, ["a"], VOC_CLASSES, torch.zeros(1, 20))
    before = output.read_bytes()
    places = ("--data-root", root, "--artifacts", tmp_path, "--output", output)
    done = mcar("submit", "voc2012", "--release", "--checkpoint", path, *places)
    assert done.exit_code == 4
    assert "is of 80 classes and the model here of 20" in done.stderr
    assert output.read_bytes() == before


def test_submit_writes_over_no_file_of_another_kind(small: Path, root: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.tar.gz"
    output.write_text("my own")
    places = ("--data-root", root, "--artifacts", tmp_path, "--output", output)
    done = mcar("submit", "voc2012", "--release", "--checkpoint", small, *places)
    assert done.exit_code == 2
    assert f"{output} is there and is no archive that mcar submit wrote" in done.stderr
    assert output.read_text() == "my own"


# ---- files of all kinds


def test_damaged_names_say_nothing_or_settings_of_the_right_types() -> None:
    for damaged in mutated(b"coco2014-resnet101-gwp-448-4-0.5.pth.tar"):
        found = release_settings(damaged.decode("latin-1"))
        assert [type(value) for value in found.values()] in ([], [str, str, str, int, int, float])


@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
@pytest.mark.filterwarnings("ignore")
def test_damaged_weights_are_read_or_named(name: str, tmp_path: Path) -> None:
    path, state = tmp_path / name, {"convclass.weight": torch.ones(2, 3), "convclass.bias": torch.zeros(2)}
    torch.save({"state_dict": state}, path) if name.endswith("pth") else save_file(state, path)
    for content in mutated(path.read_bytes()):
        path.write_bytes(content)
        try:
            assert all(isinstance(value, torch.Tensor) for value in read_state_dict(path).values())
        except WeightsError as error:
            assert str(path) in str(error)  # noqa: PT017
            assert "\n" not in str(error)  # noqa: PT017
            assert "weights_only" not in str(error)  # noqa: PT017


@pytest.mark.parametrize("nested", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_weights_are_found_below_the_usual_keys_beside_numpy_numbers(
    nested: str | None, prefix: str, tmp_path: Path
) -> None:
    state = {f"{prefix}a.weight": torch.ones(2)}
    content = state if nested is None else {nested: state, "best": np.float64(0.8), "epoch": np.int64(3)}
    torch.save(content, tmp_path / "x.pth")
    found = read_state_dict(tmp_path / "x.pth")
    assert list(found) == ["a.weight"]


def test_a_file_of_more_than_tensors_is_named_without_advice_to_trust_it(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(1)}, "scores": np.ones(3)}, tmp_path / "x.pth")
    with pytest.raises(
        WeightsError, match=r"x\.pth .*it holds more than tensors \(numpy.*save its weights alone"
    ) as caught:
        read_state_dict(tmp_path / "x.pth")
    assert "weights_only" not in str(caught.value)


def test_a_release_checkpoint_in_our_own_keys_is_read(tmp_path: Path) -> None:
    model, path = build("mobilenet_v2", 20), tmp_path / "x.pth"
    torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, path)
    read = load_release_checkpoint(path, build_mcar("mobilenet_v2", 20, "none"))
    assert torch.equal(read.convclass.weight, model.convclass.weight)
