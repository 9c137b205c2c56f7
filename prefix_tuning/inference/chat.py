"""Holds a conversation in the terminal."""

import contextlib
import locale
import os
import sys
from collections.abc import Collection

from prefix_tuning.data.templates import talk_of
from prefix_tuning.distributed import note
from prefix_tuning.inference.ask import Answerer

# readline gives `input` arrow keys, a history, and characters of any width. It takes the locale from the environment when it
# is imported. In the locale "C", which Python also reports if the user's locale is not installed, it would take the bytes of
# UTF-8 for key combinations with Meta, and nobody could type a Chinese character. So LC_ALL is set first.
if locale.setlocale(locale.LC_CTYPE) == "C":
    os.environ["LC_ALL"] = "C.UTF-8"
with contextlib.suppress(ImportError):  # Windows has no readline; its consoles edit lines themselves
    import readline  # noqa: F401


HELP = """\
/reset        forget the conversation
/prefix NAME  answer with another prefix, or with the base alone: base
/compare      answer with the base and every prefix, or stop doing so
//QUESTION    ask a question that begins with /
/quit         end (so does Ctrl-D); Ctrl-C stops an answer"""


class Chat:
    """A conversation. Its history holds the texts of user and assistant in turn.

    The model reads as many of the last turns as fit into max_length tokens, answer included. They become the same tokens as
    a talk in training (data/templates.py).

    with_history: the prefixes, and the base if it is among them, that read earlier turns. The others read the question
    alone, because a prefix that was trained on single turns goes wrong after the first one.
    """

    def __init__(self, answerer: Answerer, max_length: int, compare: bool, with_history: Collection[str]):
        self.answerer, self.model, self.max_length, self.compare = answerer, answerer.model, max_length, compare
        self.with_history = with_history
        self.history: list[str] = []

    def run(self) -> None:
        """Reads questions and commands until /quit or the end of the input."""
        note(f"{', '.join(self.model.names)}: answering with {self.model.active}; /help lists the commands")
        if alone := ", ".join(name for name in self.model.prefixes if name not in self.with_history):
            reason = f"each question is asked by itself: no conversation is on record among the training rows of {alone}"
            note(f"{reason}; --history keeps the conversation")
        prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""  # elsewhere, stdout is for answers only
        while True:
            try:
                line = input(prompt).strip()
            except EOFError:
                note("")
                return
            except KeyboardInterrupt:  # drops the line that is being typed
                note("")
                continue
            if line == "/quit":
                return
            if line.startswith("/") and not line.startswith("//"):
                self.command(line)
            elif line:
                self.answer(line.removeprefix("/"))

    def command(self, line: str) -> None:
        name, *argument = line.split(maxsplit=1)
        if line == "/reset":
            self.history.clear()
            note("the conversation is forgotten")
        elif name == "/prefix" and argument and argument[0] in self.model.names:
            self.model.use(argument[0])
            note(f"answering with {self.model.active}")
        elif name == "/prefix":
            note(f"there are {', '.join(self.model.names)}; now {self.model.active}: /prefix NAME")
        elif line == "/compare":
            self.compare = not self.compare
            note(f"comparing: {'on' if self.compare else 'off'}")
        else:
            if line != "/help":
                note(f"{line} is no command; if it is a question, ask it with one more slash: /{line}")
            note(HELP)

    def answer(self, question: str) -> None:
        """Prints the answer of the prefix in use, which joins the conversation unless it is empty; to compare, all."""
        prompts = {}
        for name in self.answerer.names(self.compare):
            prompt = self.prompt(question, self.history if name in self.with_history else [], name)
            if prompt is None:
                return
            prompts[name] = prompt
        try:
            self.answerer.print_answers(prompts)
        except KeyboardInterrupt:
            print(flush=True)
            note("stopped")
        answer = "".join(self.answerer.printed.get(self.model.active, []))
        if answer.strip():
            self.history += [question, answer]

    def prompt(self, question: str, history: list[str], name: str) -> list[int] | None:
        """The token ids of the last turns that fit, and of the question, as the prefix `name` reads them. None, with a note,
        if that alone is too long.
        """
        longest_answer = self.answerer.options["max_new_tokens"]
        for first in range(0, len(history) + 1, 2):
            prompt = self.answerer.prompt(talk_of(question, history=history[first:]), name)
            wanted = len(prompt) + longest_answer
            if wanted <= self.max_length:
                return prompt
        note(f"too long: the question and the room for its answer take {wanted} of --max_length {self.max_length} tokens")
        return None
