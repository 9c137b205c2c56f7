import copy
import logging

import pytest
import torch
from answers import GREEDY, PROMPTS
from models import random_decoder
from transformers import GenerationConfig
from transformers.utils.logging import warning_once

from prefix_tuning import PrefixBloom
from prefix_tuning.data.templates import prompt_of
from prefix_tuning.generation.options import depends_on_padding, guess_mask, is_continuable, new_tokens, resolve_options


def test_settings_come_from_the_call_its_configuration_and_the_models_own(tuned_model, base, tokenizer):
    model = copy.copy(tuned_model)
    prompts = [prompt_of(question) for question in ("法国的首都是哪里？", "请问草鱼在动物分类里归入哪一类？")]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    expected = model.generate(**inputs, **GREEDY)
    config = GenerationConfig(**GREEDY)
    assert torch.equal(model.generate(inputs.input_ids, config), expected)  # the mask is guessed by the model's own pad id
    assert config.pad_token_id is None
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.num_beams = 2
    assert torch.equal(model.generate(**inputs, generation_config=config), model.generate(**inputs, **GREEDY, num_beams=2))
    model.generation_config.num_beams, model.generation_config.max_new_tokens = 1, 30
    static = model.generate(**inputs, generation_config=GenerationConfig(cache_implementation="static", do_sample=False))
    assert torch.equal(static[:, : expected.shape[1]], expected)
    ended = torch.tensor([[2, *tokenizer(PROMPTS[0]).input_ids]])  # an eos in the text is no padding, even where pad is eos
    ours = model.generate(ended, prefix_name="base", pad_token_id=2, **GREEDY)
    assert torch.equal(ours, base.generate(ended, pad_token_id=2, **GREEDY))


def test_settings_for_sampling_that_a_greedy_answer_ignores_are_named_only_to_who_has_given_them(caplog, monkeypatch):
    """The base's generation_config has some, as those of Llama, Qwen and Gemma do."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    base = random_decoder("llama")
    for name, value in {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20}.items():
        setattr(base.generation_config, name, value)
    model, ids = PrefixBloom(base), torch.tensor([[5, 6, 7]])

    def said(**options):
        warning_once.cache_clear()
        caplog.clear()
        model.generate(ids, max_new_tokens=2, **options)
        return "".join(record.getMessage() for record in caplog.records)

    assert said(do_sample=False) == said(generation_config=GenerationConfig(do_sample=False)) == said() == ""
    assert "['temperature']" in said(do_sample=False, temperature=0.5)
    assert "['top_k']" in said(generation_config=GenerationConfig(do_sample=False, top_k=3))


def test_a_mask_is_guessed_from_pad_tokens_unless_pad_is_also_eos():
    ids = torch.tensor([[3, 3, 5, 2, 6], [4, 5, 2, 3, 6]])
    padded = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 1]])
    for pad, eos, mask in ((3, 2, padded), (3, None, padded), (3, [2, 7], padded)):
        assert torch.equal(guess_mask(ids, GenerationConfig(pad_token_id=pad, eos_token_id=eos)), mask)
    for pad, eos in ((2, 2), (2, [7, 2]), (None, 2)):
        assert guess_mask(ids, GenerationConfig(pad_token_id=pad, eos_token_id=eos)).all()


def test_options_that_do_not_go_with_a_prefix_are_refused(random_model, base):
    ids = torch.tensor([[5, 6]])
    for options in (
        {"inputs_embeds": torch.zeros(1, 2, 192)},
        {"assistant_model": base},
        {"prompt_lookup_num_tokens": 2},
        {"guidance_scale": 1.5},
        {"prefill_chunk_size": 2},
    ):
        with pytest.raises(ValueError, match="does not go with a prefix"):
            random_model.generate(ids, **options)
    with pytest.raises(ValueError, match="static cache"):
        random_model.generate(ids, cache_implementation="quantized")
    assert torch.equal(random_model.generate(ids, guidance_scale=1, **GREEDY), random_model.generate(ids, **GREEDY))
    model = copy.copy(random_model)
    model.generation_config = GenerationConfig(cache_implementation="static")
    with pytest.raises(ValueError, match="give cache_implementation to `generate`"):
        model.generate(ids)


def test_a_guessed_mask_hides_every_pad_token_and_nothing_else():
    ids = torch.tensor([[3, 3, 5, 2, 6], [7, 2, 3, 8, 9]])
    for pad, eos, padding in ((3, 2, 3), (3, [2, 5], 3), (3, None, 3), (2, 2, None), (2, [5, 2], None), (None, 2, None)):
        expected = torch.tensor([[int(token != padding) for token in row] for row in ids.tolist()])
        torch.testing.assert_close(guess_mask(ids, GenerationConfig(pad_token_id=pad, eos_token_id=eos)), expected)


def test_new_tokens_are_counted_by_themselves_or_with_the_text():
    assert new_tokens(GenerationConfig(max_new_tokens=7, max_length=50), 10) == 7
    assert new_tokens(GenerationConfig(max_length=50), 10) == 40
    assert new_tokens(GenerationConfig(), 10) == 20  # as transformers has it


NEUTRAL = {"repetition_penalty": 1.0, "encoder_repetition_penalty": 1.0}
NEUTRAL |= {"no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0}


@pytest.mark.parametrize("name, neutral", NEUTRAL.items())
def test_padding_matters_where_eos_pads_and_a_penalty_reads_the_text(name, neutral):
    for value, pad, matters in ((neutral, 2, False), (neutral + 1, 2, True), (neutral + 1, 3, False)):
        assert depends_on_padding(GenerationConfig(eos_token_id=[7, 2], **{name: value}), pad) == matters


def test_an_answer_is_continued_by_another_call_only_where_that_changes_nothing():
    options = {"temperature": 0.5, "top_k": 3, "repetition_penalty": 1.5, "eos_token_id": [2], "num_beams": 1}
    settings = GenerationConfig(max_new_tokens=5, do_sample=True, num_return_sequences=1, **options)
    assert is_continuable(settings, {"tokenizer": object(), "streamer": None})
    assert not is_continuable(settings, {"stopping_criteria": []})
    assert not is_continuable(GenerationConfig(max_length=50), {})
    for other in ({"min_new_tokens": 2}, {"num_beams": 2}, {"num_return_sequences": 2}, {"cache_implementation": "static"}):
        assert not is_continuable(GenerationConfig(max_new_tokens=5, do_sample=True, **other), {})


def test_options_of_the_call_override_its_configuration_which_overrides_the_models():
    own = GenerationConfig(max_new_tokens=1, do_sample=True, top_k=1, top_p=0.1, guidance_scale=1.0)
    given = GenerationConfig(max_new_tokens=2, top_k=2)
    settings, others = resolve_options(own, given, {"max_new_tokens": 3, "streamer": "none of the settings"})
    assert (settings.max_new_tokens, settings.top_k, settings.top_p, settings.guidance_scale) == (3, 2, 0.1, None)
    assert others == {"streamer": "none of the settings"}
    assert (given.max_new_tokens, given.top_p, own.max_new_tokens) == (2, None, 1)  # both stay as they are
    settings, _ = resolve_options(own, None, {})
    assert (settings.max_new_tokens, settings.top_k) == (1, 1) and settings is not own
