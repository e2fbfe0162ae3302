"""The reader's own images: a CSV file with the columns path, labels (separated by ";") and, if any, split."""

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mcar_lib.data.image_set import ImageSet
from mcar_lib.data.preparation import Problems
from mcar_lib.errors import DataError


class _Row(NamedTuple):
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
    all classes. Photos are turned upright as their EXIF orientation says. Raises one DataError that lists the
    wrong rows by their line number.
    """
    csv_path = Path(csv_path)
    problems = Problems(str(csv_path))
    columns = ("path", "labels") if split is None else ("path", "labels", "split")
    rows = _read_rows(csv_path, columns, problems)
    names = tuple(sorted({label for row in rows for label in row.labels}) if classes is None else classes)
    chosen = [row for row in rows if split is None or row.split == split]
    if not chosen:
        there = ", ".join(name or "(empty)" for name in sorted({row.split for row in rows})) or "none"
        which = "no images" if split is None else f"no images of the split {split!r}"
        problems.add(f"{which}; splits found: {there}")
    if len(set(names)) != len(names):
        problems.add("the list of classes names one class twice")
    if not names:
        problems.add("no labels at all")
    targets = _targets(chosen, names, problems)
    problems.raise_if_any()
    folder = csv_path.parent if image_root is None else Path(image_root)
    return ImageSet(
        name="table",
        split=split or "all",
        classes=names,
        ids=tuple(row.path for row in chosen),
        paths=tuple(folder / row.path for row in chosen),
        targets=targets,
        upright=True,
    )


def _read_rows(path: Path, columns: tuple[str, ...], problems: Problems) -> list[_Row]:
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
            rows = [_read_row(fields, reader.line_num, problems) for fields in reader]
            return [row for row in rows if row is not None]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot read this table as a CSV file in UTF-8 ({error})") from error


def _read_row(fields: dict[str, str | None], number: int, problems: Problems) -> _Row | None:
    path, labels = (fields["path"] or "").strip(), fields["labels"]
    if not path:
        problems.add(f"row {number}: the path is empty")
    elif labels is None:
        problems.add(f"row {number}: {path} has no labels column (too few commas)")
    elif None in fields:
        problems.add(f"row {number}: {path} has too many columns; separate labels with ';'")
    else:
        parts = tuple(label.strip() for label in labels.split(";") if label.strip())
        return _Row(number, path, parts, (fields.get("split") or "").strip())
    return None


def _targets(rows: list[_Row], classes: tuple[str, ...], problems: Problems) -> Tensor:
    targets = torch.zeros((len(rows), len(classes)), dtype=torch.int8)
    first: dict[str, int] = {}
    for position, row in enumerate(rows):
        if first.setdefault(row.path, row.number) != row.number:
            problems.add(f"row {row.number}: {row.path} is already listed in row {first[row.path]}")
        for label in row.labels:
            if label in classes:
                targets[position, classes.index(label)] = 1
            else:
                problems.add(f"row {row.number}: unknown class {label!r}; classes: {', '.join(classes)}")
    return targets
