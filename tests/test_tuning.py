"""The rate of an arm: looked up without training."""

from pathlib import Path

import pytest

from mcar_lib.runs import Record, RunConfig, Runs, load_profile, tune
from mcar_lib.runs import tuning as tuning_module


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runs:
    """The photos profile without a record; training is an error."""

    def train(*_: object) -> None:
        raise AssertionError("trained")

    monkeypatch.setattr(tuning_module, "find_or_train", train)
    return Runs(load_profile("photos"), results=tmp_path, artifacts=tmp_path, verbose=False)


def test_an_arm_without_tuning_runs_keeps_its_rate_and_none_is_trained(runs: Runs) -> None:
    config = runs.profile.run.vary(learning_rate=0.03)
    assert tune(runs, [config], train=False) == [config]


def test_the_best_rate_that_is_there_is_found(runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    """0.2 is the best and the last of the grid, and of the wider ones only 0.4 has a record, a lower one."""
    maps = {0.02: 0.5, 0.05: 0.6, 0.2: 0.8, 0.4: 0.7}

    def find(config: RunConfig) -> Record | None:
        assert config.scored_on == "val"
        value = maps.get(config.learning_rate)
        return value and Record(Path("x"), {"metrics": {"last": {"fused": {"mAP": value}}}})

    monkeypatch.setattr(runs, "find", find)
    assert tune(runs, [runs.profile.run], train=False)[0].learning_rate == 0.2
