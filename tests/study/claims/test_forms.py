"""Other forms of attention against transformers' own forward, and against the attention that the product runs."""

import pytest
import torch
from helpers import examples_of, random_bloom, random_prefix

from prefix_tuning.model.batch import pack
from prefix_tuning.study.attention import attending
from prefix_tuning.study.claims.forms import attend_gated, attend_infix
from prefix_tuning.study.scoring import label_logits, label_rows


@pytest.fixture(scope="module")
def model():
    return random_bloom(dtype=torch.float64)


@pytest.fixture(scope="module")
def examples():
    return examples_of([9, 4, 17], prompt_share=0.6)


def infix_logits(model, example, pairs):
    """Twin: transformers' own forward, whose softmax is float32, reads the prompt but for its last token; the pairs are
    appended to that cache; then it reads the rest behind them.
    """
    first = next(place for place, label in enumerate(example.labels) if label != -100) - 1
    ids = torch.tensor([example.input_ids])
    cache = model(ids[:, :first], use_cache=True).past_key_values
    for layer, (key, value) in enumerate(pairs):
        cache.update(key.unsqueeze(0), value.unsqueeze(0), layer)
    mask = torch.ones(1, pairs.shape[3] + ids.shape[1], dtype=torch.long)
    return model(ids[:, first:], past_key_values=cache, attention_mask=mask).logits[0, :-1]


@torch.no_grad()
def test_an_infix_is_a_cache_that_grew_between_prompt_and_answer(model, examples):
    pairs = random_prefix(model, tokens=4).double()
    batch = next(pack(examples, 1000))
    with attending(model, lambda layer: attend_infix):
        found = label_logits(model, batch, pairs)
    rows = label_rows(batch)
    for row, example in enumerate(sorted(examples, key=lambda example: len(example.input_ids))):
        torch.testing.assert_close(found[rows == row], infix_logits(model, example, pairs), atol=1e-6, rtol=0)
    assert not torch.allclose(found, label_logits(model, batch, pairs), atol=1e-3)


@torch.no_grad()
def test_the_gated_form_is_the_model_itself(model, examples):
    prefix = random_prefix(model, tokens=4).double()
    batch = next(pack(examples, 1000))
    with attending(model, lambda layer: attend_gated):
        found = label_logits(model, batch, prefix)
    torch.testing.assert_close(found, label_logits(model, batch, prefix), atol=1e-9, rtol=0)
