from prefix_tuning.study.claims.li_liang_data import extrapolation, low_data, words


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
