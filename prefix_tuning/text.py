"""Text: what UTF-8 can encode, its width on a terminal, where a Chinese character takes two columns, and times."""

import os
import re
import unicodedata

from prefix_tuning.errors import UserError


def is_text(value: str) -> bool:
    """Whether UTF-8 can encode it: it contains no lone surrogate, which is half of a character."""
    return value.isprintable() or not re.search("[\ud800-\udfff]", value)


def as_text(argument: str, name: str) -> str:
    """An argument of the command line, decoded as UTF-8 where Python took it for ASCII. Raises UserError if it is neither.

    name: of the argument, for the message.
    """
    try:
        return argument if is_text(argument) else os.fsencode(argument).decode()
    except UnicodeError as error:
        raise UserError(f"{name} holds bytes that are no UTF-8 text; write it, or rename the file, in UTF-8") from error


def named(path: str) -> str:
    """A file's name as text: its bytes decoded as UTF-8, a ? for those that are none, whatever Python took them for."""
    return path if is_text(path) else os.fsencode(path).decode(errors="replace")


def display_width(text: str) -> int:
    """The number of terminal columns of a text: two for a wide character, none for one that combines with another."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):  # accents, and joiners between emoji
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def shorten(text: str, columns: int) -> str:
    """A text on one line of at most `columns` columns, white space collapsed; if it is cut, it ends in "..."."""
    text = " ".join(text.split())
    if display_width(text) <= columns:
        return text
    end, left = 0, columns - len("...")
    while (left := left - _columns(text[end])) >= 0:
        end += 1
    return text[:end] + "..."


def duration(seconds: float) -> str:
    """A time as people say it: 40 s, 3 min 20 s, 2 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def pad(text: str, columns: int) -> str:
    """A text with spaces appended, so that it takes at least `columns` columns."""
    return text + " " * (columns - display_width(text))
