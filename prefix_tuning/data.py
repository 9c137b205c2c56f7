"""From a dataset's rows to packed batches: sources, template, -100 masking, packing.

source row {instruction, input, output}  ->  Example(input_ids, labels)  ->  Batch of packed tokens
"""

import csv
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow.parquet
import torch
from datasets import Dataset, DatasetDict, NamedSplit, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from prefix_tuning import demo
from prefix_tuning.config import UserError, is_text, reason_of

IGNORED = -100  # the label of a position that does not count, as in torch's cross_entropy


@dataclass
class Example:
    """One row as token ids. labels[i] is input_ids[i] where it is part of the answer, IGNORED where of the prompt."""

    input_ids: list[int]
    labels: list[int]


COLUMNS = ("instruction", "input", "output")
HASHED_BYTES = 64 * 2**20  # the cache knows a file of up to this size by its content


def load_rows(name: str, splits: tuple[str, ...]) -> Dataset:
    """Reads a dataset: rows with the string columns instruction, input (empty where the source has none) and output.

    name: a bundled name; a .json, .jsonl, .csv or .parquet file; a folder written by `save_to_disk`; or a hub name.
    splits: which split to take of a source that has several: the first of these that it has.

    The rows are cached by `datasets`, on disk, under a key that knows the file's content, or its size and time where it is
    larger than HASHED_BYTES; of a folder, what `datasets` noted when it was saved. Raises UserError naming the file and the
    row for a source that cannot be read, a missing column, or a row whose text is no text.
    """
    path = Path(demo.resolve(name))
    is_file = path.is_file()
    with _cache():
        # If it cannot be made, `load_dataset` would fail as for a name that the hub does not have.
        Path(datasets.config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
        if is_file:
            reader, source = _reader_for(name, path, _READERS), str(path.resolve())
            version = (source, _version(name, path))
        else:
            reader, source = _read_dataset, _open_dataset(name, splits)
            version = source._fingerprint
        return Dataset.from_generator(
            _checked_rows,
            gen_kwargs={"name": name, "reader": reader, "source": source},
            split=NamedSplit(splits[0]),  # for the progress bar, which names it; part of the key, as the cache keeps it
            fingerprint=Hasher.hash([_THIS_CODE, name, version, splits[0]]),
        )


def _version(name: str, path: Path) -> str:
    """Tells one content of a file from another. A large one by size and time: a hash would have to read it as a whole."""
    try:
        status = path.stat()
        if status.st_size > HASHED_BYTES:
            return f"{status.st_size} bytes at {status.st_mtime_ns}"
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from error


@contextmanager
def _cache() -> Iterator[None]:
    """For everything that `datasets` writes. Raises UserError if the disk is full, say, and for what is wrong with a row."""
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


def _open_dataset(name: str, splits: tuple[str, ...]) -> Dataset:
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
    if isinstance(found, DatasetDict):
        split = next((split for split in splits if split in found), None)
        if split is None:
            raise UserError(f"{name}: has the splits {', '.join(found)}, but none of {', '.join(splits)}")
        found = found[split]
    return found


def read_questions(name: str, prefixes: list[str]) -> Iterator[tuple[dict, str, str | None]]:
    """Reads a file of questions: each row as it is, its prompt, and the prefix that it names in the column prefix, if any.

    name: a .json, .jsonl, .csv or .parquet file. Raises UserError naming the row for one that has no text as instruction,
    that names none of `prefixes`, or that has a response already.
    """
    path = Path(demo.resolve(name))
    for place, row in _numbered(name, _reader_for(name, path, _WHOLE_ROW_READERS)(name, str(path))):
        texts = _texts(name, place, row, required=("instruction",))
        prefix = None if row.get("prefix") in (None, "") else row["prefix"]
        if prefix is not None and prefix not in prefixes:
            raise UserError(f"{name}, {place}: names the prefix {prefix!r}; there are {', '.join(prefixes)}")
        if "response" in row:
            raise UserError(f"{name}, {place}: has a column 'response' already; the answer would replace it")
        yield row, prompt_of(texts["instruction"], texts["input"]), prefix


def _reader_for(name: str, path: Path, readers: dict):
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{name}: unknown kind of file; known are {', '.join(readers)}")
    return reader


def _checked_rows(name: str, reader, source) -> Iterator[dict[str, str]]:
    """The rows of one source, each with all COLUMNS as strings."""
    for place, row in _numbered(name, reader(name, source)):
        texts = _texts(name, place, row, required=("instruction", "output"))
        if not texts["output"].strip():
            raise UserError(f"{name}, {place}: 'output' is empty; every row needs an answer")
        yield texts


def _numbered(name: str, rows: Iterator[tuple[str, object]]) -> Iterator[tuple[str, dict]]:
    """The rows of a reader. Raises UserError for one that is no object, and if there is none at all."""
    place = None
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(f"{name}, {place}: is no object with the columns instruction, input and output")
        yield place, row
    if place is None:
        raise UserError(f"{name}: holds no rows")


def _texts(name: str, place: str, row: dict, required: tuple[str, ...]) -> dict[str, str]:
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


# Each reader yields (place for messages, row). Plain readers keep "8" a text and can name the row that is wrong, where
# a table reader would guess a column's type. Of a table only the needed columns are read: a value of another that Python has
# no form for does no harm; in the row, None stands for it.


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


def _read_dataset(name: str, dataset: Dataset) -> Iterator[tuple[str, object]]:
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


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}
# For rows that are passed on as they are.
_WHOLE_ROW_READERS = _READERS | {".parquet": functools.partial(_read_parquet, columns=None)}
# Part of every cache key: rows that an older version of this file prepared are not taken for new ones.
_THIS_CODE = Path(__file__).read_text("utf-8")


def prompt_of(instruction: str, input: str = "") -> str:
    """The template: what the model reads before its answer."""
    return "\n".join(["Human: " + instruction, input]).strip() + "\n\nAssistant: "


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Rows of `load_rows` as columns input_ids and labels, in the same order, cut at max_length.

    Prompt and answer are tokenised by separate calls, as in the notebook that this re-creates, so no token spans their
    border. Rows whose prompt leaves no room for any label are left out: their loss would be 0 / 0. What looks like a special
    token in a row, "</s>" say, stays plain text: only the end of the answer gets a real one.
    """

    def encode(columns: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts = [prompt_of(*row) for row in zip(columns["instruction"], columns["input"], strict=True)]
        prompts, answers = (tokenizer(texts, split_special_tokens=True) for texts in (prompts, columns["output"]))
        encoded = {"input_ids": [], "labels": []}
        for prompt, answer in zip(prompts.input_ids, answers.input_ids, strict=True):
            answer.append(tokenizer.eos_token_id)
            if len(prompt) < max_length:
                encoded["input_ids"].append((prompt + answer)[:max_length])
                encoded["labels"].append(([IGNORED] * len(prompt) + answer)[:max_length])
        return encoded

    state = (tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)
    with _cache():
        return rows.map(
            encode,
            batched=True,
            remove_columns=rows.column_names,
            desc="Tokenising",
            new_fingerprint=Hasher.hash([_THIS_CODE, rows._fingerprint, state, max_length]),
        )


def digest(dataset: Dataset) -> str:
    """Tells one dataset of texts, or of token ids and labels, from another: a hash over all rows, in their order."""
    found = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(1000):
        for column in map(pyarrow.ChunkedArray.combine_chunks, batch.columns):
            if pyarrow.types.is_string(column.type):
                found.update(json.dumps(column.to_pylist()).encode())
            else:
                for numbers in (column.value_lengths(), column.flatten()):
                    found.update(numbers.cast("int64").to_numpy())
    return found.hexdigest()


def take(tokenized: Dataset, indices: list[int]) -> list[Example]:
    """The examples at these places of a tokenised dataset."""
    columns = tokenized[indices]
    return [Example(*row) for row in zip(columns["input_ids"], columns["labels"], strict=True)]


@dataclass
class Batch:
    """Rows end to end, without padding. All tensors are int64.

    input_ids:        (total_tokens,)
    label_positions:  (labels,) the packed position whose output predicts the label, one before the labelled token
    labels:           (labels,) the token ids to predict
    lengths:          tokens of each row
    first_labels:     of each row, the first place in it whose output predicts a label; its length if there is none
    slots:            (total_tokens,) place of each token in the flattened (rows, max_length) grid; None if it has no padding
    """

    input_ids: torch.Tensor
    label_positions: torch.Tensor
    labels: torch.Tensor
    lengths: list[int]
    first_labels: list[int]
    slots: torch.Tensor | None

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    def to(self, device: torch.device) -> "Batch":
        """This batch on `device`. From pinned memory, so that a CUDA copy waits for nothing that is still computing."""

        def move(value):
            if not isinstance(value, torch.Tensor):
                return value
            return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)

        return Batch(**{name: move(value) for name, value in vars(self).items()})

    def to_grid(self, packed: torch.Tensor) -> torch.Tensor:
        """(total_tokens, ...) -> (rows, max_length, ...), zeros where a row is shorter."""
        if self.slots is not None:
            grid = packed.new_zeros(self.rows * self.max_length, *packed.shape[1:])
            packed = grid.index_copy(0, self.slots, packed)
        return packed.unflatten(0, (self.rows, self.max_length))

    def from_grid(self, grid: torch.Tensor) -> torch.Tensor:
        """(rows, max_length, ...) -> (total_tokens, ...): `to_grid` undone."""
        flat = grid.flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)


def pack(examples: list[Example], max_tokens: int) -> Iterator[Batch]:
    """Packs the examples into batches of up to `max_tokens` tokens, rows of similar length together.

    A row that is longer than `max_tokens` makes a batch of its own.
    """
    rows: list[Example] = []
    tokens = 0
    for example in sorted(examples, key=lambda example: len(example.input_ids)):
        if rows and tokens + len(example.input_ids) > max_tokens:
            yield _batch(rows)
            rows, tokens = [], 0
        rows.append(example)
        tokens += len(example.input_ids)
    if rows:
        yield _batch(rows)


def _batch(rows: list[Example]) -> Batch:
    lengths = [len(row.input_ids) for row in rows]
    # Position i predicts token i + 1: shift the labels to where their prediction is made.
    shifted = [[*row.labels[1:], IGNORED] for row in rows]
    flat = torch.tensor(list(itertools.chain(*shifted)))
    label_positions = (flat != IGNORED).nonzero().flatten()
    in_row = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Batch(
        input_ids=torch.tensor(list(itertools.chain(*(row.input_ids for row in rows)))),
        label_positions=label_positions,
        labels=flat[label_positions],
        lengths=lengths,
        first_labels=[next((i for i, label in enumerate(row) if label != IGNORED), len(row)) for row in shifted],
        slots=None if bool(in_row.all()) else in_row.flatten().nonzero().flatten(),
    )


# A batch that asks for nothing: one token, no label.
NO_LABELS = _batch([Example([0], [IGNORED])])


def count_labels(examples: list[Example]) -> int:
    """How many labels are predicted: a row's first token has nothing before it that could."""
    return sum(label != IGNORED for example in examples for label in example.labels[1:])
