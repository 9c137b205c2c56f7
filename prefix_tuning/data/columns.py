"""Reads the columns of any source as ours: which column is which, and how talks of several turns become rows.

A row of ours has four texts, instruction, input, output and system, and two lists. `history` contains the texts of earlier
turns, alternating between user and assistant. `weights` contains a number for each answer of a talk, the last one included:
1 if it is learned, 0 if it is only read. It is empty if all answers are learned. For example, a talk of two turns becomes

    {"instruction": "And of Spain?", "input": "", "output": "Madrid.", "system": "",
     "history": ["What is the capital of France?", "Paris."], "weights": []}

This file imports nothing large, because the settings check their flags with it.
"""

import contextlib
import json
from collections.abc import Collection, Mapping
from itertools import chain
from typing import Any, NamedTuple

from prefix_tuning.errors import UserError
from prefix_tuning.text import is_text, shorten

COLUMNS = ("instruction", "input", "output")
READ = (*COLUMNS, "history", "system", "messages", "context")  # the names before = in --columns
PAIRS = (("question", "answer"), ("prompt", "completion"), ("prompt", "response"), ("query", "response"))
TALKS = ("messages", "conversations")  # lists of {role, content}, or of {from, value}
ROLES = {"user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant", "system": "system"}
OPTIONAL = ("input", "context", "history", "system", "prefix")  # may be missing in any row, even if the first row has them
WEIGHTS = ("weight", "loss", "train")  # whether a message is learned: the keys of OpenAI, ms-swift and axolotl
CALLS = ("tool_calls", "function_call")  # a message with one of these says something outside its content
MESSAGE_KEYS = {"role", "content", "from", "value", "name", *WEIGHTS, *CALLS}


class Columns(NamedTuple):
    """How the rows of a source are read.

    sources: our name of each column that is read -> its name in the source, such as {"instruction": "question", ...}. It has
    messages, or else instruction, with output if answers are read; and the names of OPTIONAL that rows may have. `context`
    is read as input in a row whose input is missing or empty.
    answered: whether every row needs an answer. If not, rows are questions, and answers in them are ignored.
    may_lack: an answered row may lack its answer, which is then "".
    """

    sources: dict[str, str]
    answered: bool
    may_lack: bool = False

    def read(self, where: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of the source as ours. Raises UserError, which begins with `where`, for a missing column or a bad value."""
        for ours, theirs in self.sources.items():
            if theirs not in row and ours not in OPTIONAL and not (ours == "output" and self.may_lack):
                raise UserError(f"{where}: has no column {theirs!r}; it has {_listed(row)}")
        system = self._optional(where, "system", row)
        if "messages" in self.sources:
            column = self.sources["messages"]
            talk = _read_talk(where, column, row[column])
            if talk.system and system and talk.system != system:
                both = f"one in {self.sources['system']!r} and another in {column!r}"
                raise UserError(f"{where}: has two system texts, {both}; leave one of them out")
            return _row_of_talk(where, column, talk._replace(system=talk.system or system), self.answered, self.may_lack)
        texts = dict.fromkeys(COLUMNS, "")
        has_answer = self.answered and not (self.may_lack and row.get(self.sources["output"]) in (None, ""))
        for ours in ("instruction", "output") if has_answer else ("instruction",):
            texts[ours] = _text(where, repr(self.sources[ours]), row[self.sources[ours]])
        if has_answer and not texts["output"].strip():
            raise UserError(f"{where}: {self.sources['output']!r} is empty; every row needs an answer")
        texts["input"] = self._optional(where, "input" if self.has_input(row) else "context", row)
        history = _texts_of_history(where, self.sources["history"], row) if "history" in self.sources else []
        return texts | {"system": system, "history": history, "weights": []}

    def has(self, row: Mapping[str, Any], ours: str) -> bool:
        return ours in self.sources and row.get(self.sources[ours]) is not None

    def has_input(self, row: Mapping[str, Any]) -> bool:
        """Whether the row has an input of its own. In a CSV file, rows without one have an empty cell."""
        return self.has(row, "input") and row[self.sources["input"]] != ""

    def _optional(self, where: str, ours: str, row: Mapping[str, Any]) -> str:
        """The text of a column of OPTIONAL, "" if the row has none."""
        if not self.has(row, ours):
            return ""
        hint = "" if ours == "input" else f"; --columns {ours}= leaves it out"
        return _text(where, repr(self.sources[ours]), row[self.sources[ours]], hint)


class Seen:
    """Reads the rows of a source, and remembers which of their columns were read, as what, and which were not read."""

    def __init__(self, columns: Columns):
        self.columns = columns
        self.ours = {theirs: ours for ours, theirs in columns.sources.items()}
        self.found: dict[str, None] = {}
        self.readings: dict[str, str] = {}
        self.unread: dict[str, None] = {}

    def read(self, where: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """Reads a row with `Columns.read`."""
        for column in row:
            self.found[column] = None
            ours = self.ours.get(column)
            if ours == "context" and self.columns.has_input(row):
                if self.columns.has(row, "context"):
                    self.unread[f"{column} in rows that have input"] = None
            elif ours is None:
                self.unread[column] = None
            else:
                self.readings[column] = "input" if ours == "context" else ours
                if ours == "messages" and isinstance(row[column], list):
                    self._note_messages(column, row[column])
        return self.columns.read(where, row)

    def _note_messages(self, column: str, messages: list[Any]) -> None:
        for message in messages:
            for key, value in message.items() if isinstance(message, dict) else ():
                if key not in MESSAGE_KEYS and value not in (None, "", [], {}):
                    self.unread[f"{key} of {column}"] = None

    def line(self, name: str) -> str:
        """After all rows: a line that tells how the columns were read. "" if all were read and have our names.

        Raises UserError if --columns names a column that no row has.
        """
        for ours, theirs in self.columns.sources.items():
            if ours != theirs and theirs not in self.found:
                found = _listed(self.found)
                raise UserError(f"{name}: no row has a column {theirs!r}, which --columns names; they have {found}")
        parts = []
        if "messages" in self.columns.sources:
            parts.append(f"each row of {self.columns.sources['messages']} is read as a talk")
        renamed = [pair for pair in self.readings.items() if pair[1] not in (pair[0], "messages")]
        if renamed:
            (theirs, ours), *others = sorted(renamed, key=lambda pair: READ.index(pair[1]))
            parts.append(", ".join([f"{theirs} is read as {ours}", *(f"{theirs} as {ours}" for theirs, ours in others)]))
        if self.unread:
            # repr makes visible what would not print: an empty name, a line break, half a character.
            named = ", ".join(column if column.strip() and column.isprintable() else repr(column) for column in self.unread)
            parts.append(f"not {'read' if self.columns.answered else 'part of the question'}: {shorten(named, 300)}")
        return f"{name}: {'; '.join(parts)}" if parts else ""


def parse_columns(flag: str | None) -> dict[str, str]:
    """Parses --columns: "instruction=frage,output=antwort" gives {"instruction": "frage", "output": "antwort"}.

    An optional column without a name, as in "context=", is not read; its value here is "". Raises UserError for a bad flag.
    """
    given: dict[str, str] = {}
    for part in flag.split(",") if flag else []:
        ours, _, theirs = part.partition("=")
        ours = ours.strip()
        if not (theirs or ours in OPTIONAL) or ours in given or (theirs and theirs in given.values()):
            raise UserError(f"--columns {flag}: must be like instruction=NAME,output=NAME, each name once")
        if ours not in READ:
            raise UserError(f"--columns {flag}: there is no {ours!r} to read; there are {', '.join(READ)}")
        given[ours] = theirs
    if "messages" in given and {ours for ours, theirs in given.items() if theirs} - {"messages", "system"}:
        raise UserError(f"--columns {flag}: messages are whole talks and exclude the others but system; choose")
    return given


def columns_of(
    where: str, found: Collection[str], given: Mapping[str, str], answered: bool, may_lack: bool = False
) -> Columns:
    """How to read a source whose first row has the columns `found`. Raises UserError, which begins with `where`, if that is
    not clear.

    where: the source and its first row, such as "rows.jsonl, line 1". given: the parsed --columns. may_lack: if no column
    holds answers, rows are questions.
    """
    if missing := [theirs for ours, theirs in given.items() if theirs not in found and ours not in OPTIONAL]:
        raise UserError(f"{where}: has no column {missing[0]!r}, which --columns names; it has {_listed(found)}")
    readings = _readings(found, given, answered)
    if may_lack and not readings:
        readings, answered = _readings(found, given, answered=False), False
    if len(readings) != 1:
        problem = "can be read in more than one way" if readings else "are not known as question and answer"
        hint = "instruction=NAME,output=NAME or messages=NAME" if answered else "instruction=NAME or messages=NAME"
        raise UserError(f"{where}: its columns {problem}: {_listed(found)}; say which to read by --columns {hint}")
    sources = readings[0] if answered else {ours: theirs for ours, theirs in readings[0].items() if ours != "output"}
    optional = ["system"]
    if "messages" not in sources:
        # If --columns names a column as input, a column called context is not read, unless the flag names it as well.
        optional += ["history"] if given.get("input") and "context" not in given else ["history", "context"]
    if not answered:
        optional += ["prefix"]  # names the prefix that answers the question
    taken = {*sources.values(), *given.values()}
    sources |= {ours: given.get(ours, ours) for ours in optional if ours in given or ours not in taken}
    return Columns({ours: theirs for ours, theirs in sources.items() if theirs}, answered, may_lack)


def _readings(found: Collection[str], given: Mapping[str, str], answered: bool) -> list[dict[str, str]]:
    """The possible ways to read a source. If the columns have our own names, that is the only way."""
    if "messages" in given:
        return [{"messages": given["messages"]}]
    own = {ours: given.get(ours, ours) for ours in COLUMNS if ours in given or ours not in given.values()}
    if all(own.get(ours) in found for ours in (("instruction", "output") if answered else ("instruction",))):
        return [own]
    if given.keys() & {"instruction", "output"}:
        return []
    readings = [own | {"instruction": asked, "output": answer} for asked, answer in PAIRS if {asked, answer} <= {*found}]
    if not {ours for ours, theirs in given.items() if theirs} - {"system"}:
        readings += [{"messages": column} for column in TALKS if column in found]
    if not answered and not readings:  # a column of questions is enough
        readings = [own | {"instruction": asked} for asked in dict(PAIRS) if asked in found]
    return readings


class _Talk(NamedTuple):
    system: str  # "" if there is no system text
    texts: list[str]  # of user and assistant in turn, beginning with the user
    weights: list[int]  # for each answer, 1 if it is learned, else 0


def _read_talk(where: str, column: str, talk: Any) -> _Talk:
    if not isinstance(talk, list):
        kinds = "as .json, .jsonl and .parquet files can hold one"
        raise UserError(f"{where}: {column!r} must be a list of messages, {kinds}, not {_shown(talk)}")
    system = ""
    texts: list[str] = []
    weights: list[int] = []
    names: dict[str, str] = {}
    for number, message in enumerate(talk, start=1):
        what = f"message {number} of {column!r}"
        if not isinstance(message, dict):
            raise UserError(f"{where}: {what} must have role and content, or from and value; it is {_shown(message)}")
        role, content = ("role", "content") if "role" in message else ("from", "value")
        speaker, expected = message.get(role), ("assistant" if len(texts) % 2 else "user")
        kind = ROLES.get(speaker) if isinstance(speaker, str) else None
        if kind is None or (kind != expected and not (kind == "system" and number == 1)):
            order = "user and assistant take turns, a system message may come first"
            raise UserError(f"{where}: {what} is by {_shown(speaker)}, where {expected} is expected: {order}")
        if call := next((key for key in CALLS if message.get(key)), None):
            raise UserError(f"{where}: {what} has {call}, which cannot be learned; write it as content or leave the row out")
        if (name := message.get("name")) and names.setdefault(kind, name) != name:
            hint = "a talk is between one user and one assistant"
            raise UserError(f"{where}: {what} is by {_shown(name)}, an earlier one by {_shown(names[kind])}: {hint}")
        text = _text(where, f"the {content} of {what}", message.get(content))
        if kind == "system":
            system = text
            continue
        if kind == "assistant":
            if not text.strip():
                raise UserError(f"{where}: {what} is empty; every answer needs a text")
            weights.append(_weight(where, what, message))
        texts.append(text)
    return _Talk(system, texts, weights)


def _weight(where: str, what: str, message: Mapping[str, Any]) -> int:
    """1 if this answer is learned, else 0."""
    for key in WEIGHTS:
        value = message.get(key)
        if value is not None and value not in (0, 1):
            raise UserError(f"{where}: the {key} of {what} must be 0 or 1, not {_shown(value)}")
        if value == 0:
            return 0
    return 1


def _row_of_talk(where: str, column: str, talk: _Talk, answered: bool, may_lack: bool) -> dict[str, Any]:
    """A talk as a row. It ends with the last answer that is learned or, if rows are questions, with the last question.

    may_lack: a talk that ends with a question is a row that lacks its answer.
    """
    if answered and may_lack and len(talk.texts) % 2:
        *history, question = talk.texts
        weights, output = [*talk.weights, 1], ""
    elif answered:
        turns = max((number for number, weight in enumerate(talk.weights, start=1) if weight), default=0)
        texts, weights = talk.texts[: 2 * turns], talk.weights[:turns]
        if not texts:
            raise UserError(f"{where}: {column!r} holds no answer{' whose weight is 1' if talk.weights else ''}")
        *history, question, output = texts
    else:
        texts, weights, output = talk.texts[:-1] if len(talk.texts) % 2 == 0 else talk.texts, [], ""
        if not texts:
            raise UserError(f"{where}: {column!r} holds no question")
        *history, question = texts
    row = {"instruction": question, "input": "", "output": output, "system": talk.system, "history": history}
    return row | {"weights": [] if all(weights) else weights}


def _texts_of_history(where: str, column: str, row: Mapping[str, Any]) -> list[str]:
    """The texts of earlier turns, from [[question, answer], ...] or from [question, answer, question, answer, ...]."""
    history = row.get(column)
    if isinstance(history, str) and history.lstrip().startswith("["):  # in a CSV file, a list can only be JSON
        with contextlib.suppress(ValueError, RecursionError):
            history = json.loads(history)
    if history in (None, "", []):
        return []
    if isinstance(history, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        history = [*chain.from_iterable(history)]
    elif not isinstance(history, list) or not any(isinstance(turn, str) for turn in history):
        kinds = "a list of [question, answer], as .json, .jsonl and .parquet files can hold one"
        hint = "--columns history= leaves it out"
        raise UserError(f"{where}: {column!r} must be {kinds}, not {_shown(history)}; {hint}")
    if len(history) % 2:
        raise UserError(f"{where}: {column!r} ends with a question; that needs an answer before the row's own question")
    for number, text in enumerate(history):
        what = f"{'answer' if number % 2 else 'question'} {number // 2 + 1} of {column!r}"
        if not _text(where, what, text).strip() and number % 2:
            raise UserError(f"{where}: {what} is empty; every answer needs a text")
    return history


def _text(where: str, what: str, value: Any, hint: str = "") -> str:
    """The value, if it is a text that UTF-8 can encode: others can be neither tokenised nor cached."""
    if not isinstance(value, str):
        raise UserError(f"{where}: {what} must be a text, not {_shown(value)}{hint}")
    if not is_text(value):
        raise UserError(f"{where}: {what} holds half of a character (a lone surrogate)")
    return value


def _shown(value: Any) -> str:
    """The beginning of a value, for messages. Half a character in it becomes \\ud83d, so that the message can be printed."""
    try:
        return json.dumps(value, ensure_ascii=False, default=str)[:80].encode(errors="backslashreplace").decode()
    # json.loads has read lists that are nested deeper than json.dumps can write them.
    except RecursionError:
        return f"a {type(value).__name__}"


def _listed(columns: Collection[str]) -> str:
    return shorten(", ".join(map(repr, columns)), 300) or "none"
