"""Attention that returns its weights, against the weights that transformers reports."""

import pytest
import torch
from models import eager_twin, examples_of, random_bloom, random_decoder, random_prefix

from prefix_tuning.generation.cache import CACHE
from prefix_tuning.model.batch import pack
from prefix_tuning.model.bloom import prefix_cache
from prefix_tuning.study.attention import running, watching


@pytest.fixture(scope="module")
def batch():
    """Rows of a few lengths, so that the grid has padding."""
    return next(pack(examples_of([7, 1, 30, 12], vocab_size=99), max_tokens=1000))


@pytest.fixture(scope="module", params=["bloom", "qwen3", "gemma2", "gpt_oss"])
def pair(request):
    """A random base, and transformers' own forward of it. Gemma 2 caps its scores; gpt-oss has sinks, and a window too."""
    base = random_bloom() if request.param == "bloom" else random_decoder(request.param)
    return base, eager_twin(base)


@torch.no_grad()
def test_the_weights_are_those_that_transformers_reports(pair, batch):
    base, eager = pair
    prefix = random_prefix(base, tokens=6)
    seen = []
    with watching(base, lambda layer, weights: seen.append(weights)):
        base.packed_hidden(batch, prefix)
    assert len(seen) == len(prefix)
    for row, ids in enumerate(batch.input_ids.split(batch.lengths)):
        cache, mask = prefix_cache([prefix])
        mask = torch.cat((mask, torch.ones(1, len(ids), dtype=torch.long)), dim=1)
        reported = eager(ids[None], **{CACHE: cache}, attention_mask=mask, output_attentions=True).attentions
        for ours, theirs in zip(seen, reported, strict=True):
            torch.testing.assert_close(ours[row, :, : len(ids), : 6 + len(ids)], theirs[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_watching_changes_no_result(pair, batch):
    base, _ = pair
    prefix = random_prefix(base)
    plain = base.packed_hidden(batch, prefix)
    with watching(base, lambda layer, weights: None):
        torch.testing.assert_close(base.packed_hidden(batch, prefix), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(base.packed_hidden(batch, prefix), plain, atol=0, rtol=0)


@torch.no_grad()
def test_a_layer_runs_what_it_is_given_and_then_its_own_again(pair, batch):
    """Without the first two layers, the third gets what they gave in an earlier pass, so the result is the same."""
    base, _ = pair
    prefix, outputs = random_prefix(base), []
    plain = base.packed_hidden(batch, prefix)

    def keep(layer, forward):
        return lambda *inputs, **options: outputs.append(forward(*inputs, **options)) or outputs[-1]

    with running(base, keep):
        assert torch.equal(base.packed_hidden(batch, prefix), plain)
    with running(base, lambda layer, forward: forward if layer == 2 else lambda *_, **options: outputs[layer]):
        assert torch.equal(base.packed_hidden(batch, prefix), plain)
        assert torch.equal(base.packed_hidden(batch, 0 * prefix), plain) is False
    assert torch.equal(base.packed_hidden(batch, prefix), plain) and len(outputs) == 3
