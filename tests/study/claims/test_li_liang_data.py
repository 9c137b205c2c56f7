from prefix_tuning.study.claims.li_liang_data import extrapolation, low_data, words


def test_low_data_is_the_mean_over_sizes_and_the_gap(staged):
    gaps = {2: 0.3, 4: -0.1, 6: 0.0}
    assert staged(low_data, lambda trial: (1, 1, 0.5 + gaps[trial.rows] * (trial.method == "prefix"))) == [True, True]
    assert staged(low_data, lambda trial: (1, 1, 0.5 - gaps[trial.rows] * (trial.method == "prefix"))) == [False, False]


def test_words_help_with_few_rows_and_do_nothing_with_all(staged):
    def figures(trial):
        return 1, 1, {"prefix": 0.5, "related": 0.51 if trial.rows is None else 0.6, "unrelated": 0.4}[trial.method]

    assert staged(words, figures) == [True, True, True]
    turned = {"prefix": 0.6, "related": 0.5, "unrelated": 0.4}
    assert staged(words, lambda trial: (1, 1, turned[trial.method])) == [False, False, False]


def test_extrapolation_asks_for_match_and_loss(staged):
    better, worse = (1, 0.5, 0.9), (1, 1.5, 0.8)
    assert staged(extrapolation, lambda trial: better if trial.method == "prefix" else worse) == [True, True]
    assert staged(extrapolation, lambda trial: worse if trial.method == "prefix" else better) == [False, False]
