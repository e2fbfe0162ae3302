"""What the README tells a newcomer to type exists, and what it shows as code runs."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from test_data import write_photo

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [line.partition("#")[0].strip() for line in TEXT.splitlines() if re.match(r"(\.venv/bin/)?mcar ", line)]
TARGETS = re.findall(r"^make (\w+)", TEXT, re.MULTILINE)


def test_readme_has_commands() -> None:
    assert COMMANDS
    assert TARGETS


@pytest.mark.parametrize("target", sorted(set(TARGETS)))
def test_make_target_exists(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_knows_its_options(command: str) -> None:
    words = command.split()[1:]
    done = subprocess.run(
        [sys.executable, "-m", "mcar_lib", words[0], "--help"], capture_output=True, text=True, check=True, cwd=ROOT
    )
    for option in re.findall(r"--[a-z-]+", command):
        assert option in done.stdout


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL))
def test_python_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_photo(tmp_path / "photo.jpg", side=80)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"images": torch.zeros(2, 3, 64, 64)}
    exec(block, names)
    assert names["output"].scores.shape[1] == 20  # type: ignore[attr-defined]
    models = [each for each in names.values() if isinstance(each, torch.nn.Module)]
    assert not any(model.training for model in models)  # or scores would follow from what else is in the batch


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://)([^)#]+)\)", TEXT)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_diagram_shows_the_layers_that_imports_are_held_to() -> None:
    """The rooms in the README, line by line, are the layers of the contract in pyproject.toml."""
    diagram = re.search(r"```\nnotebooks/.*?\nmcar_lib\n(.*?)```", TEXT, re.DOTALL)
    assert diagram
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ][0]
    layers = [{name.removeprefix("mcar_lib.") for name in re.split(r" [|:] ", layer)} for layer in contract["layers"]]
    names = {path.stem for path in (ROOT / "mcar_lib").iterdir() if path.suffix == ".py" or path.is_dir()}
    shown = [
        {word for word in re.split(r" {2,}", line.strip())[0].split() if word in names}
        for line in diagram[1].splitlines()
    ]
    assert shown == [layer for layer in layers if layer != {"__main__"}]
