"""The numbered notebooks run headless, what they computed here beside what is committed, and how that is published.

Notebooks ask for runs, whose records are found again, so each of these jobs may be killed and started again.
"""

import hashlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markdown import Markdown

from mcar_lib.ablations import studies
from mcar_lib.config import Profile, RunConfig, load_profile
from mcar_lib.data.samples import sample_photos
from mcar_lib.errors import ConfigError, MCARError, ResultsError
from mcar_lib.experiment import (
    Workspace,
    arithmetic_fingerprint,
    is_current,
    main_grid,
    project_root,
    read_json,
    read_records,
)
from mcar_lib.grid import run_grid
from mcar_lib.progress import format_seconds, say
from mcar_lib.released import card_text, load_released
from mcar_lib.training import write_atomically

SHOWN_IN_NOTEBOOKS = "mini"  # the profile of the committed notebooks
GREY_LEVELS = 1.0  # mean difference, of 255, that two drawings of one figure may have: fonts differ between machines
INPUTS = "mcar_inputs"  # metadata of an executed notebook
GENERATED = (
    "README.md",
    "results/README.md",
    "results/*/tables/*",
    "results/*/figures/*",
    "models/*.md",
    "models/*.png",
)


def reproduce(
    profile: str, only: Sequence[str], results: Path | None, data_root: Path | None, notebooks: Path | None = None
) -> None:
    """Trains what the notebooks of a profile ask for, runs them in order, writes its tables and compares them.

    only: numbers or names of notebooks, none for all. results: the folder that gets <profile>/, default results/local.
    A notebook that fails does not keep the others from running; it is named in the MCARError that is raised at the end.
    One that ran here before, on the same cells, code and run records, is not run again.
    """
    from mcar_lib.report import write_profile

    root, chosen = project_root(), load_profile(profile)
    results = (results or root / "results" / "local").resolve()
    folder, committed = results / chosen.name, root / "results" / chosen.name
    parameters = {
        "profile": str(Path(profile).resolve()) if profile.endswith(".toml") else profile,
        "results": str(results),
        "data_root": str(data_root.expanduser().resolve()) if data_root else "",
    }
    selected = _with_a_study(select_notebooks(notebooks or root / "notebooks", only), chosen)
    made = _made(folder / "notebooks")
    _train_for(selected, Workspace(chosen, results, data_root))
    failed = [path.stem for path in selected if not _run_once(path, made / path.name, parameters, root, folder)]
    try:
        if not write_profile(folder, chosen):
            say(f"no tables yet: the runs in {folder} are not complete")
        if folder != committed and (committed / "runs").is_dir():
            compare(committed, folder)
    except MCARError as error:
        say(f"tables: {error}")
        failed.append("tables")
    if failed:
        raise MCARError(f"failed: {', '.join(failed)}")


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


def _with_a_study(notebooks: Sequence[Path], profile: Profile) -> list[Path]:
    """Those that are no ablation, or one that the profile has values for; says which are left out."""
    known, found = studies(profile), []
    for path in notebooks:
        _, is_ablation, study = path.stem.partition("_ablation_")
        if is_ablation and study not in known:
            say(f"{path.stem}: left out, profile {profile.name} has no [ablations] for it")
        else:
            found.append(path)
    return found


def compare(committed: Path, folder: Path) -> None:
    """Prints committed results beside those made here and keeps them as comparison.csv and comparison.md."""
    from mcar_lib.report import compare_results, markdown, write_text

    table = compare_results(committed, folder)
    write_text(folder / "comparison.csv", table.to_csv(index=False, float_format="%.4f"))
    write_text(folder / "comparison.md", markdown(table, digits=2))
    Console(width=None if sys.stdout.isatty() else 160).print(Markdown(markdown(table, digits=2)))
    say(", ".join(f"{count} {verdict}" for verdict, count in table["verdict"].value_counts().items()))


def publish(profile: str) -> None:
    """Makes results/local/<profile> the committed results, rebuilds all that follows from them, and runs the notebooks
    in place if they show this profile; those that fail are left as they were, and named in an MCARError at the end.

    Records of other arithmetic than today's stay behind. Raises ResultsError when there is none to publish.
    """
    root, name = project_root(), load_profile(profile).name
    local, target = root / "results" / "local" / name, root / "results" / name
    today = {"arithmetic": arithmetic_fingerprint()}
    records = {record.run_id: record.path for record in read_records(local) if is_current(record, today)}
    if not records:
        raise ResultsError(f"{local} has no current run records; first: mcar reproduce --profile {profile}")
    evaluations = _of_runs(local / "evaluations", records, lambda content: [content["run_id"]])
    regions = _of_runs(local / "regions", records, lambda content: [content["run_id"]])
    comparisons = _of_runs(local / "comparisons", records, lambda content: content["runs"])
    _replace_folder(target / "runs", list(records.values()))
    _replace_folder(target / "evaluations", evaluations)
    _replace_folder(target / "regions", regions)
    _replace_folder(target / "comparisons", comparisons)
    say(f"{target}: {len(records)} runs, {len(evaluations)} evaluations, {len(comparisons)} comparisons")
    rebuild(root)
    shown = select_notebooks(root / "notebooks") if name == SHOWN_IN_NOTEBOOKS else []
    failed = [path.stem for path in shown if not _run_in_place(path, root)]
    if failed:
        raise MCARError(f"failed, and left as they were: {', '.join(failed)}")


def _of_runs(
    folder: Path, records: Mapping[str, Path], runs_of: Callable[[Mapping[str, Any]], Sequence[str]]
) -> list[Path]:
    """The JSON files of a folder that follow from these run records alone."""
    return [path for path in sorted(folder.glob("*.json")) if records.keys() >= {*runs_of(read_json(path))}]


def rebuild(root: Path) -> list[Path]:
    """Writes all committed tables, figures and README blocks from the records, and removes those without any."""
    from mcar_lib import plots
    from mcar_lib.report import photos_figure, write_profile, write_text
    from mcar_lib.summary import write_summary

    if not (root / "README.md").exists():
        raise ResultsError(f"{root / 'README.md'} is missing; its generated blocks cannot be filled")
    written: list[Path] = []
    for runs in sorted((root / "results").glob("*/runs")):  # local/<profile>/runs lies deeper
        written += write_profile(runs.parent, load_profile(runs.parent.name))
    written += write_summary(root / "results", root / "README.md")
    for path in sorted((root / "models").glob("*.safetensors")):
        released = load_released(path)
        written.append(write_text(path.with_suffix(".md"), card_text(path.stem, released.about)))
        written.append(plots.save(photos_figure(released, sample_photos()), path.with_suffix(".png")))
    for path in (*root.glob("results/*/tables/*"), *root.glob("results/*/figures/*")):
        if path not in written:
            path.unlink()
    return written


def drifted(root: Path) -> list[Path]:
    """The generated files, relative to root, that differ from what the committed records give. Changes nothing."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        shutil.copytree(root / "results", fresh / "results", ignore=shutil.ignore_patterns("local"))
        if (root / "models").is_dir():
            shutil.copytree(root / "models", fresh / "models")
        if (root / "README.md").exists():
            shutil.copy(root / "README.md", fresh)
        rebuild(fresh)
        found = {path.relative_to(top) for top in (root, fresh) for name in GENERATED for path in top.glob(name)}
        return [name for name in sorted(found) if not _same_file(root / name, fresh / name)]


def _same_file(a: Path, b: Path) -> bool:
    from PIL import Image, ImageChops, ImageStat

    if not (a.exists() and b.exists() and a.suffix == ".png"):
        return a.exists() and b.exists() and a.read_bytes() == b.read_bytes()
    one, two = (Image.open(path).convert("RGB") for path in (a, b))
    return one.size == two.size and max(ImageStat.Stat(ImageChops.difference(one, two)).mean) <= GREY_LEVELS


def _train_for(notebooks: Sequence[Path], workspace: Workspace) -> None:
    """Trains side by side what the notebooks will ask for. What goes wrong here they will meet, and tell, too."""
    wanted = [config for path in notebooks for config in runs_of(path, workspace.profile)]
    try:
        run_grid(workspace, wanted)
    except MCARError as error:
        say(f"training: {error}")


def runs_of(notebook: Path, profile: Profile) -> list[RunConfig]:
    """The runs that a notebook asks for, by its name: those of a study, of the main comparison, or the run itself."""
    _, _, name = notebook.stem.partition("_")
    if name.startswith("ablation_"):
        found = studies(profile).get(name.removeprefix("ablation_"))
        return found.runs if found else []
    if name == "main_results":
        return [run for group in main_grid(profile).values() for run in group]
    return [profile.run] if name in ("training", "attentional_regions") else []


def _run_once(notebook: Path, output: Path, parameters: Mapping[str, str], root: Path, folder: Path) -> bool:
    """Runs a notebook unless its output is here already and was made from the same inputs."""
    import nbformat

    if output.exists() and nbformat.read(output, as_version=4).metadata.get(INPUTS) == _inputs(notebook, folder):
        say(f"{notebook.stem}: was run before, nothing has changed")
        return True
    if not _run(notebook, output, parameters, root):
        return False
    content = nbformat.read(output, as_version=4)
    content.metadata[INPUTS] = _inputs(notebook, folder)
    write_atomically(output, lambda partial: nbformat.write(content, partial))
    return True


def _inputs(notebook: Path, folder: Path) -> str:
    """A hash of what a notebook's output follows from: its cells, this library, and the profile's run records."""
    library = Path(__file__).parent
    sources = (path for kind in ("*.py", "*.toml") for path in library.rglob(kind))
    digest = hashlib.sha256()
    for path in sorted([notebook, *sources, *folder.glob("runs/*.json")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _run(notebook: Path, output: Path, parameters: Mapping[str, str], root: Path) -> bool:
    """Runs a notebook and prints what it prints. Its output appears when whole; as *.failed.ipynb if it failed."""
    import papermill

    failed, partial = (output.with_name(f"{output.stem}.{state}.ipynb") for state in ("failed", "part"))
    for earlier in (output, failed, partial):
        earlier.unlink(missing_ok=True)
    say(f"{notebook.stem}: running")
    started = time.monotonic()
    kernel = {"kernel_name": "python3", "kernel_manager_class": _kernel_of_this_python(), "cwd": root}
    options = {"progress_bar": False, "stdout_file": sys.stdout, "stderr_file": sys.stderr, "record_timing": False}
    final, outcome = output, "done"
    try:
        papermill.execute_notebook(notebook, partial, dict(parameters), **kernel, **options)
    except papermill.PapermillExecutionError as error:
        final, outcome = failed, f"FAILED in cell [{error.exec_count}]: {error.ename}: {error.evalue}"
    except Exception as error:  # a dead kernel, a broken file: the other notebooks are run all the same
        final, outcome = failed, f"FAILED: {type(error).__name__}: {error}"
    if partial.exists():
        partial.replace(final)
    say(f"{notebook.stem}: {outcome} ({format_seconds(time.monotonic() - started)})")
    return final == output


def _run_in_place(notebook: Path, root: Path) -> bool:
    """Runs a committed notebook with its own parameters; what changes from run to run is left out of the file."""
    import nbformat

    from mcar_lib.report import write_text

    with tempfile.TemporaryDirectory() as scratch:
        executed = Path(scratch) / notebook.name
        if not _run(notebook, executed, {}, root):
            return False
        content = nbformat.read(executed, as_version=4)
    content.metadata["language_info"] = {"name": "python"}
    for part in (content, *content.cells):
        for key in ("papermill", "execution", "widgets", *([] if part.metadata.get("tags") else ["tags"])):
            part.metadata.pop(key, None)
        if "outputs" in part:  # a finished progress line leaves an empty output
            part.outputs = [output for output in part.outputs if output.get("data") != {"text/plain": ""}]
        for output in part.get("outputs", []):
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    write_text(notebook, nbformat.writes(content) + "\n")
    return True


def _kernel_of_this_python() -> type:
    """A kernel manager to which python3 is sys.executable, whatever kernels are installed here, or none."""
    from jupyter_client.kernelspec import KernelSpecManager
    from jupyter_client.manager import AsyncKernelManager
    from traitlets import Instance

    class KernelOfThisPython(AsyncKernelManager):
        kernel_spec_manager = Instance(KernelSpecManager, kw={"kernel_dirs": []})
        transport_encryption = "auto"  # without it each kernel warns of what other users of the machine could read

    return KernelOfThisPython


def _replace_folder(target: Path, files: Sequence[Path]) -> None:
    """Puts copies of files in place of a folder, whole or not at all; no files, no folder."""
    if not files:
        shutil.rmtree(target, ignore_errors=True)
        return
    with tempfile.TemporaryDirectory(dir=_made(target.parent), prefix=".publish-") as scratch:
        for path in files:
            shutil.copy(path, _made(Path(scratch) / "new"))
        if target.exists():
            target.replace(Path(scratch) / "old")
        _made(Path(scratch) / "new").replace(target)


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"{folder} cannot be made ({error.strerror}); choose another --results folder") from error
    return folder
