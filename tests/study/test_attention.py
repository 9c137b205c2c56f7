"""Attention that returns its weights, against the weights that transformers reports."""

import pytest
import torch
from models import examples_of, random_prefix

from prefix_tuning.model.batch import pack
from prefix_tuning.model.bloom import prefix_cache
from prefix_tuning.study.attention import watching


@pytest.fixture(scope="module")
def batch():
    """Rows of a few lengths, so that the grid has padding."""
    return next(pack(examples_of([7, 1, 30, 12]), max_tokens=1000))


@torch.no_grad()
def test_the_weights_are_those_that_transformers_reports(base, eager, batch):
    prefix = random_prefix(base, tokens=6)
    seen = []
    with watching(base, lambda layer, weights: seen.append(weights)):
        base.packed_hidden(batch, prefix)
    assert len(seen) == len(prefix)
    for row, ids in enumerate(batch.input_ids.split(batch.lengths)):
        cache, mask = prefix_cache([prefix])
        mask = torch.cat((mask, torch.ones(1, len(ids), dtype=torch.long)), dim=1)
        reported = eager(ids[None], past_key_values=cache, attention_mask=mask, output_attentions=True).attentions
        for ours, theirs in zip(seen, reported, strict=True):
            torch.testing.assert_close(ours[row, :, : len(ids), : 6 + len(ids)], theirs[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_watching_changes_no_result(base, batch):
    prefix = random_prefix(base)
    plain = base.packed_hidden(batch, prefix)
    with watching(base, lambda layer, weights: None):
        torch.testing.assert_close(base.packed_hidden(batch, prefix), plain, atol=1e-5, rtol=1e-5)
    assert not any("attend" in vars(block) for block in base.transformer.h)
    torch.testing.assert_close(base.packed_hidden(batch, prefix), plain, atol=0, rtol=0)
