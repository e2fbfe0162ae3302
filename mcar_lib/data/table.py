"""The reader's own images: a CSV file with the columns path, labels (separated by ";") and, if any, split."""

import csv
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mcar_lib.data.image_set import ImageSet
from mcar_lib.data.preparation import Problems
from mcar_lib.errors import DataError

SPLITS = ("train", "test")
SEPARATORS = re.compile(r"[;,|/+&\t]")  # beside the one that labels are split at


class Row(NamedTuple):
    """A row of a table: its line number, and what it says of one photo."""

    number: int
    path: str
    labels: tuple[str, ...]
    split: str


def load_table(
    csv_path: Path | str,
    split: str | None = None,
    image_root: Path | str | None = None,
    classes: Sequence[str] | None = None,
) -> ImageSet:
    """Read the images of a CSV file: those of `split`, or all of them when split is None.

    Paths are relative to `image_root`, by default the folder of the CSV. `classes` are by default all labels
    of the whole file, sorted, so that every split has the same classes. A row without labels is negative for
    all classes. Labels are compared in the Unicode form NFC. Photos are turned upright as their EXIF orientation says.
    Raises one DataError that lists the wrong rows by their line number; what may be meant so is among the doubts.
    """
    csv_path = Path(csv_path).expanduser()
    problems = Problems(str(csv_path))
    columns = ("path", "labels") if split is None else ("path", "labels", "split")
    rows = _read_rows(csv_path, columns, problems)
    labels = {label for row in rows for label in row.labels}
    names = tuple(sorted(labels) if classes is None else map(normalized, classes))
    chosen = [row for row in rows if split is None or row.split == split]
    if not chosen:
        there = ", ".join(name or "(empty)" for name in sorted({row.split for row in rows})) or "none"
        which = "no images" if split is None else f"no images of the split {split!r}"
        problems.add(f"{which}; splits found: {there}")
    if len(set(names)) != len(names):
        problems.add("the list of classes names one class twice")
    if not names:
        problems.add("no labels at all")
    doubts = [*alike(names), *check_separators(rows, labels, problems)]
    if split is not None:
        doubts += _check_splits(rows, (*SPLITS, split), problems)
    check_paths(rows if split is None else [row for row in rows if row.split in (*SPLITS, split)], problems)
    targets = _targets(chosen, names, problems)
    problems.raise_if_any()
    folder = csv_path.parent if image_root is None else Path(image_root).expanduser()
    return ImageSet(
        name="table",
        split=split or "all",
        classes=names,
        ids=tuple(row.path for row in chosen),
        paths=tuple(folder / row.path for row in chosen),
        targets=targets,
        upright=True,
        doubts=tuple(f"{csv_path}: {doubt}" for doubt in doubts),
    )


def _read_rows(path: Path, columns: tuple[str, ...], problems: Problems) -> list[Row]:
    if not path.is_file():
        raise DataError(
            f"{path}: no such table. Expected a CSV file with the columns path, labels and split. "
            "Name it, or the folder that holds labels.csv, with --data-root or MCAR_DATA"
        )
    try:
        # -sig: spreadsheets write a byte order mark
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            first_line = reader.fieldnames or ()
            if missing := [name for name in columns if name not in first_line]:
                raise DataError(
                    f"{path}: no column {', '.join(missing)}; the first line must name the columns "
                    f"{','.join(columns)} and it reads {','.join(first_line) or '(nothing)'}"
                )
            if repeated := [name for name in columns if first_line.count(name) > 1]:
                raise DataError(f"{path}: the column {', '.join(repeated)} is there more than once; keep one of them")
            rows = [_read_row(fields, reader.line_num, problems) for fields in reader]
            return [row for row in rows if row is not None]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot read this table as a CSV file in UTF-8 ({error})") from error


def _read_row(fields: dict[str, str | None], number: int, problems: Problems) -> Row | None:
    path, labels = (fields["path"] or "").strip(), fields["labels"]
    if not path:
        problems.add(f"row {number}: the path is empty")
    elif "\0" in path:
        problems.add(f"row {number}: the path holds a NUL")
    elif labels is None:
        problems.add(f"row {number}: {path} has no labels column (too few commas)")
    elif None in fields:
        problems.add(f"row {number}: {path} has too many columns; separate labels with ';'")
    else:
        parts = tuple(normalized(label) for label in labels.split(";") if label.strip())
        return Row(number, path, parts, (fields.get("split") or "").strip())
    return None


def _targets(rows: list[Row], classes: tuple[str, ...], problems: Problems) -> Tensor:
    targets = torch.zeros((len(rows), len(classes)), dtype=torch.int8)
    for position, row in enumerate(rows):
        for label in row.labels:
            if label in classes:
                targets[position, classes.index(label)] = 1
            else:
                problems.add(f"row {row.number}: unknown class {label!r}; classes: {', '.join(classes)}")
    return targets


def normalized(label: str) -> str:
    """A keyboard writes é as one character (NFC), a Mac's folder names as two (NFD)."""
    return unicodedata.normalize("NFC", label.strip())


def alike(classes: Sequence[str]) -> Iterator[str]:
    """Doubts: pairs of classes that differ in upper and lower case, in blanks or in the width of letters only."""
    by_form: dict[str, list[str]] = {}
    for name in classes:
        form = unicodedata.normalize("NFKC", name).casefold()
        by_form.setdefault("".join(form.split()), []).append(name)
    for names in by_form.values():
        yield from (
            f"the classes {one!r} and {other!r} differ in spelling only" for one, other in combinations(names, 2)
        )


def check_separators(rows: Sequence[Row], labels: set[str], problems: Problems, separator: str = ";") -> list[str]:
    """Labels that look like several are problems where it is certain, else doubts, which are returned. separator: the
    one that labels were split at."""
    cut = {
        label: [normalized(part) for part in SEPARATORS.split(label)] for label in labels if SEPARATORS.search(label)
    }
    parts = Counter(part for each in cut.values() for part in set(each))
    wrong = {label for label, each in cut.items() if labels.issuperset(each)} | set(filter(_is_literal, labels))
    odd = {label for label, each in cut.items() if any(part in labels or parts[part] > 1 for part in each)} - wrong
    odd |= {label for label in labels if len(label.split()) > 1 and labels.issuperset(label.split())}
    doubts = []
    for row in rows:
        for label in row.labels:
            if label in wrong:
                problems.add(
                    f"row {row.number}: the label {label!r} looks like several; separate labels by {separator!r}"
                )
            elif label in odd:
                doubts.append(
                    f"row {row.number}: is the label {label!r} one, or several that {separator!r} should separate?"
                )
    return doubts


def _is_literal(label: str) -> bool:
    """Whether it is a list, tuple or text as Python or JSON writes it."""
    return re.fullmatch(r"""[\[({].*['",].*[\])}]|(['"]).*\1""", label) is not None


def _check_splits(rows: Sequence[Row], known: Sequence[str], problems: Problems) -> list[str]:
    """Problems of rows whose split is empty or misspelt; a doubt about those that are in a split of another name."""
    others = []
    for row in rows:
        if row.split in known:
            continue
        if not row.split:
            problems.add(f"row {row.number}: {row.path} has no split; write train or test, or leave the row out")
        elif row.split.casefold() in known:
            problems.add(f"row {row.number}: the split {row.split!r} should be spelt {row.split.casefold()}")
        else:
            others.append(row)
    if not others:
        return []
    found = ", ".join(sorted({row.split for row in others}))
    return [
        f"{len(others):,} of {len(rows):,} rows are neither in train nor in test, the first is row "
        f"{others[0].number}; other splits found: {found}"
    ]


def check_paths(rows: Sequence[Row], problems: Problems) -> None:
    """A problem for each row whose photo an earlier row has."""
    first: dict[str, Row] = {}
    for row in rows:
        other = first.setdefault(os.path.normpath(row.path), row)
        if other is not row:
            where = "" if other.split == row.split else f", in the split {other.split}"
            problems.add(f"row {row.number}: {row.path} is already listed in row {other.number}{where}")
