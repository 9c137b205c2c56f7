import itertools

import pytest
import torch

from prefix_tuning.data.templates import prompt_of
from prefix_tuning.generation.cache import CACHE
from prefix_tuning.model.bloom import prefix_cache
from prefix_tuning.study import question
from prefix_tuning.study.question import follow, token_text
from prefix_tuning.study.shares import attention_shares

QUESTION = "法国的首都是哪里？"


@pytest.fixture(scope="module")
def shares(studied, batches):
    return attention_shares(studied.model, batches["short"], studied.model.prefixes["short"])["share"]


@pytest.fixture(scope="module")
def prompt(tokenizer):
    return tokenizer(prompt_of(QUESTION), split_special_tokens=True).input_ids


@pytest.fixture(scope="module")
def followed(studied, tokenizer, prompt, shares):
    return follow(studied.model, tokenizer, prompt, "short", shares)


def test_probabilities_are_those_of_generate_with_scores(followed, studied, tokenizer, prompt):
    ids = torch.tensor([prompt])
    output = studied.model.generate(
        ids, prefix_name="short", max_new_tokens=48, do_sample=False, output_scores=True, return_dict_in_generate=True
    )
    reply = output.sequences[0, ids.shape[1] :]
    assert followed["prompt"] == ids.shape[1] and len(followed["tokens"]) == output.sequences.shape[1]
    assert followed["answers"]["prefix"] == tokenizer.decode(reply, skip_special_tokens=True)
    expected = followed["expected"]["prefix"][ids.shape[1] - 1 :]
    for token, scores, one in zip(reply, output.scores, expected, strict=True):
        probabilities = scores[0].softmax(dim=0)
        assert one["probability"] == pytest.approx(probabilities[token].item(), abs=1e-5)
        assert [value for _, value in one["likeliest"]] == pytest.approx(probabilities.topk(5).values.tolist(), abs=1e-5)
        assert one["likeliest"][0][0] == token_text(tokenizer, token.item())


def test_the_base_s_side_knows_no_prefix(followed, studied, prompt):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        probabilities = studied.eager(ids).logits[0].softmax(dim=-1)
    expected = [probabilities[position, ids[0, position + 1]].item() for position in range(ids.shape[1] - 1)]
    found = [one["probability"] for one in followed["expected"]["base"][: len(expected)]]
    assert found == pytest.approx(expected, abs=1e-5)


def test_attention_is_what_transformers_reports(followed, studied, prompt):
    ids = torch.tensor([prompt])
    cache, mask = prefix_cache([studied.model.prefixes["short"]])
    mask = torch.cat((mask, torch.ones_like(ids)), dim=1)
    with torch.no_grad():
        reported = studied.eager(ids, **{CACHE: cache}, attention_mask=mask, output_attentions=True).attentions
    assert len(followed["attention"]) == 24
    for one in followed["attention"]:
        expected = reported[one["layer"]][0, one["head"], :, :16]
        torch.testing.assert_close(torch.tensor(one["weights"])[: ids.shape[1]], expected, atol=1e-5, rtol=0)


def test_of_many_heads_those_with_the_largest_share_are_kept(studied, tokenizer, prompt, shares, followed, monkeypatch):
    monkeypatch.setattr(question, "MOST_MAPS", 2)
    found = follow(studied.model, tokenizer, prompt, "short", shares)
    kept = [shares[one["layer"]][one["head"]] for one in found["attention"]]
    assert kept == sorted(itertools.chain(*shares), reverse=True)[:2]
    assert found["attention"] == followed["attention"][:2]


def test_tokens_are_text_or_the_bytes_of_a_part_of_a_character(tokenizer):
    ids = tokenizer("巴黎 brave 𰻝").input_ids
    texts = [token_text(tokenizer, token) for token in ids]
    assert "巴黎" in texts
    pieces = [bytes.fromhex(text[1:-1].replace(" ", "")) if text.startswith("<") else text.encode() for text in texts]
    assert b"".join(pieces).decode() == "巴黎 brave 𰻝"
    assert token_text(tokenizer, tokenizer.eos_token_id) == "</s>"
