"""A browser, JupyterLab over copies of the notebooks, and the built site; collected where they are asked for.

Without Playwright or chromium the tests are skipped; `make test-browser` (MCAR_BROWSER=1) makes that a failure.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import requests

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page

ROOT = Path(__file__).resolve().parents[2]
IS_NEEDED = os.environ.get("MCAR_BROWSER") == "1"
# Nothing of its own that reaches for the network, so that what is asked for is the page's doing.
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SERVER_STARTS_WITHIN = 60  # seconds
ANSWERS_WITHIN = 90_000  # milliseconds for a click or a page, on a machine that does other things too


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Plain `pytest` leaves this folder out: its minutes and its browser are for those who name it."""
    is_asked = IS_NEEDED or any("browser" in argument for argument in config.invocation_params.args)
    return None if is_asked else True


def pytest_itemcollected(item: pytest.Item) -> None:
    item.add_marker(pytest.mark.browser)


def missing(what: str) -> None:
    """Skips, or fails where the browser tests were asked for by make."""
    (pytest.fail if IS_NEEDED else pytest.skip)(what)


@pytest.fixture(scope="session")
def artifacts() -> Path:
    """Where screenshots are kept."""
    folder = ROOT / "artifacts" / "browser"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator["Browser"]:
    """Debian's chromium, with a profile of its own that is new and empty."""
    chromium = shutil.which("chromium")
    if chromium is None:
        missing("there is no chromium; apt-get install --no-install-recommends chromium fonts-dejavu-core")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        missing("there is no Playwright; pip install -e '.[browser]'")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        yield started
        started.close()


@dataclass
class Watched:
    """A page, with what it complained of and what it asked other hosts for."""

    page: "Page"
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)

    def note_console(self, message: "ConsoleMessage") -> None:
        if message.type == "error":
            self.errors.append(f"{message.text} ({message.location.get('url')})")


@pytest.fixture
def open_page(browser: "Browser") -> Iterator[Callable[..., Watched]]:
    """Opens pages that may ask one host only, or none: what else they ask for is noted and not sent."""
    contexts = []

    def open_new(host: str = "", **options: Any) -> Watched:
        contexts.append(browser.new_context(**options))
        contexts[-1].set_default_timeout(ANSWERS_WITHIN)
        watched = Watched(contexts[-1].new_page())
        watched.page.on("console", watched.note_console)
        watched.page.on("pageerror", lambda error: watched.errors.append(str(error)))

        def pass_on(route: Any) -> None:
            url = route.request.url
            if url.startswith(("file:", "data:", "blob:")) or (host and url.startswith(host)):
                route.continue_()
            else:
                watched.elsewhere.append(url)
                route.abort()

        watched.page.route("**/*", pass_on)
        return watched

    yield open_new
    for context in contexts:
        context.close()


# JupyterLab ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lab:
    """A running JupyterLab: its address, its token and the folder that it shows."""

    url: str
    token: str
    folder: Path

    def page_of(self, path: str, workspace: str) -> str:
        """The address of a file in a workspace of its own, so that nothing opened earlier comes back."""
        return f"{self.url}lab/workspaces/{workspace}/tree/{path}?token={self.token}"

    def ask(self, method: str, path: str) -> Any:
        answer = requests.request(method, f"{self.url}api/{path}", params={"token": self.token}, timeout=120)
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def end_kernels(self) -> None:
        for session in self.ask("GET", "sessions"):
            self.ask("DELETE", f"sessions/{session['id']}")


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab as `make notebook` starts it, over copies of the notebooks that say the profile smoke."""
    top = tmp_path_factory.mktemp("lab")
    folder, home = top / "project", top / "home"
    write_copies(folder, top / "results")
    environment = {
        **os.environ,
        "HOME": str(home),  # no settings of whoever runs this
        "JUPYTER_CONFIG_DIR": str(home / "config"),
        "JUPYTER_DATA_DIR": str(home / "data"),
        "JUPYTER_RUNTIME_DIR": str(home / "runtime"),
        "IPYTHONDIR": str(home / "ipython"),
        "MCAR_ARTIFACTS": str(top / "artifacts"),
        "MPLCONFIGDIR": str(home / "matplotlib"),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),  # this checkout's library, from the folder of the copies
    }
    home.mkdir()
    command = [sys.executable, "-m", "jupyterlab", "--config", str(ROOT / "notebooks/.lab/jupyter_lab_config.py")]
    options = ["--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port=0"]
    with (top / "server.log").open("w") as log:
        server = subprocess.Popen([*command, *options], cwd=folder, env=environment, stdout=log, stderr=log)
    try:
        about = described_server(server, home / "runtime", top / "server.log")
        yield Lab(about["url"], about["token"], folder)
    finally:
        server.terminate()
        server.wait(timeout=30)


def described_server(server: "subprocess.Popen[bytes]", runtime: Path, log: Path) -> dict[str, Any]:
    """What a server says of itself once it listens: url, token, port."""
    deadline = time.monotonic() + SERVER_STARTS_WITHIN
    while server.poll() is None and time.monotonic() < deadline:
        for path in runtime.glob("jpserver-*.json"):
            about = json.loads(path.read_text(encoding="utf-8") or "{}")
            if about.get("port"):
                return about
        time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start: {log.read_text(encoding='utf-8')[-2000:]}")


def write_copies(folder: Path, results: Path) -> None:
    """The start page and the notebooks without outputs, with the parameters of smoke, as papermill sets them."""
    import nbformat
    import papermill
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    copies = folder / "notebooks"
    copies.mkdir(parents=True)
    shutil.copy(ROOT / "notebooks/START.md", copies)
    values = {"profile": "smoke", "profiles": ["smoke"], "results": str(results), "data_root": "", "readme": ""}
    for path in sorted((ROOT / "notebooks").glob("[0-9]*.ipynb")):
        declared = papermill.inspect_notebook(path)
        notebook = parameterize_notebook(
            load_notebook_node(str(path)), {name: value for name, value in values.items() if name in declared}
        )
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, copies / path.name)


# The site ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the site, built anew; a warning of Sphinx is a failure."""
    try:
        import furo  # noqa: F401
        import latex2mathml  # noqa: F401
        import myst_nb  # noqa: F401
    except ImportError:
        missing("there is no Sphinx with MyST-NB; pip install -e '.[site]'")
    top = tmp_path_factory.mktemp("site")
    options = ["-q", "-n", "-W", "--keep-going", "-b", "html", "-c", "site", "-d", str(top / "doctrees")]
    command = [sys.executable, "-m", "sphinx", *options, ".", str(top / "html")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-3000:]
    return top / "html"
