"""Each claim on staged figures: what agrees, what does not, and what is open."""

import math

from prefix_tuning.study.claims.experiments import (
    extrapolation,
    factor_beside_the_best,
    fixed_keys,
    infix,
    length,
    low_data,
    projection,
    shared,
    unlock,
    words,
)
from prefix_tuning.study.claims.trials import Measured


def test_length_agrees_where_training_falls_on_and_held_out_turns(staged):
    assert staged(length, lambda trial: (1 / trial.tokens, 2 + abs(trial.tokens - 4), 0.5)) == [True, True]
    assert staged(length, lambda trial: (trial.tokens, 1 / trial.tokens, 0.5)) == [False, False]
    assert staged(length, lambda trial: (1, 2, 0.5)) == [None, None]


def test_infix_and_embedding_only_are_each_compared_with_the_prefix(staged):
    shares = {"prefix": 0.7, "infix": 0.6, "embeddings": 0.9}
    assert staged(infix, lambda trial: (1, 1, shares[trial.method])) == [True, False]


def test_projection_needs_the_direct_pairs_to_be_worse(staged):
    for direct, agrees in ((0.6, True), (0.8, False)):
        found = staged(projection, lambda trial, direct=direct: (1, 1, 0.7 if trial.method == "prefix" else direct))
        assert found == [agrees, False]  # both as sensitive


def test_the_factor_is_of_the_worse_neighbour():
    def factor(*losses):
        tried = {str(index): loss for index, loss in enumerate(losses)}
        return factor_beside_the_best(Measured(0.01, tried, [], [], []))

    assert factor(9.0, 2.0, 1.0, 3.0) == 3 and factor(1.0, 4.0) == 4 and factor(1.5, 1.0, None) == math.inf


def test_low_data_is_the_mean_over_sizes_from_50_on_and_the_lead(staged):
    leads = {2: -0.9, 50: 0.3, 60: 0.1}

    def figures(sign):
        return lambda trial: (1, 1, 0.5 + sign * leads[trial.rows] * (trial.method == "prefix"))

    assert staged(low_data, figures(1)) == [True, True]
    assert staged(low_data, figures(-1)) == [False, None]  # no lead that could shrink


def test_words_help_with_few_rows_and_do_nothing_with_all(staged):
    def figures(losses):
        shares = {"prefix": 0.5, "related": 0.6, "unrelated": 0.4}
        same = {"prefix": 0.5, "related": 0.51, "unrelated": 0.4}
        return lambda trial: (1, losses[trial.method], (shares if trial.rows else same)[trial.method])

    assert staged(words, figures({"prefix": 2, "related": 1, "unrelated": 3})) == [True] * 5
    assert staged(words, figures({"prefix": 2, "related": 4, "unrelated": 3})) == [None] * 4 + [True]  # match, not loss
    turned = {"prefix": 0.6, "related": 0.5, "unrelated": 0.55}
    assert staged(words, lambda trial: (1, 1 - turned[trial.method], turned[trial.method])) == [False] * 5


def test_extrapolation_asks_for_match_and_loss(staged):
    better, worse = (1, 0.5, 0.9), (1, 1.5, 0.8)
    assert staged(extrapolation, lambda trial: better if trial.method == "prefix" else worse) == [True, True]
    assert staged(extrapolation, lambda trial: worse if trial.method == "prefix" else better) == [False, False]


def test_shared_is_compared_with_both_at_each_size(staged):
    losses = {"prefix": 1.0, "separate": 0.9, "direct": 1.1}
    assert staged(shared, lambda trial: (1, losses[trial.method], 0.5)) == [True, False] * 3


def test_unlock_has_a_known_task_a_new_one_and_a_control(staged):
    found = {("short", "prefix"): 0.9, ("reversed", "prefix"): 0.0, ("copied", "prefix"): 0.7}
    assert staged(unlock, lambda trial: (1, 1, found.get((trial.task, trial.method), 0.9))) == [True] * 5
    found["copied", "prefix"] = 0.0  # then it is not the order
    assert staged(unlock, lambda trial: (1, 1, found.get((trial.task, trial.method), 0.9))) == [True] * 4 + [None]
    assert staged(unlock, lambda trial: (1, 1, 0.4)) == [False] * 4 + [None]


def test_fixed_keys_are_no_claim_of_the_paper(staged):
    shares = {"prefix": 0.9, "fixed normal": 0.86, "fixed words": 0.8}
    assert staged(fixed_keys, lambda trial: (1, 1, shares[trial.method])) == [None, None]
