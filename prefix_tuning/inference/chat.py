"""A conversation in the terminal."""

import contextlib
import locale
import os
import sys

from transformers import PreTrainedTokenizerBase

from prefix_tuning.data.rows import prompt_of
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.inference.ask import decoding_options, say, title
from prefix_tuning.inference.settings import InferConfig
from prefix_tuning.settings import MAX_LENGTH

if locale.setlocale(locale.LC_CTYPE) == "C":  # or one that is not installed; readline would take UTF-8 for Meta keys
    os.environ["LC_ALL"] = "C.UTF-8"


with contextlib.suppress(ImportError):  # Windows; consoles there edit lines themselves
    import readline  # noqa: F401 (gives `input` arrow keys, a history, and characters of any width)


HELP = """\
/reset        forget the conversation
/prefix NAME  answer with another prefix, or with the base alone: base
/compare      answer by the base and every prefix, or stop doing so
/quit         end (so does Ctrl-D); Ctrl-C stops an answer"""


class Chat:
    """A conversation: what was said, and how to go on.

    The model sees as many of the last turns as fit in config.max_length, in the template of training, one after the other.
    """

    def __init__(self, config: InferConfig, model: PrefixBloom, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer, self.seed, self.comparing = model, tokenizer, config.seed, config.compare
        self.max_length = config.max_length or MAX_LENGTH
        self.options = decoding_options(config)
        if config.max_new_tokens is None:
            self.options["max_new_tokens"] = min(128, self.max_length // 2)
        self.turns: list[tuple[str, str]] = []

    def run(self) -> None:
        """Reads questions and commands until /quit or the end of the input."""
        note(f"{', '.join(self.model.names)}: answering with {self.model.active}; /help lists the commands")
        while True:
            try:
                line = ask_user("> ").strip()
            except EOFError:
                note("")
                return
            except KeyboardInterrupt:  # a question that is not to be asked after all
                note("")
                continue
            if line == "/quit":
                return
            if line.startswith("/"):
                self.command(*line.split(maxsplit=1))
            elif line:
                self.answer(line)

    def command(self, name: str, argument: str = "") -> None:
        if name == "/reset":
            self.turns.clear()
            note("the conversation is forgotten")
        elif name == "/prefix" and argument in self.model.names:
            self.model.use(argument)
            note(f"answering with {argument}")
        elif name == "/prefix":
            note(f"there are {', '.join(self.model.names)}; now {self.model.active}: /prefix NAME")
        elif name == "/compare":
            self.comparing = not self.comparing
            note(f"comparing: {'on' if self.comparing else 'off'}")
        else:
            note(HELP)

    def answer(self, question: str) -> None:
        """Answers by the prefix in use; if comparing, by all. What the one in use says becomes part of the conversation."""
        prompt = self.prompt(question)
        if prompt is None:
            return
        answers: dict[str, list[str]] = {}
        try:
            for name in self.model.names if self.comparing else [self.model.active]:
                answers[name] = []
                label = title(name, self.model) if self.comparing else ""
                say(self.model, self.tokenizer, prompt, name, self.seed, self.options, label, answers[name])
        except KeyboardInterrupt:
            print(flush=True)
            note("stopped")
        if self.model.active in answers:
            self.turns.append((question, "".join(answers[self.model.active]).strip()))

    def prompt(self, question: str) -> str | None:
        """What the model is given to read: the last turns and the question. None, and a note, if that is too long."""
        room = self.max_length - self.options["max_new_tokens"]
        for first in range(len(self.turns) + 1):
            turns = (prompt_of(asked) + said + "\n\n" for asked, said in self.turns[first:])
            text = "".join(turns) + prompt_of(question)
            taken = len(self.tokenizer(text, split_special_tokens=True).input_ids)
            if taken <= room:
                return text
        wanted = taken + self.options["max_new_tokens"]
        note(f"too long: the question and the room for its answer take {wanted} of --max_length {self.max_length} tokens")
        return None


def ask_user(prompt: str) -> str:
    """A line from the user. Where no one sits at a terminal, the prompt is not for stdout."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        return input(prompt)
    return input()


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
