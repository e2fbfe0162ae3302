"""The explorer notebook: its slider changes the picture, a photo can be uploaded, what is no photo gets a sentence."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from .test_lab import run_all

NAME = "12_explore.ipynb"
pytestmark = pytest.mark.skipif(
    not (Path(__file__).resolve().parents[2] / "notebooks" / NAME).is_file(), reason=f"there is no {NAME}"
)
FOLLOWS_WITHIN = 20_000  # milliseconds, on a machine that does other things too
PICTURE = ".mcar-explorer .mcar-picture img, .mcar-explorer img.mcar-picture"


@pytest.fixture(scope="module")
def explored(lab: Any, browser: Any) -> Iterator[Any]:
    """A page with the explorer, run to its end."""
    page = browser.new_page(viewport={"width": 1280, "height": 1400})
    run_all(lab, page, NAME)
    page.locator(".mcar-explorer").first.scroll_into_view_if_needed(timeout=FOLLOWS_WITHIN)
    yield page
    page.close()
    lab.end_kernels()


def source_of_picture(page: Any) -> str:
    return page.locator(PICTURE).first.get_attribute("src", timeout=FOLLOWS_WITHIN)


def wait_for_another_picture(page: Any, before: str) -> None:
    page.wait_for_function(
        "([selector, before]) => document.querySelector(selector)?.getAttribute('src') !== before",
        arg=[PICTURE, before],
        timeout=FOLLOWS_WITHIN,
    )


def test_the_slider_of_tau_changes_the_picture(explored: Any, artifacts: Path) -> None:
    before = source_of_picture(explored)
    handle = explored.locator(".mcar-explorer .mcar-tau .noUi-handle, .mcar-explorer .mcar-tau [role=slider]").first
    handle.focus()
    for _ in range(3):
        handle.press("ArrowRight")
    wait_for_another_picture(explored, before)
    explored.screenshot(path=artifacts / "explorer.png")


def test_an_uploaded_photo_is_shown(explored: Any, tmp_path: Path) -> None:
    before = source_of_picture(explored)
    Image.effect_noise((80, 60), 90).convert("RGB").save(tmp_path / "my photo ü.jpg")
    upload(explored, tmp_path / "my photo ü.jpg")
    wait_for_another_picture(explored, before)


def test_a_text_file_named_jpg_gets_a_sentence(explored: Any, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no photo", encoding="utf-8")
    upload(explored, tmp_path / "text.jpg")
    explored.locator(".mcar-explorer", has_text="text.jpg").first.wait_for(timeout=FOLLOWS_WITHIN)
    assert "Traceback" not in explored.locator(".mcar-explorer").first.inner_text()


def upload(page: Any, path: Path) -> None:
    """Chooses a file as a reader does: the button opens the browser's dialog."""
    with page.expect_file_chooser() as chosen:
        page.locator(".mcar-explorer .mcar-upload, .mcar-explorer .mcar-upload button").first.click()
    chosen.value.set_files(path)
