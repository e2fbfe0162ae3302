"""What is committed follows from the committed records."""

from pathlib import Path

import pytest

from mcar_lib.notebooks.jobs import drifted

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
@pytest.mark.timeout(2400)  # all notebooks, beside as long a test
def test_no_table_figure_or_page_differs_from_what_its_notebook_writes() -> None:
    assert drifted(ROOT) == []
