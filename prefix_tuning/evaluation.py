"""How good is a prefix: held-out loss, perplexity, exact match."""

import math

import torch
from datasets import Dataset
from transformers import BloomForCausalLM, PreTrainedTokenizerBase

from prefix_tuning.bloom import loss_sum
from prefix_tuning.data import pack, prompt_of, take
from prefix_tuning.generation import generate


@torch.no_grad()
def evaluate_loss(
    model: BloomForCausalLM, tokenized: Dataset, prefix: torch.Tensor | None, max_tokens: int
) -> dict[str, float]:
    """Mean cross-entropy per label in nats, and its exponential, over a tokenised dataset."""
    total, labels = 0.0, 0
    for start in range(0, len(tokenized), 1024):  # sorted by length within each thousand
        for batch in pack(take(tokenized, list(range(start, min(start + 1024, len(tokenized))))), max_tokens):
            total += loss_sum(model, batch.to(model.device), prefix).item()
            labels += len(batch.labels)
    loss = total / labels
    return {"eval_loss": loss, "eval_perplexity": math.exp(min(loss, 700))}  # e ** 710 overflows


def answer_rows(
    model: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: Dataset, prefix: torch.Tensor | None
) -> list[str]:
    """Greedy answers to the questions of `rows` (columns instruction and input), long enough to match their output."""
    prompts = [prompt_of(row["instruction"], row["input"]) for row in rows]
    longest = max(len(ids) for ids in tokenizer(list(rows["output"]), split_special_tokens=True).input_ids)
    return generate(model, tokenizer, prompts, prefix, max_new_tokens=longest + 1, do_sample=False)


def exact_match(answers: list[str], rows: Dataset) -> float:
    """Share of answers that equal the row's output but for surrounding white space."""
    return sum(answer.strip() == output.strip() for answer, output in zip(answers, rows["output"], strict=True)) / len(rows)
