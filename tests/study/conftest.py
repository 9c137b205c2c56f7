"""`studied` is one model of each kind that the study looks into: a Bloom, and a decoder with rotation and grouped heads."""

from typing import NamedTuple

import pytest
import torch
from models import eager_twin, random_decoder
from transformers import AutoModelForCausalLM, PreTrainedModel

from prefix_tuning import PrefixBloom, bundled
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import tokenize
from prefix_tuning.model.encoder import key_value_shape
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


class Studied(NamedTuple):
    """A model with the prefixes `short` (16 tokens) and `sentence` (10), and its base as transformers' own eager forward."""

    model: PrefixBloom
    eager: PreTrainedModel


@pytest.fixture(scope="module", params=["bloom", "qwen3"])
def studied(request, tokenizer):
    """The demo's Bloom with tuned prefixes, and a random Qwen3 of as many layers and heads, with random prefixes."""
    if request.param == "bloom":
        return Studied(request.getfixturevalue("tuned_model"), request.getfixturevalue("eager"))
    options = {"vocab_size": len(tokenizer), "num_hidden_layers": 4, "use_sliding_window": False}
    base = random_decoder("qwen3", eos_token_id=tokenizer.eos_token_id, **options)
    model, (layers, heads, head_dim) = PrefixBloom(base, tokenizer), key_value_shape(base.config)
    for name, tokens in (("short", 16), ("sentence", 10)):
        torch.manual_seed(tokens)
        model.attach(name, 2 * torch.randn(layers, 2, heads, tokens, head_dim))
    return Studied(model, eager_twin(base))
