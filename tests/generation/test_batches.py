import copy

import pytest
from helpers import GREEDY, PROMPTS, logits_after
from transformers import GenerationConfig, SuppressTokensAtBeginLogitsProcessor

from prefix_tuning import PrefixBloom, load_prefix
from prefix_tuning.generation.batches import complete, complete_batches

IS = 267  # the token "是", which most sentences have
OTHER_DECODING = {
    "beams": {"num_beams": 3},
    "a static cache": {"cache_implementation": "static"},
    "a repetition penalty": {"repetition_penalty": 1.3},
    "a repetition penalty on beams": {"repetition_penalty": 20.0, "num_beams": 2},
    "no token twice": {"no_repeat_ngram_size": 1},
    "another end": {"eos_token_id": [2, IS]},
    "an end of the configuration's": {"generation_config": GenerationConfig(eos_token_id=[2, IS])},
    "no end at first": {"begin_suppress_tokens": [2]},
    "a least number of tokens": {"min_new_tokens": 6},
    "ends that become likelier": {"exponential_decay_length_penalty": (3, 2.0)},
    "a penalty on the prompt": {"encoder_repetition_penalty": 1.5},
    "a forced end": {"forced_eos_token_id": 2},
    "strings that end an answer": {"stop_strings": ["是", "的"]},
    "a processor of the user's": {"logits_processor": [SuppressTokensAtBeginLogitsProcessor([2], 0)]},
}


def test_sequences_are_drawn_one_after_the_other_from_the_same_question(random_model, tokenizer):
    options = {"max_new_tokens": 6, "do_sample": True, "prefix_name": "five", "num_return_sequences": 3}
    ((places, texts),) = complete_batches(random_model, tokenizer, PROMPTS, seed=3, **options)
    assert sorted(places) == [0, 1, 2, 3] and all(len(set(row)) == 3 for row in texts)
    ((_, again),) = complete_batches(random_model, tokenizer, PROMPTS, seed=3, **options)
    assert again == texts
    ((_, other),) = complete_batches(random_model, tokenizer, PROMPTS, seed=4, **options)
    assert other != texts


@pytest.mark.parametrize(
    "options",
    [{}, {"num_return_sequences": 2}, {"num_beams": 2}, {"cache_implementation": "static"}],
    ids=["plain", "sequences", "beams", "static cache"],
)
def test_what_is_drawn_for_a_prompt_depends_on_its_number_and_the_seed_alone(tuned_model, tokenizer, mixed, options):
    prompts, names = ([*part[:14], *part[:4]] for part in mixed)  # the last ones are asked for the second time
    options = {"max_new_tokens": 10, "do_sample": True, "temperature": 2.0, **options}

    def answers(numbers, seed, batch_size):
        asked = [prompts[number] for number in numbers], [names[number] for number in numbers]
        batches = complete_batches(tuned_model, tokenizer, *asked, batch_size, seed, numbers, **options)
        return {numbers[place]: texts for batch in batches for place, texts in zip(*batch, strict=True)}

    whole = answers(range(18), 5, 64)
    for process in range(2):  # as two processes share them, in another order and other batches
        assert answers(range(18)[process::2][::-1], 5, 4 + process).items() <= whole.items()
    assert sum(whole[number] != whole[number + 14] for number in range(4)) > 1
    assert sum(answers(range(18), 6, 64)[number] != whole[number] for number in range(18)) > 9


def test_draws_follow_the_models_distribution(base, random_model, tokenizer):
    probabilities = logits_after(base, random_model.prefixes["five"], tokenizer(PROMPTS[0]).input_ids).softmax(0)
    token = probabilities.argmax().item()
    prompts, options = PROMPTS[:1] * 1000, {"max_new_tokens": 1, "do_sample": True, "top_k": 0, "prefix_name": "five"}
    texts = complete(random_model, tokenizer, prompts, batch_size=500, seed=1, **options)
    share, count = probabilities[token].item(), texts.count(tokenizer.decode([token]))
    assert 0.02 < share < 0.98
    assert abs(count - 1000 * share) < 4 * (1000 * share * (1 - share)) ** 0.5
    even = {"do_sample": True, "temperature": 1e4, "top_k": 0, "seed": 1}  # all tokens alike: what comes is the draw alone
    first, all_eight = (complete(random_model, tokenizer, PROMPTS, max_new_tokens=most, **even) for most in (1, 8))
    assert all(eight != 8 * one for one, eight in zip(first, all_eight, strict=True))


@pytest.mark.parametrize("batch_size", [7, 64])
def test_a_mixed_batch_answers_as_each_row_alone(tuned_model, tokenizer, mixed, batch_size):
    prompts, names = mixed
    assert len({tuned_model.prefixes[name].shape[3] for name in ("short", "sentence")}) == 2  # of different lengths
    together = complete(tuned_model, tokenizer, prompts, prefix_name=names, batch_size=batch_size, **GREEDY)
    alone = [complete(tuned_model, tokenizer, [p], prefix_name=n, **GREEDY)[0] for p, n in zip(prompts, names, strict=True)]
    assert together == alone
    assert len(set(together)) > 40


@pytest.mark.parametrize("options", OTHER_DECODING.values(), ids=OTHER_DECODING)
def test_so_it_does_with_other_decoding(tuned_model, tokenizer, mixed, options):
    prompts, names = (part[:24] for part in mixed)
    together = complete(tuned_model, tokenizer, prompts, prefix_name=names, **(GREEDY | options))
    alone = [
        complete(tuned_model, tokenizer, [p], prefix_name=n, **(GREEDY | options))[0]
        for p, n in zip(prompts, names, strict=True)
    ]
    assert together == alone


@pytest.mark.parametrize("most", [1, 3, 12])
def test_answers_are_whole_up_to_the_last_token(tuned_model, tokenizer, mixed, most):
    prompts = mixed[0][:12]
    replies = complete(tuned_model, tokenizer, prompts, prefix_name="sentence", max_new_tokens=most, do_sample=False)
    for prompt, reply in zip(prompts, replies, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = tuned_model.generate(**inputs, prefix_name="sentence", max_new_tokens=most, do_sample=False)[0]
        assert reply == tokenizer.decode(ids[inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_rows_that_have_ended_leave_the_batch(tuned_model, tokenizer, mixed):
    prompts = mixed[0][:64]
    computed = []
    hook = tuned_model.lm_head.register_forward_hook(lambda module, args, output: computed.append(len(output)))
    try:
        answers = complete(tuned_model, tokenizer, prompts, prefix_name="short", max_new_tokens=40, do_sample=False)
    finally:
        hook.remove()
    longest = max(len(ids) for ids in tokenizer(answers).input_ids) + 1
    assert computed[0] == 64 and sum(computed) < 0.6 * 64 * longest


def test_a_base_with_settings_of_its_own_answers_as_alone(base, tuned, tokenizer, mixed):
    odd = copy.deepcopy(base)
    odd.config.use_cache = odd.generation_config.use_cache = False
    odd.generation_config.update(min_new_tokens=5, no_repeat_ngram_size=2, cache_implementation="static")
    model = PrefixBloom(odd, tokenizer)
    model.attach("short", load_prefix(str(tuned["short"])))
    prompts = mixed[0][:9]
    together = complete(model, tokenizer, prompts, **GREEDY)
    assert together == [complete(model, tokenizer, [prompt], **GREEDY)[0] for prompt in prompts]
