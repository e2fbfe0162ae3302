"""A run survives: checkpoints within an epoch, signals that leave one, a log; and what else a run may be told to do."""

import contextlib
import itertools
import json
import math
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from test_training import STEPS_PER_EPOCH, differences, numbers
from torch import Tensor

from mcar_lib.data.squares import ResizedImages
from mcar_lib.errors import RESUMABLE, ConfigError, Stopped
from mcar_lib.model import MCAR, build_mcar
from mcar_lib.training import Execution, Fit, Recipe, Standing, evaluate, fit, loop, training_step
from mcar_lib.training.stopping import stop_request

RECIPE = Recipe(epochs=3, batch_size=8, learning_rate=0.05, schedule="onecycle")
ALL_THE_TIME = Execution(checkpoint_minutes=0)
Squares = tuple[ResizedImages, ResizedImages]
Train = Callable[..., tuple[Fit, MCAR]]


@pytest.fixture
def train(scene_squares: Squares, tiny_model: Callable[..., MCAR], tmp_path: Path) -> Train:
    """Trains a new tiny model in a folder below the test's own."""

    def run(
        name: str = "run", recipe: Recipe = RECIPE, execution: Execution = ALL_THE_TIME, **options: object
    ) -> tuple[Fit, MCAR]:
        tell = options.pop("tell", None)
        made = tiny_model(**options)
        return fit(made, *scene_squares, recipe, tmp_path / name, execution, False, tell=tell), made  # type: ignore[arg-type]

    return run


@contextlib.contextmanager
def at_step(number: int, what: Callable[[], object]) -> Iterator[list[int]]:
    """Does something in the middle of a step; gives the list of steps that were made."""
    steps: list[int] = []
    real = loop.training_step

    def counted(*args: object) -> object:
        steps.append(len(steps) + 1)
        if len(steps) == number:
            what()
        return real(*args)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "training_step", counted)
        yield steps


def die() -> None:
    raise RuntimeError("killed")


# ---- within an epoch


@pytest.mark.parametrize("step", range(1, 3 * STEPS_PER_EPOCH + 1))
def test_a_run_goes_on_from_the_step_before_and_ends_with_the_same_numbers(train: Train, step: int) -> None:
    whole = train("whole")
    with at_step(step, die), pytest.raises(RuntimeError, match="killed"):
        train()
    with at_step(0, die) as steps:
        again = train()
    assert len(steps) == 3 * STEPS_PER_EPOCH - (step - 1)
    assert differences(whole, again) == []


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"average_decay": 0.5}, {}),
        ({"statistics_batch": 4, "batch_size": 12}, {}),
        ({"precision": "bf16"}, {}),
        ({"precision": "fp16"}, {}),
        ({}, {"selection": "random"}),
        ({}, {"local_stream": False}),
    ],
    ids=str,
)
def test_so_does_a_run_of_another_kind(train: Train, changes: dict[str, object], options: dict[str, object]) -> None:
    recipe = RECIPE.model_copy(update=changes)

    def drawing() -> dict[str, object]:
        return {**options, **({"generator": torch.Generator()} if "selection" in options else {})}

    whole = train("whole", recipe, **drawing())
    with at_step(2, die), pytest.raises(RuntimeError, match="killed"):
        train("run", recipe, **drawing())
    assert differences(whole, train("run", recipe, **drawing())) == []


def test_what_draws_from_torch_s_own_stream_goes_on_where_it_was(
    scene_squares: Squares, tiny_model: Callable[..., MCAR], tmp_path: Path
) -> None:
    def run(name: str) -> tuple[Fit, MCAR]:
        made = tiny_model()
        made.features.append(torch.nn.Dropout(0.5))  # type: ignore[operator]
        return fit(made, *scene_squares, RECIPE, tmp_path / name, ALL_THE_TIME, False), made

    whole = run("whole")
    with at_step(2, die), pytest.raises(RuntimeError, match="killed"):
        run("killed")
    assert differences(whole, run("killed")) == []


def test_no_checkpoint_is_written_within_an_epoch_before_it_is_time(train: Train) -> None:
    with at_step(2, die), pytest.raises(RuntimeError, match="killed"):
        train(execution=Execution(checkpoint_minutes=10))
    with at_step(0, die) as steps:
        train()
    assert len(steps) == 3 * STEPS_PER_EPOCH


def test_a_run_that_is_killed_while_it_tests_trains_no_step_of_the_epoch_again(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train("whole")
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):  # noqa: PT012
        patch.setattr(loop, "evaluate", lambda *args: die())
        train()
    with at_step(0, die) as steps:
        again = train()
    assert len(steps) == 2 * STEPS_PER_EPOCH
    assert differences(whole, again) == []


# ---- signals


def send(number: signal.Signals) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_a_run_after_its_step_with_a_checkpoint(train: Train, number: signal.Signals) -> None:
    whole = train("whole")
    before = signal.signal(number, signal.default_int_handler)  # whatever a shell has left ignored
    try:
        with at_step(5, send(number)) as steps, pytest.raises(Stopped) as stopped:
            train(execution=Execution())
    finally:
        signal.signal(number, before)
    assert (len(steps), stopped.value.signal, stopped.value.resumable) == (5, number, True)
    with at_step(0, die) as steps:
        again = train(execution=Execution())
    assert len(steps) == 3 * STEPS_PER_EPOCH - 5
    assert differences(whole, again) == []


def test_a_signal_while_it_tests_is_heard_after_a_batch(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train("whole")
    scored = loop.batch_scores

    def signalled(model: MCAR, images: Tensor) -> object:
        os.kill(os.getpid(), signal.SIGTERM)
        return scored(model, images)

    with monkeypatch.context() as patch, pytest.raises(Stopped):  # noqa: PT012
        patch.setattr(loop, "batch_scores", signalled)
        train(execution=Execution())
    with at_step(0, die) as steps:
        again = train(execution=Execution())
    assert len(steps) == 2 * STEPS_PER_EPOCH
    assert differences(whole, again) == []


def test_the_handlers_are_afterwards_as_they_were(train: Train) -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    with at_step(1, send(signal.SIGTERM)), pytest.raises(Stopped):
        train()
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_a_second_signal_ends_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcar_lib.training.stopping.ONE_EVENT", 0.05)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with stop_request() as request:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # of the same event
            assert request.signal == signal.SIGINT
            time.sleep(0.1)
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_signal_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_request() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_exit_code_is_that_of_a_temporary_failure() -> None:
    assert RESUMABLE == os.EX_TEMPFAIL


# ---- what a run tells


def test_the_log_has_a_line_for_each_epoch_also_after_a_kill(train: Train, tmp_path: Path) -> None:
    with at_step(STEPS_PER_EPOCH + 2, die), pytest.raises(RuntimeError, match="killed"):
        train()
    state, _ = train()
    lines = [json.loads(line) for line in (tmp_path / "run" / loop.LOG).read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert lines[2]["map_fused"] == state.history[2].map_fused
    assert all(line["images_per_second"] > 0 for line in lines)


def test_a_run_tells_where_it_is(train: Train) -> None:
    told: list[Standing] = []
    state, _ = train(tell=told.append)
    assert [(each.epoch, each.images) for each in told[:5]] == [(1, 8), (1, 16), (1, 24), (1, 24), (2, 8)]
    assert told[4].last_map == state.history[0].map_fused
    assert told[-1].seconds_left == 0
    assert all(earlier.seconds_left > 0 for earlier in told[:-1])


def test_waiting_for_photos_is_told_apart(train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ResizedImages.__getitem__
    monkeypatch.setattr(ResizedImages, "__getitem__", lambda self, index: (time.sleep(0.01), read(self, index))[1])
    state, _ = train(recipe=RECIPE.model_copy(update={"epochs": 1}))
    assert 0.24 <= state.history[0].wait_seconds <= state.history[0].train_seconds


def test_tensorboard_gets_each_epoch_s_scalars(train: Train, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    state, _ = train(execution=Execution(trackers=("tensorboard",)))
    (events,) = (tmp_path / "run").rglob("events.out.tfevents*")
    scalars = accumulator.EventAccumulator(str(events)).Reload()
    found = [each.value for each in scalars.Scalars("map_fused")]
    assert found == pytest.approx([result.map_fused for result in state.history])
    assert [each.step for each in scalars.Scalars("global_loss")] == [1, 2, 3]


def test_trackers_change_no_number(train: Train) -> None:
    pytest.importorskip("tensorboard")
    assert differences(train("without"), train(execution=Execution(trackers=("tensorboard",)))) == []


def test_a_tracker_that_is_not_here_is_told_before_training(train: Train, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no tracker nobody here .* install its package, or choose another"):
        train(execution=Execution(trackers=("nobody",)))
    assert list(tmp_path.rglob("*.pt")) == []


# ---- choices of the recipe


@pytest.mark.parametrize(("every", "tested"), [(1, [1, 2, 3]), (2, [2, 3]), (3, [3]), (9, [3])])
def test_the_test_set_is_scored_as_often_as_asked_and_at_the_end(train: Train, every: int, tested: list[int]) -> None:
    state, _ = train(recipe=RECIPE.model_copy(update={"evaluate_every": every}))
    assert [each.epoch for each in state.history if each.map_fused is not None] == tested
    assert state.best_epoch in tested
    assert state.last is not None


def test_when_it_is_scored_changes_no_weight(train: Train) -> None:
    one, other = train("one"), train("other", RECIPE.model_copy(update={"evaluate_every": 3}))
    assert [each for each in differences(one, other) if each not in ("history", "best epoch", "best scores")] == []
    assert numbers(one[0].history)[-1] == numbers(other[0].history)[-1]


def test_the_average_of_weights_is_what_is_kept_and_tested(train: Train, scene_squares: Squares) -> None:
    recipe = RECIPE.model_copy(update={"epochs": 1, "average_decay": 0.5})
    weights: list[dict[str, Tensor]] = []
    with pytest.MonkeyPatch.context() as patch:
        update = loop.AveragedModel.update_parameters
        patch.setattr(
            loop.AveragedModel,
            "update_parameters",
            lambda self, model: (
                weights.append({key: value.detach().clone() for key, value in model.named_parameters()}),
                update(self, model),
            ),
        )
        state, made = train(recipe=recipe)
    for key, value in made.named_parameters():
        first, second, third = (each[key] for each in weights)
        torch.testing.assert_close(value.detach(), 0.25 * first + 0.25 * second + 0.5 * third)
    assert torch.equal(evaluate(made, scene_squares[1], verbose=False).fused, state.last.fused)  # type: ignore[union-attr]


def test_without_an_average_the_weights_are_the_last_step_s(train: Train) -> None:
    assert loop._average(train()[1], 0.0) is None


def test_fp16_keeps_every_box_and_its_weights_in_float32(tiny_model: Callable[..., MCAR], train: Train) -> None:
    made, images = tiny_model().eval(), torch.randn(8, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    exact = made(images)
    with torch.autocast("cpu", torch.float16):
        coarse = made(images)
    assert torch.equal(coarse.regions.boxes, exact.regions.boxes)
    assert not torch.equal(coarse.local_logits, exact.local_logits)
    state, trained = train(recipe=RECIPE.model_copy(update={"precision": "fp16"}))
    assert {parameter.dtype for parameter in trained.parameters()} == {torch.float32}
    assert math.isfinite(state.history[-1].local_loss)


def test_fp16_scales_its_loss_and_leaves_out_steps_that_overflow(
    scene_squares: Squares, tiny_model: Callable[..., MCAR], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scale is halved for each step whose gradients overflow, and the weights are left as they were."""
    warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
    scale = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda *args, **options: scale(*args, **options, init_scale=2.0**120))
    scales: list[float] = []
    moved: list[bool] = []
    update, made = scale.update, tiny_model()
    before = {key: value.clone() for key, value in made.named_parameters()}

    def noted(self: torch.amp.GradScaler) -> None:
        scales.append(self.get_scale())
        moved.append(any(not torch.equal(value, before[key]) for key, value in made.named_parameters()))
        update(self)

    monkeypatch.setattr(scale, "update", noted)
    fit(made, *scene_squares, Recipe(epochs=1, batch_size=8, precision="fp16"), tmp_path, verbose=False)
    assert all(later == earlier / 2 for earlier, later in itertools.pairwise(scales))
    assert moved == [False] * STEPS_PER_EPOCH


# ---- less memory


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("group", [0, 4])
def test_recomputed_activations_give_the_same_numbers(train: Train, precision: str, group: int) -> None:
    recipe = RECIPE.model_copy(update={"precision": precision, "statistics_batch": group})
    assert differences(train("kept", recipe), train("again", recipe, Execution(recompute=True))) == []


def test_recomputing_keeps_less_for_the_backward_pass(tiny_model: Callable[..., MCAR]) -> None:
    kept = []
    for recompute in (False, True):
        made, sizes = tiny_model().train(), []
        made.recompute = recompute
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: (sizes.append(tensor.numel()), tensor)[1], lambda tensor: tensor
        ):
            output = made(torch.rand(4, 3, 64, 64), lambda logits: None)
        kept.append(sum(sizes))
        assert output.local_logits is not None
    assert kept[1] < 0.7 * kept[0]


def test_a_gpu_with_too_little_memory_recomputes_and_says_so(
    train: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, calls = train("whole"), itertools.count(1)

    def small(model: Callable[..., object], *args: object) -> object:
        parts = training_step(model, *args)  # type: ignore[arg-type]
        if next(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return parts

    monkeypatch.setattr(loop, "training_step", small)
    again = train("again")
    assert "the GPU has too little memory to keep all activations" in capsys.readouterr().out
    assert again[1].recompute
    assert differences(whole, again) == []


def test_a_step_reads_nothing_back_from_the_device_and_copies_no_number_there(tiny_model: Callable[..., MCAR]) -> None:
    """Either would make a GPU wait: seen as the operations of a step that take a value out of a tensor, whose result
    has a size that the values decide, or that make a tensor of a Python number."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, operation, types, arguments=(), options=None):  # type: ignore[no-untyped-def]
            self.seen.append(str(operation))
            return operation(*arguments, **(options or {}))

    made, images = tiny_model().train(), torch.randint(256, (4, 3, 64, 64), dtype=torch.uint8)
    loop.network_input(made, images)  # mean and std are made once
    with Watch() as watch:
        training_step(made, loop.network_input(made, images), torch.ones(4, 20))
    waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "index.Tensor", "equal.default")
    assert len(watch.seen) > 100
    assert [name for name in watch.seen if any(f"aten.{each}" in name for each in waits)] == []


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet50", "efficientnet_lite0", "timm:resnet18"])
def test_every_backbone_s_gradients_and_statistics_are_the_same_recomputed(backbone: str) -> None:
    images, targets = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.ones(2, 5)
    kept, again = (build_mcar(backbone, 5, "none", seed=0, num_regions=2).train() for _ in range(2))
    again.recompute = True
    for made in (kept, again):
        training_step(made, images, targets)
    gradients = dict(again.named_parameters())
    assert [k for k, value in kept.named_parameters() if not torch.equal(value.grad, gradients[k].grad)] == []  # type: ignore[arg-type]
    buffers = dict(again.named_buffers())
    assert [key for key, value in kept.named_buffers() if not torch.equal(value, buffers[key])] == []
