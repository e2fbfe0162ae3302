"""Notebooks that open on Colab, for whoever has put this project on GitHub, under whatever name: make colab.

A badge needs the repository's address, and a notebook that was opened on Colab does not know where it is from. So both
are written once the address is known (python -m mcar_lib.notebooks.colab ADDRESS NUMBER...), and again for a fork.
"""

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mcar_lib.errors import ConfigError
from mcar_lib.files import needed_checkout, write_text
from mcar_lib.notebooks.clean import cleaned
from mcar_lib.notebooks.runner import select_notebooks
from mcar_lib.progress import say

BADGE = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"
START, END = "<!-- colab -->", "<!-- end of colab -->"
CELL_ID = "colab"
CELL = """\
import sys

if "google.colab" in sys.modules:  # elsewhere nothing needs to be done
    !git clone -q --depth 1 {address} project
    %cd -q project
    %pip install -q -e ".[bundled,notebooks]\""""


def open_on_colab(root: Path, address: str, numbers: Sequence[str]) -> None:
    """Names a GitHub repository in pyproject.toml, puts a badge for each of these notebooks into the README, and into
    the notebooks a cell that installs the project where they are run on Colab. What was written before is replaced.

    Raises ConfigError for what is no address of a repository on GitHub.
    """
    found = re.fullmatch(r"https://github\.com/([\w-]+/[\w.-]+?)(\.git)?/?", address)
    if not found:
        raise ConfigError(f"{address!r}: give the address of a repository, https://github.com/OWNER/NAME")
    address = f"https://github.com/{found[1]}"
    notebooks = select_notebooks(root / "notebooks", numbers)
    _name_repository(root / "pyproject.toml", address)
    colab = f"https://colab.research.google.com/github/{found[1]}/blob/main/notebooks"
    badges = [f"{path.stem}: {BADGE.format(link=f'{colab}/{path.name}')}" for path in notebooks]
    _put_badges(root / "README.md", badges)
    for path in notebooks:
        write_text(path, _with_cell(path.read_text(encoding="utf-8"), address))
    say(f"{', '.join(path.stem for path in notebooks)}: open on Colab from {address}; next: make report, then commit")


def _name_repository(path: Path, address: str) -> None:
    text = re.sub(r"^Repository = .*\n", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    write_text(path, text.replace("[project.urls]\n", f'[project.urls]\nRepository = "{address}"\n', 1))


def _put_badges(path: Path, badges: Sequence[str]) -> None:
    """Below the title, or in place of those that stand there."""
    text = path.read_text(encoding="utf-8")
    title, _, rest = re.sub(f"{START}.*?{END}\n\n", "", text, flags=re.DOTALL).partition("\n\n")
    write_text(path, "\n".join([f"{title}\n", START, "<br>\n".join(badges), f"{END}\n", rest]))


def _with_cell(text: str, address: str) -> str:
    """The notebook with the cell before its parameters: what stands above these needs nothing to be installed."""
    notebook: dict[str, Any] = json.loads(text)
    cells = [cell for cell in notebook["cells"] if cell.get("id") != CELL_ID]
    at = next(n for n, cell in enumerate(cells) if "parameters" in cell["metadata"].get("tags", []))
    source = CELL.format(address=address).splitlines(keepends=True)
    code: dict[str, Any] = {"cell_type": "code", "id": CELL_ID, "metadata": {}, "execution_count": None, "outputs": []}
    code["source"] = source
    return cleaned(json.dumps({**notebook, "cells": [*cells[:at], code, *cells[at:]]}))


if __name__ == "__main__":
    try:
        open_on_colab(needed_checkout("make colab"), sys.argv[1] if sys.argv[1:] else "", sys.argv[2:])
    except ConfigError as error:
        sys.exit(f"error: {error}")
