"""CSV tables as others write them: labels in one column with separators, in several columns, or as columns of 0 and 1.

Which column is what is found by its name and its values, and told. The strict reader of this project's own labels.csv
is mcar_lib.data.table, whose checks are used here too.
"""

import csv
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mcar_lib.data.own.listing import SPELLINGS, Listed, Listing, joined
from mcar_lib.data.photo_files import ENDINGS, visible
from mcar_lib.data.preparation import Problems
from mcar_lib.data.table import Row, check_paths, check_separators, normalized
from mcar_lib.errors import DataError

DELIMITERS = (",", ";", "\t")  # between columns; Excel writes ; where the decimal point is a comma
SEPARATORS = (";", "|", ",")  # between the labels of one cell
IMAGE_COLUMNS = (
    *("path", "image_path", "img_path", "file_path", "filepath", "filename", "file_name", "image_name", "image", "img"),
    *("images", "file", "photo", "picture", "image_id", "img_id", "name", "id"),
)
LABEL_COLUMNS = (
    *("labels", "label", "tags", "tag", "classes", "class", "class_names", "class_name", "categories", "category"),
    *("class_ids", "class_id", "label_ids", "label_id", "targets", "target"),
)
SPLIT_COLUMNS = ("split", "set", "subset", "partition", "dataset")
NUMBERED = re.compile(r"(label|tag|class|category)s?_?\d+")
YES, NO = ("1", "1.0", "true", "yes"), ("0", "0.0", "false", "no", "")


@dataclass(frozen=True)
class _Layout:
    """Which column is what, by position. labels: the columns of labels; one_hot: whether each is a class of its own."""

    image: int
    labels: tuple[int, ...]
    one_hot: bool
    split: int | None


@dataclass(frozen=True)
class _File:
    """A table as it was read: header and the cells of each row, with its line number."""

    path: Path
    delimiter: str
    header: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]

    def column(self, position: int) -> list[str]:
        return [cells[position].strip() for _, cells in self.rows]


def find_tables(root: Path) -> dict[Path, str]:
    """The tables that a path stands for, with the split that each is of ("": its rows say it, or nobody does): the file
    itself, the one .csv of a folder, or its train.csv, val.csv and test.csv. Empty where there is none.

    Raises DataError where a folder holds several others.
    """
    if root.is_file():
        return {root: ""} if root.suffix.lower() in (".csv", ".tsv") else {}
    found = [path for path in visible(root) if path.suffix.lower() in (".csv", ".tsv") and path.is_file()]
    splits = {path: SPELLINGS.get(path.stem.lower(), "") for path in found}
    if len(found) > 1 and not all(splits.values()):
        raise DataError(
            f"{root}: {len(found)} tables ({joined([path.name for path in found])}); name the one that is meant, or "
            "call them train.csv, val.csv and test.csv"
        )
    return splits if len(found) > 1 else dict.fromkeys(found, "")


def list_tables(root: Path, options: Mapping[str, object]) -> Listing:
    """The photos of the tables below root. options: image_root, image_column, label_columns, separator, classes.

    Raises one DataError that lists the wrong rows by their line number.
    """
    photos: list[Listed] = []
    taken, doubts = "", list[str]()
    tables = find_tables(root)
    for path, split in tables.items():
        listed, taken, doubted = _list_table(path, split, options)
        photos += listed
        doubts += doubted
    names = f"a CSV table ({', '.join(path.name for path in tables)}): {taken}"
    classes = tuple(sorted({label for photo in photos for label in photo.labels}))
    return Listing(names, tuple(photos), classes, doubts=tuple(doubts), files=tuple(tables))


def _list_table(path: Path, split: str, options: Mapping[str, object]) -> tuple[list[Listed], str, list[str]]:
    table = _read(path)
    layout = _layout(table, options)
    problems = Problems(str(path))
    separator = _separator(table, layout, options)
    read_labels = _reader_of_labels(table, layout, separator, problems)
    rows = [
        Row(
            number,
            *_image_and_labels(cells, layout, read_labels, number),
            _split(cells, layout, split, number, problems),
        )
        for number, cells in table.rows
    ]
    for row in rows:
        if not row.path or "\0" in row.path:
            problems.add(f"row {row.number}: the path of the image {'holds a NUL' if row.path else 'is empty'}")
    check_paths([row for row in rows if row.path], problems)
    rows = _named_by_numbers(rows, options)
    labels = {label for row in rows for label in row.labels}
    doubts = [] if layout.one_hot else check_separators(rows, labels, problems, separator or ";")
    problems.raise_if_any()
    folder, place = _folder(path, rows, options)
    photos = [Listed(row.path, folder / row.path, row.labels, row.split, place=f"row {row.number}") for row in rows]
    return photos, _told(table, layout, separator) + place, [f"{path}: {doubt}" for doubt in doubts]


def _read(path: Path) -> _File:
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: spreadsheets write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f'{path}: cannot read this table as text in UTF-8 ({error}); save it as "CSV UTF-8"') from error
    if not text.strip():
        raise DataError(f"{path}: the table is empty; its first line names the columns, such as path and labels")
    first = text.lstrip().splitlines()[0]
    delimiter = max(DELIMITERS, key=lambda each: len(next(csv.reader([first], delimiter=each))))
    problems = Problems(str(path))
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
        lines = [(reader.line_num, tuple(cells)) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise DataError(f"{path}: cannot read this table as CSV ({error}); look at its quotation marks") from error
    header = tuple(cell.strip() for cell in lines[0][1])
    for number, cells in lines[1:]:
        if len(cells) != len(header):
            problems.add(
                f"row {number}: {len(cells)} columns, the first line has {len(header)}; put quotation marks around a "
                f"cell that holds {delimiter!r}"
            )
    problems.raise_if_any()
    if len(lines) == 1:
        raise DataError(f"{path}: the table has no rows below its first line")
    return _File(path, delimiter, header, tuple(lines[1:]))


# Which column is what -------------------------------------------------------------------------------------------------


def _layout(table: _File, options: Mapping[str, object]) -> _Layout:
    names = [re.sub(r"[\s-]+", "_", name.casefold()) for name in table.header]
    split = next(
        (names.index(name) for name in SPLIT_COLUMNS if name in names and _names_splits(table, names, name)), None
    )
    image = _image_column(table, names, options)
    others = [position for position in range(len(names)) if position not in (image, split)]
    asked = options.get("label_columns")
    if isinstance(asked, list | tuple):
        labels = tuple(_position(table, str(name), "label_columns") for name in asked)
        return _Layout(image, labels, all(_is_flag(table, each) for each in labels), split)
    for wanted in LABEL_COLUMNS:
        if found := tuple(each for each in others if names[each] == wanted):  # several where a name is there twice
            return _Layout(image, found, False, split)
    if numbered := tuple(each for each in others if NUMBERED.fullmatch(names[each])):
        return _Layout(image, numbered, all(_is_flag(table, each) for each in numbered), split)
    if flags := tuple(each for each in others if _is_flag(table, each)):
        return _Layout(image, flags, True, split)
    if len(others) == 1:
        return _Layout(image, (others[0],), False, split)
    raise DataError(
        f"{table.path}: no column of labels; the first line reads {table.delimiter.join(table.header)}. Wanted: a "
        "column labels, columns label_1, label_2, ..., or a column of 0 and 1 for each class; or name them: --set "
        'data_options.label_columns=["NAME"]'
    )


def _image_column(table: _File, names: Sequence[str], options: Mapping[str, object]) -> int:
    if asked := options.get("image_column"):
        return _position(table, str(asked), "image_column")
    candidates = [names.index(name) for name in IMAGE_COLUMNS if name in names]
    by_values = [each for each in range(len(names)) if _names_photos(table.column(each))]
    found = [each for each in candidates if each in by_values] or by_values or candidates
    if not found:
        raise DataError(
            f"{table.path}: no column of images; the first line reads {table.delimiter.join(table.header)}. Call the "
            "column path, or name it: --set data_options.image_column=NAME"
        )
    return found[0]


def _position(table: _File, name: str, option: str) -> int:
    if name not in table.header:
        raise DataError(
            f"{table.path}: no column {name!r}, which {option} names; the columns are {', '.join(table.header)}"
        )
    return table.header.index(name)


def _names_photos(values: Sequence[str]) -> bool:
    looked = values[:50]
    return 2 * sum(value.lower().endswith(ENDINGS) for value in looked) > len(looked)


def _names_splits(table: _File, names: Sequence[str], name: str) -> bool:
    """Whether a column holds splits: one that is called so may be anything."""
    values = table.column(names.index(name))
    return any(value.casefold() in SPELLINGS for value in values)


def _is_flag(table: _File, position: int) -> bool:
    values = {value.casefold() for value in table.column(position)}
    return values <= {*YES, *NO, "-1"} and values != {""}


# What a row says ------------------------------------------------------------------------------------------------------


def _image_and_labels(
    cells: Sequence[str], layout: _Layout, read_labels: Callable[[Sequence[str], int], tuple[str, ...]], number: int
) -> tuple[str, tuple[str, ...]]:
    path = cells[layout.image].strip()
    return path if os.sep == "\\" else path.replace("\\", "/"), read_labels(cells, number)


def _split(cells: Sequence[str], layout: _Layout, split: str, number: int, problems: Problems) -> str:
    if split or layout.split is None:
        return split
    named = cells[layout.split].strip()
    if named.casefold() not in SPELLINGS:
        problems.add(f"row {number}: the split {named!r} is none of train, val and test; write one of them")
    return SPELLINGS.get(named.casefold(), "")


def _reader_of_labels(
    table: _File, layout: _Layout, separator: str, problems: Problems
) -> Callable[[Sequence[str], int], tuple[str, ...]]:
    """cells, line number -> labels of a row, each once."""
    if not layout.one_hot:
        return lambda cells, _: tuple(
            dict.fromkeys(
                normalized(part)
                for each in layout.labels
                for part in (cells[each].split(separator) if separator else [cells[each]])
                if part.strip()
            )
        )
    classes = {each: normalized(table.header[each]) for each in layout.labels}
    if twice := {name for name in classes.values() if list(classes.values()).count(name) > 1}:
        problems.add(f"the columns of the class {', '.join(sorted(twice))} are there more than once")
    values = {value for each in layout.labels for value in table.column(each)}
    if "-1" in values and "0" in values:
        problems.add("columns of classes hold 1, 0 and -1; write 1 where the class is there and 0 where it is not")
    return lambda cells, _: tuple(name for each, name in classes.items() if cells[each].strip().casefold() in YES)


def _separator(table: _File, layout: _Layout, options: Mapping[str, object]) -> str:
    """Between the labels of one cell; "" where no cell holds any."""
    if layout.one_hot:
        return ""
    if asked := options.get("separator"):
        return str(asked)
    cells = [value for each in layout.labels for value in table.column(each)]
    if len(layout.labels) > 1:
        return ""
    return next((each for each in SEPARATORS if any(each in cell for cell in cells)), "")


def _named_by_numbers(rows: Sequence[Row], options: Mapping[str, object]) -> list[Row]:
    """Labels that are whole numbers count through the classes that were named, from 0."""
    classes = options.get("classes")
    labels = {label for row in rows for label in row.labels}
    if not isinstance(classes, list | tuple) or not labels or not all(label.isdecimal() for label in labels):
        return list(rows)
    if labels <= set(classes) or max(map(int, labels)) >= len(classes):
        return list(rows)
    return [row._replace(labels=tuple(str(classes[int(label)]) for label in row.labels)) for row in rows]


def _folder(path: Path, rows: Sequence[Row], options: Mapping[str, object]) -> tuple[Path, str]:
    """Where paths start: at the folder that was named, at the table, or else at a folder images beside it."""
    if asked := options.get("image_root"):
        return Path(str(asked)).expanduser(), ""
    beside = path.parent
    for name in ("images", "imgs", "photos"):
        if not (beside / rows[0].path).exists() and (beside / name / rows[0].path).exists():
            return beside / name, f", photos in {name}"
    return beside, ""


def _told(table: _File, layout: _Layout, separator: str) -> str:
    names = [table.header[each] for each in layout.labels]
    if layout.one_hot:
        labels = f"a column of 0 and 1 for each of {len(names)} classes"
    elif len(names) > 1:
        labels = f"labels in the columns {joined(names)}"
    else:
        labels = f"labels in {names[0]!r}, " + (f"separated by {separator!r}" if separator else "one a row")
    used = {layout.image, layout.split, *layout.labels}
    ignored = [name for position, name in enumerate(table.header) if position not in used]
    parts = [f"columns separated by {table.delimiter!r}", f"images in {table.header[layout.image]!r}", labels]
    parts += [] if layout.split is None else [f"splits in {table.header[layout.split]!r}"]
    return ", ".join(parts + ([f"not used: {joined(ignored)}"] if ignored else []))
