"""How good is a prefix: held-out loss, perplexity, exact match."""

import itertools
import math
from collections.abc import Iterator

import torch
from datasets import Dataset
from transformers import BloomForCausalLM, PreTrainedTokenizerBase

from prefix_tuning import signals
from prefix_tuning.base_model.sharding import in_step
from prefix_tuning.data.rows import prompt_of, take
from prefix_tuning.distributed import gather, share, sum_over_ranks
from prefix_tuning.generation.batches import complete
from prefix_tuning.generation.prefix_bloom import BASE, PrefixBloom
from prefix_tuning.model.batch import EMPTY_BATCH, count_labels, pack
from prefix_tuning.model.bloom import label_losses


@torch.no_grad()
def row_losses(
    model: BloomForCausalLM, tokenized: Dataset, prefix: torch.Tensor | None, max_tokens: int
) -> Iterator[tuple[float, int]]:
    """Of every row of a tokenised dataset, in order: cross-entropy in nats, summed over its labels, and their number."""
    with in_step(model, lambda: label_losses(model, EMPTY_BATCH.to(model.device), prefix)):
        for start in range(0, len(tokenized), 1024):  # sorted by length within each thousand
            examples = take(tokenized, list(range(start, min(start + 1024, len(tokenized)))))
            order = sorted(range(len(examples)), key=lambda place: len(examples[place].input_ids))
            found: list[tuple[float, int]] = [(0.0, 0)] * len(examples)
            places = iter(order)
            for batch in pack([examples[place] for place in order], max_tokens):
                if signals.heard():  # who called asks all processes, by stop_if_heard
                    return
                losses = label_losses(model, batch.to(model.device), prefix).double().cpu()
                rows = list(itertools.islice(places, batch.rows))
                counts = [count_labels([examples[place]]) for place in rows]
                for place, part in zip(rows, losses.split(counts), strict=True):
                    found[place] = part.sum().item(), len(part)
            yield from found


def evaluate_loss(
    model: BloomForCausalLM, tokenized: Dataset, prefix: torch.Tensor | None, max_tokens: int
) -> dict[str, float]:
    """Mean cross-entropy per label in nats, and its exponential, over a tokenised dataset; processes share the rows.

    Raises Interrupted in all of them, after the pass at hand, if one has heard a signal.
    """
    losses, labels = 0.0, 0
    for loss, count in row_losses(model, tokenized.select(share(range(len(tokenized)))), prefix, max_tokens):
        losses, labels = losses + loss, labels + count
    signals.stop_if_heard()
    losses, labels = sum_over_ranks([losses, labels])
    return {"eval_loss": losses / labels, "eval_perplexity": perplexity(losses / labels)}


def perplexity(loss: float) -> float:
    """exp(loss), but for what is too large for a float."""
    return math.exp(min(loss, 700))  # e ** 710 overflows


def answer_rows(
    model: PrefixBloom, tokenizer: PreTrainedTokenizerBase, rows: Dataset, prefix: torch.Tensor | None
) -> list[str]:
    """Greedy answers to the questions of `rows` (columns instruction and input), long enough to match their output.

    Processes share the questions, and all get all answers. Raises Interrupted in all of them, after the batch at hand, if
    one has heard a signal.
    """
    prompts = [prompt_of(row["instruction"], row["input"]) for row in rows]
    longest = max(len(ids) for ids in tokenizer(list(rows["output"]), split_special_tokens=True).input_ids)
    name = BASE
    if prefix is not None:
        name = "prefix"
        model.attach(name, prefix)
    with model.in_step():
        mine = complete(model, tokenizer, share(prompts), prefix_name=name, max_new_tokens=longest + 1, do_sample=False)
    signals.stop_if_heard()
    answers = [""] * len(prompts)
    for process, part in enumerate(parts := gather(mine)):
        answers[process :: len(parts)] = part
    return answers


def exact_match(answers: list[str], rows: Dataset) -> float:
    """Share of answers that equal the row's output but for surrounding white space."""
    return sum(answer.strip() == output.strip() for answer, output in zip(answers, rows["output"], strict=True)) / len(rows)
