"""The reader's own images: a CSV file with the columns path, labels (separated by ";") and, if any, split."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mcar_lib.data.image_set import ImageSet
from mcar_lib.data.preparation import Problems
from mcar_lib.errors import DataError


@dataclass(frozen=True)
class _Row:
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
    rows = _read_rows(csv_path, need_split=split is not None, problems=problems)
    names = tuple(sorted({label for row in rows for label in row.labels}) if classes is None else classes)
    chosen = [row for row in rows if split is None or row.split == split]
    _check_rows(chosen, names, split, sorted({row.split for row in rows}), problems)
    problems.raise_if_any()
    column = {name: number for number, name in enumerate(names)}
    targets = torch.zeros((len(chosen), len(names)), dtype=torch.int8)
    for position, row in enumerate(chosen):
        for label in row.labels:
            targets[position, column[label]] = 1
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


def _read_rows(path: Path, need_split: bool, problems: Problems) -> list[_Row]:
    if not path.is_file():
        raise DataError(
            f"{path}: no such table. Expected a CSV file with the columns path, labels and split. "
            "Name it, or the folder that holds labels.csv, with --data-root or MCAR_DATA"
        )
    try:
        # -sig: spreadsheets write a byte order mark
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True, strict=True)
            _require_columns(path, reader.fieldnames or (), need_split)
            rows = [_read_row(fields, reader.line_num, problems) for fields in reader]
            return [row for row in rows if row is not None]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot read this table as a CSV file in UTF-8 ({error})") from error


def _require_columns(path: Path, found: Sequence[str], need_split: bool) -> None:
    missing = [name for name in ("path", "labels", *(("split",) if need_split else ())) if name not in found]
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(missing)}; the first line must name the columns "
            f"path,labels{',split' if need_split else ''} and it reads {','.join(found) or '(nothing)'}"
        )


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


def _check_rows(
    rows: list[_Row], classes: tuple[str, ...], split: str | None, splits: list[str], problems: Problems
) -> None:
    if not rows:
        there = ", ".join(name or "(empty)" for name in splits) or "none"
        which = "no images" if split is None else f"no images of the split {split!r}"
        problems.add(f"{which}; splits found: {there}")
    if len(set(classes)) != len(classes):
        problems.add("the list of classes names one class twice")
    if not classes:
        problems.add("no labels at all")
    first: dict[str, int] = {}
    for row in rows:
        if first.setdefault(row.path, row.number) != row.number:
            problems.add(f"row {row.number}: {row.path} is already listed in row {first[row.path]}")
        for label in row.labels:
            if label not in classes:
                problems.add(f"row {row.number}: unknown class {label!r}; classes: {', '.join(classes)}")
