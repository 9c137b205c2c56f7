"""The sections of the page: both languages, all fields filled, notes on what was left out, and the size."""

import string

import numpy as np
import pytest

from prefix_tuning.study import sections, texts
from prefix_tuning.study.claims import record
from prefix_tuning.study.page import Text, write_page
from prefix_tuning.study.question import MOST_MAPS
from prefix_tuning.study.removal import MOST_HEADS
from prefix_tuning.study.run import rounded
from prefix_tuning.study.sections import sections_of, share_out, summary
from prefix_tuning.study.texts import say


def fields(text):
    return {name.split("[")[0] for _, name, _, _ in string.Formatter().parse(text) if name}


@pytest.mark.parametrize("texts", [texts.TEXTS, record.TEXTS])
def test_both_languages_say_the_same_fields(texts):
    for key, text in texts.by_key.items():
        assert set(text) == {"zh", "en"} and all(text.values()), key
        assert fields(text["zh"]) == fields(text["en"]), key


def test_a_text_within_a_text_has_the_same_language():
    said = say("summary", base="b", precision="p", prefixes=Text("中", "en"))
    assert "中" in said.zh and "en" in said.en and "中" not in said.en


def test_pictures_are_drawn_within_their_share_of_the_page(monkeypatch):
    monkeypatch.setattr(sections, "ROOM", 2000)
    monkeypatch.setattr(sections, "OF_A_PREFIX", 0)
    assert share_out(0.5, 2, fixed=100, each=50, most=24) == (2, 8)
    assert share_out(0.5, 2, fixed=100, each=50, most=5) == (2, 5)
    assert share_out(0.5, 10, fixed=300, each=100, most=24) == (2, 2)
    assert share_out(0.001, 3, fixed=300, each=100, most=24) == (1, 1)
    monkeypatch.setattr(sections, "OF_A_PREFIX", 500)
    assert share_out(0.5, 2, fixed=100, each=50, most=24) == (2, 3)


def numbers_of(names, layers, heads, tokens, length):
    """Random figures in the shape of study.json. tokens: of each prefix. length: of the question with its answer."""
    rng = np.random.default_rng(0)
    score = {"loss": 1.23456789, "exact_match": 0.5}
    part = [{"kind": "head", "layer": layer, "head": head} for layer in range(layers) for head in range(heads)][:MOST_HEADS]
    prefix = {
        "dataset": "rows",
        "rows": 20,
        "rows_cut": 3,
        "rows_there": 3000,
        "num_virtual_tokens": tokens,
        "key_value_heads": heads,
        "attention": {
            "share": rng.random((layers, heads)).tolist(),
            "by_distance": rng.random((layers, heads, 256)).tolist(),
            "slopes": rng.random(heads).tolist(),
        },
        "question": {
            "question": "问" * 100,
            "answers": {"base": "甲", "prefix": "乙"},
            "tokens": ["词"] * length,
            "prompt": length - 40,
            "expected": {
                side: [{"probability": rng.random(), "likeliest": [["词", rng.random()]] * 5}] * (length - 1)
                for side in ("base", "prefix")
            },
            "attention": [
                {"layer": 0, "head": head, "weights": rng.random((length, tokens)).tolist()}
                for head in range(min(MOST_MAPS, layers * heads))
            ],
        },
        "removal": {
            "whole": score,
            "base": score,
            "parts": [one | score for one in part],
            "left_out": max(0, layers * heads - MOST_HEADS),
        },
        "growth": {
            "stages": [
                {
                    "step": step,
                    "norm": [1.5, 2.5],
                    "share": rng.random(layers).tolist(),
                    "singular_values": rng.random(tokens).tolist(),
                }
                for step in range(25)
            ],
            "losses": [[step, rng.random()] for step in range(500)],
            "held_out": [],
            "left_out": 7,
        },
        "norms": dict.fromkeys(("text", "prefix"), rng.random((layers, 2, 5)).tolist()),
        "nearest_words": [{"words": [["词", 0.123]] * 5, "unexplained": 0.5}] * tokens,
    }
    scores = [{"rows": score}] * 2
    pair = {"first": names[0], "alone": scores, "after": scores, "exchanged": scores, "between": scores * 5}
    pair |= {"cosine": rng.random((2, layers)).tolist()}
    numbers = {
        "base": "bloom",
        "precision": "float32",
        "prefixes": dict.fromkeys(names, prefix),
        "pairs": [pair | {"second": name} for name in names[1:]],
        "quiz": None,
    }
    return rounded(numbers, None)


@pytest.mark.parametrize("count", [1, 10])
def test_of_a_large_base_the_page_stays_small_and_says_what_it_leaves_out(count, tmp_path):
    """bloom-1b4's 24 x 16 heads, 16 virtual tokens, a question and answer of 300 tokens."""
    numbers = numbers_of([f"prefix-{number}" for number in range(count)], 24, 16, 16, 300)
    parts = sections_of(numbers)
    write_page(tmp_path / "page.html", say("title"), summary(numbers), parts)
    assert (tmp_path / "page.html").stat().st_size < 6e6
    said = {note.en for part in parts for note in part.notes}
    distance, maps = (13, 64) if count == 1 else (1, 4)
    for note in (
        f"Left out: {24 - distance} layers, which are in the JSON file.",
        f"Left out: the attention of {24 * 16 - maps} heads, which look at the prefix least.",
        "Not removed one by one: 320 heads, which look at the prefix least.",
        "Left out: 7 checkpoints.",
        "Left out: the 4 that matter least, which are in the JSON file.",
    ):
        assert note in said
    assert ("Only the first prefix is compared with each of the others." in said) == (count > 1)
    assert "20 of the 3000 rows of rows, 3 of them cut at 256 tokens" in summary(numbers).en
    second = "With a second --prefix NAME=DIR, this section compares two prefixes"
    assert any(part.reading.en.startswith(second) for part in parts) == (count == 1)
    distances, _ = parts[1].figures[0]
    assert len(distances.layout.updatemenus[0].buttons) == distance


def test_rows_that_were_cut_are_named_only_if_there_are_some():
    numbers = numbers_of(["short"], 2, 2, 4, 50)
    assert "3 of them cut at 256 tokens" in summary(numbers).en and "截到" in summary(numbers).zh
    numbers["prefixes"]["short"]["rows_cut"] = 0
    assert "cut" not in summary(numbers).en and "截" not in summary(numbers).zh


def test_every_part_begins_with_what_was_found_on_each_prefix():
    numbers = numbers_of(["short", "sentence"], 2, 2, 4, 50)
    numbers["quiz"] = {"questions": 80, "there": 3203, "right": {"base": 1.0, "short": 0.75, "sentence": 0.9}}
    parts = sections_of(numbers)
    for part in parts:
        assert part.found, part.title.en
        assert all(name in " ".join(one.en for one in part.found) for name in ("short", "sentence"))
    assert "80 of its 3203 questions" in parts[5].reading.en and "the farthest one 3 slopes more" in parts[1].reading.en
    assert "--save_steps 50 --save_total_limit 20" in parts[6].reading.en
    assert any("One of the 20 rows is 5.0%" in note.en for note in parts[3].notes)


def test_a_model_without_alibi_says_so_and_one_with_grouped_heads_what_a_head_is():
    numbers = numbers_of(["short"], 2, 6, 4, 50)
    with_alibi = sections_of(numbers)
    prefix = numbers["prefixes"]["short"]
    prefix["attention"]["slopes"], prefix["key_value_heads"] = None, 2
    prefix["nearest_words"] = [one | {"unexplained": None} for one in prefix["nearest_words"]]
    parts = sections_of(numbers)
    assert [part.title for part in parts] == [part.title for part in with_alibi]
    said = [number for number, part in enumerate(parts) if "This model has no ALiBi" in part.reading.en]
    about = [number for number, part in enumerate(with_alibi) if "ALiBi" in part.reading.en]
    assert said == about == [0, 1, 7]
    assert all("这个模型没有 ALiBi" in parts[number].reading.zh for number in about)
    assert not any("no ALiBi" in part.reading.en for part in with_alibi)
    assert len(parts[1].figures[0]) == 1 and all(part.found for part in parts[:4])
    assert any("3 heads share each key and value" in note.en for note in parts[3].notes)
    assert not any("share each key" in note.en for note in with_alibi[3].notes)
    assert (
        len(parts[8].table[0]) == len(parts[8].table[1]) == 3
        and "virtual token j stands at position j" in parts[8].reading.en
    )
