import torch
from models import random_bloom, random_prefix

from prefix_tuning.study.claims.exchange import MIXES, Exchange, exchange_pairs, parts_of_exchange
from prefix_tuning.study.mixing import mix
from prefix_tuning.study.page import Text


def test_a_mix_has_the_keys_of_one_and_the_values_of_the_other():
    one, other = (random_prefix(random_bloom(), seed=seed) for seed in (1, 2))
    mixed = mix(one, other)
    assert torch.equal(mixed[:, 0], one[:, 0]) and torch.equal(mixed[:, 1], other[:, 1])


def test_a_real_exchange(tiny):
    found = exchange_pairs(Exchange("prefix", (0.01, 0.01), 1), tiny)
    assert [list(found[style]) for style in ("short", "sentence")] == [["own", "other keys", "other values"]] * 2
    assert all(0.5 < cosine < 1 for cosine in found["moved"].values())  # two steps from the start


def agreements(*seeds):
    found = [{style: dict(zip(MIXES, shares, strict=True)) for style, shares in seed.items()} for seed in seeds]
    return [part.agrees for part in parts_of_exchange(Text("a", "a"), found)]


def test_keys_must_keep_most_and_do_better_than_values_in_both_styles():
    assert agreements({"short": [0.9, 0.8, 0.1], "sentence": [0.9, 0.8, 0.0]}) == [True, True]
    assert agreements({"short": [0.9, 0.1, 0.3], "sentence": [0.9, 0.5, 0.6]}) == [False, False]
    assert agreements({"short": [0.9, 0.1, 0.3], "sentence": [0.9, 0.5, 0.4]}) == [False, None]  # one so, one so
    apart, overlapping = {"short": [0.9, 0.5, 0.1], "sentence": [0.9, 0.5, 0.1]}, {"short": [0.9, 0.2, 0.3]}
    assert agreements(apart, apart | overlapping) == [False, None]
