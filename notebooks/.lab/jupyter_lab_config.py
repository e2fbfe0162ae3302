"""JupyterLab as `make notebook` starts it: on the start page, as a page rather than as Markdown and without a question
about news (overrides.json beside this), with the whole project in reach of the notebooks' links."""

from pathlib import Path

from traitlets.config import get_config

c = get_config()
c.LabApp.default_url = "/lab/tree/notebooks/START.md"
c.ServerApp.tornado_settings = {"websocket_max_message_size": 200 * 2**20}  # a photo to upload, which 10 MB are not
c.LabApp.app_settings_dir = str(Path(__file__).resolve().parent)
