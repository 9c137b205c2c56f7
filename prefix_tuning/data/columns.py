"""From the columns of any source to ours: which column is read as which, and talks of several turns as rows.

A row of ours has the texts instruction, input and output, and `history`: the texts of the turns before, those of the user
and of the assistant in turn. It is empty unless the row was a talk. Imports nothing large: the settings check their flags
with it.
"""

import json
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from prefix_tuning.errors import UserError
from prefix_tuning.text import is_text, shorten

COLUMNS = ("instruction", "input", "output")
PAIRS = (("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("query", "response"))
TALKS = ("messages", "conversations")  # each a list of {role, content}, or of {from, value}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}


class Columns(NamedTuple):
    """How the rows of a source are read.

    sources: by our names, the columns of the source that are read as them: instruction, input and output, or messages alone.
    answered: whether every row needs an answer. If not, rows are questions: answers that they come with are passed over.
    """

    sources: dict[str, str]
    answered: bool

    def note(self, name: str) -> str | None:
        """What to tell the user about the source of this name; None if its columns have our names."""
        if "messages" in self.sources:
            return f"{name}: each row of {self.sources['messages']} is read as a talk"
        renamed = [(theirs, ours) for ours, theirs in self.sources.items() if ours != theirs]
        readings = [f"{theirs} {'as' if place else 'is read as'} {ours}" for place, (theirs, ours) in enumerate(renamed)]
        return f"{name}: {', '.join(readings)}" if readings else None

    def read(self, where: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the source as ours. Raises UserError, beginning with `where`, for a value that is not as it must be."""
        for ours, theirs in self.sources.items():
            if theirs not in row and ours != "input":
                raise UserError(f"{where}: has no column {theirs!r}; it has {_listed(row)}")
        if "messages" in self.sources:
            column = self.sources["messages"]
            return _row_of_talk(where, column, *_texts_of_talk(where, column, row[column]), self.answered)
        texts = dict.fromkeys(COLUMNS, "")
        for ours, theirs in self.sources.items():
            if ours != "input" or row.get(theirs) is not None:
                texts[ours] = _text(where, repr(theirs), row[theirs])
        if self.answered and not texts["output"].strip():
            raise UserError(f"{where}: {self.sources['output']!r} is empty; every row needs an answer")
        return texts | {"history": []}


def parse_columns(flag: str | None) -> dict[str, str]:
    """The value of --columns, such as instruction=frage,output=antwort, as columns of a source by our names."""
    given: dict[str, str] = {}
    for part in flag.split(",") if flag else []:
        ours, _, theirs = part.partition("=")
        ours = ours.strip()
        if not theirs or ours in given or theirs in given.values():
            raise UserError(f"--columns {flag}: must be like instruction=NAME,output=NAME, each name once")
        if ours not in (*COLUMNS, "messages"):
            raise UserError(f"--columns {flag}: there is no {ours!r} to read; there are {', '.join(COLUMNS)} and messages")
        given[ours] = theirs
    if "messages" in given and len(given) > 1:
        raise UserError(f"--columns {flag}: messages are whole talks and exclude the others; choose")
    return given


def columns_of(where: str, found: Collection[str], given: Mapping[str, str], answered: bool) -> Columns:
    """How a source with the columns `found` is read. Raises UserError, which begins with `where`, if that is not clear.

    where: the source and the place of its first row, whose columns they are. given: what --columns says.
    """
    if missing := [theirs for theirs in given.values() if theirs not in found]:
        raise UserError(f"{where}: has no column {missing[0]!r}, which --columns names; it has {_listed(found)}")
    readings = _readings(found, given, answered)
    if len(readings) != 1:
        problem = "can be read in more than one way" if readings else "are not known as those of question and answer"
        hint = "instruction=NAME,output=NAME or messages=NAME" if answered else "instruction=NAME or messages=NAME"
        raise UserError(f"{where}: its columns {problem}: {_listed(found)}; say which to read by --columns {hint}")
    return Columns({ours: theirs for ours, theirs in readings[0].items() if answered or ours != "output"}, answered)


def _readings(found: Collection[str], given: Mapping[str, str], answered: bool) -> list[dict[str, str]]:
    """The ways in which a source can be read. Those of our own names come before all others."""
    if "messages" in given:
        return [dict(given)]
    # Each row may have an input or not, whatever the first one has.
    own = {ours: given.get(ours, ours) for ours in COLUMNS if ours in given or ours not in given.values()}
    if all(own.get(ours) in found for ours in (("instruction", "output") if answered else ("instruction",))):
        return [own]
    if given.keys() & {"instruction", "output"}:
        return []
    readings = [own | {"instruction": asked, "output": answer} for asked, answer in PAIRS if {asked, answer} <= {*found}]
    if not given:
        readings += [{"messages": column} for column in TALKS if column in found]
    if not answered and not readings:  # a question alone will do
        readings = [own | {"instruction": asked} for asked in dict(PAIRS) if asked in found]
    return readings


def _texts_of_talk(where: str, column: str, talk: Any) -> tuple[str, list[str]]:
    """The system's text, "" if there is none, and the texts of user and assistant in turn, the user's first."""
    if not isinstance(talk, list):
        kinds = "as .json, .jsonl and .parquet files can hold one"
        raise UserError(f"{where}: {column!r} must be a list of messages, {kinds}, not {_shown(talk)}")
    system = ""
    texts: list[str] = []
    for number, message in enumerate(talk, start=1):
        what = f"message {number} of {column!r}"
        if not isinstance(message, dict):
            raise UserError(f"{where}: {what} must have role and content, or from and value; it is {_shown(message)}")
        role, content = ("role", "content") if "role" in message else ("from", "value")
        speaker, expected = message.get(role), ("assistant" if len(texts) % 2 else "user")
        kind = ROLES.get(speaker) if isinstance(speaker, str) else None
        if kind != expected and not (kind == "system" and number == 1):
            order = "user and assistant take turns, a system may come first"
            raise UserError(f"{where}: {what} is by {_shown(speaker)}, where {expected} is expected: {order}")
        text = _text(where, f"the {content} of {what}", message.get(content))
        if kind == "system":
            system = text
        elif kind == "assistant" and not text.strip():
            raise UserError(f"{where}: {what} is empty; every answer needs a text")
        else:
            texts.append(text)
    return system, texts


def _row_of_talk(where: str, column: str, system: str, texts: list[str], answered: bool) -> dict[str, Any]:
    """A talk as a row, up to its last answer, or for questions up to what the user said last."""
    if (len(texts) % 2 == 0) != answered:
        texts = texts[:-1]
    if not texts:
        raise UserError(f"{where}: {column!r} holds no {'answer' if answered else 'question'}")
    texts, output = (texts[:-1], texts[-1]) if answered else (texts, "")
    *history, question = texts
    instruction, input = question, ""
    if system and history:
        history[0] = f"{system}\n{history[0]}"
    elif system:  # it is to the only question what an instruction is to its input
        instruction, input = system, question
    return {"instruction": instruction, "input": input, "output": output, "history": history}


def _text(where: str, what: str, value: Any) -> str:
    """The value, if it is a text."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {what} must be a text, not {_shown(value)}")
    if not is_text(value):
        raise UserError(f"{where}: {what} holds half of a character (a lone surrogate)")
    return value


def _shown(value: Any) -> str:
    """The beginning of a value, for messages."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)[:80].encode(errors="backslashreplace").decode()
    except RecursionError:  # JSON that is nested just as deeply as it can be read
        return f"a {type(value).__name__}"


def _listed(columns: Collection[str]) -> str:
    return shorten(", ".join(map(repr, columns)), 300) or "none"
