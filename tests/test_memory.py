"""A run is carried out in the memory that there is for it."""

from collections.abc import Callable

import pytest

from mcar_lib.errors import ConfigError
from mcar_lib.runs import RunConfig, load_profile
from mcar_lib.runs.memory import GIB, estimated_memory, in_half_precision, told_of_precision, within
from mcar_lib.training import Execution


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets how many GiB are free."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return lambda gib: monkeypatch.setattr("mcar_lib.runs.memory.free_memory", lambda: round(gib * GIB))


DEEP = {"backbone": "mobilenet_v2", "image_size": 224, "batch_size": 16, "num_regions": 4}


def needs(config: RunConfig, recompute: bool = False) -> float:
    return estimated_memory(config, 40, recompute) / GIB


def test_activations_are_recomputed_where_memory_is_too_small_without(
    room: Callable[[float], None], tiny_config: RunConfig
) -> None:
    config = tiny_config.vary(**DEEP)
    assert needs(config, recompute=True) < needs(config)
    room(needs(config) + 0.1)
    assert within(config, 40, Execution()) == (Execution(), [])
    room(needs(config) - 0.1)
    execution, (line,) = within(config, 40, Execution())
    assert execution == Execution(recompute=True)
    assert "the same numbers, more time" in line


def test_memory_that_is_named_counts_for_what_is_free(room: Callable[[float], None], tiny_config: RunConfig) -> None:
    config = tiny_config.vary(**DEEP)
    room(100)
    named = Execution(memory=needs(config) - 0.1)
    assert within(config, 40, named)[0].recompute
    with pytest.raises(ConfigError, match=r"1\.0 are allowed .* smaller image_size, batch_size or num_regions"):
        within(config, 40, Execution(memory=1.0))


def test_too_little_free_memory_is_told_and_all_is_done_that_changes_no_number(
    room: Callable[[float], None], tiny_config: RunConfig
) -> None:
    room(0.5)
    execution, (line,) = within(tiny_config.vary(**DEEP), 40, Execution())
    assert execution.recompute
    assert "0.5 are free" in line
    assert "precision bf16, takes less" in line


def test_half_precision_is_chosen_only_where_nothing_else_is_enough(tiny_config: RunConfig) -> None:
    config = tiny_config.vary(**DEEP)
    halved = config.vary(precision="bf16")
    between = (needs(config, recompute=True) + needs(halved, recompute=True)) / 2
    assert in_half_precision(config, 40, needs(config, recompute=True)) == config
    assert in_half_precision(config, 40, between) == halved
    assert in_half_precision(config, 40, 1.0) == config  # not even so


@pytest.mark.parametrize(("capability", "is_told"), [("AVX2", True), ("AVX512", False), ("DEFAULT", False)])
def test_half_precision_is_told_to_be_slow_where_it_is(
    capability: str, is_told: bool, tiny_config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: capability)
    assert bool(told_of_precision(tiny_config.vary(precision="bf16"))) == is_told
    assert told_of_precision(tiny_config) == []


def test_the_estimate_of_a_recomputed_run_is_near_what_was_measured() -> None:
    """Steps of 16 photos in a process of their own: 2.7 and 1.5 GiB; ResNet-50: 2.0."""
    run = load_profile("photos").run
    small = run.vary(image_size=128)
    for gib, config in {2.7: run, 1.5: small, 2.0: small.vary(backbone="resnet50")}.items():
        assert gib < estimated_memory(config, 40, recompute=True) / GIB < 1.35 * gib
