"""From rows to tokens, and which tokens are labels. templates.py says how a row is written for the model."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow
import pyarrow.compute
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from prefix_tuning.data.readers import dataset_cache, read_whole_rows
from prefix_tuning.data.templates import Question, Talk, Template, part_ids, talk_of
from prefix_tuning.errors import UserError
from prefix_tuning.model.batch import IGNORED, Example

# The version of the cached tokens, part of their cache key. Raise it when `encode` begins to make other tokens, labels or
# counts of the same rows; else users keep getting those that are already in their cache. (The rows have ROWS_VERSION.)
TOKENS_VERSION = 2

# The columns of a row of ours that make its `talk_of`.
ASKED = ("instruction", "input", "history", "system")


def tokenize(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, template: Template = None, name: str = "rows"
) -> Dataset:
    """`encode` without the rows that have no label: alone in a batch, their mean loss would be 0 / 0."""
    return with_labels(encode(rows, tokenizer, max_length, template, name))


def encode(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, template: Template = None, name: str = "rows"
) -> Dataset:
    """Tokenises rows of `load_rows`, in the same order. Columns input_ids and labels: lists of at most max_length token ids.

        input_ids = tokens(prompt)               + tokens(output) + [EOS]      (BOS in front: see templates.py)
        labels    = [-100] * len(tokens(prompt)) + tokens(output) + [EOS]

    -100 is the ignore_index of torch's cross_entropy. The prompt counts neither in the loss nor in the number of labels that
    the loss is divided by, so the prefix learns to answer, not to write questions.

    Prompt and output are tokenised by separate calls, as in the notebook that this program re-creates. So no token contains
    the end of one and the start of the other, and the prompt becomes the same tokens as in inference, which has no output.
    With a chat template, a talk is tokenised whole, and the token that ends an answer is the template's own. Raises
    UserError for a row that the template refuses, or whose prompt is other tokens without the answer. name: of the dataset,
    for that message.

    A talk is several such turns one after the other. All its answers are learned except those with weight 0. Turns are kept
    from the first one on, as long as they fit whole. If the first turn alone is too long, it is cut like any other row.

    If the (first) prompt alone fills max_length, no label is left, and both lists are empty.

    Four more columns count: `turns`, the turns kept; `length`, the tokens of the whole row; `answers`, its answers that are
    to be learned; and `cut`, those among them that lose their end or are left out.

    plain.py does the same row by row and without talks; here it is done in batches and cached on disk.
    """

    def encode_batch(columns: dict[str, list]) -> dict[str, list]:
        asked = map(talk_of, *(columns[name] for name in ASKED))
        talks = [Talk([*talk.texts, output], talk.system) for talk, output in zip(asked, columns["output"], strict=True)]
        try:
            talks_in_parts = part_ids(tokenizer, talks, template)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        encoded: dict[str, list] = {key: [] for key in ("input_ids", "labels", "turns", "length", "answers", "cut")}
        for parts, weights in zip(talks_in_parts, columns["weights"], strict=True):
            weights = weights or [1] * (len(parts) // 2)
            ids: list[int] = []
            labels: list[int] = []
            turns, length, learned_whole = 0, 0, 0
            for prompt, answer, weight in zip(parts[::2], parts[1::2], weights, strict=True):
                length += len(prompt) + len(answer)
                if length <= max_length or not ids:
                    turns += 1
                    ids += prompt + answer
                    labels += [IGNORED] * len(prompt) + (answer if weight else [IGNORED] * len(answer))
                    learned_whole += weight if length <= max_length else 0
            end = max_length if any(label != IGNORED for label in labels[:max_length]) else 0
            encoded["input_ids"].append(ids[:end])
            encoded["labels"].append(labels[:end])
            encoded["turns"].append(turns if end else 0)
            encoded["length"].append(length)
            encoded["answers"].append(sum(weights))
            encoded["cut"].append(sum(weights) - learned_whole)
        return encoded

    state = (tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, template)
    options: dict[str, Any] = {
        "batched": True,
        "remove_columns": rows.column_names,
        "desc": "Tokenising",
        "new_fingerprint": Hasher.hash([TOKENS_VERSION, rows._fingerprint, state, max_length]),
    }
    with dataset_cache():
        try:
            return rows.map(encode_batch, **options)
        except (OSError, pyarrow.ArrowException):  # the cache is damaged
            return rows.map(encode_batch, load_from_cache_file=False, **options)


def with_labels(encoded: Dataset) -> Dataset:
    """The rows of `encode` that have a label, with their columns input_ids and labels."""
    kept = pyarrow.compute.indices_nonzero(pyarrow.compute.list_value_length(encoded.data.column("labels")))
    tokenized = encoded.select_columns(["input_ids", "labels"])
    return tokenized if len(kept) == len(tokenized) else tokenized.select(kept.cast("int64").to_numpy())


def usable_rows(name: str, encoded: Dataset, max_length: int) -> Dataset:
    """`with_labels`, which also prints how many rows were left out and how many answers were cut.

    name: of the dataset. Raises UserError if no row is left.
    """
    tokenized = with_labels(encoded)
    if not len(tokenized):
        raise UserError(f"{name}: no row has a label left; every prompt fills --max_length {max_length}")
    if dropped := len(encoded) - len(tokenized):
        print(f"{name}: left out {dropped} of {len(encoded)} rows, whose prompts alone fill --max_length {max_length}")
    cut, answers, longest = cut_answers(encoded)
    if cut:
        print(f"{name}: {cut} of {answers} answers are cut or left out; --max_length {longest} would keep them all")
    return tokenized


def cut_answers(encoded: Dataset) -> tuple[int, int, int]:
    """Of the rows of `encode`: how many answers are cut or left out, of how many, and the max_length that keeps all."""
    cut, answers = (pyarrow.compute.sum(encoded.data.column(name)).as_py() for name in ("cut", "answers"))
    return cut, answers, pyarrow.compute.max(encoded.data.column("length")).as_py()


def take(tokenized: Dataset, indices: Sequence[int]) -> list[Example]:
    """The examples with these indices of a tokenised dataset."""
    columns = tokenized[indices]
    return [Example(*row) for row in zip(columns["input_ids"], columns["labels"], strict=True)]


def has_history(encoded: Dataset) -> bool:
    """Whether any row of `encode` keeps more than one turn."""
    return pyarrow.compute.max(encoded.data.column("turns")).as_py() > 1


def digest(dataset: Dataset) -> str:
    """A hash over all rows, in their order, of a dataset of texts or of token ids and labels."""
    found = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(1000):
        for column in map(pyarrow.ChunkedArray.combine_chunks, batch.columns):
            if pyarrow.types.is_list(column.type) and pyarrow.types.is_integer(column.type.value_type):
                for numbers in (column.value_lengths(), column.flatten()):
                    found.update(numbers.cast("int64").to_numpy())
            else:
                found.update(json.dumps(column.to_pylist()).encode())
    return found.hexdigest()


def read_questions(
    name: str,
    prefixes: list[str],
    given: Mapping[str, str] | None = None,
    say: Callable[[str], object] | None = None,
) -> Iterator[Question]:
    """Reads a file of questions.

    name: a .json, .jsonl, .csv, .tsv or .parquet file. given, say: as for `load_rows`. Raises UserError, which names the
    rows, for a question that is not a text, a prefix that is not in `prefixes`, and a row that already has a response.
    """

    def read(where: str, row: dict[str, Any], question: dict[str, Any]) -> Question:
        prefix = None if row.get("prefix") in (None, "") else row["prefix"]
        if prefix is not None and prefix not in prefixes:
            raise UserError(f"{where}: names the prefix {prefix!r}; there are {', '.join(prefixes)}")
        if "response" in row:
            raise UserError(f"{where}: has a column 'response' already; the answer would replace it")
        return row, talk_of(*(question[name] for name in ASKED)), prefix

    return read_whole_rows(name, read, given, say)
