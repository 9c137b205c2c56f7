import math

from prefix_tuning.study.claims.li_liang import factor_beside_the_best, infix, length, projection
from prefix_tuning.study.claims.trials import Measured


def test_length_agrees_where_training_falls_on_and_held_out_turns(staged):
    assert staged(length, lambda trial: (1 / trial.tokens, 2 + abs(trial.tokens - 4), 0.5)) == [True, True]
    assert staged(length, lambda trial: (trial.tokens, 1 / trial.tokens, 0.5)) == [False, False]
    assert staged(length, lambda trial: (1, 2, 0.5)) == [None, None]


def test_infix_and_embedding_only_are_each_held_against_the_prefix(staged):
    shares = {"prefix": 0.7, "infix": 0.6, "embeddings": 0.9}
    assert staged(infix, lambda trial: (1, 1, shares[trial.method])) == [True, False]


def test_projection_needs_the_direct_pairs_to_be_worse(staged):
    for direct, agrees in ((0.6, True), (0.8, False)):
        found = staged(projection, lambda trial, direct=direct: (1, 1, 0.7 if trial.method == "prefix" else direct))
        assert found == [agrees, False]  # both as sensitive


def test_the_factor_is_of_the_worse_neighbour():
    def factor(*losses):
        tried = {str(place): loss for place, loss in enumerate(losses)}
        return factor_beside_the_best(Measured(0.01, tried, [], [], []))

    assert factor(9.0, 2.0, 1.0, 3.0) == 3 and factor(1.0, 4.0) == 4 and factor(1.5, 1.0, None) == math.inf
