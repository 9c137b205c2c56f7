"""From files to rows: every kind of dataset becomes rows of the texts instruction, input, output, system and history.

`load_rows` reads datasets to train on or to score, and `read_whole_rows` files of questions, whose rows keep all their
columns. columns.py says which columns are read; rows.py turns rows into tokens.

Datasets of the hub and saved folders are read by `datasets`. Files have readers of our own, for what its builders do not
give: an error names the row, and all bad rows are found in one pass; a file in another encoding is named with the command
that converts it; a CSV file is read as Excel writes it, and its cells stay texts (the answer 007 is not the number 7); and
of two columns with the same name, none is renamed or dropped silently.
"""

import codecs
import contextlib
import csv
import hashlib
import itertools
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import datasets
import pyarrow.parquet
from datasets import Dataset, DatasetDict, Features, List, NamedSplit, Value, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from prefix_tuning import bundled
from prefix_tuning.data.columns import COLUMNS, OPTIONAL, PAIRS, Columns, Seen, columns_of
from prefix_tuning.errors import UserError, reason_of

FEATURES = Features(
    {**dict.fromkeys((*COLUMNS, "system"), Value("string"))}
    | {"history": List(Value("string")), "weights": List(Value("int8"))}
)
# The version of the cached rows, part of their cache key. Raise it when this file or columns.py begins to make other rows of
# the same source, or another line about its columns; else users keep getting the rows that are already in their cache.
ROWS_VERSION = 2
HASHED_BYTES = 64 * 2**20  # the cache recognises a file of up to this size by its content
SHOWN_ERRORS = 10

# A reader is called with the name for messages, a path or Dataset, and the columns whose values are wanted (None: all). It
# yields each row with its position, such as "line 3". A row has all columns of its source; in rows of tables, columns that
# are not wanted have the value None. In place of a row that cannot be read, it yields a UserError and goes on.
Reader = Callable[[str, Any, Collection[str] | None], Iterator[tuple[str, Any]]]
T = TypeVar("T")


def load_rows(
    name: str,
    splits: tuple[str, ...],
    given: Mapping[str, str] | None = None,
    say: Callable[[str], object] = print,
    may_lack: bool = False,
) -> Dataset:
    """Reads a dataset: rows with the columns instruction, input and system (empty if the source has none), output, history
    and weights (columns.py).

    name: a bundled name; a .json, .jsonl, .csv, .tsv or .parquet file; a folder written by `save_to_disk`; or a hub name.
    splits: of a source with several splits, the first of these that it has is read. given: the parsed --columns.
    say: is called with a line about the columns, if some are not read or have other names than ours. may_lack: a row may
    lack its answer; its output is then empty.

    `datasets` caches the rows on disk. The key is the file's content, or its size and time if it is larger than
    HASHED_BYTES; for a folder, the fingerprint that `datasets` saved with it. Raises UserError, which names the file and the
    row, for a source that cannot be read, a missing column, or a value that is not a text.
    """
    path = Path(bundled.resolve(name))
    reader: Reader
    source: Any
    with dataset_cache():
        # Made here, because `load_dataset` reports a folder that it cannot make as a name that the hub does not know.
        Path(datasets.config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
        if path.is_file():
            reader, source = _reader_of(name, path), str(path.resolve())
            version = [source, _version(name, path)]
        else:
            reader, source = _read_dataset, _open(name, splits)
            version = source._fingerprint
        columns = _columns_by(name, reader(name, source, ()), given, answered=True, may_lack=may_lack)
        key = Hasher.hash([ROWS_VERSION, name, version, splits[0], columns.sources, *["may lack answers"] * may_lack])
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "prefix_tuning" / key
        # Written before `datasets` finishes the rows, so it exists whenever they do.
        line_file = folder / "columns.json"

        def prepare() -> Iterator[dict[str, Any]]:
            seen = Seen(columns)
            rows = reader(name, source, columns.sources.values())
            yield from _checked(name, rows, seen.read)
            line_file.write_text(json.dumps(seen.line(name)), "utf-8")

        def prepared() -> tuple[Dataset, str]:
            split = NamedSplit(splits[0])  # for the progress bar; part of the key, because the cache records it
            rows = Dataset.from_generator(prepare, features=FEATURES, cache_dir=str(folder), split=split, fingerprint=key)
            # JSON shows if the file is damaged.
            return rows, json.loads(line_file.read_text("utf-8"))

        try:
            rows, line = prepared()
        except (OSError, ValueError, KeyError, pyarrow.ArrowException):
            if not folder.exists():
                raise
            # A full disk or a kill may have damaged the cache. If that is not the reason, the error comes again.
            shutil.rmtree(folder)
            rows, line = prepared()
    if line:
        say(line)
    return rows


@contextlib.contextmanager
def dataset_cache() -> Iterator[None]:
    """Wraps code in which `datasets` writes its cache. Raises UserError if it cannot, and passes a reader's UserError on."""
    try:
        yield
    except (DatasetGenerationError, OSError) as error:
        cause = error.__cause__ if isinstance(error, DatasetGenerationError) else error
        if isinstance(cause, UserError):
            raise cause from None
        if not isinstance(cause, OSError):
            raise
        folder = datasets.config.HF_DATASETS_CACHE
        hint = "make room, or name another folder by the variable HF_DATASETS_CACHE"
        raise UserError(f"{folder}: prepared rows cannot be kept there: {reason_of(cause)}; {hint}") from error


def _version(name: str, path: Path) -> str:
    """A hash of a file's content. For a large file, size and time instead, because hashing would read all of it."""
    try:
        status = path.stat()
        if status.st_size > HASHED_BYTES:
            return f"{status.st_size} bytes at {status.st_mtime_ns}"
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error


def _open(name: str, splits: tuple[str, ...]) -> Dataset:
    """A dataset from a folder or from the hub, reduced to one split."""
    try:
        if Path(name).is_dir():
            found = load_from_disk(name)
        elif Path(name).suffix.lower() in _READERS:
            raise UserError(f"{name}: no such file")
        else:
            found = load_dataset(name)
    except (OSError, ValueError, RuntimeError) as error:
        kind = "a folder, but not one written by save_to_disk" if Path(name).is_dir() else "no file, folder or hub name"
        raise UserError(f"{name}: {kind} that can be loaded: {str(error).strip()[:300]}") from error
    except IndexError as error:  # `datasets` saves a set without rows as no file at all, and then fails to load it
        raise UserError(f"{name}: holds no rows, or a split without rows") from error
    if isinstance(found, DatasetDict):
        split = next((split for split in splits if split in found), None)
        if split is None:
            raise UserError(f"{name}: has the splits {', '.join(found)}, but none of {', '.join(splits)}")
        found = found[split]
    return found.with_format(None)  # a saved format may hide columns, or give other values than Python's


# --- rows of any source, checked ---


def read_whole_rows(
    name: str,
    read: Callable[[str, dict[str, Any], dict[str, Any]], T],
    given: Mapping[str, str] | None = None,
    say: Callable[[str], object] | None = None,
) -> Iterator[T]:
    """Yields read(where, row, question) for each row of a bundled or other file of questions.

    where: the file and the row's position, with which a UserError of `read` should begin. row: the row with all its columns.
    question: the row as ours (columns.py). given, say: as for `load_rows`; the line comes after all rows.
    """
    path = Path(bundled.resolve(name))
    reader = _reader_of(name, path)
    columns = _columns_by(name, reader(name, str(path), None), given, answered=False)
    seen = Seen(columns)
    rows = reader(name, str(path), None)
    yield from _checked(name, rows, lambda where, row: read(where, row, seen.read(where, row)))
    if (line := seen.line(name)) and say:
        say(line)


def read_text(name: str, path: str) -> str:
    """The text of a UTF-8 file, without a byte order mark; each CR LF is a LF.

    name: of the file, for messages. Raises UserError if it cannot be read, or is in another encoding.
    """
    return "".join(_lines(name, path)).replace("\r\n", "\n")


def _columns_by(
    name: str,
    rows: Iterator[tuple[str, Any]],
    given: Mapping[str, str] | None,
    answered: bool,
    may_lack: bool = False,
) -> Columns:
    """How to read the rows of a source, judged by the first row that is an object."""
    for position, row in rows:
        if isinstance(row, dict):
            return columns_of(f"{name}, {position}", row, given or {}, answered, may_lack)
    return Columns({}, answered)  # `_checked` will say what is wrong with the rows


def _checked(name: str, rows: Iterator[tuple[str, Any]], read: Callable[[str, dict[str, Any]], T]) -> Iterator[T]:
    """Yields read(where, row) for each row.

    Raises UserError for a source without rows. Raises one UserError for all bad rows together: rows that are not objects,
    that the reader could not read, or for which `read` raises a UserError. It tells how many they are, and what is wrong
    with the first SHOWN_ERRORS of them. If the file cannot be read to its end, that counts as a bad row, too.
    """
    count, bad = 0, 0
    errors: list[str] = []
    while True:
        try:
            position, row = next(rows)
            count += 1
            if isinstance(row, UserError):
                raise row
            if not isinstance(row, dict):
                raise UserError(f"{name}, {position}: is no object with named columns, such as instruction and output")
            result = read(f"{name}, {position}", row)
        except StopIteration:
            break
        except UserError as error:
            bad += 1
            if bad <= SHOWN_ERRORS:
                errors.append(str(error))
        else:
            if not bad:
                yield result
    if bad > 1:
        others = [error.removeprefix(name).lstrip(",: ") for error in errors]
        first = f", the first {SHOWN_ERRORS}" if bad > SHOWN_ERRORS else ""
        raise UserError(f"{name}: {bad} bad rows{first}: {'; '.join(others)}")
    if bad:
        raise UserError(errors[0])
    if not count:
        raise UserError(f"{name}: holds no rows")


# --- one reader for each kind of source ---


def _reader_of(name: str, path: Path) -> Reader:
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{name}: unknown kind of file; known are {', '.join(_READERS)}")
    return reader


def _read_json(name: str, path: str, columns: Collection[str] | None = None) -> Iterator[tuple[str, Any]]:
    """A list of rows, or one row per line: both kinds of files are called .json as well as .jsonl."""
    written = (line.strip() for line in _lines(name, path) if line.strip())
    first, second = next(written, ""), next(written, "")
    if first.startswith("{") and not first.endswith("}") and second and not second.startswith("{"):
        hint = "it must be a list of rows, or one object per line, as `jq -c .` writes it"
        raise UserError(f"{name}: has an object over several lines; {hint}")
    if first.startswith("["):
        rows = _parse_json(name, "as a whole", "".join(_lines(name, path)))
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(_lines(name, path), start=1):
        if line.strip():
            position = f"line {number}"
            try:
                yield position, _parse_json(name, position, line)
            except UserError as error:
                yield position, error


def _read_csv(name: str, path: str, columns: Collection[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Cells separated by the character that a first line like Excel's sep=; names. Without such a line, by commas,
    semicolons or tabs: by the one that splits the header into the most known names or, if equal, into the most names.

    Empty cells after the last named column, which Excel may write, are ignored.
    """
    number = 0
    csv.field_size_limit(2**31 - 1)  # the default refuses cells of more than 131,072 characters
    lines = itertools.dropwhile(lambda line: not line.strip(), _lines(name, path))
    try:
        header = next(lines, "")
        if header.startswith("sep=") and len(separator := header[4:].rstrip("\r\n")) == 1:
            header = next(lines, "")
        else:
            separator = max(",;\t", key=lambda one: _known_names(next(csv.reader([header], delimiter=one), [])))
        table = csv.DictReader(itertools.chain([header], lines), delimiter=separator, strict=True)
        names = list(table.fieldnames or [])
        while names and not names[-1].strip():
            names.pop()
        _refuse_duplicates(name, names)
        table.fieldnames = names
        for number, row in enumerate(table, start=1):
            position = f"row {number}"
            if any(map(str.strip, row.pop(None, []))):
                yield position, UserError(f"{name}, {position}: has more cells than the header line names columns")
            else:
                yield position, row
    except csv.Error as error:
        hint = 'write a quote within a cell as "", and the cell between quotes' if "expected after" in str(error) else ""
        raise UserError(f"{name}, row {number + 1}: is not CSV: {error}{hint and '; ' + hint}") from error


def _known_names(header: list[str]) -> tuple[int, int]:
    """The number of names in a header that are known as columns, and of all its names."""
    known = {*OPTIONAL, *COLUMNS, *itertools.chain(*PAIRS)}
    return len(known & {cell.strip() for cell in header}), len(header)


def _read_parquet(name: str, path: str, columns: Collection[str] | None) -> Iterator[tuple[str, Any]]:
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            _refuse_duplicates(name, names)
            numbers = itertools.count(1)
            for batch in file.iter_batches(1024, columns=None if columns is None else list(columns)):
                read = dict(zip(batch.schema.names, batch.columns, strict=True))
                for index in range(batch.num_rows):
                    position = f"row {next(numbers)}"
                    row: dict[str, Any] = dict.fromkeys(names)
                    try:
                        for column, values in read.items():
                            row[column] = values[index].as_py()
                    except Exception as error:  # many classes: for a date beyond Python's, for bytes that are not UTF-8, ...
                        yield position, UserError(f"{name}, {position}: {column!r} cannot be read: {reason_of(error)}")
                    else:
                        yield position, row
    # UnicodeDecodeError comes if a column's name is not UTF-8.
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot be read as Parquet: {str(error).strip()[:300]}") from error


def _read_dataset(name: str, dataset: Dataset, columns: Collection[str] | None) -> Iterator[tuple[str, Any]]:
    names = dataset.column_names
    rows = iter(dataset.select_columns([column for column in names if columns is None or column in columns]))
    for number in range(1, len(dataset) + 1):
        try:
            row: dict[str, Any] = next(rows, {})  # {}: without any column to read, the iterator ends at once
        except Exception as error:  # many classes, as for Parquet
            raise UserError(f"{name}, row {number}: cannot be read: {reason_of(error)}") from error
        yield f"row {number}", dict.fromkeys(names) | row


_READERS: dict[str, Reader] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}


def _refuse_duplicates(name: str, columns: Sequence[str]) -> None:
    if duplicates := {column for column in columns if columns.count(column) > 1}:
        raise UserError(f"{name}: has more than one column {min(duplicates)!r}")


def _lines(name: str, path: str) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(file):
                if number == 0 and "\0" in line:  # ASCII text in UTF-16 is valid UTF-8 with zero bytes
                    raise UserError(f"{name}: is not UTF-8 text; {_encoding_hint(path)}")
                yield line
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not UTF-8 text: {error.reason}; {_encoding_hint(path)}") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error


def _encoding_hint(path: str) -> str:
    """How to convert a file to UTF-8, judged by its beginning."""
    with open(path, "rb") as file:
        beginning = file.read(2**20)
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in beginning[:4]:
        return f"it looks like UTF-16: iconv -f UTF-16 -t UTF-8 {path}"
    try:
        beginning.decode()
    except UnicodeDecodeError as error:
        # GB2312 holds the common characters of GBK and little else, so other encodings hardly ever decode as it.
        with contextlib.suppress(UnicodeDecodeError):
            codecs.getincrementaldecoder("gb2312")().decode(beginning[error.start : error.start + 200])
            return f"it looks like GBK: iconv -f GB18030 -t UTF-8 {path}"
    return "save it as UTF-8"


def _parse_json(name: str, position: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}, {position}: is not JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object with unique names. Of two values with the same name, Python would silently keep the last one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return found
