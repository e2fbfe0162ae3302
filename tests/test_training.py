"""Training: the recipe to the letter, and the same numbers however a run was stopped, resumed or fed."""

import dataclasses
import itertools
import math
import os
import random
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import SCENES
from pydantic import ValidationError
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

from mcar_lib.data.squares import ResizedImages
from mcar_lib.data.transforms import normalise
from mcar_lib.errors import CheckpointError, ConfigError, TrainingError
from mcar_lib.files import write_atomically
from mcar_lib.model import MCAR
from mcar_lib.regions import crop_regions
from mcar_lib.runs import Runs
from mcar_lib.runs.trainer import dry_run
from mcar_lib.training import (
    CHECKPOINT,
    PREVIOUS,
    EpochResult,
    Execution,
    Fit,
    Recipe,
    StepLoss,
    StreamScores,
    TrainingImages,
    build_optimizer,
    build_schedule,
    checkpoint,
    evaluate,
    fit,
    forward_in_groups,
    loop,
    network_input,
    stream_map,
    training_step,
)

RECIPE = Recipe(epochs=4, batch_size=8, learning_rate=0.05, schedule="onecycle")
STEPS_PER_EPOCH = 3
Train = Callable[..., tuple[Fit, MCAR]]


@pytest.fixture(scope="module")
def train(scene_squares: tuple[ResizedImages, ResizedImages], tiny_model: Callable[..., MCAR]) -> Train:
    """Trains a new tiny model in a folder; returns where it stands and the model."""

    def run(
        folder: Path,
        recipe: Recipe = RECIPE,
        execution: Execution = Execution(),  # noqa: B008  # frozen
        verbose: bool = False,
        **options: object,
    ) -> tuple[Fit, MCAR]:
        made = tiny_model(**options)
        return fit(made, *scene_squares, recipe, folder, execution, verbose), made

    return run


@pytest.fixture(scope="module")
def uninterrupted(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fit, MCAR]:
    return train(tmp_path_factory.mktemp("uninterrupted"))


def numbers(history: list[EpochResult]) -> list[tuple[float, ...]]:
    """A history without its seconds."""
    return [dataclasses.astuple(result)[:6] for result in history]


def differences(one: tuple[Fit, MCAR], other: tuple[Fit, MCAR]) -> list[str]:
    """What is not the same bit for bit about two runs."""
    (fit_a, model_a), (fit_b, model_b) = one, other
    found = [] if numbers(fit_a.history) == numbers(fit_b.history) else ["history"]
    found += [] if fit_a.best_epoch == fit_b.best_epoch else ["best epoch"]
    for name in ("last", "best"):
        pairs = zip(getattr(fit_a, name), getattr(fit_b, name), strict=True)
        found += [] if all(torch.equal(a, b) for a, b in pairs) else [f"{name} scores"]
    weights = model_b.state_dict()
    return found + [key for key, value in model_a.state_dict().items() if not torch.equal(value, weights[key])]


# ---- a run from end to end


@pytest.mark.parametrize("stream", ["global_loss", "local_loss"])
def test_loss_falls_on_few_images(train: Train, tmp_path: Path, stream: str) -> None:
    recipe = Recipe(epochs=12, batch_size=8, learning_rate=0.2, schedule="onecycle", flip=False, jitter=0.0)
    history = train(tmp_path, recipe)[0].history
    assert getattr(history[-1], stream) < 0.5 * getattr(history[0], stream)


def test_history_has_a_line_for_each_epoch(uninterrupted: tuple[Fit, MCAR]) -> None:
    assert [result.epoch for result in uninterrupted[0].history] == [1, 2, 3, 4]


def test_history_ends_with_the_map_of_the_last_scores(
    uninterrupted: tuple[Fit, MCAR], scene_squares: tuple[ResizedImages, ResizedImages]
) -> None:
    state, _ = uninterrupted
    assert state.last is not None
    assert numbers(state.history)[-1][3:] == stream_map(state.last, scene_squares[1])


def test_history_counts_seconds_of_training_and_testing(uninterrupted: tuple[Fit, MCAR]) -> None:
    assert all(min(result.train_seconds, result.test_seconds) > 0 for result in uninterrupted[0].history)


def test_history_loss_is_the_mean_over_images_not_over_batches(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[tuple[StepLoss, int]] = []

    def note(model: MCAR, images: Tensor, targets: Tensor, *rest: object) -> StepLoss:
        part = step(model, images, targets, *rest)
        parts.append((part, len(images)))
        return part

    step = loop.training_step
    monkeypatch.setattr(loop, "training_step", note)
    state, _ = train(tmp_path, Recipe(epochs=1, batch_size=16))  # batches of 16 and 8
    assert state.history[0].global_loss == pytest.approx(sum(part.global_loss * size for part, size in parts) / 24)


def test_best_epoch_is_the_first_with_the_highest_map(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused = iter([0.2, 0.7, 0.7, 0.1])
    monkeypatch.setattr(loop, "stream_map", lambda scores, test: (0.5, 0.5, next(fused)))
    assert train(tmp_path)[0].best_epoch == 2


def test_best_scores_are_those_of_the_best_epoch(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scene_squares: tuple[ResizedImages, ResizedImages]
) -> None:
    fused = iter([0.2, 0.7, 0.3, 0.1])
    monkeypatch.setattr(loop, "stream_map", lambda scores, test: (0.5, 0.5, next(fused)))
    each: list[StreamScores] = []

    def note(*args: object, **options: object) -> StreamScores:
        each.append(evaluate(*args, **options))  # type: ignore[arg-type]
        return each[-1]

    monkeypatch.setattr(loop, "evaluate", note)
    state, _ = train(tmp_path)
    assert state.best is each[1]


def test_a_test_set_without_positives_does_not_stop_training(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "stream_map", lambda scores, test: (math.nan, math.nan, math.nan))
    assert len(train(tmp_path)[0].history) == 4


def test_an_epoch_is_told_in_one_line(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, Recipe(epochs=1, batch_size=8), verbose=True)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch 1/1: loss global")]
    assert len(told) == 1


def test_a_finished_run_is_not_trained_again(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = train(tmp_path)
    monkeypatch.delattr(loop, "training_step")
    assert differences(first, train(tmp_path)) == []


def test_global_only_training_reports_no_local_loss(train: Train, tmp_path: Path) -> None:
    state, _ = train(tmp_path, Recipe(epochs=1, batch_size=8), local_stream=False)
    assert state.history[0].local_loss == 0.0


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_each_precision_trains_after_the_other_in_one_process(train: Train, tmp_path: Path, precision: str) -> None:
    for name, each in (("first", {"bf16": "fp32", "fp32": "bf16"}[precision]), ("then", precision)):
        state, _ = train(tmp_path / name, Recipe(epochs=1, batch_size=24, precision=each))
    assert math.isfinite(state.history[0].global_loss)


def test_bf16_differs_from_fp32(train: Train, tmp_path: Path) -> None:
    one, other = (train(tmp_path / each, Recipe(epochs=1, batch_size=24, precision=each)) for each in ("fp32", "bf16"))
    assert "history" in differences(one, other)


@pytest.mark.parametrize("pooling", ["avg", "gwp"])
@pytest.mark.parametrize("size", [0, 4])
def test_a_step_is_that_of_the_sum_of_both_losses_bit_for_bit(
    tiny_model: Callable[..., MCAR], pooling: str, size: int
) -> None:
    """Though it goes back through the global stream before it looks at the crops."""
    draw = torch.Generator().manual_seed(0)
    batches = [(torch.randn(8, 3, 64, 64, generator=draw), torch.rand(8, 20, generator=draw).round()) for _ in range(3)]
    ours, joint = (tiny_model(pooling=pooling).train() for _ in range(2))
    optimizers = [build_optimizer(each, Recipe(learning_rate=0.5)) for each in (ours, joint)]
    for images, targets in batches:
        output = forward_in_groups(joint, images, size)
        losses = [cross_entropy(logits, targets) for logits in (output.global_logits, output.local_logits)]
        sum(losses).backward()
        assert training_step(ours, images, targets, size) == tuple(loss.item() for loss in losses)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    before, found = joint.state_dict(), ours.state_dict()
    assert [key for key in before if not torch.equal(before[key], found[key])] == []


def test_the_global_stream_s_activations_are_freed_before_the_pass_over_the_crops(
    tiny_model: Callable[..., MCAR], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    left: list[bool] = []

    def keep(tensor: Tensor) -> Tensor:
        copy = tensor.clone()
        alive.append(weakref.ref(copy))
        return copy

    def crops(images: Tensor, boxes: Tensor) -> Tensor:
        left.extend(one() is not None for one in alive)
        return crop_regions(images, boxes)

    monkeypatch.setattr("mcar_lib.model.crop_regions", crops)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda copy: copy):
        training_step(tiny_model().train(), torch.rand(4, 3, 64, 64), torch.ones(4, 20))
    assert left
    assert not any(left)


def test_bf16_keeps_every_box_and_the_global_logits(tiny_model: Callable[..., MCAR]) -> None:
    made, images = tiny_model().eval(), torch.randn(8, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    exact = made(images)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = made(images)
    assert torch.equal(coarse.regions.boxes, exact.regions.boxes)
    assert torch.equal(coarse.global_logits, exact.global_logits)
    assert not torch.equal(coarse.local_logits, exact.local_logits)


def test_bf16_scores_of_the_global_stream_are_those_of_fp32(
    scene_squares: tuple[ResizedImages, ResizedImages], tiny_model: Callable[..., MCAR]
) -> None:
    exact, coarse = (evaluate(tiny_model(), scene_squares[1], each, verbose=False) for each in ("fp32", "bf16"))
    assert torch.equal(coarse.global_scores, exact.global_scores)
    assert not torch.equal(coarse.local_scores, exact.local_scores)


def test_bf16_goes_back_through_the_global_stream_in_float32(train: Train, tmp_path: Path) -> None:
    """A first step over the same numbers has the same global loss, and the global-only model the same weights."""
    runs = [
        train(tmp_path / each, Recipe(epochs=1, batch_size=8, precision=each), local_stream=False)
        for each in ("fp32", "bf16")
    ]
    assert differences(*runs) == []


def test_bf16_keeps_its_weights_in_float32(train: Train, tmp_path: Path) -> None:
    _, made = train(tmp_path, Recipe(epochs=1, batch_size=24, precision="bf16"))
    assert {parameter.dtype for parameter in made.parameters()} == {torch.float32}


def test_training_is_stochastic_gradient_descent_on_both_losses(
    train: Train,
    tmp_path: Path,
    scene_squares: tuple[ResizedImages, ResizedImages],
    tiny_model: Callable[..., MCAR],
    order_of: Callable[[int, int], list[int]],
) -> None:
    recipe = Recipe(epochs=2, batch_size=8, learning_rate=0.05, milestones=(1,), flip=False, jitter=0.0)
    made, squares = tiny_model().train().to(memory_format=torch.channels_last), scene_squares[0]
    groups = [{"params": made.convclass.parameters()}, {"params": made.features.parameters()}]
    optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=1e-4)
    for epoch, rate in enumerate((0.05, 0.005)):
        optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = rate, rate / 10
        for batch in torch.tensor(order_of(recipe.seed, epoch)).split(8):
            images = normalise(torch.stack([squares[index] for index in batch]))
            images = images.contiguous(memory_format=torch.channels_last)  # rounding can move a box
            targets = (squares.image_set.targets[batch] != 0).float()
            output = made(images)
            losses = [cross_entropy(logits, targets) for logits in (output.global_logits, output.local_logits)]
            optimizer.zero_grad()
            sum(losses).backward()
            optimizer.step()
    found = train(tmp_path, recipe)[1].state_dict()
    for key, value in made.state_dict().items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=1e-4, msg=key)


def seen_images(train: Train, folder: Path, recipe: Recipe) -> list[Tensor]:
    """The images of each epoch as the model got them, (n, 3, S, S)."""
    batches: list[Tensor] = []
    step = loop.training_step

    def note(model: MCAR, images: Tensor, targets: Tensor, *rest: object) -> StepLoss:
        batches.append(images.clone())
        return step(model, images, targets, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "training_step", note)
        train(folder, recipe)
    return list(torch.cat(batches).split(24))


def test_each_epoch_has_its_own_order(train: Train, tmp_path: Path) -> None:
    first, second = seen_images(train, tmp_path, Recipe(epochs=2, batch_size=8, flip=False, jitter=0.0))
    brightness = [images.mean(dim=(1, 2, 3)) for images in (first, second)]
    assert not torch.equal(*brightness)
    torch.testing.assert_close(*(values.sort().values for values in brightness))


def test_each_epoch_is_augmented_anew(train: Train, tmp_path: Path) -> None:
    first, second = seen_images(train, tmp_path, Recipe(epochs=2, batch_size=8, flip=False, jitter=0.3))
    brightness = [images.mean(dim=(1, 2, 3)).sort().values for images in (first, second)]
    assert (brightness[0] - brightness[1]).abs().max() > 0.01


# ---- the same numbers, bit for bit


def test_the_same_configuration_twice_gives_the_same_numbers(
    train: Train, tmp_path: Path, uninterrupted: tuple[Fit, MCAR]
) -> None:
    assert differences(uninterrupted, train(tmp_path)) == []


def test_another_seed_gives_other_numbers(train: Train, tmp_path: Path, uninterrupted: tuple[Fit, MCAR]) -> None:
    assert "history" in differences(uninterrupted, train(tmp_path, RECIPE.model_copy(update={"seed": 1})))


def test_numbers_do_not_depend_on_the_global_random_state(
    train: Train, tmp_path: Path, uninterrupted: tuple[Fit, MCAR], monkeypatch: pytest.MonkeyPatch
) -> None:
    def elsewhere(*args: object) -> Fit:
        torch.manual_seed(time.monotonic_ns())
        return resume(*args)  # type: ignore[arg-type]

    resume = loop.resume
    monkeypatch.setattr(loop, "resume", elsewhere)
    assert differences(uninterrupted, train(tmp_path)) == []


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_numbers_do_not_depend_on_the_number_of_workers(
    train: Train, tmp_path: Path, uninterrupted: tuple[Fit, MCAR], workers: int
) -> None:
    assert differences(uninterrupted, train(tmp_path, execution=Execution(workers))) == []


def test_random_regions_repeat(train: Train, tmp_path: Path) -> None:
    one, other = (train(tmp_path / name, selection="random", generator=torch.Generator()) for name in ("one", "other"))
    assert differences(one, other) == []


def test_random_regions_are_not_the_top_ones(train: Train, tmp_path: Path, uninterrupted: tuple[Fit, MCAR]) -> None:
    assert "history" in differences(uninterrupted, train(tmp_path, selection="random", generator=torch.Generator()))


def interrupt(*args: object, **options: object) -> None:
    raise KeyboardInterrupt


def interrupt_at(monkeypatch: pytest.MonkeyPatch, name: str, call: int) -> None:
    """Makes the call-th call of a function of the training loop end the run as a user's interrupt does."""
    module = checkpoint if name == "write_bytes" else loop
    calls = itertools.count(1)
    real = getattr(module, name)

    def counted(*args: object, **options: object) -> object:
        return interrupt() if next(calls) == call else real(*args, **options)

    monkeypatch.setattr(module, name, counted)


def train_until(train: Train, folder: Path, name: str, call: int, **options: object) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):  # noqa: PT012
        interrupt_at(patch, name, call)
        train(folder, **options)


MOMENTS = [
    pytest.param("training_step", 2, id="in the first epoch"),
    pytest.param("evaluate", 1, id="while testing the first epoch"),
    pytest.param("save", 2, id="before the second epoch is saved"),
    pytest.param("write_bytes", 2, id="as the second epoch is saved"),
    pytest.param("training_step", 2 * STEPS_PER_EPOCH + 1, id="at the start of the third epoch"),
    pytest.param("training_step", 2 * STEPS_PER_EPOCH + 3, id="at the end of the third epoch"),
    pytest.param("evaluate", 4, id="while testing the last epoch"),
]


@pytest.mark.parametrize(("name", "call"), MOMENTS)
def test_a_run_that_was_stopped_ends_with_the_same_numbers(
    train: Train, tmp_path: Path, uninterrupted: tuple[Fit, MCAR], name: str, call: int
) -> None:
    train_until(train, tmp_path, name, call)
    assert differences(uninterrupted, train(tmp_path)) == []


def test_a_run_goes_on_after_its_last_whole_epoch(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_until(train, tmp_path, "training_step", 2 * STEPS_PER_EPOCH + 2)
    calls: list[object] = []
    step = loop.training_step
    monkeypatch.setattr(loop, "training_step", lambda *args: calls.append(args) or step(*args))
    train(tmp_path)
    assert len(calls) == 2 * STEPS_PER_EPOCH


def test_a_run_stopped_twice_ends_with_the_same_numbers(
    train: Train, tmp_path: Path, uninterrupted: tuple[Fit, MCAR]
) -> None:
    for call in (STEPS_PER_EPOCH + 2, STEPS_PER_EPOCH + 1):
        train_until(train, tmp_path, "training_step", call)
    assert differences(uninterrupted, train(tmp_path)) == []


def test_a_run_with_random_regions_that_was_stopped_ends_with_the_same_numbers(train: Train, tmp_path: Path) -> None:
    def options() -> dict[str, object]:
        return {"selection": "random", "generator": torch.Generator()}

    train_until(train, tmp_path / "stopped", "training_step", 2 * STEPS_PER_EPOCH + 2, **options())
    assert differences(train(tmp_path / "stopped", **options()), train(tmp_path / "whole", **options())) == []


def test_a_step_schedule_that_was_stopped_ends_with_the_same_numbers(train: Train, tmp_path: Path) -> None:
    recipe = Recipe(epochs=4, batch_size=8, learning_rate=0.05, milestones=(1, 3))
    train_until(train, tmp_path / "stopped", "training_step", 2 * STEPS_PER_EPOCH + 2, recipe=recipe)
    assert differences(train(tmp_path / "stopped", recipe), train(tmp_path / "whole", recipe)) == []


ENDLESS = """
import sys
from pathlib import Path
import torch
from conftest import IMAGE_SIZE, SCENES, TINY_CHANNELS, build_tiny
from mcar_lib.data import load_image_set
from mcar_lib.data.scenes import CLASSES
from mcar_lib.data.squares import ResizedImages
from mcar_lib.model import MCAR
from mcar_lib.training import Recipe, fit

torch.set_num_threads(1)
data, folder, recipe = Path(sys.argv[1]), Path(sys.argv[2]), Recipe.model_validate_json(sys.argv[3])
squares = [ResizedImages(load_image_set("scenes", split, data, **SCENES), IMAGE_SIZE) for split in ("train", "test")]
torch.manual_seed(0)
model = MCAR(build_tiny(), TINY_CHANNELS[-1], len(CLASSES), num_regions=2)
fit(model, *squares, recipe, folder, verbose=False)
"""


def test_a_killed_process_is_resumed_with_the_same_numbers(train: Train, tmp_path: Path, scenes_data: Path) -> None:
    recipe = RECIPE.model_copy(update={"epochs": 10})
    folder = tmp_path / "killed"
    arguments = [sys.executable, "-c", ENDLESS, str(scenes_data), str(folder), recipe.model_dump_json()]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(arguments, env=environment)
    while not (folder / CHECKPOINT).exists() and process.poll() is None:
        time.sleep(0.01)
    time.sleep(random.uniform(0, 0.1))  # any moment will do; whatever it is, the end must be the same
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert differences(train(folder, recipe), train(tmp_path / "whole", recipe)) == []


# ---- checkpoints


@pytest.fixture
def stopped(train: Train, tmp_path: Path) -> Path:
    """The folder of a run that was stopped in its third epoch."""
    train_until(train, tmp_path, "training_step", 2 * STEPS_PER_EPOCH + 2)
    return tmp_path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_truncated_checkpoint_is_passed_over(train: Train, stopped: Path, uninterrupted: tuple[Fit, MCAR]) -> None:
    cut(stopped / CHECKPOINT)
    assert differences(uninterrupted, train(stopped)) == []


def test_a_truncated_checkpoint_is_told(train: Train, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cut(stopped / CHECKPOINT)
    train(stopped)
    assert f"{stopped / CHECKPOINT} cannot be read" in capsys.readouterr().out


def test_a_truncated_checkpoint_costs_one_epoch(train: Train, stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cut(stopped / CHECKPOINT)
    calls: list[object] = []
    step = loop.training_step
    monkeypatch.setattr(loop, "training_step", lambda *args: calls.append(args) or step(*args))
    train(stopped)
    assert len(calls) == 3 * STEPS_PER_EPOCH


@pytest.mark.parametrize("size", [0, 1000])
def test_a_run_whose_checkpoints_are_all_truncated_starts_anew(
    train: Train, stopped: Path, uninterrupted: tuple[Fit, MCAR], size: int
) -> None:
    for name in (CHECKPOINT, PREVIOUS):
        (stopped / name).write_bytes((stopped / name).read_bytes()[:size])
    assert differences(uninterrupted, train(stopped)) == []


def test_a_run_killed_between_both_renames_goes_on(
    train: Train, stopped: Path, uninterrupted: tuple[Fit, MCAR]
) -> None:
    (stopped / CHECKPOINT).replace(stopped / "checkpoint-new.pt")
    assert differences(uninterrupted, train(stopped)) == []


def test_no_flipped_bit_in_a_checkpoint_is_believed(stopped: Path) -> None:
    path = stopped / CHECKPOINT
    content = path.read_bytes()
    expected = checkpoint._read(path)
    for at in range(0, len(content), len(content) // 300):
        path.write_bytes(content[:at] + bytes([content[at] ^ 16]) + content[at + 1 :])
        found = checkpoint._newest(stopped)
        assert found is not None
        if found[0] == path:  # the bit is none of the content's: a date, or what fills up a block
            assert found[1]["history"] == expected["history"]
            assert all(torch.equal(value, expected["model"][key]) for key, value in found[1]["model"].items())


def test_a_checkpoint_that_was_written_whole_is_gone_on_from_whatever_is_with_the_others(
    train: Train, stopped: Path, uninterrupted: tuple[Fit, MCAR]
) -> None:
    (stopped / CHECKPOINT).replace(stopped / checkpoint.NEW)
    cut(stopped / PREVIOUS)
    assert checkpoint._newest(stopped)[0].name == checkpoint.NEW  # type: ignore[index]
    assert differences(uninterrupted, train(stopped)) == []


def made_otherwise(folder: Path, **changes: object) -> None:
    """The newest checkpoint as if it had been made under other circumstances; None for one that says nothing."""
    content = torch.load(folder / CHECKPOINT, weights_only=True)
    content["made"] = {**content["made"], **changes} if changes else {}
    torch.save(content, folder / CHECKPOINT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"processes": 2}, "was made with processes: 2, and here are 1, .* with torchrun --nproc-per-node 2, or move "),
        (
            {"device": "cuda"},
            "was made on cuda, and this is cpu, which does not give the same numbers; go on there, or",
        ),
        ({"run": "0a1b2c"}, "belongs to the run '0a1b2c', not to '': data, arithmetic or starting weights differ;"),
    ],
)
def test_a_checkpoint_that_would_end_in_other_numbers_is_refused(
    train: Train, stopped: Path, changes: dict[str, object], message: str
) -> None:
    made_otherwise(stopped, **changes)
    with pytest.raises(CheckpointError, match=rf"{stopped / CHECKPOINT} {message}"):
        train(stopped)


def test_a_checkpoint_of_one_process_is_refused_by_two(
    train: Train, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = checkpoint._circumstances
    monkeypatch.setattr(checkpoint, "_circumstances", lambda *args: {**there(*args), "processes": 2})
    with pytest.raises(CheckpointError, match=r"made with processes: 1, and here are 2, .* with one process, or move"):
        train(stopped)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"threads": 7}, "was made with threads 7, not 1: the last digits may differ"),
        ({"torch": "1.0"}, "was made with torch 1.0, not"),
        ({}, "does not say how many processes made it: going on with 1"),
    ],
)
def test_what_may_change_last_digits_of_a_checkpoint_s_run_is_said(
    train: Train, stopped: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], said: str
) -> None:
    made_otherwise(stopped, **changes)
    train(stopped)
    assert f"{stopped / CHECKPOINT} {said}" in capsys.readouterr().out


def test_what_is_no_checkpoint_is_passed_over(train: Train, stopped: Path, uninterrupted: tuple[Fit, MCAR]) -> None:
    torch.save({"weight": torch.zeros(3)}, stopped / CHECKPOINT)
    assert differences(uninterrupted, train(stopped)) == []


def test_a_checkpoint_of_another_recipe_is_refused_with_what_differs(train: Train, stopped: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint.pt was made by another recipe \(epochs 4, jitter 0.3\)"):
        train(stopped, RECIPE.model_copy(update={"epochs": 5, "jitter": 0.0}))


def test_a_checkpoint_of_other_classes_is_refused_with_both_numbers(train: Train, stopped: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint.pt is of 20 classes and the model here of 7;"):
        train(stopped, num_classes=7)


def test_a_refused_checkpoint_is_left_as_it_was(train: Train, stopped: Path, uninterrupted: tuple[Fit, MCAR]) -> None:
    with pytest.raises(CheckpointError):
        train(stopped, num_classes=7)
    assert differences(uninterrupted, train(stopped)) == []


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write_half(partial: Path) -> None:
        partial.write_text("ne")
        interrupt()

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write_half)
    assert path.read_text() == "old"


# ---- a loss that is no number


def break_weights_at(monkeypatch: pytest.MonkeyPatch, call: int, value: float) -> None:
    calls = itertools.count(1)
    step = loop.training_step

    def broken(model: MCAR, images: Tensor, targets: Tensor, *rest: object) -> StepLoss:
        if next(calls) == call:
            targets.fill_(value)
        return step(model, images, targets, *rest)

    monkeypatch.setattr(loop, "training_step", broken)


@pytest.mark.parametrize(("value", "told"), [(math.nan, "nan"), (math.inf, "inf|nan")])
def test_a_loss_that_is_no_number_stops_training(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float, told: str
) -> None:
    break_weights_at(monkeypatch, 1, value)
    with pytest.raises(TrainingError, match=f"the loss is ({told}); lower learning_rate"):
        train(tmp_path)


def test_a_loss_that_is_no_number_leaves_the_checkpoint_before_it(
    train: Train, tmp_path: Path, uninterrupted: tuple[Fit, MCAR], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, pytest.raises(TrainingError):  # noqa: PT012
        break_weights_at(patch, 2 * STEPS_PER_EPOCH + 2, math.nan)
        train(tmp_path)
    assert differences(uninterrupted, train(tmp_path)) == []


# ---- scores


def test_scores_are_in_the_order_of_the_images(
    scene_squares: tuple[ResizedImages, ResizedImages], tiny_model: Callable[..., MCAR]
) -> None:
    test, made = scene_squares[1], tiny_model().eval()
    image = network_input(made, test[9][None])
    with torch.no_grad():
        expected = made(image).global_logits[0]
    torch.testing.assert_close(evaluate(made, test, verbose=False).global_scores[9], expected)


def test_scores_of_a_diverged_model_still_differ(
    scene_squares: tuple[ResizedImages, ResizedImages], tiny_model: Callable[..., MCAR]
) -> None:
    """Their sigmoids are all 1."""
    test, made = scene_squares[1], tiny_model().eval()
    with torch.no_grad():
        made.convclass.weight *= 1000
        made.convclass.bias += 2000
    scores = evaluate(made, test, verbose=False).fused
    assert torch.sigmoid(scores).unique().tolist() == [1.0]
    assert all(len(column.unique()) == len(test) for column in scores.T)


def test_scores_do_not_depend_on_the_batch(
    scene_squares: tuple[ResizedImages, ResizedImages],
    tiny_model: Callable[..., MCAR],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = evaluate(tiny_model(), scene_squares[1], verbose=False)
    monkeypatch.setattr(loop, "EVALUATION_BATCH", 5)
    parts = evaluate(tiny_model(), scene_squares[1], verbose=False)
    # Rounding differs with the batch and can move a box, so local scores are no witness.
    torch.testing.assert_close(parts.global_scores, whole.global_scores)


def test_testing_changes_no_weight(
    scene_squares: tuple[ResizedImages, ResizedImages], tiny_model: Callable[..., MCAR]
) -> None:
    made = tiny_model().train()
    evaluate(made, scene_squares[1], verbose=False)
    before = tiny_model().state_dict()
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())


def test_global_only_scores_stand_for_both_streams(
    scene_squares: tuple[ResizedImages, ResizedImages], tiny_model: Callable[..., MCAR]
) -> None:
    scores = evaluate(tiny_model(local_stream=False), scene_squares[1], verbose=False)
    assert torch.equal(scores.global_scores, scores.local_scores)


def test_fused_scores_are_the_larger_of_both_streams() -> None:
    scores = StreamScores(torch.tensor([[0.1, 0.8]]), torch.tensor([[0.4, 0.2]]))
    assert torch.equal(scores.fused, torch.tensor([[0.4, 0.8]]))


# ---- the schedules of the learning rate


def learning_rates(model: MCAR, recipe: Recipe, steps_per_epoch: int) -> list[tuple[float, float]]:
    """The rates of classifier and backbone at every step."""
    optimizer = build_optimizer(model, recipe)
    schedule = build_schedule(optimizer, recipe, steps_per_epoch)
    rates = []
    for _ in range(recipe.epochs * steps_per_epoch):
        rates.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"]))
        optimizer.step()
        schedule.step()
    return rates


@pytest.mark.parametrize(("epoch", "rate"), [(0, 1e-2), (29, 1e-2), (30, 1e-3), (49, 1e-3), (50, 1e-4), (59, 1e-4)])
def test_step_schedule_of_the_release(tiny_model: Callable[..., MCAR], epoch: int, rate: float) -> None:
    rates = learning_rates(tiny_model(), Recipe(), steps_per_epoch=2)
    assert [classifier for classifier, _ in rates[2 * epoch : 2 * epoch + 2]] == pytest.approx([rate, rate])


@pytest.mark.parametrize("schedule", ["step", "onecycle"])
def test_backbone_learns_at_a_tenth_all_along(tiny_model: Callable[..., MCAR], schedule: str) -> None:
    rates = learning_rates(tiny_model(), Recipe(epochs=20, milestones=(5, 9), schedule=schedule), steps_per_epoch=3)
    assert [backbone for _, backbone in rates] == pytest.approx([classifier / 10 for classifier, _ in rates])


def test_one_cycle_peaks_at_the_learning_rate_when_the_warmup_ends(tiny_model: Callable[..., MCAR]) -> None:
    recipe = Recipe(epochs=10, learning_rate=0.1, schedule="onecycle", warmup=0.3)
    rates = [classifier for classifier, _ in learning_rates(tiny_model(), recipe, steps_per_epoch=10)]
    assert (max(rates), rates.index(max(rates))) == (pytest.approx(0.1), 29)


def test_one_cycle_rises_to_its_peak_and_falls_to_nothing(tiny_model: Callable[..., MCAR]) -> None:
    recipe = Recipe(epochs=10, learning_rate=0.1, schedule="onecycle", warmup=0.3)
    rates = [classifier for classifier, _ in learning_rates(tiny_model(), recipe, steps_per_epoch=10)]
    rising, falling = rates[:30], rates[29:]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)
    assert falling[-1] < 1e-5


def test_optimizer_is_the_release_s(tiny_model: Callable[..., MCAR]) -> None:
    groups = build_optimizer(tiny_model(), Recipe()).param_groups
    found = [(group["momentum"], group["weight_decay"], group["nesterov"]) for group in groups]
    assert found == [(0.9, 1e-4, False), (0.9, 1e-4, False)]


@pytest.mark.parametrize("milestones", [(50, 30), (30, 30)])
def test_milestones_must_ascend(milestones: tuple[int, ...]) -> None:
    with pytest.raises(ValidationError, match="milestones must ascend"):
        Recipe(milestones=milestones)


# ---- the images of an epoch


def test_difficult_counts_as_positive_in_training(scene_squares: tuple[ResizedImages, ResizedImages]) -> None:
    images = scene_squares[0].image_set
    labels = torch.zeros_like(images.targets)
    labels[0, :3] = torch.tensor([1, 0, -1])
    relabelled = ResizedImages(dataclasses.replace(images, targets=labels), 32)
    assert TrainingImages(relabelled, RECIPE).batch((0, [0])).targets[0, :3].tolist() == [1.0, 0.0, 1.0]


def test_an_image_is_augmented_alike_in_any_order(scene_squares: tuple[ResizedImages, ResizedImages]) -> None:
    dataset = TrainingImages(scene_squares[0], RECIPE)
    forwards, backwards = dataset.batch((3, [0, 1, 2, 3, 4])), dataset.batch((3, [4, 3, 2, 1, 0]))
    assert all(torch.equal(one, other.flip(0)) for one, other in zip(forwards, backwards, strict=True))


def test_an_image_is_augmented_anew_in_each_epoch(scene_squares: tuple[ResizedImages, ResizedImages]) -> None:
    dataset = TrainingImages(scene_squares[0], RECIPE)
    first, second = (dataset.batch((epoch, range(24))) for epoch in (0, 1))
    assert not torch.equal(first.images, second.images)
    assert not torch.equal(first.factors, second.factors)


@pytest.fixture
def order_of(scene_squares: tuple[ResizedImages, ResizedImages]) -> Callable[[int, int], list[int]]:
    def order(seed: int, epoch: int) -> list[int]:
        return TrainingImages(scene_squares[0], Recipe(seed=seed)).order(epoch)

    return order


def test_an_epoch_takes_every_image_once(order_of: Callable[[int, int], list[int]]) -> None:
    assert sorted(order_of(0, 0)) == list(range(24))


def test_the_order_of_an_epoch_repeats(order_of: Callable[[int, int], list[int]]) -> None:
    assert order_of(3, 2) == order_of(3, 2)


@pytest.mark.parametrize("other", [(3, 1), (4, 2)], ids=["epoch", "seed"])
def test_the_order_changes_with_epoch_and_seed(
    other: tuple[int, int], order_of: Callable[[int, int], list[int]]
) -> None:
    assert order_of(3, 2) != order_of(*other)


def test_a_warm_up_of_exactly_one_step_is_refused(train: Train, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"warmup 0\.2 of 5 steps is a single step"):
        train(tmp_path, Recipe(epochs=1, batch_size=5, schedule="onecycle", warmup=0.2))


# ---- batch statistics over a part of the batch


def test_groups_of_a_batch_have_their_own_batch_statistics(tiny_model: Callable[..., MCAR]) -> None:
    """As on the release's four GPUs: each group alone gives the same logits as that group within the batch."""
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    grouped = forward_in_groups(tiny_model().train(), images, 4)
    first = tiny_model().train()(images[:4])
    torch.testing.assert_close(grouped.global_logits[:4], first.global_logits)
    torch.testing.assert_close(grouped.local_logits[:4], first.local_logits)
    whole = forward_in_groups(tiny_model().train(), images, 0)
    assert not torch.allclose(grouped.global_logits, whole.global_logits)


@pytest.mark.parametrize("size", [0, 8, 100])
def test_a_group_as_large_as_the_batch_is_the_batch(tiny_model: Callable[..., MCAR], size: int) -> None:
    images = torch.rand(8, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    grouped, whole = forward_in_groups(tiny_model().train(), images, size), tiny_model().train()(images)
    assert torch.equal(grouped.global_logits, whole.global_logits)


def test_groups_work_for_the_global_stream_alone_and_in_training(train: Train, tmp_path: Path) -> None:
    recipe = Recipe(epochs=1, batch_size=8, statistics_batch=4)
    state, _ = train(tmp_path, recipe)
    other, _ = train(tmp_path / "whole", Recipe(epochs=1, batch_size=8))
    assert state.history[0].global_loss != other.history[0].global_loss


# ---- settings of the shell

# Left there by another job, or by accelerate launch.
OVERRULED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_DYNAMO_BACKEND": "inductor",
    "ACCELERATE_USE_CPU": "true",
    "ACCELERATE_TORCH_DEVICE": "meta",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_USE_FSDP": "true",
    "ACCELERATE_USE_MEGATRON_LM": "true",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
    "ACCELERATE_SPLIT_BATCHES": "false",
    "RANK": "1",
    "WORLD_SIZE": "2",
}


ONE_EPOCH = RECIPE.model_copy(update={"epochs": 1})


@pytest.fixture(scope="module")
def one_epoch(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Fit, MCAR]:
    return train(tmp_path_factory.mktemp("one"), ONE_EPOCH)


@pytest.mark.parametrize("name", OVERRULED)
def test_a_setting_of_the_environment_changes_no_number(
    name: str, train: Train, one_epoch: tuple[Fit, MCAR], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)  # as in a new session, which reads all anew
    monkeypatch.setenv(name, OVERRULED[name])
    assert differences(train(tmp_path, ONE_EPOCH), one_epoch) == []


@pytest.mark.parametrize("name", loop.SETTINGS)
def test_a_setting_that_would_change_float32_is_refused_by_name(
    name: str, train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "0")
    with pytest.raises(ConfigError, match=f"{name} is '0' in the environment.*unset it"):
        train(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["", "strict"])
def test_a_setting_that_changes_nothing_is_taken(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", value)
    loop.check_settings()


def test_a_coarser_matrix_product_that_was_set_before_is_set_back(train: Train, tmp_path: Path) -> None:
    """As TORCH_ALLOW_TF32_CUBLAS_OVERRIDE sets it from the start."""
    torch.set_float32_matmul_precision("medium")
    train(tmp_path, ONE_EPOCH)
    assert torch.get_float32_matmul_precision() == "highest"


# ---- an image alone


@pytest.fixture
def few(scene_squares: tuple[ResizedImages, ResizedImages]) -> Callable[..., ResizedImages]:
    return lambda count, size=32: ResizedImages(scene_squares[0].image_set.select(range(count)), size)


@pytest.mark.parametrize(
    ("images", "batch", "group", "ways"),
    [
        (5, 4, 0, "batch_size 5 or image_size 64 or more"),
        (3, 1, 0, "batch_size 3 or image_size 64 or more"),
        (8, 4, 1, "another statistics_batch or image_size 64 or more"),
        (7, 4, 2, "another statistics_batch or image_size 64 or more"),
        (1, 4, 0, "image_size 64 or more"),
    ],
)
def test_an_image_alone_at_32_pixels_is_told_before_the_first_step(
    images: int,
    batch: int,
    group: int,
    ways: str,
    few: Callable[..., ResizedImages],
    tiny_model: Callable[..., MCAR],
    tmp_path: Path,
) -> None:
    recipe = Recipe(epochs=1, batch_size=batch, statistics_batch=group)
    with pytest.raises(ConfigError, match=f"of {images} images .* one is alone, .*; choose {ways}$"):
        fit(tiny_model(), few(images), None, recipe, tmp_path / "run", verbose=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("images", "size", "batch", "group"),
    [(5, 32, 5, 0), (3, 32, 3, 0), (5, 64, 4, 0), (2, 64, 1, 0), (2, 64, 2, 1), (1, 64, 4, 0)],
)
def test_what_is_advised_for_an_image_alone_trains(
    images: int,
    size: int,
    batch: int,
    group: int,
    few: Callable[..., ResizedImages],
    tiny_model: Callable[..., MCAR],
    tmp_path: Path,
) -> None:
    recipe = Recipe(epochs=1, batch_size=batch, statistics_batch=group)
    assert len(fit(tiny_model(), few(images, size), None, recipe, tmp_path, verbose=False).history) == 1


@pytest.mark.parametrize(("images", "batch", "advised"), [(9, 4, 6), (6, 2, 4)])
def test_an_image_alone_in_one_of_two_processes_is_told(
    images: int, batch: int, advised: int, tiny_model: Callable[..., MCAR], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop.processes, "num_processes", lambda: 2)
    with pytest.raises(ConfigError, match=f"choose batch_size {advised} or"):
        loop.check_groups(tiny_model(), images, 32, Recipe(batch_size=batch))
    loop.check_groups(tiny_model(), images, 32, Recipe(batch_size=advised))


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("group", [0, 1, 2])
def test_the_smallest_group_is_that_of_the_steps(count: int, group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop.processes, "num_processes", lambda: count)
    for images, batch in itertools.product(range(1, 30), (4, 8, 12)):
        found = []
        for first, rank in itertools.product(range(0, images, batch), range(count)):
            monkeypatch.setattr(loop.processes, "rank", lambda rank=rank: rank)
            used = loop.processes.shard_size(min(batch, images - first), batch) or batch // count
            found += [len(part) for part in torch.zeros(used).split(group or used)]
        assert loop._smallest_group(images, Recipe(batch_size=batch, statistics_batch=group)) == min(found)


def test_a_dry_run_tells_an_image_alone(runs: Runs) -> None:
    config = runs.profile.run.vary(image_size=32, epochs=1, batch_size=SCENES["num_train"] - 1)
    with pytest.raises(ConfigError, match="one is alone"):
        dry_run(runs.splits, config)
