"""From rows to tokens: the template, tokenisation, and which tokens are labels."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
from datasets import Dataset
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from prefix_tuning.data.readers import dataset_cache, read_whole_rows, row_texts
from prefix_tuning.errors import UserError
from prefix_tuning.model.batch import IGNORED, Example

# Part of the cache key: tokens that an older version prepared are not reused. The key of their rows has the readers' code.
_THIS_CODE = Path(__file__).read_text("utf-8")


def prompt_of(instruction: str, input: str = "") -> str:
    """The template: all that the model reads before the answer. Training and inference share it.

    Human: INSTRUCTION
    INPUT                  (no such line where there is no input)

    Assistant:             (and a space; the answer follows it)
    """
    return "\n".join(["Human: " + instruction, input]).strip() + "\n\nAssistant: "


def tokenize(rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """Rows of `load_rows` as columns input_ids and labels, lists of at most max_length token ids, in the same order.

        input_ids = tokens(prompt)               + tokens(output) + [EOS]
        labels    = [-100] * len(tokens(prompt)) + tokens(output) + [EOS]

    -100 is the ignore_index of torch's cross_entropy: the prompt counts neither in the loss nor in the number of labels that
    it is divided by, so the prefix learns to answer, and not to write questions.

    Prompt and output are tokenised by separate calls, as in the notebook that this re-creates. So no token contains the end
    of one and the start of the other, and training sees the prompt as the same tokens as inference, which has no output.

    A row whose prompt alone fills max_length has no label left, and is dropped: its mean loss would be 0 / 0.

    Text that looks like a special token, "</s>" say, is tokenised as text (split_special_tokens). The one real EOS, at the
    end of the output, is therefore added as an id. plain.py does the same row by row; here in batches, cached on disk.
    """

    def encode(columns: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        texts = [prompt_of(*row) for row in zip(columns["instruction"], columns["input"], strict=True)], columns["output"]
        prompts, outputs = (tokenizer(part, split_special_tokens=True).input_ids for part in texts)
        encoded: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
        for prompt, output in zip(prompts, outputs, strict=True):
            answer = [*output, tokenizer.eos_token_id]
            if len(prompt) < max_length:
                encoded["input_ids"].append((prompt + answer)[:max_length])
                encoded["labels"].append(([IGNORED] * len(prompt) + answer)[:max_length])
        return encoded

    state = (tokenizer.backend_tokenizer.to_str(), tokenizer.eos_token_id)
    with dataset_cache():
        return rows.map(
            encode,
            batched=True,
            remove_columns=rows.column_names,
            desc="Tokenising",
            new_fingerprint=Hasher.hash([_THIS_CODE, rows._fingerprint, state, max_length]),
        )


def take(tokenized: Dataset, indices: Sequence[int]) -> list[Example]:
    """The examples at these places of a tokenised dataset."""
    columns = tokenized[indices]
    return [Example(*row) for row in zip(columns["input_ids"], columns["labels"], strict=True)]


def digest(dataset: Dataset) -> str:
    """A hash of a dataset of texts, or of token ids and labels: over all rows, in their order."""
    found = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(1000):
        for column in map(pyarrow.ChunkedArray.combine_chunks, batch.columns):
            if pyarrow.types.is_string(column.type):
                found.update(json.dumps(column.to_pylist()).encode())
            else:
                for numbers in (column.value_lengths(), column.flatten()):
                    found.update(numbers.cast("int64").to_numpy())
    return found.hexdigest()


def read_questions(name: str, prefixes: list[str]) -> Iterator[tuple[dict[str, Any], str, str | None]]:
    """Reads a file of questions: each row as it is, its prompt, and the prefix that its column prefix names, if it does.

    name: a .json, .jsonl, .csv or .parquet file. Raises UserError naming the row whose instruction is no text, that names
    none of `prefixes`, or that has a column response already.
    """
    for place, row in read_whole_rows(name):
        texts = row_texts(name, place, row, required=("instruction",))
        prefix = None if row.get("prefix") in (None, "") else row["prefix"]
        if prefix is not None and prefix not in prefixes:
            raise UserError(f"{name}, {place}: names the prefix {prefix!r}; there are {', '.join(prefixes)}")
        if "response" in row:
            raise UserError(f"{name}, {place}: has a column 'response' already; the answer would replace it")
        yield row, prompt_of(texts["instruction"], texts["input"]), prefix
