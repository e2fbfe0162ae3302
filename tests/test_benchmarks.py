"""Benchmarks: what pages and README tell follows from the JSON files, a failure costs nothing, loops are the method."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mcar_lib.model import MCAR
from mcar_lib.tables import BLOCK

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "benchmarks"))

import released_way  # noqa: E402
import run  # noqa: E402
import timing  # noqa: E402
from reports import Began, Circumstances, Finding, Record, Report, Table, page, summary, told  # noqa: E402
from test_regions import Golden, golden, model  # noqa: E402, F401 (fixtures)

COMMITTED = ROOT / "results" / "benchmarks"
BEGAN = Began(0.1, "abc", quick=False)


def record(topic: str = "metrics", alt: str = "", quick: bool = False, **finding: object) -> Record:
    """A record with one finding and one table."""
    values = {"what": "a thing", "ours": 2.0, "unit": "s", "in_readme": True, **finding}
    report = Report(
        title="Things",
        about="Two things.",
        findings=(Finding.model_validate(values),),
        tables=(Table(heading="All", columns=("what", "s", "of"), rows=(("one", 0.1234, 10000), ("two", 3.0, None))),),
        alt=alt,
    )
    circumstances = Circumstances(
        **{"processor": "P", "device": "CPU", "cores": 2, "threads": 2, "python": "3.11.7", "commit": "abc"},
        **{"finished": "2026-01-02T03:04:05", "seconds": 9.6, "load": 0.1, "others": 0.02, "quick": quick},
        versions={"torch": "2.14.1", "numpy": "2.4.6"},
    )
    return Record(topic=topic, report=report, circumstances=circumstances)


# Told


def test_committed_pages_are_what_their_numbers_give() -> None:
    found = run.records(COMMITTED)
    assert {each.topic: (COMMITTED / f"{each.topic}.md").read_text(encoding="utf-8") for each in found} == {
        each.topic: page(each) for each in found
    }
    pictures = {f"{each.topic}.png" for each in found if each.report.alt}
    files = {f"{each.topic}{kind}" for each in found for kind in (".json", ".md")}
    assert {path.name for path in COMMITTED.glob("*")} == files | pictures


def test_the_table_of_the_readme_is_what_the_committed_numbers_give() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = (match[0] for match in BLOCK.finditer(text) if match["name"] == run.BLOCK)
    assert block == f"<!-- generated: {run.BLOCK} -->\n{summary(run.records(COMMITTED))}<!-- end -->"


def test_a_page_holds_figures_goals_and_circumstances() -> None:
    text = page(record(against="another", theirs=1.0, ratio=2.0, at_most=1.5))
    assert "| a thing | 2.00 s | another: 1.00 s | 2.00 | at most 1.5: **missed** |" in text
    assert "| one | 0.12 | 10,000 |\n| two | 3.00 | - |" in text
    assert "P, 2 cores, threads used: 2; Python 3.11.7, torch 2.14.1, numpy 2.4.6." in text
    assert "Load average 0.1 at the start of the run; other programs had 2 %" in text
    assert "mean nothing" not in text
    assert "mean nothing" in page(record(quick=True))


def test_what_was_read_back_is_told_alike(tmp_path: Path) -> None:
    written = record(theirs=1.0, ratio=2.0)
    (tmp_path / "a.json").write_text(json.dumps(written.content()))
    assert Record.read(tmp_path / "a.json") == written
    assert page(Record.read(tmp_path / "a.json")) == page(written)


@pytest.mark.parametrize(
    ("finding", "met"),
    [
        ({}, None),
        ({"at_most": 2.0}, True),
        ({"at_most": 1.9}, False),
        ({"at_most": 1.05, "ratio": 1.05}, True),
        ({"at_most": 1.05, "ratio": 1.051}, False),
    ],
)
def test_a_goal_is_met_by_what_was_measured(finding: dict[str, float], met: bool | None) -> None:
    assert record(**finding).report.findings[0].met is met


def test_the_table_holds_what_is_marked_for_it() -> None:
    text = summary([record("metrics"), record("startup", in_readme=False)])
    assert "[a thing](results/benchmarks/metrics.md)" in text
    assert "startup" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,234"), (45.67, "45.7"), (1.049, "1.05"), (0.01234, "0.0123"), (12345, "12,345"), (None, "-")],
)
def test_numbers_are_told_with_some_three_digits(value: float | None, text: str) -> None:
    assert told(value) == text


# Run


def test_only_takes_names_in_their_order_and_names_those_that_are_none() -> None:
    assert run.chosen("startup, metrics") == ("metrics", "startup")
    assert run.chosen("") == run.TOPICS
    with pytest.raises(SystemExit, match="there is no benchmark speed; choose from inference, "):
        run.chosen("metrics,speed")


@pytest.mark.parametrize("topic", run.TOPICS)
def test_each_benchmark_can_be_measured(topic: str) -> None:
    assert callable(importlib.import_module(topic).measure)


def child(tmp_path: Path, code: str) -> list[str]:
    """A command that runs code, where `into` is the folder that it writes into."""
    script = tmp_path / "child.py"
    script.write_text(f"import sys\nfrom pathlib import Path\ninto = Path(sys.argv[1])\n{code}\n")
    return [sys.executable, str(script)]


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "LOOKED", 0.01)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    "code",
    [
        "sys.exit(3)",
        "",  # nothing was written
        "(into / 'report.json').write_text('{')",
        "(into / 'report.json').write_text(REPORT)",  # its picture is missing
    ],
)
def test_a_benchmark_that_fails_leaves_the_earlier_files(
    code: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {"report": record(alt="a curve").report.model_dump(mode="json"), "environment": environment()}
    output = tmp_path / "output"
    output.mkdir()
    for kind in ("json", "md", "png"):
        (output / f"metrics.{kind}").write_text("earlier")
    command = child(tmp_path, code.replace("REPORT", repr(json.dumps(content))))
    assert run.benchmark("metrics", command, output, BEGAN) == run.FAILED
    assert {path.name: path.read_text() for path in output.iterdir()} == {
        f"metrics.{kind}": "earlier" for kind in ("json", "md", "png")
    }
    assert "its earlier files stay as they were" in capsys.readouterr().err


def environment() -> dict[str, object]:
    known = record().circumstances
    versions = dict.fromkeys(("torch", "torchvision", "numpy", "pillow"), "1")
    return {**known.model_dump(mode="json", exclude={"seconds", "load", "others", "quick"}), "versions": versions}


@pytest.mark.usefixtures("at_once")
def test_what_was_measured_is_written_with_its_page(tmp_path: Path) -> None:
    content = {"report": record().report.model_dump(mode="json"), "environment": environment()}
    command = child(tmp_path, f"(into / 'report.json').write_text({json.dumps(content)!r})")
    assert run.benchmark("metrics", command, tmp_path / "output", BEGAN._replace(quick=True)) == run.MEASURED
    found = Record.read(tmp_path / "output" / "metrics.json")
    assert (found.report, found.circumstances.load, found.circumstances.quick) == (record().report, 0.1, True)
    assert (tmp_path / "output" / "metrics.md").read_text() == page(found)


@pytest.mark.usefixtures("at_once")
def test_what_cannot_be_measured_here_is_left_out_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = child(tmp_path, "(into / 'skipped').write_text('there are no photos')")
    assert run.benchmark("reading", command, tmp_path / "output", BEGAN) == run.SKIPPED
    assert not (tmp_path / "output").exists()
    assert "reading: left out, there are no photos" in capsys.readouterr().out


def test_after_a_failure_the_others_go_on_and_the_exit_code_is_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(topic: str, *rest: object) -> str:
        asked.append(topic)
        return run.FAILED if topic == "metrics" else run.MEASURED

    monkeypatch.setattr(run, "benchmark", measured)
    assert run.main(["--only", "metrics,startup", "--output", str(tmp_path)]) == 1
    assert asked == ["metrics", "startup"]
    assert run.main(["--only", "startup", "--output", str(tmp_path)]) == 0


def test_a_readme_gets_the_table_of_what_lies_there(tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("<!-- generated: benchmarks -->\nold\n<!-- end -->\n<!-- generated: x -->\nkept\n<!-- end -->\n")
    (tmp_path / "metrics.json").write_text(json.dumps(record().content()))
    run.run((), tmp_path, False, readme)
    assert "[a thing](metrics.md)" not in readme.read_text()
    assert summary([record()]) in readme.read_text()
    assert "kept" in readme.read_text()


@pytest.mark.slow
def test_a_quick_run_measures_in_a_process_of_its_own(tmp_path: Path) -> None:
    assert run.main(["--only", "metrics", "--quick", "--output", str(tmp_path)]) == 0
    assert Record.read(tmp_path / "metrics.json").circumstances.quick


# Measured


def test_arms_take_turns_and_the_first_round_does_not_count() -> None:
    calls: list[str] = []
    seconds = timing.in_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2)
    assert calls == ["a", "b"] * 3
    assert {name: len(each) for name, each in seconds.items()} == {"a": 2, "b": 2}


def test_a_ratio_is_the_median_over_rounds() -> None:
    assert timing.ratio({"a": [1, 4, 9], "b": [1, 2, 3]}, "a", "b") == 2


def test_without_photos_a_benchmark_says_what_to_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(timing.DATA_ROOT, raising=False)
    with pytest.raises(timing.Skipped, match="DATA_ROOT=DIR"):
        timing.photos(1)
    monkeypatch.setenv(timing.DATA_ROOT, str(tmp_path))
    with pytest.raises(timing.Skipped, match="no photos"):
        timing.photos(1)


# The release's way


def test_the_loops_give_what_the_released_code_gave(model: MCAR, golden: Golden) -> None:  # noqa: F811
    with torch.no_grad():
        found = released_way.two_streams(model, golden.images)
    assert torch.equal(found.boxes, golden.boxes)
    assert torch.allclose(found.global_scores, golden.global_scores, atol=1e-5)
    assert torch.allclose(found.local_scores, golden.local_scores, atol=1e-5)


@pytest.mark.parametrize(("num_regions", "threshold"), [(1, 0.5), (4, 0.3), (4, 0.7)])
def test_the_loops_find_the_boxes_of_the_module(num_regions: int, threshold: float) -> None:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(3, 8, 32, stride=32), nn.ReLU())
    mcar = MCAR(features, 8, 6, num_regions=num_regions, threshold=threshold).eval()
    images = 3 * torch.randn(3, 3, 160, 224)
    with torch.no_grad():
        found, ours = released_way.two_streams(mcar, images), mcar(images)
    assert torch.equal(found.boxes, ours.regions.boxes)
    assert torch.allclose(torch.maximum(found.global_scores, found.local_scores), ours.scores, atol=1e-5)
