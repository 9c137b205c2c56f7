"""How good is a prefix: held-out loss, perplexity, exact match."""

import itertools
import math
from collections.abc import Iterator

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from prefix_tuning import distributed, signals
from prefix_tuning.data.rows import parts_of, prompt_ids, take
from prefix_tuning.generation.batches import complete
from prefix_tuning.generation.prefix_bloom import BASE, PrefixBloom
from prefix_tuning.model.batch import EMPTY_BATCH, Batch, count_labels, pack
from prefix_tuning.model.bloom import Bloom

SORTED_ROWS = 1024  # rows that are sorted by length together


@torch.no_grad()
def row_losses(
    model: Bloom, tokenized: Dataset, prefix: torch.Tensor | None, max_tokens: int
) -> Iterator[tuple[float, int]]:
    """Of every row of a tokenised dataset, in order: cross-entropy in nats, summed over its labels, and their number.

    All ranks call this together, each for its own rows. It ends early, in all of them, once one was sent a signal.
    """
    found: dict[int, tuple[float, int]] = {}
    following = 0  # the row to yield next
    for places, batch in _passes_of_all_ranks(_passes(tokenized, max_tokens)):
        losses = model.label_losses(batch.to(model.device), prefix).double().cpu()
        counts = [count for _, count in places]
        for (place, count), part in zip(places, losses.split(counts), strict=True):
            found[place] = part.sum().item(), count
        while following in found:
            yield found.pop(following)
            following += 1


def _passes(tokenized: Dataset, max_tokens: int) -> Iterator[tuple[list[tuple[int, int]], Batch]]:
    """The rows, packed; with each batch, the place and the number of labels of each of its rows."""
    for start in range(0, len(tokenized), SORTED_ROWS):
        examples = take(tokenized, list(range(start, min(start + SORTED_ROWS, len(tokenized)))))
        order = iter(sorted(range(len(examples)), key=lambda place: len(examples[place].input_ids)))  # as `pack` does
        for batch in pack(examples, max_tokens):
            rows = list(itertools.islice(order, batch.rows))
            yield [(start + row, count_labels([examples[row]])) for row in rows], batch


def _passes_of_all_ranks(passes: Iterator[tuple[list, Batch]]) -> Iterator[tuple[list, Batch]]:
    """The passes, and empty ones until no rank has any left, as a sharded base is gathered by all ranks in each pass.

    An all-reduce before each pass asks for that, and for signals: if a rank was sent one, this ends in all of them.
    """
    while True:
        following = next(passes, None)
        busy, signal = zip(*distributed.gather_numbers([following is not None, signals.heard()]), strict=True)
        if any(signal) or not any(busy):
            return
        yield following or ([], EMPTY_BATCH)


def evaluate_loss(model: Bloom, tokenized: Dataset, prefix: torch.Tensor | None, max_tokens: int) -> dict[str, float]:
    """Mean cross-entropy per label in nats, and its exponential, over a tokenised dataset; processes share the rows.

    Raises Interrupted in all of them, after the current pass, if one was sent a signal.
    """
    own = tokenized.select(distributed.share(range(len(tokenized))))
    losses, labels = 0.0, 0
    for loss, count in row_losses(model, own, prefix, max_tokens):
        losses, labels = losses + loss, labels + count
    signals.stop_if_heard()
    all_losses, all_labels = distributed.sum_over_ranks([losses, labels])
    return {"eval_loss": all_losses / all_labels, "eval_perplexity": perplexity(all_losses / all_labels)}


def perplexity(loss: float) -> float:
    """exp(loss), or the largest of those that a float can hold."""
    return math.exp(min(loss, 700))  # e ** 710 overflows


def answer_rows(
    model: PrefixBloom, tokenizer: PreTrainedTokenizerBase, rows: Dataset, prefix: torch.Tensor | None
) -> list[str]:
    """Greedy answers to the questions of `rows`, each with its history in front, long enough to match their output.

    Processes share the questions, and all get all answers. Raises Interrupted in all of them, after the current batch, if
    one was sent a signal.
    """
    talks = [parts_of(row["instruction"], row["input"], row["history"]) for row in rows]
    prompts = prompt_ids(tokenizer, distributed.share(talks))
    longest = max(len(ids) for ids in tokenizer(list(rows["output"]), split_special_tokens=True).input_ids)
    name = BASE
    if prefix is not None:
        name = "prefix"
        model.attach(name, prefix)
    with model.equal_passes():
        own = complete(model, tokenizer, prompts, prefix_name=name, max_new_tokens=longest + 1, do_sample=False)
    signals.stop_if_heard()
    answers = [""] * len(rows)
    for process, part in enumerate(parts := distributed.gather(own)):
        answers[process :: len(parts)] = part
    return answers


def exact_match(answers: list[str], rows: Dataset) -> float:
    """Share of answers that equal the row's output, surrounding white space aside."""
    return sum(answer.strip() == output.strip() for answer, output in zip(answers, rows["output"], strict=True)) / len(rows)
