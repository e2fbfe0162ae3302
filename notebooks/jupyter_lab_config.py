"""JupyterLab as `make notebook` starts it: on the start page, with the whole project in reach of the notebooks' links,
and without a question about news."""

from traitlets.config import get_config

c = get_config()
c.LabApp.default_url = "/lab/tree/notebooks/START.md?factory=Markdown%20Preview"
c.LabApp.news_url = None
c.LabApp.check_for_updates_class = "jupyterlab.NeverCheckForUpdate"
