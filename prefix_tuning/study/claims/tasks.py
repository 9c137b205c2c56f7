"""What is trained and scored: the bundled questions, some of their relations, and a task that the base has never seen."""

import functools
import random
from typing import NamedTuple, cast

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from prefix_tuning import bundled
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.data.readers import FEATURES, load_rows
from prefix_tuning.data.rows import tokenize
from prefix_tuning.demo.knowledge import load_relations
from prefix_tuning.model.bloom import Bloom
from prefix_tuning.settings import MAX_LENGTH

TASKS = ("short", "sentence", "relations", "reversed", "copied")
WORD_ROWS, WORDS = 3000, 3


class Task(NamedTuple):
    """Tokenised rows: to train on, to choose a rate by, and to score. No row is in two of these."""

    train: Dataset
    validation: Dataset
    held_out: Dataset


@functools.cache
def bundled_base() -> tuple[Bloom, PreTrainedTokenizerBase]:
    """The mini Bloom, frozen, float32, on the CPU, and its tokenizer. They are shared: change a copy."""
    base, tokenizer = load_base(bundled.MODEL, torch.float32, torch.device("cpu"))
    return cast(Bloom, base), tokenizer


@functools.cache
def load_task(name: str) -> Task:
    """The rows of one of TASKS.

    short, sentence: the demo's questions, answered by a word or a sentence. Held-out rows ask about other facts.
    relations: the questions of `short` about every second relation. Held-out rows ask about the other relations; validation
    rows ask about other facts of the relations that are trained on.
    reversed, copied: three words of the facts, to be written in reverse order, or as they are. Held-out rows are other draws
    of words.
    """
    if name in ("reversed", "copied"):
        rows = word_rows(bundled_base()[1], WORD_ROWS + 1200, backwards=name == "reversed")
        train, others = rows.select(range(WORD_ROWS)), rows.select(range(WORD_ROWS, len(rows)))
    else:
        style = "short" if name == "relations" else name
        train, others = (load_rows(f"bundled:{style}{part}", ("train",)) for part in ("", "-eval"))
    if name == "relations":
        parts = relation_rows(train, True), relation_rows(others, True), relation_rows(others, False)
    else:
        rest = [row for row in range(len(others)) if row % 3]
        parts = train, others.select(range(0, len(others), 3)), others.select(rest)
    return Task(*map(tokenized, parts))


def tokenized(rows: Dataset) -> Dataset:
    return tokenize(rows, bundled_base()[1], MAX_LENGTH)


def relation_rows(rows: Dataset, seen: bool) -> Dataset:
    """The rows that ask about the first, third, fifth ... relation of the facts; if not `seen`, about the others."""
    number_of = {
        question.format(s=subject): number
        for number, relation in enumerate(load_relations())
        for question in relation["questions"]
        for subject in relation["facts"]
    }
    return rows.select([row for row, text in enumerate(rows["instruction"]) if (number_of[text] % 2 == 0) == seen])


def word_rows(tokenizer: PreTrainedTokenizerBase, count: int, backwards: bool) -> Dataset:
    """Questions such as 倒过来写：巴黎、苹果、七 with the answer 七、苹果、巴黎; or 照着写 with the words in their order.

    Each word is one token that the base knows.
    """
    words = sorted({word for relation in load_relations() for fact in relation["facts"].items() for word in fact})
    ids = tokenizer(words, split_special_tokens=True).input_ids
    words = [word for word, tokens in zip(words, ids, strict=True) if len(tokens) == 1]
    rng = random.Random(0)
    rows = []
    for _ in range(count):
        drawn = rng.sample(words, WORDS)
        asked = f"{'倒过来写' if backwards else '照着写'}：{'、'.join(drawn)}"
        answer = "、".join(reversed(drawn) if backwards else drawn)
        rows.append({"instruction": asked, "input": "", "output": answer, "system": "", "history": [], "weights": []})
    return Dataset.from_list(rows, features=FEATURES)
