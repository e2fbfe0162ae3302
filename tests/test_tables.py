"""How notebooks show and keep what they found: frames of runs, files beside the records, blocks of a page."""

import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from mcar_lib.errors import ResultsError
from mcar_lib.runs import Failure, Record, RunConfig, Runs
from mcar_lib.tables import Generated, differing, fill_blocks, markdown, save, title_of, write_index

ROOT = Path(__file__).resolve().parent.parent
TABLE = pd.DataFrame({"value": ["a", "b"], "mAP": [12.3456, None]})
SMALL = "# Page\n<!-- generated: numbers -->\nold\n<!-- end -->\nrest\n"


@pytest.fixture
def record(runs: Runs, tiny_config: RunConfig) -> Record:
    return runs.run(tiny_config)


def written(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.parent.name in ("tables", "figures")
    )


def test_a_frame_of_runs_has_what_differs_with_model_and_seed(tiny_config: RunConfig) -> None:
    table = differing(
        [tiny_config.vary(pooling=pooling, local_stream=local) for local in (False, True) for pooling in ("avg", "max")]
    )
    assert list(table) == ["pooling", "model", "seed"]
    assert table["model"].tolist() == ["global baseline", "global baseline", "MCAR", "MCAR"]


def test_tables_and_figures_lie_beside_the_records(runs: Runs, record: Record) -> None:
    save(runs, [record], {"one": TABLE}, {"one": Figure()})
    assert written(runs.folder) == ["figures/one.png", "tables/one.csv", "tables/one.md"]
    assert (runs.folder / "tables/one.csv").read_text() == "value,mAP\na,12.3456\nb,\n"
    assert (
        (runs.folder / "tables/one.md").read_text().startswith("profile tiny, 2 epochs; scenes test\n\n| value | mAP |")
    )


def test_saving_again_changes_no_byte(runs: Runs, record: Record) -> None:
    contents = []
    for _ in range(2):
        save(runs, [record], {"one": TABLE}, {"one": Figure()})
        contents.append([(runs.folder / name).read_bytes() for name in written(runs.folder)])
    assert contents[0] == contents[1]


@pytest.mark.parametrize(("height", "kept"), [(0.5, True), (0.9, False), (0.505, False)])
def test_a_picture_that_looks_the_same_stays_as_it_is(height: float, kept: bool, tmp_path: Path) -> None:
    def draw(at: float) -> Figure:
        made = Figure()
        made.add_subplot(ylim=(0, 1)).axhspan(0, at)
        return made

    path, written = tmp_path / "figures" / "one.png", Generated(tmp_path)
    written.put_figure("figures/one.png", draw(0.5))
    Image.open(path).save(path, compress_level=1)  # other bytes, the same picture
    written.note("figures/one.png")
    before = path.read_bytes()
    written.put_figure("figures/one.png", draw(height))
    assert (path.read_bytes() == before) is kept
    assert [each.name for each in path.parent.iterdir()] == ["one.png"]


@pytest.mark.parametrize("also", ["a run of one's own", "a run that could not be had"])
def test_committed_tables_hold_committed_records_alone(
    also: str, open_runs: Callable[..., Runs], tiny_config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = open_runs().run(tiny_config)
    path = tmp_path / "checkout" / "results" / "tiny" / "runs" / made.path.name
    path.parent.mkdir(parents=True)
    made.path.rename(path)
    monkeypatch.setattr("mcar_lib.runs.runs.project_root", lambda: tmp_path / "checkout")
    runs = open_runs("results")
    committed = runs.run(tiny_config)
    other = tiny_config.vary(seed=1)
    second = runs.run(other) if also.endswith("own") else Failure(other, "no data")
    save(runs, [committed], {"committed": TABLE})
    save(runs, [committed, second], {"mixed": TABLE})
    assert written(runs.folder) == ["tables/committed.csv", "tables/committed.md"]
    assert written(runs.local_folder) == ["tables/mixed.csv", "tables/mixed.md"]


def test_runs_of_which_none_could_be_had_are_an_error_that_says_why(runs: Runs, tiny_config: RunConfig) -> None:
    with pytest.raises(ResultsError, match="tiny: none of these runs could be had: no photos"):
        title_of(runs, [Failure(tiny_config, "no photos"), Failure(tiny_config.vary(seed=1), "no photos")])


def test_markdown_has_one_digit_three_for_p_and_a_dash_for_nothing() -> None:
    table = pd.DataFrame({"name": ["x"], "mAP": [56.08], "tiny": [0.0123], "p": [0.0004], "n": [12345], "none": [None]})
    assert markdown(table).splitlines()[2] == "| x | 56.1 | 0.012 | 0.000 | 12,345 | - |"


def test_the_index_of_a_folder_names_what_notebooks_wrote_there_in_its_order(runs: Runs, record: Record) -> None:
    save(runs, [record], {"a": TABLE, "b": TABLE}, {"b": Figure(), "c": Figure()})
    (runs.folder / "tables/own.md").write_text("somebody's own")
    (runs.folder / "figures/c.png").unlink()
    write_index(runs.folder, "Title", {"b": ("what b is", "notebook 7"), "gone": ("not here", "notebook 8")})
    lines = (runs.folder / "README.md").read_text().splitlines()
    assert lines[0] == "# Title"
    assert lines[6:] == [
        "| b | what b is | [figure](figures/b.png), [CSV](tables/b.csv), [table](tables/b.md) | notebook 7 |",
        "| a | - | [CSV](tables/a.csv), [table](tables/a.md) | - |",
    ]


def test_an_index_keeps_the_lines_that_others_told(runs: Runs, record: Record) -> None:
    save(runs, [record], {"a": TABLE, "b": TABLE})
    write_index(runs.folder, "Title", {"a": ("what a is", "notebook 7")})
    folder = save(runs, [record], {"c": TABLE})
    write_index(folder, "Title", {"c": ("what c is", "notebook 8")})
    write_index(folder, "Title", {"a": ("what a is now", "notebook 7")})
    lines = (runs.folder / "README.md").read_text().splitlines()[6:]
    assert [[line.split(" | ")[at].strip(" |") for at in (0, 1, 3)] for line in lines] == [
        ["a", "what a is now", "notebook 7"],
        ["c", "what c is", "notebook 8"],
        ["b", "-", "-"],
    ]


def test_an_index_that_somebody_wrote_is_moved_aside(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    write_index(tmp_path, "Title", {})
    assert (tmp_path / "README.yours.md").read_text() == "mine"


def test_every_committed_table_and_figure_is_linked_with_a_line_on_what_it_is() -> None:
    folders = [path.parent for path in ROOT.glob("results/*/generated.json")]
    committed = {folder / name for folder in folders for name in Generated(folder).hashes() if name != "README.md"}
    linked, told = set[Path](), list[str]()
    for page in [folder / "README.md" for folder in folders if (folder / "README.md").exists()]:
        told += page.read_text(encoding="utf-8").splitlines()[5:]
        linked |= {page.parent / link for link in re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))}
    assert committed
    assert sorted(committed - linked) == []
    assert [line for line in told if "| - |" in line] == []


def test_a_block_is_replaced_and_the_rest_stays(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(SMALL)
    fill_blocks(page, {"numbers": "new\n"})
    assert page.read_text() == SMALL.replace("old", "new")


def test_blocks_of_others_stay_as_they_are(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    others = SMALL.replace("numbers", "others")
    page.write_text(SMALL + others)
    fill_blocks(page, {"numbers": "new\n"})
    assert page.read_text() == SMALL.replace("old", "new") + others


@pytest.mark.parametrize("blocks", [{"other": "x\n"}, {"numbers": "x\n", "other": "y\n"}])
def test_blocks_that_the_page_does_not_have_are_an_error(blocks: dict[str, str], tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(SMALL)
    with pytest.raises(ResultsError, match="mend the markers"):
        fill_blocks(page, blocks)
    assert page.read_text() == SMALL


def test_a_block_that_a_page_has_twice_is_an_error(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text(SMALL + SMALL)
    with pytest.raises(ResultsError, match="mend the markers"):
        fill_blocks(page, {"numbers": "new\n"})
