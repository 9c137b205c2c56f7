"""From rows to tokens: the template, tokenisation, and which tokens are labels."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.compute
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from prefix_tuning.data.readers import dataset_cache, read_whole_rows
from prefix_tuning.errors import UserError
from prefix_tuning.model.batch import IGNORED, Example

# Part of the cache key: tokens that an older version prepared are not reused. The key of their rows has the readers' code.
_THIS_CODE = Path(__file__).read_text("utf-8")


# A row of a file of questions as it is, its `parts_of`, and the prefix that its column prefix names, if it does.
Question = tuple[dict[str, Any], list[str], str | None]


def prompt_of(instruction: str, input: str = "") -> str:
    """The template: all that the model reads before the answer. Training and inference share it.

    Human: INSTRUCTION
    INPUT                  (no such line where there is no input)

    Assistant:             (and a space; the answer follows it)
    """
    return "\n".join(["Human: " + instruction, input]).strip() + "\n\nAssistant: "


def question_of(prompt: str) -> str:
    """What a prompt asks, without the template: the inverse of `prompt_of`."""
    return prompt.removeprefix("Human: ").removesuffix("\n\nAssistant: ")


def parts_of(instruction: str, input: str = "", history: Sequence[str] = ()) -> list[str]:
    """All that the model reads before its answer, in the parts that are tokenised each by itself.

    prompt, answer, prompt, answer, ..., prompt: those before the last are of the turns in `history`.
    """
    turns = [text if place % 2 else prompt_of(text) for place, text in enumerate(history)]
    return [*turns, prompt_of(instruction, input)]


def part_ids(tokenizer: PreTrainedTokenizerBase, talks: Sequence[Sequence[str]]) -> list[list[list[int]]]:
    """The token ids of every part of every talk. Each answer ends with EOS.

    Text that looks like a special token, "</s>" say, is tokenised as text (split_special_tokens).
    """
    texts = list(chain.from_iterable(talks))
    ids = iter(tokenizer(texts, split_special_tokens=True).input_ids if texts else [])
    return [[next(ids) + [tokenizer.eos_token_id] * (place % 2) for place in range(len(parts))] for parts in talks]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, talks: Sequence[Sequence[str]]) -> list[list[int]]:
    """The token ids of each of these talks, which are `parts_of`."""
    return [list(chain.from_iterable(parts)) for parts in part_ids(tokenizer, talks)]


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """The tokens of the rows that have a label, by `encode`. The mean loss of another row would be 0 / 0."""
    return with_labels(encode(rows, tokenizer, max_length))


def encode(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Rows of `load_rows` as columns input_ids and labels, lists of at most max_length token ids, in the same order.

        input_ids = tokens(prompt)               + tokens(output) + [EOS]
        labels    = [-100] * len(tokens(prompt)) + tokens(output) + [EOS]

    -100 is the ignore_index of torch's cross_entropy: the prompt counts neither in the loss nor in the number of labels that
    it is divided by, so the prefix learns to answer, and not to write questions.

    Prompt and output are tokenised by separate calls, as in the notebook that this re-creates. So no token contains the end
    of one and the start of the other, and training sees the prompt as the same tokens as inference, which has no output.

    A talk is one such turn after the other: all its answers are learned, but for those whose weight is 0. Of its turns, as
    many of the first are kept as fit whole. Only where the first is too long by itself, as any other row may be, it is cut.

    A row whose (first) prompt alone fills max_length has no label left; both of its lists are empty.

    Four more columns count: `turns`, those that are kept; `length`, the tokens of the whole row; `answers`, how many of it
    are learned; and `cut`, how many of these lose their end or are left out.

    plain.py does the same row by row, without talks; here in batches, cached on disk.
    """

    def encode_batch(columns: dict[str, list]) -> dict[str, list]:
        fields = (columns[name] for name in ("instruction", "input", "history", "output"))
        talks = [[*parts_of(*asked), output] for *asked, output in zip(*fields, strict=True)]
        encoded: dict[str, list] = {name: [] for name in ("input_ids", "labels", "turns", "length", "answers", "cut")}
        for parts, weights in zip(part_ids(tokenizer, talks), columns["weights"], strict=True):
            weights = weights or [1] * (len(parts) // 2)
            ids: list[int] = []
            labels: list[int] = []
            # Answers that are learned whole; turns that are kept; tokens up to the next turn.
            kept, turns, following = 0, 0, 0
            for prompt, answer, weight in zip(parts[::2], parts[1::2], weights, strict=True):
                following += len(prompt) + len(answer)
                if following <= max_length or not ids:
                    turns += 1
                    ids += prompt + answer
                    labels += [IGNORED] * len(prompt) + (answer if weight else [IGNORED] * len(answer))
                    kept += weight if following <= max_length else 0
            end = max_length if any(label != IGNORED for label in labels[:max_length]) else 0
            encoded["input_ids"].append(ids[:end])
            encoded["labels"].append(labels[:end])
            encoded["turns"].append(turns if end else 0)
            encoded["length"].append(following)
            encoded["answers"].append(sum(weights))
            encoded["cut"].append(sum(weights) - kept)
        return encoded

    state = (tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)
    options: dict[str, Any] = {
        "batched": True,
        "remove_columns": rows.column_names,
        "desc": "Tokenising",
        "new_fingerprint": Hasher.hash([_THIS_CODE, rows._fingerprint, state, max_length]),
    }
    with dataset_cache():
        try:
            return rows.map(encode_batch, **options)
        except (OSError, pyarrow.ArrowException):  # what an earlier run left there is damaged
            return rows.map(encode_batch, load_from_cache_file=False, **options)


def with_labels(encoded: Dataset) -> Dataset:
    """The rows of `encode` that have a label, with their columns input_ids and labels."""
    kept = pyarrow.compute.indices_nonzero(pyarrow.compute.list_value_length(encoded.data.column("labels")))
    tokenized = encoded.select_columns(["input_ids", "labels"])
    return tokenized if len(kept) == len(tokenized) else tokenized.select(kept.cast("int64").to_numpy())


def usable_rows(name: str, encoded: Dataset, max_length: int) -> Dataset:
    """The same, with a line each about the rows that lost all their labels to truncation, and about the answers that were
    cut. Raises UserError if no row is left. name: of the dataset.
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
    """Of the rows of `encode`: how many answers are cut or left out, of how many, and the max_length that keeps them all."""
    cut, answers = (pyarrow.compute.sum(encoded.data.column(name)).as_py() for name in ("cut", "answers"))
    return cut, answers, pyarrow.compute.max(encoded.data.column("length")).as_py()


def take(tokenized: Dataset, indices: Sequence[int]) -> list[Example]:
    """The examples at these places of a tokenised dataset."""
    columns = tokenized[indices]
    return [Example(*row) for row in zip(columns["input_ids"], columns["labels"], strict=True)]


def has_history(encoded: Dataset) -> bool:
    """Whether any row of `encode` keeps a turn before another."""
    return pyarrow.compute.max(encoded.data.column("turns")).as_py() > 1


def digest(dataset: Dataset) -> str:
    """A hash of a dataset of texts, or of token ids and labels: over all rows, in their order."""
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

    name: a .json, .jsonl, .csv, .tsv or .parquet file. given, say: as for `load_rows`. Raises UserError naming the rows
    whose question is no text, that name none of `prefixes`, or that have a column response already.
    """

    def read(where: str, row: dict[str, Any], question: dict[str, Any]) -> Question:
        prefix = None if row.get("prefix") in (None, "") else row["prefix"]
        if prefix is not None and prefix not in prefixes:
            raise UserError(f"{where}: names the prefix {prefix!r}; there are {', '.join(prefixes)}")
        if "response" in row:
            raise UserError(f"{where}: has a column 'response' already; the answer would replace it")
        return row, parts_of(question["instruction"], question["input"], question["history"]), prefix

    return read_whole_rows(name, read, given, say)
