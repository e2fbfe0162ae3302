"""The workflow for GitHub Actions does what a checkout does, and may do no more. zizmor and its schema: make lint."""

import re
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
WORKFLOW = yaml.safe_load(TEXT)
STEPS = [step for job in WORKFLOW["jobs"].values() for step in job["steps"]]


def test_every_check_is_run_and_the_tables_are_made_anew() -> None:
    targets = {word for step in STEPS for word in re.findall(r"^make ([\w-]+)", step.get("run", ""))}
    assert targets == {"test", "test-browser", "report"}
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert [target for target in targets if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []


def test_executed_notebooks_are_uploaded() -> None:
    (upload,) = (step["with"]["path"].split() for step in STEPS if "upload-artifact" in step.get("uses", ""))
    assert [pattern for pattern in upload if not list(ROOT.glob(pattern))] == []
    assert "notebooks/*.ipynb" in upload


def test_the_workflow_may_read_and_nothing_else() -> None:
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert [job for job in WORKFLOW["jobs"].values() if "permissions" in job] == []
    checkouts = [step for step in STEPS if "checkout@" in step.get("uses", "")]
    assert checkouts
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_actions_are_pinned_to_commits() -> None:
    used = re.findall(r"uses: (.*)", TEXT)
    assert [each for each in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v[0-9.]+", each)] == []
