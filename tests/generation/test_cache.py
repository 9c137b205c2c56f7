"""Caches keep the mask of their prefixes when transformers' methods change their rows, and while a forward is compiled."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from answers import GREEDY, PROMPTS
from models import random_bloom, random_prefix
from transformers import DynamicCache, StaticCache

from prefix_tuning import PrefixBloom

NAMES = ["base", "five", "nine"]  # of 0, 5 and 9 tokens: two of them are padded
CHANGES = {
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 0])), [2, 0]),
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([1, 2, 0])), [1, 2, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "crop": (lambda cache: cache.crop(-2), [0, 1, 2]),
}


@pytest.fixture(scope="module")
def inputs(tokenizer):
    return tokenizer(PROMPTS[:3], return_tensors="pt", padding=True, padding_side="left")


def read(model, inputs, tokens, names=NAMES):
    """A cache that holds the prefixes and all of the text but its last `tokens`."""
    cache = DynamicCache()
    with torch.no_grad():
        model(inputs.input_ids[:, :-tokens], cache, inputs.attention_mask[:, :-tokens], prefix_name=names)
    return cache


@pytest.mark.parametrize("copied", [lambda cache: cache, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
@pytest.mark.parametrize("change, rows", CHANGES.values(), ids=CHANGES)
def test_rows_go_on_with_their_own_prefixes(random_model, inputs, change, rows, copied):
    ids, mask = inputs.input_ids[rows], inputs.attention_mask[rows]
    names = [NAMES[row] for row in rows]
    with torch.no_grad():
        expected = random_model(ids, attention_mask=mask, prefix_name=names).logits[:, -2:]
    texts = random_model.generate(ids, attention_mask=mask, prefix_name=names, pad_token_id=3, **GREEDY)
    for go_on in ("forward", "generate"):
        cache = read(random_model, inputs, tokens=2)
        change(cache)
        cache = copied(cache)
        new = ids[:, cache.get_seq_length() - 9 :]
        if go_on == "forward":
            with torch.no_grad():
                logits = random_model(new, past_key_values=cache, attention_mask=mask).logits[:, -2:]
            assert torch.allclose(logits, expected, atol=1e-4)
        else:
            on = random_model.generate(ids, attention_mask=mask, past_key_values=cache, pad_token_id=3, **GREEDY)
            assert torch.equal(on, texts)


def test_a_cache_of_the_base_is_repeated_too(random_model, base, inputs):
    cache = read(random_model, inputs, tokens=2, names="base")
    cache.batch_repeat_interleave(2)
    ids, mask = (inputs[name].repeat_interleave(2, dim=0) for name in ("input_ids", "attention_mask"))
    on = random_model.generate(ids, attention_mask=mask, past_key_values=cache, pad_token_id=3, **GREEDY)
    assert torch.equal(on, base.generate(ids, attention_mask=mask, pad_token_id=3, **GREEDY))


def test_a_cache_that_is_emptied_gets_the_prefix_anew(random_model, inputs):
    expected = random_model.generate(**inputs, prefix_name=NAMES, pad_token_id=3, **GREEDY)
    cache = read(random_model, inputs, tokens=2, names=NAMES[::-1])
    cache.reset()
    on = random_model.generate(**inputs, past_key_values=cache, prefix_name=NAMES, pad_token_id=3, **GREEDY)
    assert torch.equal(on, expected)


def test_a_prefix_that_is_cut_or_of_other_rows_is_named(random_model, inputs):
    cache = read(random_model, inputs, tokens=2)
    with pytest.raises(ValueError, match="have 3 rows, but 6 are continued"):
        random_model.generate(**inputs, past_key_values=cache, num_beams=2, pad_token_id=3, **GREEDY)
    with pytest.raises(ValueError, match="has cut into the prefix; `reset` empties"):
        cache.crop(-(cache.get_seq_length() - 8))


@pytest.mark.parametrize("kind, masked", [("dynamic", True), ("static", False)])
def test_a_compiled_loop_of_forwards_is_the_loop(inputs, kind, masked):
    """With backend "eager", torch.compile traces the forward and changes no kernel."""
    model = PrefixBloom(random_bloom(n_layer=1))
    model.attach("five", random_prefix(model))
    model.attach("nine", random_prefix(model, tokens=9))
    logits = []
    for forward in (model, torch.compile(model, backend="eager")):
        cache = DynamicCache() if kind == "dynamic" else StaticCache(model.config, max_cache_len=64)
        mask = inputs.attention_mask if masked else None
        with torch.no_grad():
            new = model(inputs.input_ids, cache, mask, prefix_name=NAMES).logits[:, -1:].argmax(-1)
            for _ in range(2):
                mask = F.pad(mask, (0, 1), value=1) if masked else None
                logits.append(forward(new, past_key_values=cache, attention_mask=mask).logits)
                new = logits[-1].argmax(-1)
    for plain, compiled in zip(logits[:2], logits[2:], strict=True):
        assert torch.allclose(compiled, plain, atol=1e-4)
