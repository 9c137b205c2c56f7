import pytest
from checkout import REAL_ROWS, needs_real_rows

from prefix_tuning.data.readers import load_rows
from prefix_tuning.errors import UserError
from prefix_tuning.text import as_text, display_width, duration, is_text, named, pad, shorten


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


def test_a_lone_surrogate_is_no_text():
    assert all(is_text(text) for text in ("", "巴黎", "two\nlines", "e\u0301", "\U0001f469\u200d\U0001f467", "\ue000"))
    assert not any(is_text(text) for text in ("\ud800", "a\n\udfff", "巴\udc80黎"))


def test_an_argument_that_python_took_for_ascii_is_utf_8():
    assert as_text("巴黎\n", "--x") == "巴黎\n"
    assert as_text("巴黎".encode().decode("ascii", "surrogateescape"), "--x") == "巴黎"
    with pytest.raises(UserError, match="--x is not encoded in UTF-8"):
        as_text("a\udcff", "--x")


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (200, "3 min 20 s"),
        (3599.4, "59 min 59 s"),
        (3599.6, "1 h 0 min"),
        (7529, "2 h 5 min"),
        (360_000, "100 h 0 min"),
    ],
)
def test_a_time_is_what_people_say(seconds, text):
    assert duration(seconds) == text
