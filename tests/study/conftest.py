import pytest
import torch
from transformers import AutoModelForCausalLM

from prefix_tuning import bundled
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import tokenize
from prefix_tuning.study.scoring import pack_rows


@pytest.fixture(scope="session")
def batches(tokenizer):
    """24 held-out rows of each style, packed."""

    def of(style):
        rows = load_rows(f"bundled:{style}-eval", ("train",)).select(range(24))
        return pack_rows(tokenize(rows, tokenizer, 256), max_tokens=300)

    return {style: of(style) for style in ("short", "sentence")}


@pytest.fixture(scope="session")
def eager():
    """transformers' own Bloom, which returns attention weights."""
    path = bundled.resolve(bundled.MODEL)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
