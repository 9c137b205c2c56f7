"""Answers one question, and prints each answer while it is generated."""

import os
import sys
from dataclasses import dataclass, field, replace

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from prefix_tuning.data.templates import Talk, Template, prompt_ids, system_line, talk_of, template_from
from prefix_tuning.distributed import note
from prefix_tuning.errors import UserError
from prefix_tuning.generation.prefix_bloom import BASE, PrefixBloom
from prefix_tuning.text import display_width, pad


def templates_of(model: PrefixBloom) -> dict[str, Template]:
    """By name, the template in which each prefix was trained. The base alone is asked as the first prefix is."""
    found = {name: template_from(name, record.get("template")) for name, record in model.trained_on.items()}
    return {BASE: next(iter(found.values()), None), **found}


def common_template(model: PrefixBloom) -> Template:
    """The template of all prefixes. Raises UserError if they were trained in different ones."""
    (first, template), *others = list(templates_of(model).items())[1:]
    if other := next((name for name, its_own in others if its_own != template), None):
        raise UserError(f"{first} and {other} were trained in different templates, so they read different tokens; take one")
    return template


def note_system_texts(model: PrefixBloom, tokenizer: PreTrainedTokenizerBase) -> None:
    """Says on stderr what is done with the system texts of rows, where a chat template has no turn for them."""
    for line in {system_line(tokenizer, template) for template in templates_of(model).values()} - {""}:
        note(line)


@dataclass
class Answerer:
    """A model with prefixes, and how its answers are decoded.

    options: for transformers' `generate`; they include max_new_tokens, num_beams and num_return_sequences. seed: for
    sampling.
    templates: see `templates_of`.
    printed: name of the prefix -> the pieces of its answer to the last prompt. If Ctrl-C stops an answer, its pieces remain.
    """

    model: PrefixBloom
    tokenizer: PreTrainedTokenizerBase
    options: dict
    seed: int
    templates: dict[str, Template] = field(init=False)
    printed: dict[str, list[str]] = field(default_factory=dict, init=False)

    def __post_init__(self):
        self.templates = templates_of(self.model)

    def names(self, compare: bool) -> list[str]:
        """The names that answer: the prefix in use or, to compare, the base and every prefix."""
        return self.model.names if compare else [self.model.active]

    def prompt(self, talk: Talk, name: str) -> list[int]:
        """The token ids of a talk up to its question, in the template of this prefix. Raises UserError where the template
        refuses the talk.
        """
        return prompt_ids(self.tokenizer, [talk], self.templates[name])[0]

    def print_answers(self, prompts: dict[str, list[int]]) -> None:
        """Prints the answer of each prefix to its prompt; if there are several, after the prefix's name.

        prompts: name of the prefix -> token ids.
        """
        self.printed = {}
        for name, prompt in prompts.items():
            # Processes that share the base all generate the same answer, and main prints it.
            with self.model.equal_passes():
                self._print_answer(prompt, name, self._label(name) if len(prompts) > 1 else "")

    def _print_answer(self, prompt: list[int], name: str, label: str) -> None:
        """Prints a line for each sequence. A single sequence without beams is printed piece by piece."""
        torch.manual_seed(self.seed)
        self.printed[name] = []
        streamer = _KeepingStreamer(self.tokenizer, self.printed[name])
        streams = self.options["num_beams"] == self.options["num_return_sequences"] == 1
        inputs = self.tokenizer.pad({"input_ids": [prompt]}, return_tensors="pt").to(self.model.device)
        if streams:
            print(label, end="", flush=True)
        output = self.model.generate(
            **inputs,
            prefix_name=name,
            pad_token_id=self.tokenizer.pad_token_id,
            streamer=streamer if streams else None,
            tokenizer=self.tokenizer,  # for stop_strings, which the base's generation_config may have
            return_dict_in_generate=False,
            **self.options,
        )
        if not streams:
            for text in self.tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True):
                print(label, end="")
                streamer.on_finalized_text(text, stream_end=True)

    def _label(self, name: str) -> str:
        """The text before an answer that is compared with others, in colour if the terminal shows colours."""
        text = pad(name, max(map(display_width, self.model.names))) + "  "
        if not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
            return text
        return f"\033[{33 if name == BASE else 36}m{text}\033[0m"  # yellow, cyan


class _KeepingStreamer(TextStreamer):
    """Prints an answer piece by piece, and appends the pieces to `printed`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, printed: list[str]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.printed = printed

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.printed.append(text)
        super().on_finalized_text(text, stream_end)


def ask(answerer: Answerer, question: str, max_length: int | None, compare: bool) -> None:
    """Prints the answers to one question. max_length: of question and answer; None: max_new_tokens decides."""
    prompts = {name: answerer.prompt(talk_of(question), name) for name in answerer.names(compare)}
    if max_length:
        taken = max(map(len, prompts.values()))
        if max_length <= taken:
            raise UserError(f"--max_length {max_length} leaves no room for an answer; the question takes {taken}")
        answerer = replace(answerer, options=answerer.options | {"max_new_tokens": max_length - taken})
    answerer.print_answers(prompts)
