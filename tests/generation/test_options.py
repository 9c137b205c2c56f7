import copy

import pytest
import torch
from helpers import GREEDY, PROMPTS
from transformers import GenerationConfig

from prefix_tuning.data.rows import prompt_of
from prefix_tuning.generation.options import guess_mask


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


def test_a_mask_is_guessed_from_the_padding_unless_that_is_an_end_too():
    ids = torch.tensor([[3, 3, 5, 2, 6], [4, 5, 2, 3, 6]])
    padded = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 1]])
    for pad, eos, mask in ((3, 2, padded), (3, None, padded), (3, [2, 7], padded)):
        assert torch.equal(guess_mask(ids, GenerationConfig(pad_token_id=pad, eos_token_id=eos)), mask)
    for pad, eos in ((2, 2), (2, [7, 2]), (None, 2)):
        assert guess_mask(ids, GenerationConfig(pad_token_id=pad, eos_token_id=eos)).all()


def test_what_a_prefix_rules_out_is_refused(random_model, base):
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
