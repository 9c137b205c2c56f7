"""What pairs of a text lose by standing right before the row: the table of prefix_tuning/training/teacher.py.

python tests/benchmarks/positions.py        # both bundled bases, a minute on a CPU

The teacher is a base with a text of 192 tokens in front, sentences of the demo. Each line is the divergence from it of some
of the text's pairs, untrained, over the answers to 200 held-out questions: of three texts, and their mean.
"""

import json
import random
from pathlib import Path

import pytest
import torch

from prefix_tuning import bundled
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import take, tokenize
from prefix_tuning.model import bloom
from prefix_tuning.model.attention import aligned, attention_bias
from prefix_tuning.model.batch import pack
from prefix_tuning.model.decoder import Decoder
from prefix_tuning.model.distillation import Distillation
from prefix_tuning.training.start import start_pairs
from prefix_tuning.training.teacher import read_pairs, text_tokens

TOKENS, TEXTS, QUESTIONS = 192, 3, 200


def divergences(base, ids, batches) -> dict[str, float]:
    """The mean divergence in nats per label, by what stands before the row."""
    pairs = read_pairs(base, ids, len(ids))
    objective = Distillation(base, pairs)

    def of(prefix) -> float:
        return torch.cat([objective.label_losses(batch, prefix) for batch in batches]).mean().item()

    shuffled = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    found = {"no pair": of(None), "all, in a random order": of(pairs[:, :, :, shuffled])}
    for part in (2, 4, 8):
        tokens = len(ids) // part
        chosen = torch.arange(tokens) * len(ids) // tokens
        found[f"first 1/{part}"] = of(start_pairs(base, ids, tokens))
        found[f"1/{part} at even steps"] = of(start_pairs(base, ids, tokens, "chunks"))
        with pytest.MonkeyPatch.context() as patch:
            if not isinstance(base, Decoder):
                patch.setattr(bloom, "attention_bias", true_distances(len(ids), chosen))
            name = "positions from 0" if isinstance(base, Decoder) else "their true distances"
            found[f"1/{part} at even steps, {name}"] = of(pairs[:, :, :, chosen])
    return found


def true_distances(length: int, chosen: torch.Tensor):
    """ALiBi's bias with the `chosen` of `length` pairs as far from the row as they are in the text."""

    def bias(heads, prefix_length, max_length, like):
        if prefix_length != len(chosen):
            return attention_bias(heads, prefix_length, max_length, like)
        whole = attention_bias(heads, length, max_length, like)
        return aligned(torch.cat((whole[..., chosen], whole[..., length:]), dim=-1))

    return bias


@torch.no_grad()
def main() -> None:
    lines = Path(bundled.resolve("bundled:sentence")).read_text("utf-8").splitlines()
    sentences = [json.loads(line)["output"] for line in lines]
    for name in bundled.MODELS:
        base, tokenizer = load_base(name, torch.float32, torch.device("cpu"))
        rows = tokenize(load_rows("bundled:sentence-eval", ("train",)), tokenizer, 256)
        batches = list(pack(take(rows, range(0, 8 * QUESTIONS, 8)), 2000))
        found = []
        for seed in range(TEXTS):
            text = "".join(random.Random(seed).sample(sentences, 40))
            found.append(divergences(base, text_tokens(tokenizer, text)[:TOKENS], batches))
        print(name)
        for line in found[0]:
            values = [one[line] for one in found]
            print(f"  {line:45s}", *(f"{value:.3f}" for value in values), f"  mean {sum(values) / TEXTS:.3f}")


if __name__ == "__main__":
    main()
