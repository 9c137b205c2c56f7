import torch
from helpers import random_bloom, random_prefix

from prefix_tuning.study.claims.cartridges import Exchange, exchange_pairs, fixed_keys, mix, parts_of_exchange
from prefix_tuning.study.page import Text


def test_a_mix_has_the_keys_of_one_and_the_values_of_the_other():
    one, other = (random_prefix(random_bloom(), seed=seed) for seed in (1, 2))
    mixed = mix(one, other)
    assert torch.equal(mixed[:, 0], one[:, 0]) and torch.equal(mixed[:, 1], other[:, 1])


def test_a_real_exchange(tiny):
    found = exchange_pairs(Exchange("prefix", (0.01, 0.01), 1, tiny))
    assert [list(shares) for shares in found.values()] == [["own", "other keys", "other values"]] * 2


def test_keys_must_keep_most_and_values_lose_most_in_both_styles():
    def agreements(short, sentence):
        return [part.agrees for part in parts_of_exchange(Text("a", "a"), {"short": short, "sentence": sentence})]

    assert agreements([0.9, 0.8, 0.1], [0.9, 0.8, 0.0]) == [True, True]
    assert agreements([0.9, 0.8, 0.1], [0.9, 0.5, 0.6]) == [False, False]


def test_fixed_keys_may_cost_five_points(staged):
    shares = {"prefix": 0.9, "fixed normal": 0.86, "fixed words": 0.8}
    assert staged(fixed_keys, lambda trial: (1, 1, shares[trial.method])) == [True, False]
