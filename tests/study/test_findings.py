"""The sentences of the findings name the figures that they are made from."""

from prefix_tuning.study import findings


def test_attention_names_the_head_that_looks_most():
    shares = {"share": [[0.005, 0.2], [0.8, 0.3]], "slopes": [0.25, 0.0625], "by_distance": [[[0.5, 0.1], [0.9, 0.7]]] * 2}
    said = findings.attention("short", {"attention": shares}).en
    assert "give 33% of their attention" in said and "head 0 of layer 1 gives the most, 80%; 1 of the 4 heads" in said
    said = findings.distance("short", {"attention": shares}).en
    assert "token 1 to token 2" in said and "from 50% to 10% in the head with the steepest slope (0.25)" in said
    assert "from 90% to 70% in the head with the flattest (0.062)" in said


def test_without_alibi_the_distance_names_the_head_that_looks_most_from_afar():
    shares = {"by_distance": [[[0.5, 0.1], [0.9, 0.7]], [[1.0, 0.009], [0.3, 0.2]]], "slopes": None}
    said = findings.distance("short", {"attention": shares})
    assert "at token 2 of a row, 3 of the 4 heads still" in said.en
    assert "head 1 of layer 0 gives the most, 70%, and 90% at token 1" in said.en and "第 0 层的头 1" in said.zh


def test_a_question_s_first_token_of_the_answer():
    expected = {side: [{"probability": 0.5}, {"probability": last}] for side, last in (("base", 1e-7), ("prefix", 0.998))}
    said = findings.question("short", {"question": {"prompt": 2, "tokens": ["a", "b", "巴黎"], "expected": expected}}).en
    assert "“巴黎”" in said and "of 99.8% with the prefix and of <0.1% with the base" in said


def test_the_worst_part_is_a_layer_a_head_or_a_token():
    parts = [{"kind": "keys only", "loss": 9.0, "exact_match": 0.0}]
    parts += [{"kind": "head", "layer": 3, "head": 1, "loss": 2.0, "exact_match": 0.25}]
    parts += [{"kind": "token", "token": 7, "loss": 0.5, "exact_match": 0.9}]
    removal = {"whole": {"loss": 0.49, "exact_match": 0.95}, "parts": parts}
    said = findings.removal("short", {"removal": removal, "rows": 40})
    assert "head 1 of layer 3 matters most: without it the loss changes from 0.49 to 2, and 10 of 40 rows" in said.en
    assert "rows are right instead of 38" in said.en
    assert "第 3 层的头 1" in said.zh and "1 of the 2 parts" in said.en


def test_two_prefixes_on_the_rows_of_the_first():
    def scores(match):
        return {"a": {"exact_match": match}, "b": {"exact_match": 0.0}}

    pair = {"first": "x", "second": "y", "alone": [scores(0.99), scores(0.01)], "after": [scores(0.07), scores(0.9)]}
    pair |= {"between": [scores(0.99), scores(0.28), scores(0.01)], "cosine": [[0.2, 0.4], [0.1, 0.1]]}
    prefixes = {"x": {"dataset": "a"}, "y": {"dataset": "b"}}
    said = findings.pair(pair, prefixes).en
    for part in ("x alone answers 99% right and y alone 1%", "7% are right", "before both, 90%", "half-way", "28%", "0.30"):
        assert part in said
    assert "half-way" not in findings.pair(pair | {"between": None, "cosine": None}, prefixes).en


def test_growth_norms_words_and_quiz():
    stages = [{"step": step, "norm": [step, 2.0], "singular_values": [4.0, 1.0, 0.1]} for step in (5, 10)]
    said = findings.growth("short", {"growth": {"stages": stages}}).en
    assert "at step 5 the keys have a mean length of 5.0" in said and "at step 10 of 10.0" in said
    assert "the largest 1 of 3 singular values" in said  # 16 of 17.01
    five = [[[1, 1, middle, 1, 1]] * 2 for middle in (2, 4)]
    said = findings.norms("short", {"norms": {"text": [five[0]] * 2, "prefix": five}}).en
    assert "1.0 to 2.0 times as long" in said
    words = [{"words": [["a", 0.2], ["b", 0.1]], "unexplained": 0.6}, {"words": [["c", 0.3]], "unexplained": 0.7}]
    said = findings.words("short", {"nearest_words": words}).en
    assert "0.30 (“c”)" in said and "at least 60%" in said
    said = findings.words("short", {"nearest_words": [one | {"unexplained": None} for one in words]})
    assert "0.30 (“c”)" in said.en and "more than any word" not in said.en and "2 个虚拟词" in said.zh
    assert "100% right; with short, 74%" in findings.quiz({"right": {"base": 1.0, "short": 0.742}}).en
