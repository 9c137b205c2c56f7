"""From files to rows: every kind of dataset becomes rows of the texts instruction, input, output and history.

`load_rows` reads datasets to train on or to score, `read_whole_rows` files whose rows are passed on with all their columns.
Their errors name the file and the place of the row. columns.py says which columns are read; rows.py turns rows into tokens.
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
    {**dict.fromkeys(COLUMNS, Value("string")), "history": List(Value("string")), "weights": List(Value("int8"))}
)
HASHED_BYTES = 64 * 2**20  # the cache knows a file of up to this size by its content
SHOWN_ERRORS = 10

# Part of the cache key: rows that an older version prepared are not reused.
_THIS_CODE = "".join(Path(__file__).with_name(file).read_text("utf-8") for file in ("readers.py", "columns.py"))

# Yields each row of a source with its place, such as "line 3". Called with the name for messages, a path or Dataset, and the
# columns whose values are wanted, None for all. A row has all columns of its source; from tables, None for those not wanted.
# A row that cannot be read, where the next one may well be, is a UserError that says why.
Reader = Callable[[str, Any, Collection[str] | None], Iterator[tuple[str, Any]]]
T = TypeVar("T")


def load_rows(
    name: str, splits: tuple[str, ...], given: Mapping[str, str] | None = None, say: Callable[[str], object] = print
) -> Dataset:
    """Reads a dataset: rows with the columns instruction, input (empty where the source has none), output, history and
    weights (columns.py).

    name: a bundled name; a .json, .jsonl, .csv, .tsv or .parquet file; a folder written by `save_to_disk`; or a hub name.
    splits: which split to take of a source that has several: the first of these that it has. given: what --columns says.
    say: is called with a line that names the columns that are read, where the source has other names than ours, and those
    that are not read.

    The rows are cached on disk by `datasets`. The key is the file's content, or its size and time if it is larger than
    HASHED_BYTES; for a folder, the fingerprint that `datasets` saved with it. Raises UserError naming the file and the row
    for a source that cannot be read, a missing column, or a value that is no text.
    """
    path = Path(bundled.resolve(name))
    reader: Reader
    source: Any
    with dataset_cache():
        # Made here, because `load_dataset` reports a cache that it cannot make like a name that the hub does not have.
        Path(datasets.config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
        if path.is_file():
            reader, source = _reader_of(name, path), str(path.resolve())
            version = [source, _version(name, path)]
        else:
            reader, source = _read_dataset, _open(name, splits)
            version = source._fingerprint
        columns = _columns_by(name, reader(name, source, ()), given, answered=True)
        key = Hasher.hash([_THIS_CODE, name, version, splits[0], columns.sources])
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "prefix_tuning" / key
        line_file = folder / "columns.json"  # written before `datasets` finishes the rows, so it is there wherever they are

        def prepare() -> Iterator[dict[str, Any]]:
            seen = Seen(columns)
            rows = reader(name, source, columns.sources.values())
            yield from _checked(name, rows, seen.read)
            line = seen.line(name).encode("utf-8", "backslashreplace").decode()
            line_file.write_text(json.dumps(line), "utf-8")

        def prepared() -> tuple[Dataset, str]:
            split = NamedSplit(splits[0])  # the progress bar shows it; part of the key, because the cache keeps it
            rows = Dataset.from_generator(prepare, features=FEATURES, cache_dir=str(folder), split=split, fingerprint=key)
            # As JSON, so that a damaged one is noticed.
            return rows, json.loads(line_file.read_text("utf-8"))

        try:
            rows, line = prepared()
        except (OSError, ValueError, KeyError, pyarrow.ArrowException):
            if not folder.exists():
                raise
            shutil.rmtree(folder)  # what an earlier run left there is damaged, or else the same error comes again
            rows, line = prepared()
    if line:
        say(line)
    return rows


@contextlib.contextmanager
def dataset_cache() -> Iterator[None]:
    """Around what `datasets` writes. Raises UserError if it cannot be written. A reader's UserError comes out unwrapped."""
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
    """A hash of a file's content; of a large file its size and time, because hashing would have to read all of it."""
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
    except IndexError as error:  # of a set without rows, `datasets` saves no file, and then fails to load it
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
    """`read` of each row of a bundled or other file of questions: of its place, of it with all its columns, and as ours.

    read: may raise a UserError that begins with the place. given, say: as for `load_rows`; the line comes after all rows.
    """
    path = Path(bundled.resolve(name))
    reader = _reader_of(name, path)
    columns = _columns_by(name, reader(name, str(path), None), given, answered=False)
    seen = Seen(columns)
    rows = reader(name, str(path), None)
    yield from _checked(name, rows, lambda where, row: read(where, row, seen.read(where, row)))
    if (line := seen.line(name)) and say:
        say(line)


def _columns_by(name: str, rows: Iterator[tuple[str, Any]], given: Mapping[str, str] | None, answered: bool) -> Columns:
    """How the rows of a source are read, by the first of them that is an object."""
    for place, row in rows:
        if isinstance(row, dict):
            return columns_of(f"{name}, {place}", row, given or {}, answered)
    return Columns({}, answered)  # `_checked` will say what is wrong with the rows


def _checked(name: str, rows: Iterator[tuple[str, Any]], read: Callable[[str, dict[str, Any]], T]) -> Iterator[T]:
    """`read` of the place and the columns of each row.

    Raises UserError for a source without rows, and one for all bad rows together: those that are no objects, and those for
    which `read` or the reader raises a UserError. It has their number, and the errors of the first SHOWN_ERRORS.
    """
    count, bad = 0, 0
    errors: list[str] = []
    while True:
        try:
            place, row = next(rows)
            count += 1
            if isinstance(row, UserError):
                raise row
            if not isinstance(row, dict):
                raise UserError(f"{name}, {place}: is no object with named columns, such as instruction and output")
            result = read(f"{name}, {place}", row)
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
    """A list of rows, or one object per line: files of both kinds are called .json as well as .jsonl."""
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
            place = f"line {number}"
            try:
                yield place, _parse_json(name, place, line)
            except UserError as error:
                yield place, error


def _read_csv(name: str, path: str, columns: Collection[str] | None = None) -> Iterator[tuple[str, Any]]:
    """Separated by what Excel's line sep=; names, else by commas, semicolons or tabs: by what gives a header of most known
    names, and of most names. Empty cells without a column, behind the last one, are ignored: Excel writes some.
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
            place = f"row {number}"
            if any(map(str.strip, row.pop(None, []))):
                yield place, UserError(f"{name}, {place}: has more cells than the header line names columns")
            else:
                yield place, row
    except csv.Error as error:
        hint = 'write a quote within a cell as "", and the cell between quotes' if "expected after" in str(error) else ""
        raise UserError(f"{name}, row {number + 1}: is not CSV: {error}{hint and '; ' + hint}") from error


def _known_names(header: list[str]) -> tuple[int, int]:
    """How many of these names are known as columns, and how many there are."""
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
                    place = f"row {next(numbers)}"
                    row: dict[str, Any] = dict.fromkeys(names)
                    try:
                        for column, values in read.items():
                            row[column] = values[index].as_py()
                    except Exception as error:  # of many classes: a date beyond Python's, bytes that are no UTF-8, ...
                        yield place, UserError(f"{name}, {place}: {column!r} cannot be read: {reason_of(error)}")
                    else:
                        yield place, row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: a column's name is no UTF-8
        raise UserError(f"{name}: cannot be read as Parquet: {str(error).strip()[:300]}") from error


def _read_dataset(name: str, dataset: Dataset, columns: Collection[str] | None) -> Iterator[tuple[str, Any]]:
    names = dataset.column_names
    rows = iter(dataset.select_columns([column for column in names if columns is None or column in columns]))
    for number in range(1, len(dataset) + 1):
        try:
            row: dict[str, Any] = next(rows, {})  # without any column to read, the iterator ends at once
        except Exception as error:  # of many classes, as for Parquet
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
                if number == 0 and "\0" in line:  # ASCII in UTF-16 is also UTF-8, with a zero byte beside each character
                    raise UserError(f"{name}: is not UTF-8 text; {_encoding_hint(path)}")
                yield line
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: is not UTF-8 text: {error.reason}; {_encoding_hint(path)}") from error
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error


def _encoding_hint(path: str) -> str:
    """How to make a file UTF-8 that is not, by what its beginning looks like."""
    with open(path, "rb") as file:
        beginning = file.read(2**20)
    if beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in beginning[:4]:
        return f"it looks like UTF-16: iconv -f UTF-16 -t UTF-8 {path}"
    try:
        beginning.decode()
    except UnicodeDecodeError as error:
        with contextlib.suppress(UnicodeDecodeError):  # GB2312 has the common characters of GBK, and little else
            codecs.getincrementaldecoder("gb2312")().decode(beginning[error.start : error.start + 200])
            return f"it looks like GBK: iconv -f GB18030 -t UTF-8 {path}"
    return "save it as UTF-8"


def _parse_json(name: str, place: str, text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}, {place}: is not JSON: {error}") from error


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are unique. Of two values with one name, Python would keep the last without a word."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return found
