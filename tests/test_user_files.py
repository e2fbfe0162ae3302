"""What belongs to the reader: where the project is, which paths are meant, and files that stay as they are."""

import json
from pathlib import Path

import pytest
from test_cli import PROFILE, mcar

import mcar_lib
from mcar_lib.errors import ConfigError, ResultsError, as_markdown, printable
from mcar_lib.files import checkout, made_folder, project_root, user_path
from mcar_lib.notebooks.jobs import _replace_records
from mcar_lib.runs import Runs, load_profile
from mcar_lib.tables import Generated, own_files, write_page

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder that looks like a project and is none of ours."""
    for name in ("notebooks", "results"):
        (tmp_path / name).mkdir()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "thesis"\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def installed(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a package that was installed without a checkout."""
    monkeypatch.setattr("mcar_lib.files.PACKAGE", elsewhere / "site-packages" / "mcar_lib")
    return elsewhere


# ---- the project and the working folder


def test_the_project_is_the_checkout_that_the_package_lies_in(elsewhere: Path) -> None:
    assert checkout() == project_root() == ROOT
    assert mcar_lib.load("voc-photos").classes


def test_without_a_checkout_own_files_go_below_the_working_folder(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MCAR_ARTIFACTS", raising=False)
    runs = Runs("smoke")
    assert (runs.local, runs.artifacts) == (installed / "results" / "local", installed / "artifacts")


@pytest.mark.parametrize("command", ["reproduce", "publish", "report"])
def test_what_needs_a_checkout_says_so(command: str, installed: Path) -> None:
    done = mcar(command)
    assert (done.exit_code, "a checkout of the project" in done.stderr) == (2, True)


def test_results_of_ones_own_are_taken_from_the_working_folder(elsewhere: Path) -> None:
    assert Runs("smoke", "out").results == elsewhere / "out"
    assert Runs("smoke", "results").results == ROOT / "results"


def test_a_home_folder_is_understood(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(elsewhere))
    monkeypatch.setenv("MCAR_ARTIFACTS", "~/a")
    runs = Runs("smoke", "~/r", "~/d")
    assert (runs.artifacts, runs.results) == (elsewhere / "a", elsewhere / "r")
    assert runs.splits.data_root == elsewhere / "d"


@pytest.mark.parametrize("path", ["", 5, "~no-such-user/x"])
def test_what_is_no_path_is_a_sentence(path: object) -> None:
    with pytest.raises(ConfigError, match=r"path|user"):
        user_path(path)


@pytest.mark.parametrize(("profile", "results"), [(3, None), ("mini", 5), ("no.toml", None)])
def test_parameters_of_a_wrong_type_are_a_sentence(profile: object, results: object) -> None:
    with pytest.raises(ConfigError, match=r"named by a text|is not a path|no such file"):
        Runs(profile, results)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["../x", "a/b", "", "local", "Published", "a\\u001bb", "a b"])
def test_a_profile_is_named_as_a_folder_may_be(name: str, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.write_text(PROFILE.replace('"tiny"', f'"{name}"', 1))
    with pytest.raises(ConfigError, match="letters, digits"):
        load_profile(str(path))


@pytest.mark.parametrize("content", [b"\xff\xfe", b"name = ", None], ids=["no text", "broken", "folder"])
def test_a_profile_that_cannot_be_read_is_named(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "own.toml"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"own\.toml"):
        load_profile(str(path))


def test_a_folder_that_cannot_be_made_names_the_option_that_helps(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResultsError, match="--artifacts"):
        made_folder(tmp_path / "file" / "runs", "choose another --artifacts folder")


def test_names_reach_a_terminal_and_a_page_as_text() -> None:
    assert printable("a\x1b[31m\udcff\u202eé\n") == "a\\x1b[31m\\udcff\\u202eé\n"
    assert as_markdown("a|b\n[c](d)`") == "a\\|b \\[c\\](d)\\`"


# ---- files of somebody else


def test_a_file_that_was_changed_is_moved_aside_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = Generated(tmp_path)
    written.put_text("tables/a.csv", "1\n")
    (tmp_path / "tables/a.csv").write_text("mine\n")
    written.put_text("tables/a.csv", "2\n")
    assert (tmp_path / "tables/a.csv").read_text() == "2\n"
    assert (tmp_path / "tables/a.yours.csv").read_text() == "mine\n"
    assert "kept as a.yours.csv" in capsys.readouterr().out


def test_only_unchanged_files_that_nobody_writes_any_more_are_removed(tmp_path: Path) -> None:
    written = Generated(tmp_path)
    for name in ("stale", "changed", "again"):
        written.put_text(f"tables/{name}.csv", "1\n")
    (tmp_path / "tables/changed.csv").write_text("mine\n")
    before = written.state()
    written.put_text("tables/again.csv", "1\n")
    written.remove_stale(before)
    assert sorted(path.stem for path in (tmp_path / "tables").iterdir()) == ["again", "changed"]
    assert list(written.hashes()) == ["tables/again.csv"]


def test_files_beside_the_generated_ones_are_named(tmp_path: Path) -> None:
    Generated(tmp_path / "results" / "mini").put_text("tables/a.csv", "1\n")
    (tmp_path / "results/mini/tables/b.csv").touch()
    assert own_files(tmp_path / "results") == ["results/mini/tables/b.csv"]


def test_a_page_of_somebody_else_stays(tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("# my thesis\n")
    with pytest.raises(ResultsError, match="it stays"):
        write_page(page, "new\n")
    assert page.read_text() == "# my thesis\n"


def test_publishing_removes_records_and_nothing_else(tmp_path: Path) -> None:
    runs, fresh = tmp_path / "runs", tmp_path / "new.json"
    runs.mkdir()
    record = {"format": 1, "run_id": "x", "profile": "mini"}
    fresh.write_text(json.dumps(record))
    (runs / "earlier.json").write_text(json.dumps(record))
    (runs / "other.json").write_text(json.dumps({**record, "profile": "other"}))
    (runs / "notes.txt").write_text("mine")
    (runs / "cut.json").write_text("{")
    others = _replace_records(runs, [fresh], "mini")
    assert sorted(path.name for path in runs.iterdir()) == ["cut.json", "new.json", "notes.txt", "other.json"]
    assert [path.name for path in others] == ["cut.json", "notes.txt", "other.json"]
