"""From files to rows."""

import csv
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet
from datasets import Dataset

from prefix_tuning.errors import UserError, reason_of
from prefix_tuning.text import is_text

COLUMNS = ("instruction", "input", "output")


def reader_for(name: str, path: Path, readers: dict):
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{name}: unknown kind of file; known are {', '.join(readers)}")
    return reader


def checked_rows(name: str, reader, source) -> Iterator[dict[str, str]]:
    """The rows of one source, each with all COLUMNS as strings."""
    for place, row in numbered_rows(name, reader(name, source)):
        texts = row_texts(name, place, row, required=("instruction", "output"))
        if not texts["output"].strip():
            raise UserError(f"{name}, {place}: 'output' is empty; every row needs an answer")
        yield texts


def numbered_rows(name: str, rows: Iterator[tuple[str, object]]) -> Iterator[tuple[str, dict]]:
    """The rows of a reader. Raises UserError for one that is no object, and if there is none at all."""
    place = None
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{name}, {place}: is no object with the columns instruction, input and output")
        yield place, row
    if place is None:
        raise UserError(f"{name}: holds no rows")


def row_texts(name: str, place: str, row: dict, required: tuple[str, ...]) -> dict[str, str]:
    """All COLUMNS of a row as strings, "" for those that need not be there. Raises UserError for what is no text."""
    texts = {}
    for column in COLUMNS:
        if column in required and column not in row:
            raise UserError(f"{name}, {place}: has no column {column!r}; it has {', '.join(map(repr, row)) or 'none'}")
        value = row.get(column)
        if value is None and column not in required:
            value = ""
        if not isinstance(value, str):
            shown = json.dumps(value, ensure_ascii=False, default=str)[:80]
            raise UserError(f"{name}, {place}: {column!r} must be a text, not {shown}")
        if not is_text(value):
            raise UserError(f"{name}, {place}: {column!r} holds half of a character (a lone surrogate)")
        texts[column] = value
    return texts


def _read_jsonl(name: str, path: str) -> Iterator[tuple[str, object]]:
    for number, line in enumerate(_lines(name, path), start=1):
        if line.strip():
            yield f"line {number}", _parse_json(name, f"line {number}", line)


def _read_json(name: str, path: str) -> Iterator[tuple[str, object]]:
    first = next((line.strip() for line in _lines(name, path) if line.strip()), "")
    if first == "{":
        raise UserError(f"{name}: is one object over several lines; it must be a list of rows, or one object per line")
    if first.startswith("["):
        rows = _parse_json(name, "as a whole", "".join(_lines(name, path)))
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    else:  # often a .json file holds one object per line
        yield from _read_jsonl(name, path)


def _read_csv(name: str, path: str) -> Iterator[tuple[str, object]]:
    number = 0
    csv.field_size_limit(2**31 - 1)  # the default refuses cells of more than 131,072 characters
    try:
        table = csv.DictReader(_lines(name, path), strict=True)
        _refuse_twins(name, table.fieldnames or [])
        for number, row in enumerate(table, start=1):
            if None in row:
                raise UserError(f"{name}, row {number}: has more cells than the header line names columns")
            yield f"row {number}", row
    except csv.Error as error:
        raise UserError(f"{name}, row {number + 1}: is not CSV: {error}") from error


def _read_parquet(name: str, path: str, columns: Sequence[str] | None = COLUMNS) -> Iterator[tuple[str, object]]:
    """columns: those to read; None: all."""
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _refuse_twins(name, names)
            numbers = itertools.count(1)
            for batch in file.iter_batches(1024, columns=columns):
                read = dict(zip(batch.schema.names, batch.columns, strict=True))
                for index in range(batch.num_rows):
                    place, row = f"row {next(numbers)}", dict.fromkeys(names)
                    try:
                        for column, values in read.items():
                            row[column] = values[index].as_py()
                    except Exception as error:  # a time beyond Python's, bytes that are no UTF-8, ...: of many classes
                        raise UserError(f"{name}, {place}: {column!r} cannot be read: {reason_of(error)}") from error
                    yield place, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: of a column's name
        raise UserError(f"{name}: cannot be read as Parquet: {str(error).strip()[:300]}") from error


def _refuse_twins(name: str, columns: Sequence[str]) -> None:
    if twins := {column for column in columns if columns.count(column) > 1}:
        raise UserError(f"{name}: has more than one column {min(twins)!r}")


def read_dataset(name: str, dataset: Dataset) -> Iterator[tuple[str, object]]:
    names = dataset.column_names
    rows = iter(dataset.select_columns([column for column in COLUMNS if column in names]))
    for number in range(1, len(dataset) + 1):
        try:
            row = next(rows, {})  # it ends at once where there are no columns to read
        except Exception as error:  # as for Parquet
            raise UserError(f"{name}, row {number}: cannot be read: {reason_of(error)}") from error
        yield f"row {number}", dict.fromkeys(names) | row


def _lines(name: str, path: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            yield from file
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not UTF-8 text: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error


def _parse_json(name: str, place: str, text: str) -> object:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}, {place}: is not JSON: {error}") from error


def _unique(pairs: list[tuple[str, object]]) -> dict:
    """A JSON object. Python would silently keep the last of two values with one name."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return found


READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}


# For rows that are passed on as they are.
WHOLE_ROW_READERS = READERS | {".parquet": functools.partial(_read_parquet, columns=None)}
