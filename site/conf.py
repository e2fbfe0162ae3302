"""The site, by Sphinx: pages that stand in the repository already, and three of its own (index, api, tables).

Sphinx with MyST-NB rather than Jupyter Book 2: mystmd fetches its theme from api.mystmd.org at each first build, so it
does not build without a network. Nothing here is executed, and no page asks another host for anything: the search is
Sphinx's own, and formulas become MathML, which browsers set without a script.
"""

import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the library of this checkout, wherever it may be installed

project = "MCAR, replicated"
author = "the contributors"
html_title = project
language = "en"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]

# The sources start at the top of the repository, so that links between its files lead from page to page.
root_doc = "site/index"
include_patterns = [
    "*.md",
    "benchmarks/*.md",
    "models/*.md",
    "notebooks/[0-9]*.ipynb",
    "results/README.md",
    "results/*/README.md",
    "results/benchmarks/*.md",
    "results/*/tables/*.md",
    "site/*.md",
]
exclude_patterns = [".*", "artifacts", "build", "results/local", "site/_build"]
suppress_warnings = ["toc.not_included"]  # the pages of the tables stand in no menu

nb_execution_mode = "off"
nb_render_markdown_format = "myst"  # what a notebook says in Markdown links to pages as its text does
nb_merge_streams = True
nb_ipywidgets_js: dict[str, dict[str, str]] = {}  # they would come from another host
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
myst_update_mathjax = False
highlight_language = "python"

default_role = "code"  # `name` in a docstring, as in Markdown
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!mcar_lib\b).*"),  # types of other libraries: their pages are elsewhere
    ("py:.*", r".*\._\w+|mcar_lib\.weights\..*"),  # what is private, and a file that is no part of the method
]

html_theme = "furo"
html_theme_options = {"navigation_with_keys": True}
html_static_path = ["static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_extra_path = ["extra"]
html_copy_source = False
html_show_search_summary = False  # it would fetch each page found, which a browser refuses from disk
html_show_sphinx = False
html_show_copyright = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"

COMMANDS = {r"\\arg(?![a-z])": r"\\operatorname{arg}"}  # that the converter does not know


def mathml(formula: str, display: str) -> str:
    """The MathML of a LaTeX formula; raises ValueError for a command that the converter does not know."""
    known = formula
    for command, written in COMMANDS.items():
        known = re.sub(command, written, known)
    converted = convert(known, display=display)
    if unknown := re.findall(r"\\\w+", converted):
        raise ValueError(f"no MathML for {unknown[0]} in {formula!r}; write it otherwise, or add it to COMMANDS")
    return converted


def visit_inline_math(writer: Any, node: nodes.math) -> None:
    writer.body.append(mathml(node.astext(), "inline"))
    raise nodes.SkipNode


def visit_block_math(writer: Any, node: nodes.math_block) -> None:
    writer.body.append(f'<div class="formula">{mathml(node.astext(), "block")}</div>')
    raise nodes.SkipNode


def give_title(app: Sphinx, docname: str, source: list[str]) -> None:
    """A table's file is its text alone; as a page it gets its name for a title, and that of its profile. What sections
    it has begin at the third level, for they are titles of tables: here they follow the first."""
    if app.env.doc2path(docname).suffix == ".md" and not source[0].startswith("# "):
        *folders, name = docname.split("/")
        of_profile = f" ({folders[1]})" if folders[0] == "results" else ""
        text = re.sub(r"^### ", "## ", source[0], flags=re.MULTILINE)
        source[0] = f"# {name.replace('_', ' ')}{of_profile}\n\n{text}"


def drop_aliases(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    """Python describes each field of a named tuple by its position, which says nothing."""
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()


def mend_lists(app: Sphinx, page: str, template: str, context: dict[str, Any], tree: object) -> None:
    """What screen readers need and Sphinx leaves out: the level of the headings that it makes of captions, and that a
    list within the list of modules is part of an item."""
    if page == "_modules/index":
        context["body"] = context["body"].replace("</li>\n<ul>", "<ul>").replace("</ul></ul>", "</ul></li></ul>")
    for part in ("furo_navigation_tree", "body"):
        context[part] = context.get(part, "").replace('role="heading"', 'role="heading" aria-level="2"')


class DescribedFigures(SphinxTransform):
    """A picture that a notebook shows is named after the section that it stands in: it has no other description."""

    default_priority = 900

    def apply(self, **kwargs: Any) -> None:
        for image in self.document.findall(nodes.image):
            section = image.parent
            while section is not None and not isinstance(section, nodes.section):
                section = section.parent
            if not image.get("alt") and section is not None:
                image["alt"] = f"Figure in the section: {section[0].astext()}"


class PlainFolders(SphinxPostTransform):
    """A link to a folder of the repository is plain text: a site has no page for it."""

    default_priority = 5

    def run(self, **kwargs: Any) -> None:
        for link in list(self.document.findall(pending_xref)):
            target = Path(self.env.doc2path(self.env.docname)).parent / link.get("reftarget", "")
            if link.get("refdomain") == "doc" or not target.is_dir():
                continue
            link.replace_self(link.children)


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_html_math_renderer("mathml", (visit_inline_math, None), (visit_block_math, None))
    app.config.html_math_renderer = "mathml"
    app.connect("source-read", give_title)
    app.connect("autodoc-process-docstring", drop_aliases)
    app.connect("html-page-context", mend_lists, priority=900)  # after the theme has made its menu
    app.add_transform(DescribedFigures)
    app.add_post_transform(PlainFolders)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
