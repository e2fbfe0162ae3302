"""The jobs of the notebooks: reproduce them here, publish what they computed, hold what is committed to the records.

A notebook finds or trains its runs and writes its own tables and figures, so each job may be killed and started again.
"""

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mcar_lib.errors import MCARError, ResultsError
from mcar_lib.files import made_folder, needed_checkout, read_json, user_path, write_bytes, write_json
from mcar_lib.notebooks.runner import DONE, FAILED, failed_output, run_in_place, run_notebook, select_notebooks
from mcar_lib.progress import say
from mcar_lib.runs import ONE_SEED, Runs, load_profile, points, read_records
from mcar_lib.runs.claims import TOLD
from mcar_lib.runs.grid import JOBS
from mcar_lib.runs.records import RECORD_FORMAT, following, runs_of
from mcar_lib.runs.trainer import arithmetic_fingerprint

if TYPE_CHECKING:
    import pandas as pd

WRITTEN = (  # by the notebooks
    "README.md",
    "results/README.md",
    "results/*/README.md",
    "results/*/tables/*",
    "results/*/figures/*",
)
KINDS = ("evaluations", "regions", "cheaper", "comparisons")  # of records that follow from runs
SIDES = ("committed", "here")
SAME, OTHER = "the same finding", "another finding"
ONLY_COMMITTED, ONLY_HERE = "only committed", "only here"
NAMED = 10  # files of somebody's own that are named at once


# Reproduce -----------------------------------------------------------------------------------------------------------


def reproduce(
    profile: str,
    only: Sequence[str],
    results: Path | None,
    data_root: Path | None,
    notebooks: Path | None = None,
    artifacts: Path | None = None,
    jobs: int | None = None,
) -> None:
    """Runs the notebooks of a profile in order, which train what they need and write their tables, then compares.

    only: numbers or names of notebooks, none for all. results: the folder that gets <profile>/, default results/local.
    artifacts: as for Runs. jobs: runs side by side, as at_once of mcar_lib.runs.find_or_train.
    An executed notebook that somebody changed is moved aside, not overwritten.
    A notebook that fails does not keep the others from running; it is named in the MCARError that is raised at the end.
    One that ran here before, on the same cells, code, data and run records, is not run again.
    """
    from mcar_lib.tables import Generated

    root, chosen = needed_checkout("mcar reproduce"), load_profile(profile)
    results = user_path(results or root / "results" / "local").resolve()
    folder, committed = results / chosen.name, root / "results" / chosen.name
    name = str(user_path(profile).resolve()) if profile.endswith(".toml") else profile
    place = str(user_path(data_root).resolve()) if data_root else ""
    values = {"profile": name, "profiles": [name], "results": str(results), "data_root": place, "readme": ""}
    made, written = made_folder(folder / "notebooks"), Generated(folder)
    runs = Runs(chosen, results, place, artifacts)
    # Data that was named and cannot be read ends this before any notebook runs.
    named = runs.splits.data_root is not None and chosen.run.dataset != "scenes"
    looked = runs.look(chosen.run)[0] if named else {}
    selected = select_notebooks(notebooks or root / "notebooks", only)
    earlier: dict[str, Any] = {}
    with contextlib.suppress(ResultsError):  # none, or unreadable: the notebooks are run again
        earlier = read_json(made / "inputs.json")
    library, outcomes = "-".join([_library(), *looked.values()]), {}
    for path in selected:
        if (made / path.name).exists() and earlier.get(path.stem) == _inputs(path, library, folder):
            say(f"{path.stem}: was run before, nothing has changed")
            outcomes[path.stem] = DONE
            continue
        outputs = [made / path.name, failed_output(made / path.name)]
        for output in outputs:
            written.set_aside(f"notebooks/{output.name}")
        with environment_for_notebooks(artifacts, jobs):
            outcomes[path.stem] = run_notebook(path, made / path.name, values)
        for output in filter(Path.exists, outputs):
            written.note(f"notebooks/{output.name}")
    # Taken at the end, when all records and tables are there: a later notebook may have added some.
    now = {path.stem: _inputs(path, library, folder) for path in selected if outcomes[path.stem] is DONE}
    write_json(made / "inputs.json", {**earlier, **now})
    if folder != committed and (committed / "runs").is_dir():
        compare(committed, folder)
    _raise_if_any([name for name, outcome in outcomes.items() if outcome is FAILED], "failed")


@contextlib.contextmanager
def environment_for_notebooks(artifacts: Path | None = None, jobs: int | None = None) -> Iterator[None]:
    """What --artifacts and --jobs say, for the notebooks that run meanwhile in processes of their own."""
    told = {JOBS: str(jobs)} if jobs else {}
    told |= {"MCAR_ARTIFACTS": str(user_path(artifacts).resolve())} if artifacts else {}
    earlier = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in earlier.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


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
    """Prints each committed finding beside that made here, a line each, then how far the numbers of the runs lie apart.

    Both are kept as tables, comparison_findings and comparison_runs, .csv and .md.
    """
    from mcar_lib.tables import Generated, markdown

    findings, runs = compare_findings(committed, folder), compare_runs(committed, folder)
    written = Generated(folder)
    for name, table in (("findings", findings), ("runs", runs)):
        written.put_text(f"comparison_{name}.csv", table.to_csv(index=False, float_format="%.4f"))
        written.put_text(f"comparison_{name}.md", markdown(table))
    for row in findings.to_dict("records"):
        if row["verdict"] in (SAME, OTHER):
            said = f" ({row['committed finding']}; here {row['here finding']})" if row["verdict"] == OTHER else ""
            beside = ", ".join(f"{side} {_interval(row, side)}" for side in SIDES)
            say(f"{row['compared']}: {beside}: {row['verdict']}{said}")
    count = findings["verdict"].value_counts().get
    one_sided = count(ONLY_COMMITTED, 0) + count(ONLY_HERE, 0)
    say(
        f"findings: {count(SAME, 0)} the same, {count(OTHER, 0)} another; {count(ONE_SEED, 0)} comparisons of one seed "
        f"carry none, {one_sided} are on one side only ({folder / 'comparison_findings.md'})"
    )
    apart = runs["difference"].dropna().abs()
    spread = f", up to {apart.max():.1f} points of mAP apart, half of them at most {apart.median():.1f}"
    say(f"numbers: {len(apart)} compared{spread if len(apart) else ''} ({folder / 'comparison_runs.md'})")


def _interval(row: Mapping[Any, Any], side: str) -> str:
    return points({"difference": row[side], "low": row[f"{side} low"], "high": row[f"{side} high"]})


def compare_runs(committed: Path, local: Path) -> "pd.DataFrame":
    """Committed records against those made here, matched by configuration: fused and global mAP in percent, last epoch,
    and how many points apart. No tolerance tells which are alike: seeds and rounding move a run, and what that comes to
    is in the intervals of the findings."""
    import pandas as pd

    theirs, ours = (
        {record.config.model_dump_json(): record for record in read_records(folder) if record.is_scored}
        for folder in (committed, local)
    )
    rows = []
    for key in dict.fromkeys([*theirs, *ours]):
        for stream in ("fused", "global"):
            then, here = (100 * of[key].map(stream) if key in of else None for of in (theirs, ours))
            apart = None if then is None or here is None else here - then
            rows.append([(theirs.get(key) or ours[key]).config.label, f"mAP {stream}", then, here, apart])
    return pd.DataFrame(rows, columns=["run", "metric", *SIDES, "difference"]).astype(dict.fromkeys(SIDES, float))


def compare_findings(committed: Path, local: Path) -> "pd.DataFrame":
    """Every difference that a table of either side tells, beside what the same table says on the other: points of mAP,
    their interval, the finding, and whether it is the same. Differences of one seed are no findings."""
    import pandas as pd

    columns = [[side if name == "difference" else f"{side} {name}" for name in TOLD[1:]] for side in SIDES]
    sides: list[dict[tuple[str, str], dict[Any, Any]]] = [{}, {}]
    for found, folder in zip(sides, (committed, local), strict=True):
        tables = {path.stem: pd.read_csv(path) for path in sorted((folder / "tables").glob("*.csv"))}
        for name, table in tables.items():
            if set(TOLD) <= set(table):
                found |= {(name, row["compared"]): row for row in table.to_dict("records")}
    rows = []
    for key in dict.fromkeys([*sides[0], *sides[1]]):
        cells = [found.get(key, {}).get(name) for found in sides for name in TOLD[1:]]
        rows.append([*key, *cells, _verdict(*(found.get(key, {}).get("finding") for found in sides))])
    return pd.DataFrame(rows, columns=["table", "compared", *columns[0], *columns[1], "verdict"])


def _verdict(then: str | None, here: str | None) -> str:
    if then is None or here is None:
        return ONLY_HERE if then is None else ONLY_COMMITTED
    return ONE_SEED if ONE_SEED in (then, here) else SAME if then == here else OTHER


# Publish and report --------------------------------------------------------------------------------------------------


def publish(profile: str, artifacts: Path | None = None) -> None:
    """Makes results/local/<profile> the committed records and runs the committed notebooks in place, which rebuild all
    that follows from them; those that fail are left as they were, and named in an MCARError at the end.

    Records of other arithmetic than today's stay behind, and what is no record stays where it is. Raises ResultsError
    when there is none to publish.
    """
    root, name = needed_checkout("mcar publish"), load_profile(profile).name
    local, target = root / "results" / "local" / name, root / "results" / name
    today = {"arithmetic": arithmetic_fingerprint()}
    records = {record.run_id: record.path for record in read_records(local) if record.is_current(today)}
    if not records:
        raise ResultsError(f"{local} has no current run records; first: mcar reproduce --profile {profile}")
    others = _replace_records(target / "runs", list(records.values()), name)
    for kind in KINDS:
        others += _replace_records(target / kind, following(local / kind, list(records)), name)
    say(f"{target}: {len(records)} runs")
    _name_own([str(path.relative_to(root)) for path in others])
    report(artifacts=artifacts)


def _replace_records(target: Path, files: Sequence[Path], profile: str) -> list[Path]:
    """Puts copies of records in place of a folder's records; returns what else lies there."""
    for path in files:
        write_bytes(target / path.name, path.read_bytes())
    earlier = [path for path in sorted(target.glob("*")) if path.name not in {file.name for file in files}]
    others = [path for path in earlier if not _is_record(path, profile)]
    for path in earlier:
        if path not in others:
            path.unlink()
    if target.is_dir() and not any(target.iterdir()):
        target.rmdir()
    return others


def _is_record(path: Path, profile: str) -> bool:
    """Whether a file is a record of runs of this profile."""
    try:
        content = read_json(path)
        is_ours = content.get("format", RECORD_FORMAT) == RECORD_FORMAT and content.get("profile", profile) == profile
        return is_ours and len(runs_of(content)) > 0
    except (ResultsError, KeyError, TypeError):
        return False


def _name_own(files: Sequence[str]) -> None:
    if files:
        more = f" and {len(files) - NAMED} more" if len(files) > NAMED else ""
        say(f"not written by mcar, left as they are: {', '.join(files[:NAMED])}{more}")


def report(check: bool = False, artifacts: Path | None = None) -> None:
    """Runs the committed notebooks over the committed records: in place, or, to check, into a scratch folder.

    A table or figure that no notebook writes any more is removed, unless somebody changed it; what somebody else put
    beside them stays and is named. Raises MCARError that names the notebooks that fail, or the files that differ from
    what they would write.
    """
    from mcar_lib.tables import Generated, own_files

    root = needed_checkout("mcar report")
    with environment_for_notebooks(artifacts), tempfile.TemporaryDirectory() as scratch:
        if check:
            _raise_if_any([f"\n  {name}" for name in drifted(root)], "not what the records say; run mcar report")
            return
        noted = [Generated(path.parent) for path in sorted(root.glob("results/*/generated.json"))]
        before = [(written, written.state()) for written in noted]
        outcomes = {path.stem: run_in_place(path, Path(scratch)) for path in select_notebooks(root / "notebooks")}
    if set(outcomes.values()) == {DONE}:
        for written, state in before:
            written.remove_stale(state)
    _name_own(own_files(root / "results"))
    _raise_if_any([name for name, outcome in outcomes.items() if outcome is FAILED], "failed, and left as they were")


def drifted(root: Path) -> list[Path]:
    """The files that the notebooks write, relative to root, that differ from what they write from the committed
    records, or that none of them writes any more. Names what somebody else put beside them; changes nothing. Raises
    MCARError where a notebook fails."""
    from mcar_lib.tables import Generated, own_files

    with tempfile.TemporaryDirectory() as scratch:
        fresh = Path(scratch).resolve()
        ignored = shutil.ignore_patterns("local", "tables", "figures")
        shutil.copytree(root / "results", fresh / "results", ignore=ignored)
        shutil.copy(root / "README.md", fresh)
        values = {"results": str(fresh / "results"), "readme": str(fresh / "README.md")}
        outputs = made_folder(fresh / "outputs")
        selected = select_notebooks(root / "notebooks")
        named = {str(fresh): str(root)}  # a reader can mend the committed file, not its copy
        failed = [path.stem for path in selected if run_notebook(path, outputs / path.name, values, named) is FAILED]
        _raise_if_any(failed, "failed")
        written = {path.relative_to(fresh) for name in WRITTEN for path in fresh.glob(name)}
        noted = {
            (path.parent / name).relative_to(root)
            for path in root.glob("results/*/generated.json")
            for name in Generated(path.parent).hashes()
        }
        _name_own(own_files(root / "results", {str(name) for name in written}))
        return [name for name in sorted(written | noted) if not same_file(root / name, fresh / name)]


def same_file(a: Path, b: Path) -> bool:
    """Whether two files are the same; two pictures may differ by a little grey, which fonts make."""
    from mcar_lib.tables import same_picture

    if not (a.exists() and b.exists()):
        return False
    return same_picture(a, b) if a.suffix == ".png" else a.read_bytes() == b.read_bytes()
