"""Attention in the open: the weights that transformers itself reports, and pairs removed as if they had never been there."""

import pytest
import torch
from helpers import examples_of, random_prefix

from prefix_tuning.model.batch import pack
from prefix_tuning.model.bloom import prefix_cache
from prefix_tuning.study.attention import attend_openly, attending, watching, without


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
def test_to_look_changes_nothing(base, batch):
    prefix = random_prefix(base)
    plain = base.packed_hidden(batch, prefix)
    with watching(base, lambda layer, weights: None):
        torch.testing.assert_close(base.packed_hidden(batch, prefix), plain, atol=1e-5, rtol=1e-5)
    assert not any("attend" in vars(block) for block in base.transformer.h)
    torch.testing.assert_close(base.packed_hidden(batch, prefix), plain, atol=0, rtol=0)


@torch.no_grad()
def test_removed_first_tokens_are_a_shorter_prefix(base, batch):
    prefix = random_prefix(base, tokens=6)
    removed = torch.zeros(prefix.shape[0], prefix.shape[2], 6, dtype=torch.bool)
    removed[:, :, :4] = True
    with without(base, removed):
        found = base.packed_hidden(batch, prefix)
    torch.testing.assert_close(found, base.packed_hidden(batch, prefix[:, :, :, 4:]), atol=1e-5, rtol=1e-5)
    removed[:] = True
    with without(base, removed):
        found = base.packed_hidden(batch, prefix)
    torch.testing.assert_close(found, base.packed_hidden(batch, None), atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("place", [(1, slice(None), slice(None)), (2, 3, slice(None)), (slice(None), slice(None), 2)])
def test_removed_pairs_against_attention_whose_keys_never_had_them(base, batch, place):
    """A layer, a head of a layer, a token: twin is a loop over heads that concatenates the pairs that are left."""
    prefix = random_prefix(base, tokens=4)
    removed = torch.zeros(prefix.shape[0], prefix.shape[2], 4, dtype=torch.bool)
    removed[place] = True

    def attend_in(layer):
        def attend_left(qkv, pairs, batch, bias, only_labels):
            context = torch.zeros_like(qkv[:, :, 0])
            for head, gone in enumerate(removed[layer]):
                bias_left = torch.cat((bias[:, head : head + 1, :, :4][..., ~gone], bias[:, head : head + 1, :, 4:]), dim=-1)
                one = qkv[:, head : head + 1], pairs[:, head : head + 1, ~gone]
                context[:, head : head + 1] = attend_openly(*one, batch, bias_left, lambda weights: None)
            return context

        return attend_left

    with attending(base, attend_in):
        expected = base.packed_hidden(batch, prefix)
    with without(base, removed):
        found = base.packed_hidden(batch, prefix)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, base.packed_hidden(batch, prefix), atol=1e-3)
