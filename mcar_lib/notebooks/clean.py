"""A notebook without what changes by itself: the form in which it is committed.

Also the git filter of notebooks/*.ipynb (python -m mcar_lib.notebooks.clean < file): opening and closing a notebook, or
running it again, then leaves git clean unless a cell or an output has changed. Needs the standard library only.
"""

import json
import sys
from typing import Any

METADATA = {
    "kernelspec": {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WIDGET = "application/vnd.jupyter.widget-view+json"  # what a progress bar leaves


def cleaned(text: str) -> str:
    """The JSON text of a notebook, cleaned; text that is no notebook comes back as it is."""
    try:
        notebook: dict[str, Any] = json.loads(text)
        cells = notebook["cells"]
    except (ValueError, KeyError, TypeError):
        return text
    notebook["metadata"] = METADATA
    for cell in cells:
        tags = cell["metadata"].get("tags")
        cell["metadata"] = {"tags": tags} if tags else {}
        if "outputs" in cell:
            cell["outputs"] = [each for each in cell["outputs"] if WIDGET not in each.get("data", {})]
    return json.dumps(notebook, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
    sys.stdin.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.stdout.write(cleaned(sys.stdin.read()))
