"""From rows to tokens."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import datasets
import pyarrow.parquet
from datasets import Dataset, DatasetDict, NamedSplit, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from prefix_tuning import bundled
from prefix_tuning.data import readers
from prefix_tuning.data.readers import (
    READERS,
    WHOLE_ROW_READERS,
    checked_rows,
    numbered_rows,
    read_dataset,
    reader_for,
    row_texts,
)
from prefix_tuning.errors import UserError, reason_of
from prefix_tuning.model.batch import IGNORED, Example

# Part of every cache key: rows that an older version of this code prepared are not taken for new ones.
_THIS_CODE = [Path(file).read_text("utf-8") for file in (__file__, readers.__file__)]
HASHED_BYTES = 64 * 2**20  # the cache knows a file of up to this size by its content


def load_rows(name: str, splits: tuple[str, ...]) -> Dataset:
    """Reads a dataset: rows with the string columns instruction, input (empty where the source has none) and output.

    name: a bundled name; a .json, .jsonl, .csv or .parquet file; a folder written by `save_to_disk`; or a hub name.
    splits: which split to take of a source that has several: the first of these that it has.

    The rows are cached by `datasets`, on disk, under a key that knows the file's content, or its size and time where it is
    larger than HASHED_BYTES; of a folder, what `datasets` noted when it was saved. Raises UserError naming the file and the
    row for a source that cannot be read, a missing column, or a row whose text is no text.
    """
    path = Path(bundled.resolve(name))
    is_file = path.is_file()
    with _cache():
        # If it cannot be made, `load_dataset` would fail as for a name that the hub does not have.
        Path(datasets.config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
        if is_file:
            reader, source = reader_for(name, path, READERS), str(path.resolve())
            version = (source, _version(name, path))
        else:
            reader, source = read_dataset, _open_dataset(name, splits)
            version = source._fingerprint
        return Dataset.from_generator(
            checked_rows,
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
        elif Path(name).suffix.lower() in READERS:
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
    path = Path(bundled.resolve(name))
    for place, row in numbered_rows(name, reader_for(name, path, WHOLE_ROW_READERS)(name, str(path))):
        texts = row_texts(name, place, row, required=("instruction",))
        prefix = None if row.get("prefix") in (None, "") else row["prefix"]
        if prefix is not None and prefix not in prefixes:
            raise UserError(f"{name}, {place}: names the prefix {prefix!r}; there are {', '.join(prefixes)}")
        if "response" in row:
            raise UserError(f"{name}, {place}: has a column 'response' already; the answer would replace it")
        yield row, prompt_of(texts["instruction"], texts["input"]), prefix


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
