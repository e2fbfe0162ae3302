"""Models that are handed on: the file, what it predicts, its card, and the one that is committed."""

import json
from pathlib import Path

import pytest
import torch
from real_photos import real_voc2007
from safetensors.torch import save_file

import mcar_lib
from mcar_lib.config import RunConfig
from mcar_lib.data import load_voc
from mcar_lib.data.voc import VOC_CLASSES
from mcar_lib.errors import WeightsError
from mcar_lib.experiment import Workspace, read_records
from mcar_lib.metrics import average_precision
from mcar_lib.released import ReleasedModel, card_text, export_run, load_released

ROOT = Path(__file__).resolve().parent.parent
MODELS = sorted((ROOT / "models").glob("*.safetensors"))


@pytest.fixture
def exported(workspace: Workspace, tiny_config: RunConfig, tmp_path: Path) -> tuple[Path, ReleasedModel]:
    path = tmp_path / "new" / "model.safetensors"
    return path, export_run(workspace, workspace.run(tiny_config), path)


def test_a_file_predicts_what_its_run_does_up_to_the_rounding(
    exported: tuple[Path, ReleasedModel], workspace: Workspace, tiny_config: RunConfig
) -> None:
    path, _ = exported
    released, test = mcar_lib.load(path), workspace.data(tiny_config).test
    output = released.predict([test.image(index) for index in range(len(test))])
    expected = workspace.scores(tiny_config).fused
    assert output.scores.shape == expected.shape
    assert torch.allclose(output.scores, expected, atol=5e-3)
    assert not torch.equal(output.scores, expected)  # it is rounded
    assert output.regions is not None
    assert output.regions.boxes.shape == (len(test), tiny_config.num_regions, 4)
    assert released.classes == test.classes
    assert released.image_size == tiny_config.image_size


def test_a_file_says_what_it_scores_itself(
    exported: tuple[Path, ReleasedModel], workspace: Workspace, tiny_config: RunConfig
) -> None:
    path, released = exported
    test = workspace.data(tiny_config).test
    scores = released.predict([test.image(index) for index in range(len(test))]).scores
    assert released.about["mAP"] == pytest.approx(average_precision(scores, test.targets).nanmean().item(), abs=1e-6)
    assert released.about["run_mAP"] == workspace.run(tiny_config).map()
    in_fp32 = sum(4 * value.numel() for value in released.model.state_dict().values())
    assert path.stat().st_size < 0.75 * in_fp32 + 20_000  # the metadata


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
    save_file({"a": torch.zeros(1)}, path, {"mcar": json.dumps({"format": 1, "classes": ["a"]})})
    with pytest.raises(WeightsError, match="'config'"):
        load_released(path)


def test_a_write_that_fails_leaves_the_earlier_file(
    exported: tuple[Path, ReleasedModel],
    workspace: Workspace,
    tiny_config: RunConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, _ = exported
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mcar_lib.released.save_file", full)
    with pytest.raises(WeightsError, match="No space left"):
        export_run(workspace, workspace.run(tiny_config), path)
    assert path.read_bytes() == before


# ---- the models of this repository


def test_there_is_the_model_that_the_readme_names() -> None:
    assert "voc-photos" in [path.stem for path in MODELS]


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_a_committed_model_is_small_and_belongs_to_a_committed_run(path: Path) -> None:
    about = mcar_lib.load(path.stem).about
    assert path.stat().st_size <= 5e6
    runs = {record.run_id: record for record in read_records(ROOT / "results" / about["profile"])}
    assert about["run_mAP"] == runs[about["run_id"]].map()
    assert about["config"] == runs[about["run_id"]].content["config"]
    assert about["mAP"] == pytest.approx(about["run_mAP"], abs=0.01)  # rounding moves the sides of regions
    assert path.with_suffix(".md").read_text(encoding="utf-8") == card_text(path.stem, about)


@pytest.mark.photos
@pytest.mark.slow
def test_the_committed_model_scores_what_its_card_says() -> None:
    released = mcar_lib.load("voc-photos")
    test = load_voc(real_voc2007(), "2007", "test")
    batches = [range(first, min(first + 32, len(test))) for first in range(0, len(test), 32)]
    scores = torch.cat([released.predict([test.image(index) for index in batch]).scores for batch in batches])
    assert released.classes == VOC_CLASSES
    assert average_precision(scores, test.targets).nanmean().item() == pytest.approx(released.about["mAP"], abs=0.002)
