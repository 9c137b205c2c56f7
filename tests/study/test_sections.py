"""What the page says: in both languages, all fields filled, and what was left out."""

import string

from prefix_tuning.study.page import Text
from prefix_tuning.study.sections import TEXTS, say


def fields(text):
    return {name.split("[")[0] for _, name, _, _ in string.Formatter().parse(text) if name}


def test_both_languages_say_the_same_fields():
    for key, text in TEXTS.items():
        assert set(text) == {"zh", "en"} and all(text.values()), key
        assert fields(text["zh"]) == fields(text["en"]), key


def test_a_text_in_a_text_is_of_its_language():
    said = say("summary", base="b", precision="p", prefixes=Text("中", "en"))
    assert "中" in said.zh and "en" in said.en and "中" not in said.en
