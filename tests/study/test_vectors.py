import pytest
import torch
from models import random_bloom, random_decoder

from prefix_tuning.study.scoring import score_prefix
from prefix_tuning.study.vectors import QUANTILES, compare_pairs, nearest_words, prefix_norms, score_base


@torch.no_grad()
def cached(base, ids):
    """Keys and values that transformers keeps for a text: (layers, 2, heads, tokens, head_dim)."""
    layers = base(ids[None], use_cache=True).past_key_values.layers
    return torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in layers])


def test_norms_of_text_are_those_of_transformers_cache(studied, batches):
    base = studied.model
    pairs = [cached(studied.eager, ids) for batch in batches["short"] for ids in batch.input_ids.split(batch.lengths)]
    norms = torch.cat([pair.norm(dim=-1).flatten(2) for pair in pairs], dim=2)  # (layers, 2, heads * tokens)
    expected = torch.quantile(norms, torch.tensor(QUANTILES), dim=2).permute(1, 2, 0)
    scored, found = score_base(base, batches["short"])
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-4, rtol=1e-4)
    assert scored == score_prefix(base, batches["short"], None)  # of the same pass


def test_norms_of_a_prefix():
    prefix = torch.ones(2, 2, 3, 5, 4)
    prefix[1, 0] *= 3
    found = torch.tensor(prefix_norms(prefix))
    assert found.shape == (2, 2, 5)
    assert (found[0] == 2).all() and (found[1, 0] == 6).all() and (found[1, 1] == 2).all()


def test_the_pairs_of_words_are_recognised_as_these_words(base, tokenizer):
    """A prefix whose first layer holds the pairs that the base computes for words: nothing is left unexplained."""
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(token) for token in tokenizer.tokenize("法国的首都是巴黎")])
    found = nearest_words(base, tokenizer, cached(base, ids))
    assert len(found) == len(ids)
    for token, one in zip(ids, found, strict=True):
        assert one["words"][0][0] == tokenizer.decode([token])
        assert one["words"][0][1] == pytest.approx(1, abs=1e-4) and one["words"][1][1] < 0.9
        assert one["unexplained"] == pytest.approx(0, abs=1e-4)


def test_the_pairs_of_words_are_recognised_at_their_own_positions(tokenizer):
    """In a model that rotates keys: as the pairs of the same words one position farther on, they are not quite the same."""
    model = random_decoder("qwen3", vocab_size=len(tokenizer), use_sliding_window=False)
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(token) for token in tokenizer.tokenize("法国的首都是巴黎")])
    pairs = cached(model, ids)
    for token, one in zip(ids, nearest_words(model, tokenizer, pairs), strict=True):
        assert one["words"][0][0] == tokenizer.decode([token]) and one["unexplained"] is None
        assert one["words"][0][1] == pytest.approx(1, abs=1e-5) and one["words"][1][1] < 0.9
    for one in nearest_words(model, tokenizer, pairs[:, :, :, 1:]):
        assert one["words"][0][1] < 0.99


def test_what_all_words_have_in_common_counts_for_nothing():
    """Qwen2 adds a bias to every key. With it, all words would be alike."""
    model = random_decoder("qwen2", vocab_size=99)
    pairs, layer = cached(model, torch.tensor([7])), model.get_decoder().layers[0]
    expected = compare_pairs(model, pairs)
    assert expected[0].argmax() == 7 and expected.median().abs() < 0.2
    shift = 100 * torch.randn(pairs[0, 0, :, 0].shape)
    layer.self_attn.k_proj.bias += shift.flatten()
    pairs[0, 0, :, 0] += shift  # position 0 is not rotated
    torch.testing.assert_close(compare_pairs(model, pairs), expected, atol=1e-3, rtol=0)


def test_a_trained_prefix_is_no_words(tuned_model, tokenizer):
    for one in nearest_words(tuned_model, tokenizer, tuned_model.prefixes["short"]):
        assert one["unexplained"] > 0.3 and one["words"][0][1] < 0.7


@torch.no_grad()
def test_what_no_word_explains_is_a_share_of_the_pair_without_the_bias(tokenizer):
    """Pairs W x + b + r with a rest r that no x can give. If r is twice as long as W x, the share is 2 / sqrt(1 + 4)."""
    model = random_bloom()
    linear, heads = model.transformer.h[0].self_attention.query_key_value, model.config.n_head

    def keys_and_values(qkv):
        return qkv.unflatten(-1, (heads, 3, -1))[:, :, 1:].flatten(1)  # (tokens, heads * 2 * head_dim)

    columns = torch.linalg.qr(keys_and_values(linear.weight.T).T).Q
    explained = torch.randn(4, model.config.hidden_size) @ keys_and_values(linear.weight.T)
    rest = torch.randn_like(explained)
    rest -= rest @ columns @ columns.T
    times = torch.tensor([0.0, 0.5, 1.0, 2.0])
    rest *= (times * explained.norm(dim=1) / rest.norm(dim=1))[:, None]
    pairs = (explained + rest + keys_and_values(linear.bias[None])).unflatten(1, (heads, 2, -1))
    found = nearest_words(model, tokenizer, pairs.permute(2, 1, 0, 3)[None])
    assert [one["unexplained"] for one in found] == pytest.approx((times / (1 + times**2).sqrt()).tolist(), abs=1e-5)
