"""The site opens from disk, on a phone, for everybody, and asks no other host for anything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .site_links import dead_links

PHONE = {"viewport": {"width": 390, "height": 844}}
RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]
STARTS = ("site/index", "site/api", "notebooks/02_training")


def pages_of(site: Path) -> list[Path]:
    """All pages but the one at the top, which leads on at once."""
    pages = sorted(set(site.rglob("*.html")) - {site / "index.html"})
    assert len(pages) > 10
    return pages


def test_every_link_leads_to_a_file_of_the_site(site: Path) -> None:
    assert dead_links(site) == []


def test_every_notebook_and_every_table_has_a_page(site: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    sources = [*root.glob("notebooks/[0-9]*.ipynb"), *root.glob("results/[a-km-z]*/tables/*.md")]
    assert [path for path in sources if not (site / path.relative_to(root).with_suffix(".html")).is_file()] == []


def test_the_page_at_the_top_leads_to_the_start_page(site: Path, open_page: Callable[..., Any]) -> None:
    watched = open_page()
    watched.page.goto((site / "index.html").as_uri())
    watched.page.wait_for_url("**/site/index.html")


def test_pages_load_without_an_error_or_a_request_elsewhere_and_fit_a_phone(
    site: Path, open_page: Callable[..., Any]
) -> None:
    watched, too_wide = open_page(**PHONE), []
    for path in pages_of(site):
        watched.page.goto(path.as_uri(), wait_until="load")
        width = watched.page.evaluate("document.documentElement.scrollWidth")
        if width > PHONE["viewport"]["width"]:
            too_wide.append((str(path.relative_to(site)), width))
    assert watched.errors == []
    assert watched.elsewhere == []
    assert too_wide == []


def violations(watched: Any, path: Path, without: list[str]) -> list[str]:
    """What axe finds against WCAG 2.1, A and AA, in a page, but in the parts that are left out; no rule is off."""
    from axe_playwright_python.sync_playwright import Axe

    watched.page.goto(path.as_uri(), wait_until="load")
    # preload: axe would fetch the style sheets again, which a browser refuses from disk.
    options = {"runOnly": RULES, "resultTypes": ["violations"], "preload": False}
    found = Axe().run(watched.page, context={"exclude": without}, options=options).response["violations"]
    return [f"{path.name}: {each['id']}: {node['html'][:160]}" for each in found for node in each["nodes"]]


def test_pages_pass_axe(site: Path, open_page: Callable[..., Any]) -> None:
    """Code is left out: its thousands of coloured words take axe minutes, and are the same on all pages (below)."""
    watched = open_page(**PHONE)
    found = [each for path in pages_of(site) for each in violations(watched, path, [".highlight"])]
    assert found == [], "\n".join(found[:20])


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("name", ["site/index", "results/README", "notebooks/04_ablation_pooling"])
def test_pages_with_their_code_pass_axe_in_both_colour_schemes(
    site: Path, open_page: Callable[..., Any], name: str, colours: str
) -> None:
    found = violations(open_page(**PHONE, color_scheme=colours), site / f"{name}.html", [])
    assert found == [], "\n".join(found[:20])


def test_the_search_finds_from_disk(site: Path, open_page: Callable[..., Any]) -> None:
    watched = open_page()
    watched.page.goto(f"{(site / 'search.html').as_uri()}?q=pooling")
    watched.page.wait_for_selector("#search-results li a", timeout=20_000)
    assert watched.errors == []


def test_pictures_of_the_site_are_kept(site: Path, open_page: Callable[..., Any], artifacts: Path) -> None:
    """To be looked at: the start page, the API and a notebook, wide and on a phone."""
    for width in (1280, 390):
        watched = open_page(viewport={"width": width, "height": 900})
        for name in STARTS:
            watched.page.goto((site / f"{name}.html").as_uri(), wait_until="load")
            picture = artifacts / f"site-{Path(name).name}-{width}.png"
            watched.page.screenshot(path=picture)
            assert picture.stat().st_size > 10_000
