"""The jobs of the notebooks: reproduce them here, publish what they computed, hold what is committed to the records.

A notebook finds or trains its runs and writes its own tables and figures, so each job may be killed and started again.
"""

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markdown import Markdown

from mcar_lib.errors import MCARError, ResultsError
from mcar_lib.files import made_folder, project_root, read_json, write_json, write_text
from mcar_lib.notebooks.runner import DONE, FAILED, run_in_place, run_notebook, select_notebooks
from mcar_lib.progress import say
from mcar_lib.runs import Record, Runs, load_profile, read_records
from mcar_lib.runs.trainer import arithmetic_fingerprint

if TYPE_CHECKING:
    import pandas as pd

# A rerun elsewhere differs in the last bit of every sum, and training enlarges that. Of the six mini runs of the main
# comparison on a CPU with AVX2 and on one with AVX-512, the two furthest apart differed by 0.044 in mAP.
TOLERANCE = 0.06
WRITTEN = ("README.md", "results/README.md", "results/*/tables/*", "results/*/figures/*")  # by the notebooks
KINDS = ("evaluations", "regions", "comparisons")  # of records that follow from runs


# Reproduce -----------------------------------------------------------------------------------------------------------


def reproduce(
    profile: str, only: Sequence[str], results: Path | None, data_root: Path | None, notebooks: Path | None = None
) -> None:
    """Runs the notebooks of a profile in order, which train what they need and write their tables, then compares.

    only: numbers or names of notebooks, none for all. results: the folder that gets <profile>/, default results/local.
    A notebook that fails does not keep the others from running; it is named in the MCARError that is raised at the end.
    One that ran here before, on the same cells, code, data and run records, is not run again.
    """
    root, chosen = project_root(), load_profile(profile)
    results = (results or root / "results" / "local").resolve()
    folder, committed = results / chosen.name, root / "results" / chosen.name
    name = str(Path(profile).resolve()) if profile.endswith(".toml") else profile
    place = str(data_root.expanduser().resolve()) if data_root else ""
    values = {"profile": name, "profiles": [name], "results": str(results), "data_root": place, "readme": ""}
    made, runs = made_folder(folder / "notebooks"), Runs(chosen, results, place)
    # Data that was named and cannot be read ends this before any notebook runs.
    named = runs.splits.data_root is not None and chosen.run.dataset != "scenes"
    looked = runs.look(chosen.run)[0] if named else {}
    selected = select_notebooks(notebooks or root / "notebooks", only)
    earlier = read_json(made / "inputs.json") if (made / "inputs.json").exists() else {}
    library, outcomes = "-".join([_library(), *looked.values()]), {}
    for path in selected:
        if (made / path.name).exists() and earlier.get(path.stem) == _inputs(path, library, folder):
            say(f"{path.stem}: was run before, nothing has changed")
            outcomes[path.stem] = DONE
        else:
            outcomes[path.stem] = run_notebook(path, made / path.name, values)
    # Taken at the end, when all records and tables are there: a later notebook may have added some.
    now = {path.stem: _inputs(path, library, folder) for path in selected if outcomes[path.stem] is DONE}
    write_json(made / "inputs.json", {**earlier, **now})
    if folder != committed and (committed / "runs").is_dir():
        compare(committed, folder)
    _raise_if_any([name for name, outcome in outcomes.items() if outcome is FAILED], "failed")


def _library() -> str:
    """A hash of this library's files."""
    top = Path(__file__).parent.parent
    return _digest(path for kind in ("*.py", "*.toml") for path in top.rglob(kind))


def _inputs(notebook: Path, library: str, folder: Path) -> str:
    """A hash of what a notebook's output follows from: its cells, the library, and the profile's run records and tables
    (the summary reads those that other notebooks write)."""
    return f"{library}-{_digest([notebook, *folder.glob('runs/*.json'), *folder.glob('tables/*.csv')])}"


def _digest(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(paths):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _raise_if_any(names: Sequence[str], what: str) -> None:
    if names:
        raise MCARError(f"{what}: {', '.join(names)}")


# Compare -------------------------------------------------------------------------------------------------------------


def compare(committed: Path, folder: Path) -> None:
    """Prints the committed findings beside those made here; findings and runs, number by number, are kept as
    comparison_findings and comparison_runs, .csv and .md."""
    from mcar_lib.tables import markdown

    for name, table in (("runs", compare_runs(committed, folder)), ("findings", compare_findings(committed, folder))):
        write_text(folder / f"comparison_{name}.csv", table.to_csv(index=False, float_format="%.4f"))
        write_text(folder / f"comparison_{name}.md", markdown(table, digits=2))
        verdicts = ", ".join(f"{count} {verdict}" for verdict, count in table["verdict"].value_counts().items())
        if name == "findings" and len(table):
            Console(width=None if sys.stdout.isatty() else 160).print(Markdown(markdown(table)))
        say(f"{name}: {verdicts or 'none to compare'} ({folder / f'comparison_{name}.md'})")


def compare_runs(committed: Path, local: Path) -> "pd.DataFrame":
    """Committed records against those made here, matched by configuration: fused and global mAP, last epoch."""
    import pandas as pd

    theirs, ours = (
        {record.config.model_dump_json(): record for record in read_records(folder) if record.is_scored}
        for folder in (committed, local)
    )
    rows = [
        [(theirs.get(key) or ours[key]).config.label, f"mAP {stream}", *_beside(theirs.get(key), ours.get(key), stream)]
        for key in dict.fromkeys([*theirs, *ours])
        for stream in ("fused", "global")
    ]
    return pd.DataFrame(rows, columns=["run", "metric", "committed", "here", "difference", "verdict"])


def _beside(then: Record | None, here: Record | None, stream: str) -> list[object]:
    values = [None if record is None else 100 * record.map(stream) for record in (then, here)]
    if then is None or here is None:
        return [*values, None, "only here" if then is None else "only committed"]
    difference = here.map(stream) - then.map(stream)
    close = "within tolerance" if abs(difference) <= TOLERANCE else "different"
    return [*values, 100 * difference, "same" if difference == 0 else close]


def compare_findings(committed: Path, local: Path) -> "pd.DataFrame":
    """Every difference that a committed table tells, with what the same table says here."""
    import pandas as pd

    found = {}
    for side, folder in (("committed", committed), ("here", local)):
        tables = {path.stem: pd.read_csv(path) for path in sorted((folder / "tables").glob("*difference*.csv"))}
        rows = [table.assign(table=name) for name, table in tables.items()]
        frame = pd.concat(rows) if rows else pd.DataFrame(columns=["table", "compared", "difference", "finding"])
        found[side] = frame[["table", "compared", "difference", "finding"]]
    both = found["committed"].merge(found["here"], on=["table", "compared"], suffixes=(" committed", " here"))
    same = both["finding committed"] == both["finding here"]
    return both.assign(verdict=same.map({True: "same finding", False: "other finding"}))


# Publish and report --------------------------------------------------------------------------------------------------


def publish(profile: str) -> None:
    """Makes results/local/<profile> the committed records and runs the committed notebooks in place, which rebuild all
    that follows from them; those that fail are left as they were, and named in an MCARError at the end.

    Records of other arithmetic than today's stay behind. Raises ResultsError when there is none to publish.
    """
    root, name = project_root(), load_profile(profile).name
    local, target = root / "results" / "local" / name, root / "results" / name
    today = {"arithmetic": arithmetic_fingerprint()}
    records = {record.run_id: record.path for record in read_records(local) if record.is_current(today)}
    if not records:
        raise ResultsError(f"{local} has no current run records; first: mcar reproduce --profile {profile}")
    _replace_folder(target / "runs", list(records.values()))
    for kind in KINDS:
        following = [path for path in sorted((local / kind).glob("*.json")) if records.keys() >= _runs_of(path)]
        _replace_folder(target / kind, following)
    say(f"{target}: {len(records)} runs")
    report()


def _runs_of(path: Path) -> set[str]:
    content: Mapping[str, Any] = read_json(path)
    return set(content["runs"] if "runs" in content else [content["run_id"]])


def report(check: bool = False) -> None:
    """Runs the committed notebooks over the committed records: in place, or, to check, into a scratch folder.

    Raises MCARError that names the notebooks that fail, or the files that differ from what they would write.
    """
    root = project_root()
    if check:
        _raise_if_any([f"\n  {name}" for name in drifted(root)], "not what the records say; run mcar report")
        return
    with tempfile.TemporaryDirectory() as scratch:
        selected = select_notebooks(root / "notebooks")
        failed = [path.stem for path in selected if run_in_place(path, Path(scratch)) is FAILED]
    _raise_if_any(failed, "failed, and left as they were")


def drifted(root: Path) -> list[Path]:
    """The files that the notebooks write, relative to root, that differ from what they write from the committed
    records, or that none of them writes. Changes nothing. Raises MCARError where a notebook fails."""
    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch)
        ignored = shutil.ignore_patterns("local", "tables", "figures")
        shutil.copytree(root / "results", fresh / "results", ignore=ignored)
        shutil.copy(root / "README.md", fresh)
        values = {"results": str(fresh / "results"), "readme": str(fresh / "README.md")}
        outputs = made_folder(fresh / "outputs")
        selected = select_notebooks(root / "notebooks")
        failed = [path.stem for path in selected if run_notebook(path, outputs / path.name, values) is FAILED]
        _raise_if_any(failed, "failed")
        found = {path.relative_to(top) for top in (root, fresh) for name in WRITTEN for path in top.glob(name)}
        return [name for name in sorted(found) if not same_file(root / name, fresh / name)]


def same_file(a: Path, b: Path) -> bool:
    """Whether two files are the same; two pictures may differ by a little grey, which fonts make."""
    from mcar_lib.tables import same_picture

    if not (a.exists() and b.exists()):
        return False
    return same_picture(a, b) if a.suffix == ".png" else a.read_bytes() == b.read_bytes()


def _replace_folder(target: Path, files: Sequence[Path]) -> None:
    """Puts copies of files in place of a folder, whole or not at all; no files, no folder."""
    if not files:
        shutil.rmtree(target, ignore_errors=True)
        return
    with tempfile.TemporaryDirectory(dir=made_folder(target.parent), prefix=".publish-") as scratch:
        for path in files:
            shutil.copy(path, made_folder(Path(scratch) / "new"))
        if target.exists():
            target.replace(Path(scratch) / "old")
        (Path(scratch) / "new").replace(target)
