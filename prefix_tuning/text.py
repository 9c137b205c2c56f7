"""Text: what UTF-8 can hold, and the columns of a terminal, of which a Chinese character takes two."""

import os
import re
import unicodedata

from prefix_tuning.errors import UserError


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: no half of a character (a lone surrogate) is in it."""
    return value.isprintable() or not re.search("[\ud800-\udfff]", value)


def as_text(argument: str, name: str) -> str:
    """A text of the command line, where Python took its UTF-8 for ASCII. Raises UserError if it is none."""
    try:
        return argument if is_text(argument) else os.fsencode(argument).decode()
    except UnicodeError as error:
        raise UserError(f"{name} holds bytes that are no UTF-8 text") from error


"""Text in columns of a terminal, where a Chinese character takes two."""


def display_width(text: str) -> int:
    """How many columns of a terminal a text takes: two for a wide character, none for a mark on another one."""
    return sum(map(_columns, text))


def _columns(character: str) -> int:
    if unicodedata.category(character) in ("Mn", "Me", "Cf"):  # accents, and what joins emoji
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def shorten(text: str, columns: int) -> str:
    """A text in one line of at most so many columns, white space collapsed; where it is cut, it ends in "..."."""
    text = " ".join(text.split())
    if display_width(text) <= columns:
        return text
    end, left = 0, columns - len("...")
    while (left := left - _columns(text[end])) >= 0:
        end += 1
    return text[:end] + "..."


def pad(text: str, columns: int) -> str:
    """A text with spaces behind it, so that it takes at least so many columns."""
    return text + " " * (columns - display_width(text))
