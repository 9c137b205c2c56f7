"""With any version of transformers, every way of decoding after a prefix gives the answers of plain forward passes.

The plain way computes [prefix; text] anew for each token, and knows neither `generate` nor a cache that grows.
"""

import pytest
import torch
from answers import PROMPTS, complete, decode
from transformers import DynamicCache, StaticCache, TextStreamer, pipeline

from prefix_tuning.model.bloom import prefix_cache

TOKENS = 8
OPTIONS = {"max_new_tokens": TOKENS, "do_sample": False}


@pytest.fixture(scope="module")
def plainly(tuned_model, base, tokenizer):
    """The answers by plain forward passes, by name of the prefix."""
    answers = {
        name: [
            decode(tokenizer, prompt, lambda ids, prefix=prefix: base(ids, prefix_cache([prefix])[0]).logits, TOKENS)
            for prompt in PROMPTS
        ]
        for name, prefix in tuned_model.prefixes.items()
    }
    answers["base"] = [decode(tokenizer, prompt, lambda ids: base(ids).logits, TOKENS) for prompt in PROMPTS]
    assert answers["short"] != answers["base"] != answers["sentence"] != answers["short"]
    return answers


def text_of(tokenizer, output, inputs):
    return tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("name", ["short", "sentence", "base"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_one_text(tuned_model, tokenizer, plainly, name, cache):
    for prompt, answer in zip(PROMPTS, plainly[name], strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        output = tuned_model.generate(**inputs, prefix_name=name, cache_implementation=cache, **OPTIONS)
        assert text_of(tokenizer, output, inputs) == [answer]


@pytest.mark.parametrize("cache", [None, "static"])
def test_a_batch_of_unequal_texts_and_prefixes(tuned_model, tokenizer, plainly, cache):
    names = ["short", "base", "sentence", "short"]
    inputs = tokenizer(PROMPTS, padding=True, padding_side="left", return_tensors="pt")
    output = tuned_model.generate(**inputs, prefix_name=names, cache_implementation=cache, **OPTIONS)
    assert text_of(tokenizer, output, inputs) == [plainly[name][row] for row, name in enumerate(names)]


def test_many_texts_in_batches_that_shrink(tuned_model, tokenizer, plainly):
    names = [name for name in plainly for _ in PROMPTS]
    answers = complete(tuned_model, tokenizer, PROMPTS * len(plainly), prefix_name=names, **OPTIONS)
    assert answers == [answer for name in plainly for answer in plainly[name]]


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
@pytest.mark.parametrize("keyword", ["cache", "past_key_values"])
def test_a_cache_that_is_given_and_continued(tuned_model, tokenizer, plainly, kind, keyword):
    """The first half of an answer, then the other half by a second call with the same cache."""
    cache = DynamicCache() if kind is DynamicCache else StaticCache(tuned_model.config, 64)
    inputs = tokenizer(PROMPTS[:1], return_tensors="pt")
    options = OPTIONS | {keyword: cache}
    half = tuned_model.generate(**inputs, prefix_name="sentence", **options | {"max_new_tokens": TOKENS // 2})
    whole = tuned_model.generate(half, **options | {"max_new_tokens": TOKENS // 2})
    assert text_of(tokenizer, whole, inputs) == plainly["sentence"][:1]


@pytest.mark.parametrize("keyword", ["cache", "past_key_values"])
def test_forward_passes_token_by_token(tuned_model, tokenizer, plainly, keyword):
    cache = DynamicCache()

    def logits_of(ids):
        new, name = (ids, "short") if cache.get_seq_length() == 0 else (ids[:, -1:], None)
        return tuned_model(new, prefix_name=name, **{keyword: cache}).logits

    assert decode(tokenizer, PROMPTS[0], logits_of, TOKENS) == plainly["short"][0]


def test_streaming(tuned_model, tokenizer, plainly, capsys):
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    tuned_model.generate(**inputs, prefix_name="sentence", streamer=streamer, **OPTIONS)
    assert capsys.readouterr().out.strip() == plainly["sentence"][0]


def test_a_pipeline(tuned_model, tokenizer, plainly):
    answer = pipeline("text-generation", tuned_model, tokenizer=tokenizer)
    for name in ("short", "base"):
        tuned_model.use(name)
        found = answer(PROMPTS, return_full_text=False, **OPTIONS)
        assert [text for ((text,),) in ((row[0].values(),) for row in found)] == plainly[name]
    tuned_model.use("short")


@pytest.mark.parametrize("name", ["short", "base"])
def test_beams(tuned_model, base, tokenizer, name):
    """Two beams of six tokens. Neither ends its text, so the plain way only keeps the likeliest pair of each step."""
    prefix, ids = tuned_model.prefixes.get(name), tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    beams = [(0.0, ids)]
    for _ in range(6):
        longer = []
        for score, text in beams:
            with torch.no_grad():
                logits = base(text, None if prefix is None else prefix_cache([prefix])[0]).logits[0, -1]
            scores = logits.log_softmax(-1)
            scores[tokenizer.eos_token_id] = -torch.inf
            best = scores.topk(2)
            longer += [
                (score + value, torch.cat((text, token.view(1, 1)), dim=1))
                for value, token in zip(best.values.tolist(), best.indices, strict=True)
            ]
        beams = sorted(longer, key=lambda beam: -beam[0])[:2]
    options = {"num_beams": 2, "num_return_sequences": 2, "min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}
    output = tuned_model.generate(ids, attention_mask=torch.ones_like(ids), prefix_name=name, **options)
    assert torch.equal(output, torch.cat([text for _, text in beams]))
