"""Text: arguments and names that may not be UTF-8, the width on a terminal (two columns for a Chinese character), times."""

import os
import re
import unicodedata

from prefix_tuning.errors import UserError


def is_text(value: str) -> bool:
    """Whether UTF-8 can encode it: it has no lone surrogate, which JSON may hold, and Python makes of undecodable bytes."""
    return value.isprintable() or not re.search("[\ud800-\udfff]", value)


def as_text(argument: str, name: str) -> str:
    """An argument of the command line, decoded as UTF-8 even if Python took it for ASCII. `name` is for the message.

    Raises UserError if it is no UTF-8, for example a file name in GBK. It would fail later, where it is printed or written.
    """
    try:
        return argument if is_text(argument) else os.fsencode(argument).decode()
    except UnicodeError as error:
        raise UserError(f"{name} is not encoded in UTF-8; write it, or rename the file, in UTF-8") from error


def named(path: str) -> str:
    """A file's name as text: its bytes decoded as UTF-8, with a replacement character for bytes that are not UTF-8."""
    return path if is_text(path) else os.fsencode(path).decode(errors="replace")


def display_width(text: str) -> int:
    """The number of terminal columns of a text: 2 for a wide character, 0 for an accent or a joiner between emoji."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def shorten(text: str, columns: int) -> str:
    """A text on one line of at most `columns` columns, with white space collapsed. If it is cut, it ends in "..."."""
    text = " ".join(text.split())
    if display_width(text) <= columns:
        return text
    end, left = 0, columns - len("...")
    while (left := left - _columns(text[end])) >= 0:
        end += 1
    return text[:end] + "..."


def duration(seconds: float) -> str:
    """A duration for people: 40 s, 3 min 20 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def pad(text: str, columns: int) -> str:
    """A text with spaces appended up to `columns` columns."""
    return text + " " * (columns - display_width(text))
