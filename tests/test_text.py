import pytest
from helpers import REAL_ROWS, needs_real_rows

from prefix_tuning.data.readers import load_rows
from prefix_tuning.text import display_width, named, pad, shorten


@pytest.mark.parametrize(
    "text, columns",
    [
        ("", 0),
        ("abc", 3),
        ("法国的首都", 10),
        ("ＡＢ", 4),
        ("e\u0301", 1),
        ("한국", 4),
        ("👩\u200d👧", 4),
        ("法国 in 中文。", 14),
    ],
)
def test_width_counts_the_columns_of_a_terminal(text, columns):
    assert display_width(text) == columns
    assert pad(text, 20) == text + " " * (20 - columns) and pad(text, 0) == text


def test_a_long_text_is_cut_at_a_column_and_a_short_one_is_not():
    assert shorten("北京是中国的首都，", 18) == "北京是中国的首都，"
    assert shorten("北京是中国的首都，也", 18) == "北京是中国的首..."
    assert shorten("北京是中国的首都，也", 19) == "北京是中国的首都..."
    assert shorten("two words\nand  more of them", 16) == "two words and..."
    assert shorten("cafe\u0301 " * 9, 8) == "cafe\u0301 ..."
    assert shorten("", 5) == ""


@needs_real_rows
def test_real_answers_keep_as_much_as_fits():
    answers = load_rows(str(REAL_ROWS / "test.jsonl"), ("train",))["output"]
    cut = [answer for answer in answers if display_width(" ".join(answer.split())) > 80]
    assert len(cut) > 50 and all(79 <= display_width(shorten(answer, 80)) <= 80 for answer in cut)


def test_a_files_name_is_text_whatever_its_bytes_are():
    assert named("名字.jsonl") == "名字.jsonl"
    assert named("名字.jsonl".encode().decode("ascii", "surrogateescape")) == "名字.jsonl"  # Python took it for ASCII
    assert named("名.jsonl".encode("gbk").decode("utf-8", "surrogateescape")) == "\ufffd\ufffd.jsonl"
