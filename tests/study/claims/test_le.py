from prefix_tuning.study.claims.le import shared


def test_shared_is_held_against_both_at_each_size(staged):
    losses = {"prefix": 1.0, "separate": 0.9, "direct": 1.1}
    assert staged(shared, lambda trial: (1, losses[trial.method], 0.5)) == [True, False] * 3
