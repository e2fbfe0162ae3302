"""One notebook, run by papermill with the Python that runs this, from the top of the project."""

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from mcar_lib.errors import ConfigError, NotInProfileError
from mcar_lib.files import project_root, write_text
from mcar_lib.notebooks.clean import cleaned
from mcar_lib.progress import format_seconds, say

DONE, LEFT_OUT, FAILED = "done", "left out", "failed"


def select_notebooks(folder: Path, only: Sequence[str] = ()) -> list[Path]:
    """The numbered notebooks of a folder in order, or those that `only` names ("02", "2" or "02_training")."""
    found = sorted(folder.glob("[0-9]*_*.ipynb"))
    names = {name: path for path in found for name in (path.stem, path.stem.split("_")[0])}
    wanted = [name.strip().rjust(2, "0") for part in only or names for name in part.split(",")]
    unknown = ", ".join(name for name in wanted if name not in names)
    if unknown or not found:
        there = ", ".join(path.stem for path in found) or "none"
        raise ConfigError(f"no notebook {unknown or 'with a number'} in {folder}; there are: {there}")
    return sorted({names[name] for name in wanted})


def failed_output(output: Path) -> Path:
    """Where a notebook that failed is kept, up to the cell that failed."""
    return output.with_name(f"{output.stem}.failed.ipynb")


def run_notebook(
    notebook: Path, output: Path, values: Mapping[str, Any], named: Mapping[str, str] | None = None
) -> str:
    """Runs a notebook and prints what it prints; returns DONE, LEFT_OUT or FAILED.

    values: for those of its parameters that have these names. named: folder -> folder that is named in its place in
    what is printed. Its output appears when whole; as *.failed.ipynb if it failed. It is left out where the profile has
    no values for what it shows (NotInProfileError).
    """
    import papermill

    failed, partial = failed_output(output), output.with_name(f"{output.stem}.part.ipynb")
    for earlier in (output, failed, partial):
        earlier.unlink(missing_ok=True)
    say(f"{notebook.stem}: running")
    started, outcome, told = time.monotonic(), DONE, DONE
    try:
        declared = papermill.inspect_notebook(notebook)
        parameters = {name: value for name, value in values.items() if name in declared}
        kernel = {"kernel_name": "python3", "kernel_manager_class": _kernel_of_this_python(), "cwd": project_root()}
        out, err = (_Renaming(stream, named or {}) for stream in (sys.stdout, sys.stderr))
        streams = {"progress_bar": False, "stdout_file": out, "stderr_file": err}
        papermill.execute_notebook(notebook, partial, parameters, record_timing=False, **kernel, **streams)
    except papermill.PapermillExecutionError as error:
        outcome, told = FAILED, f"FAILED in cell [{error.exec_count}]: {error.ename}: {error.evalue}"
        if error.ename == NotInProfileError.__name__:
            outcome, told = LEFT_OUT, f"left out: {error.evalue}"
    except Exception as error:  # a dead kernel, a broken file: the other notebooks are run all the same
        outcome, told = FAILED, f"FAILED: {type(error).__name__}: {error}"
    if partial.exists() and outcome is LEFT_OUT:
        partial.unlink()
    elif partial.exists():
        partial.replace(output if outcome is DONE else failed)
    for folder, name in (named or {}).items():
        told = told.replace(folder, name)
    say(f"{notebook.stem}: {told} ({format_seconds(time.monotonic() - started)})")
    return outcome


class _Renaming:
    """A stream that names one folder for another."""

    def __init__(self, stream: TextIO, named: Mapping[str, str]) -> None:
        self.stream, self.named = stream, named

    def write(self, text: str) -> int:
        for folder, name in self.named.items():
            text = text.replace(folder, name)
        return self.stream.write(text)

    def flush(self) -> None:
        self.stream.flush()


def run_in_place(notebook: Path, scratch: Path) -> str:
    """Runs a committed notebook with its own parameters; what changes from run to run is left out of the file. One
    that fails is left as it was."""
    executed = scratch / notebook.name
    outcome = run_notebook(notebook, executed, {})
    if outcome is DONE:
        write_text(notebook, cleaned(executed.read_text(encoding="utf-8")))
    return outcome


def _kernel_of_this_python() -> type:
    """A kernel manager to which python3 is sys.executable, whatever kernels are installed here, or none."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import Instance

    class KernelOfThisPython(AsyncKernelManager):
        kernel_spec_manager = Instance(KernelSpecManager, kw={"kernel_dirs": []})
        transport_encryption = "auto"  # without it each kernel warns of what other users of the machine could read

    return KernelOfThisPython
