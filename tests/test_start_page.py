"""What JupyterLab opens on names every notebook, and every file that it names is there."""

import re
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
LINKS = re.findall(r"\]\(([^)]+)\)", (NOTEBOOKS / "START.md").read_text(encoding="utf-8"))


def test_each_numbered_notebook_is_linked_once() -> None:
    numbered = sorted(path.name for path in NOTEBOOKS.glob("[0-9]*.ipynb"))
    assert sorted(link for link in LINKS if link.endswith(".ipynb")) == numbered


def test_every_link_leads_to_a_file() -> None:
    assert [link for link in LINKS if not (NOTEBOOKS / link).is_file()] == []
