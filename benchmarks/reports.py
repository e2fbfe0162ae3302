"""What a benchmark found, and how it is told: a JSON file, from it a page, and from all of them README's table.

Pages and table are functions of the JSON files alone, so a test can hold them to those.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from mcar_lib.files import read_json

Cell = str | int | float | None  # a float has three or so digits when it is told; None is a dash
COLUMNS = ("what", "ours", "against", "ratio", "goal")


class Frozen(BaseModel):
    """Values that are read from JSON as they were written."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Table(Frozen):
    """Numbers as they were measured; the columns name units."""

    heading: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


class Finding(Frozen):
    """One line of a summary: our figure, in a unit, beside another one.

    ratio: ours to theirs, from rounds in which both took turns. at_most: the goal, of the ratio where there is one,
    else of our figure. in_readme: whether README's table has it.
    """

    what: str
    ours: float
    unit: str
    against: str = ""
    theirs: float | None = None
    ratio: float | None = None
    at_most: float | None = None
    in_readme: bool = False

    @property
    def met(self) -> bool | None:
        """None where there is no goal."""
        measured = self.ours if self.ratio is None else self.ratio
        return None if self.at_most is None else measured <= self.at_most


class Report(Frozen):
    """What one benchmark measured. alt: what the picture beside it shows, if it draws one."""

    title: str
    about: str
    findings: tuple[Finding, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()
    alt: str = ""


class Circumstances(Frozen):
    """Where, when and beside what it was measured.

    load: average load of the last minute before the whole run. others: the share of the processors that other programs
    had just before and just after, the larger one.
    """

    processor: str
    device: str
    cores: int
    threads: int
    python: str
    versions: dict[str, str]
    commit: str
    finished: str
    seconds: float
    load: float
    others: float
    quick: bool


class Record(Frozen):
    """One file of results/benchmarks."""

    topic: str
    report: Report
    circumstances: Circumstances

    @classmethod
    def read(cls, path: Path) -> "Record":
        return cls.model_validate(read_json(path))

    def content(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


def page(record: Record) -> str:
    """The Markdown page of one benchmark."""
    report = record.report
    parts = [f"# {report.title}", report.about]
    if report.findings:
        parts.append(markdown(COLUMNS, [_row(finding) for finding in report.findings]))
    if report.alt:
        parts.append(f"![{report.alt}]({record.topic}.png)")
    for table in report.tables:
        parts += [f"## {table.heading}", markdown(table.columns, table.rows)]
    return "\n\n".join([*parts, *report.notes, _circumstances(record)]) + "\n"


def summary(records: Sequence[Record]) -> str:
    """README's table: the findings that are marked for it, each linked to its page, and where they were measured."""
    if not records:
        return "Nothing is measured here yet: `make bench`.\n"
    rows = []
    for record in records:
        for finding in (each for each in record.report.findings if each.in_readme):
            what, *cells = _row(finding)
            rows.append((f"[{what}](results/benchmarks/{record.topic}.md)", *cells))
    lines = [_machine(record.circumstances) for record in records]
    where = f"Measured on: {'; '.join(dict.fromkeys(lines))}."
    warning = [QUICK] if any(record.circumstances.quick for record in records) else []
    return "\n\n".join([markdown(COLUMNS, rows), where, *warning]) + "\n"


QUICK = "Some of this was measured with --quick, which only tries that everything runs: those numbers mean nothing."


def markdown(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    lines = [tuple(columns), ("---",) * len(columns), *(tuple(map(told, row)) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def told(value: Cell) -> str:
    """About three digits of a float, all of a whole number; a dash for nothing."""
    if value is None or value == "":
        return "-"
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else value
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 20 else 2 if abs(value) >= 0.1 else 4
    return f"{value:,.{digits}f}"


def _row(finding: Finding) -> tuple[str, str, str, str, str]:
    theirs = "" if finding.theirs is None else f": {told(finding.theirs)} {finding.unit}"
    goal = "-"
    if finding.at_most is not None:
        unit = f" {finding.unit}" if finding.ratio is None else ""
        goal = f"at most {finding.at_most:g}{unit}: {'met' if finding.met else '**missed**'}"
    ours = f"{told(finding.ours)} {finding.unit}"
    return finding.what, ours, f"{finding.against}{theirs}" or "-", told(finding.ratio), goal


def _machine(circumstances: Circumstances) -> str:
    cores = f"{circumstances.cores} cores, threads used: {circumstances.threads}"
    return f"{circumstances.processor}, {cores}, torch {circumstances.versions['torch']}"


def _circumstances(record: Record) -> str:
    was = record.circumstances
    versions = ", ".join(f"{name} {version}" for name, version in was.versions.items())
    device = "" if was.device == "CPU" else f"; GPU: {was.device}"
    others = f"other programs had {100 * was.others:.0f} % of the processors just before or after this"
    lines = [
        f"{was.processor}, {was.cores} cores, threads used: {was.threads}{device}; Python {was.python}, {versions}.",
        f"Load average {was.load:.1f} at the start of the run; {others}.",
        f"Measured in {was.seconds:.0f} s, {was.finished[:10]}, commit {was.commit}: "
        f"`make bench ONLY={record.topic}`. All digits: [{record.topic}.json]({record.topic}.json).",
    ]
    return "\n".join([*lines, *([f"**{QUICK}**"] if was.quick else [])])


class Began(NamedTuple):
    """What is known when a run of benchmarks begins; its own files change the checkout afterwards."""

    load: float
    commit: str
    quick: bool


class Conditions(NamedTuple):
    """What the program that starts a benchmark knows of it: see Circumstances."""

    began: Began
    before: float
    seconds: float


def circumstances(environment: Mapping[str, Any], conditions: Conditions, after: float) -> Circumstances:
    """environment: mcar_lib.runs.environment.describe_environment in the process that measured; after: what other
    programs had just after it."""
    kept = ("processor", "device", "threads", "python", "finished")
    return Circumstances(
        **{name: environment[name] for name in kept},
        versions={name: environment["versions"][name] for name in ("torch", "torchvision", "numpy", "pillow")},
        cores=environment["cores"] or os.cpu_count() or 1,
        seconds=round(conditions.seconds, 1),
        load=round(conditions.began.load, 2),
        others=round(max(conditions.before, after), 3),
        commit=conditions.began.commit,
        quick=conditions.began.quick,
    )
