import pytest
import torch
from answers import PROMPTS, complete, logits_after
from transformers import GenerationConfig

from prefix_tuning.generation.batches import Prompt, batches_of, complete_batch
from prefix_tuning.generation.sampling import row_draws


def test_sequences_are_drawn_one_after_the_other_from_the_same_question(random_model, tokenizer):
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0, "num_return_sequences": 3}
    (batch,) = batches_of(map(Prompt, tokenizer(PROMPTS).input_ids, ["five"] * 4, range(4)), 64, 1000)
    texts = complete_batch(random_model, tokenizer, batch, seed=3, **options)
    assert sorted(prompt.number for prompt in batch) == [0, 1, 2, 3] and all(len(set(row)) == 3 for row in texts)
    assert complete_batch(random_model, tokenizer, batch, seed=3, **options) == texts
    assert complete_batch(random_model, tokenizer, batch, seed=4, **options) != texts


@pytest.mark.parametrize(
    "options",
    [{}, {"num_return_sequences": 2}, {"num_beams": 2}, {"cache_implementation": "static"}],
    ids=["plain", "sequences", "beams", "static cache"],
)
def test_what_is_drawn_for_a_prompt_depends_on_its_number_and_the_seed_alone(tuned_model, tokenizer, mixed, options):
    prompts, names = ([*part[:14], *part[:4]] for part in mixed)  # the last ones are asked for the second time
    options = {"max_new_tokens": 6, "do_sample": True, "temperature": 2.0, **options}

    def answers(numbers, seed, batch_size):
        asked = tokenizer([prompts[number] for number in numbers]).input_ids, [names[number] for number in numbers]
        found = {}
        for batch in batches_of(map(Prompt, *asked, numbers), batch_size, 10_000):
            texts = complete_batch(tuned_model, tokenizer, batch, seed, **options)
            found |= zip((prompt.number for prompt in batch), texts, strict=True)
        return found

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
    even = {"do_sample": True, "temperature": 1e4, "top_k": 0, "seed": 1}  # all tokens are alike
    first, all_eight = (complete(random_model, tokenizer, PROMPTS, max_new_tokens=most, **even) for most in (1, 8))
    assert all(eight != 8 * one for one, eight in zip(first, all_eight, strict=True))


def test_keys_of_one_sum_draw_differently():
    settings = GenerationConfig(do_sample=True)
    with row_draws(settings, [(3, 1), (1, 3), (2, 2), (3, 1)]):
        drawn = torch.multinomial(torch.ones(4, 100_000), num_samples=1).flatten().tolist()
    assert len(set(drawn)) == 3 and drawn[0] == drawn[3]
