"""Every cell of every notebook runs under the profile smoke."""

from pathlib import Path

import pytest

from mcar_lib.notebooks import jobs

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
TABLES = ("main_results", "ablation_pooling", "ablation_input_size", "ablation_backbone", "ablation_num_regions")


@pytest.mark.slow
@pytest.mark.timeout(2400)  # all notebooks, beside as long a test
def test_smoke_runs_every_notebook_and_a_second_time_trains_and_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MCAR_ARTIFACTS", str(tmp_path / "artifacts"))
    jobs.reproduce("smoke", only=[], results=tmp_path / "results", data_root=None)  # raises if a notebook fails
    folder = tmp_path / "results/smoke"
    records, executed = sorted(folder.glob("runs/*.json")), sorted(folder.glob("notebooks/*.ipynb"))
    assert [path.name for path in executed] == [path.name for path in NOTEBOOKS]
    written = {path: path.stat().st_mtime_ns for path in (*records, *executed)}
    for name in (*TABLES, "ablation_regions", "attentional_regions"):
        assert (folder / f"tables/{name}.csv").exists()
        assert (folder / f"figures/{name}.png").exists()

    jobs.reproduce("smoke", only=[], results=tmp_path / "results", data_root=None)
    assert sorted(folder.glob("runs/*.json")) == records
    assert {path: path.stat().st_mtime_ns for path in written} == written
