import copy
import signal

import pytest
from answers import GREEDY, complete
from transformers import GenerationConfig, SuppressTokensAtBeginLogitsProcessor

from prefix_tuning import PrefixBloom, load_prefix, signals
from prefix_tuning.generation.batches import Prompt, batches_of

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


def test_a_mixed_batch_answers_as_each_row_alone(tuned_model, tokenizer, mixed):
    prompts, names = mixed
    assert len({tuned_model.prefixes[name].shape[3] for name in ("short", "sentence")}) == 2  # of different lengths
    alone = [complete(tuned_model, tokenizer, [p], prefix_name=n, **GREEDY)[0] for p, n in zip(prompts, names, strict=True)]
    for batch_size in (7, 64):
        assert complete(tuned_model, tokenizer, prompts, prefix_name=names, batch_size=batch_size, **GREEDY) == alone
    assert len(set(alone)) > 40


@pytest.mark.parametrize("options", OTHER_DECODING.values(), ids=OTHER_DECODING)
def test_a_mixed_batch_answers_as_each_row_alone_with_other_decoding(tuned_model, tokenizer, mixed, options):
    prompts, names = (part[:24] for part in mixed)
    together = complete(tuned_model, tokenizer, prompts, prefix_name=names, **(GREEDY | options))
    alone = [
        complete(tuned_model, tokenizer, [p], prefix_name=n, **(GREEDY | options))[0]
        for p, n in zip(prompts, names, strict=True)
    ]
    assert together == alone


def test_batches_are_bounded_by_tokens_as_well_as_by_rows():
    lengths = [3, 40, 5, 5, 900, 41, 4, 5, 99, 3]
    prompts = [Prompt([1] * length, "ab"[number % 2], number) for number, length in enumerate(lengths)]
    batches = batches_of(prompts, batch_size=4, max_tokens=100)
    assert sorted(prompt.number for batch in batches for prompt in batch) == list(range(10))
    for batch in batches:
        assert len(batch) <= 4
        assert len(batch) == 1 or len(batch) * max(len(prompt.ids) for prompt in batch) <= 100
    assert [len(batch) for batch in batches] == [3, 1, 1, 3, 2]
    assert [len(batch) for batch in batches_of(prompts, batch_size=4, max_tokens=10**6)] == [4, 4, 2]


def test_long_prompts_are_answered_in_smaller_batches_with_the_same_answers(tuned_model, tokenizer, mixed):
    prompts, names = (part[:12] for part in mixed)
    rows = []
    hook = tuned_model.lm_head.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    try:
        few = complete(tuned_model, tokenizer, prompts, prefix_name=names, max_tokens=60, **GREEDY)
        most = max(rows)
        whole = complete(tuned_model, tokenizer, prompts, prefix_name=names, **GREEDY)
    finally:
        hook.remove()
    assert few == whole and max(rows) == 12 and 1 <= most <= 60 // min(len(ids) for ids in tokenizer(prompts).input_ids)


def test_a_least_number_of_tokens_is_counted_from_the_prompt_on(tuned_model, tokenizer, mixed):
    """Sentences: many of them go on after half of the rows have ended, and end soon."""
    options = GREEDY | {"prefix_name": "sentence", "min_new_tokens": 3}
    together = complete(tuned_model, tokenizer, mixed[0][:24], **options)
    assert together == [complete(tuned_model, tokenizer, [prompt], **options)[0] for prompt in mixed[0][:24]]


@pytest.mark.parametrize("most", [1, 3, 12])
def test_answers_are_whole_up_to_the_last_token(tuned_model, tokenizer, mixed, most):
    prompts = mixed[0][:12]
    replies = complete(tuned_model, tokenizer, prompts, prefix_name="sentence", max_new_tokens=most, do_sample=False)
    for prompt, reply in zip(prompts, replies, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = tuned_model.generate(**inputs, prefix_name="sentence", max_new_tokens=most, do_sample=False)[0]
        assert reply == tokenizer.decode(ids[inputs.input_ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("count, share", [(64, 0.6), (5, 0.99)])
def test_rows_that_have_ended_leave_the_batch(tuned_model, tokenizer, mixed, count, share):
    """They leave once half of the rows have ended. Four or fewer rows stay together until all have ended."""
    prompts = mixed[0][:count]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    replies = tuned_model.generate(**inputs, prefix_name="short", max_new_tokens=40, do_sample=False)
    lengths = replies[:, inputs.input_ids.shape[1] :].eq(tokenizer.eos_token_id).int().argmax(dim=1).add(1).tolist()
    expected, rows = [], lengths
    while any(length > len(expected) for length in rows):
        expected.append(len(rows))
        if len(rows) > 4 and 2 * sum(length <= len(expected) for length in rows) >= len(rows):
            rows = [length for length in rows if length > len(expected)]
    computed = []
    hook = tuned_model.lm_head.register_forward_hook(lambda module, args, output: computed.append(len(output)))
    try:
        complete(tuned_model, tokenizer, prompts, prefix_name="short", max_new_tokens=40, do_sample=False)
    finally:
        hook.remove()
    assert computed == expected and sum(computed) < share * count * max(lengths)


def test_a_base_with_settings_of_its_own_answers_as_alone(base, tuned, tokenizer, mixed):
    odd = copy.deepcopy(base)
    odd.config.use_cache = odd.generation_config.use_cache = False
    odd.generation_config.update(min_new_tokens=5, no_repeat_ngram_size=2, cache_implementation="static")
    model = PrefixBloom(odd, tokenizer)
    model.attach("short", load_prefix(str(tuned["short"])))
    prompts = mixed[0][:9]
    together = complete(model, tokenizer, prompts, **GREEDY)
    assert together == [complete(model, tokenizer, [prompt], **GREEDY)[0] for prompt in prompts]


PADDING_MATTERS = {
    "a penalty on what was said": {"repetition_penalty": 1.3},
    "a penalty on the prompt": {"encoder_repetition_penalty": 1.5},
    "none on what the prompt lacks": {"encoder_repetition_penalty": 0.7},
    "no token twice": {"no_repeat_ngram_size": 1},
    "no token of the prompt": {"encoder_no_repeat_ngram_size": 1},
    "a least length": {"min_length": 24},
    # transformers 5.17 gives the encoder_repetition_penalty of a row to the beams of another one.
    "two of them, on beams": {"repetition_penalty": 1.3, "min_length": 24, "num_beams": 2},
}


@pytest.mark.parametrize("settings", PADDING_MATTERS.values(), ids=PADDING_MATTERS)
def test_answers_do_not_depend_on_the_batch_where_eos_pads(base, tuned, tokenizer, mixed, settings):
    padded_by_eos = copy.deepcopy(tokenizer)
    padded_by_eos.pad_token = tokenizer.eos_token
    odd = copy.deepcopy(base)
    odd.generation_config.update(**settings)
    model = PrefixBloom(odd, padded_by_eos)
    for name in ("short", "sentence"):
        model.attach(name, load_prefix(tuned[name]))
    prompts, names = (part[:10] for part in mixed)
    options = GREEDY | {"prefix_name": names}
    alone = complete(model, padded_by_eos, prompts, batch_size=1, **options)
    assert complete(model, padded_by_eos, prompts, **options) == alone
    assert len({len(ids) for ids in tokenizer(prompts).input_ids}) > 1 and len(set(alone)) > 4


@pytest.mark.parametrize("options", [{}, {"min_new_tokens": 9}], ids=["a batch that shrinks", "one that does not"])
def test_a_signal_ends_the_batch_and_no_other_begins(tuned_model, tokenizer, mixed, options):
    passes = []

    def interrupt(*_):
        passes.append(1)
        if len(passes) == 3:
            signal.raise_signal(signal.SIGINT)

    hook = tuned_model.lm_head.register_forward_hook(interrupt)
    try:
        with signals.listening("stops"):
            complete(tuned_model, tokenizer, mixed[0][:24], prefix_name="sentence", batch_size=8, **(GREEDY | options))
    finally:
        hook.remove()
    assert 3 <= len(passes) <= 4  # on CUDA, `generate` learns of a stop one pass later
