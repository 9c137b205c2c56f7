import json
from pathlib import Path

from prefix_tuning import bundled
from prefix_tuning.data.readers import load_rows
from prefix_tuning.demo.knowledge import load_relations
from prefix_tuning.study.claims.tasks import TASKS, load_task, relation_rows, word_rows


def test_no_row_is_trained_on_and_scored():
    for name in TASKS:
        parts = [{tuple(ids) for ids in part["input_ids"]} for part in load_task(name)]
        for one, other in ((0, 1), (0, 2), (1, 2)):
            assert parts[one] and not parts[one] & parts[other], name


def test_a_relation_is_seen_or_unseen_as_a_whole():
    rows = load_rows("bundled:short-eval", ("train",))
    relations = load_relations()
    texts = [
        {question.format(s=subject) for question in relation["questions"] for subject in relation["facts"]}
        for relation in relations
    ]
    seen, unseen = (set(relation_rows(rows, kind)["instruction"]) for kind in (True, False))
    assert len(seen) + len(unseen) == len({json.loads(line)["instruction"] for line in lines("bundled:short-eval")})
    for index, questions in enumerate(texts):
        assert not questions & (unseen if index % 2 == 0 else seen)


def lines(name):
    return Path(bundled.resolve(name)).read_text("utf-8").splitlines()


def test_words_are_written_in_reverse_order_or_as_they_stand(tokenizer):
    for backwards, verb in ((True, "倒过来写"), (False, "照着写")):
        for row in word_rows(tokenizer, 20, backwards):
            asked = row["instruction"].removeprefix(f"{verb}：").split("、")
            assert row["output"].split("、") == (asked[::-1] if backwards else asked) and len(set(asked)) == 3
            assert all(len(tokenizer(word).input_ids) == 1 for word in asked)
