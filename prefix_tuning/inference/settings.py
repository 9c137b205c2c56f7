"""Every setting of infer.py. Imports no torch: see prefix_tuning/settings.py."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from prefix_tuning.data.columns import parse_columns
from prefix_tuning.errors import UserError
from prefix_tuning.settings import (
    COLUMNS_HELP,
    MAX_LENGTH,
    MAX_SEED,
    Needs,
    SharedBaseArguments,
    check_flags,
    check_path,
    flag,
)
from prefix_tuning.text import as_text

# A run does one of these tasks. By the setting that asks for it: how messages name it.
_TASKS = {"question": "a question", "chat": "--chat", "input": "--input", "score": "--score"}


def _tasks(*settings: str) -> Needs:
    return Needs(settings, f"goes with {' or '.join(_TASKS[name] for name in settings)}, not with {{task}}")


_ANSWERING = _tasks("question", "chat", "input")
_SAMPLING = Needs(("do_sample",), "is used with --do_sample only; add that flag")


@dataclass
class AskArguments:
    _argument_group_name = "what to answer"

    chat: bool = flag(False, "A conversation in the terminal; /help there lists its commands.")
    input: str | None = flag(
        None,
        "Answer the rows of a .jsonl, .json, .csv, .tsv or .parquet file: instruction (or question, prompt, query), input, "
        "system and history, as for train.py; or talks, up to the user's last message. A column prefix may name the prefix "
        "(or base) that answers the row.",
        is_path=True,
    )
    score: str | None = flag(
        None,
        "Loss and perplexity of given answers, with the base and with every prefix: rows with answers, or talks, as for "
        "train.py.",
        is_path=True,
    )
    columns: str | None = flag(None, COLUMNS_HELP, needs=_tasks("input", "score"))
    output: str | None = flag(
        None,
        "Where the answers to --input go, a .jsonl file: each row and its response; or the figures of --score, a .json.",
        is_path=True,
        needs=_tasks("input", "score"),
    )
    resume: bool = flag(
        False, "Resume an --output that a stopped run left unfinished; give the same flags as before.", needs=_tasks("input")
    )
    batch_size: int = flag(
        64,
        "Rows that each process answers at once, with --input; fewer where prompts are long.",
        at_least=1,
        needs=_tasks("input"),
    )
    compare: bool = flag(False, "Answer with the frozen base alone and with every prefix.", needs=_tasks("question", "chat"))
    history: bool = flag(
        False,
        "With --chat: keep the conversation for every prefix. Without this flag, only prefixes whose training rows had "
        "history see it; the others are asked each question by itself.",
        needs=_tasks("chat"),
    )


@dataclass
class DecodingArguments:
    _argument_group_name = "decoding"

    max_new_tokens: int | None = flag(None, "Longest answer, in tokens. Default: 128.", at_least=1, needs=_ANSWERING)
    max_length: int | None = flag(
        None,
        "Longest question and answer together, in tokens, instead of --max_new_tokens. With --chat: the most that the model "
        f"sees of the conversation, answer included. Default: {MAX_LENGTH}, as for train.py.",
        at_least=1,
        needs=_tasks("question", "chat"),
    )
    do_sample: bool = flag(False, "Draw tokens at random instead of always taking the likeliest.", needs=_ANSWERING)
    temperature: float = flag(
        1.0, "With --do_sample: below 1 is more careful, above 1 more daring.", at_least=1e-5, needs=_SAMPLING
    )
    top_p: float = flag(
        1.0, "With --do_sample: draw from the likeliest tokens that hold this much probability.", needs=_SAMPLING
    )
    top_k: int = flag(
        50, "With --do_sample: draw from this many of the likeliest tokens; 0 for all.", at_least=0, needs=_SAMPLING
    )
    seed: int = flag(42, "With --do_sample: the same seed draws the same answer.", at_least=0, at_most=MAX_SEED)
    repetition_penalty: float = flag(1.0, "Above 1, earlier tokens become less likely.", at_least=1e-5, needs=_ANSWERING)
    num_beams: int = flag(1, "Beam search with this many beams.", at_least=1, needs=_ANSWERING)
    num_return_sequences: int = flag(
        1, "Answers per question; needs --do_sample, or as many --num_beams.", at_least=1, needs=_tasks("question", "input")
    )
    cache: Literal["dynamic", "static"] = flag(
        "dynamic", "static: past_key_values of fixed size; on CUDA, transformers then compiles the model.", needs=_ANSWERING
    )


@dataclass
class Prefixes:
    """--prefix, each DIR or NAME=DIR."""

    prefix: list[str] = field(default_factory=lambda: ["./chatbot"])

    def named_prefixes(self) -> dict[str, str]:
        """Name of each prefix -> its folder or hub name. The name is NAME of NAME=DIR, else the last part of DIR."""
        folders: dict[str, str] = {}
        for given in self.prefix:
            name, equals, folder = given.partition("=")
            if not equals or "/" in name or os.path.exists(given):
                name, folder = Path(os.path.realpath(given)).name, given
            check_path("prefix", folder)
            if name == "base" or not name:
                hint = f"give it another name than {name!r}: --prefix NAME=DIR; base means the model without a prefix"
                raise UserError(f"--prefix {given}: {hint}")
            if name in folders:
                hint = "give it another name: --prefix NAME=DIR"
                raise UserError(f"--prefix {given}: there is a prefix {name} already; {hint}")
            folders[name] = folder
        return folders


@dataclass
class InferConfig(DecodingArguments, SharedBaseArguments, AskArguments, Prefixes):
    """All settings of infer.py. Raises UserError for values that make no sense, alone or together."""

    question: str | None = None

    def __post_init__(self) -> None:
        tasks = [task for name, task in _TASKS.items() if getattr(self, name)]
        if len(tasks) != 1:
            wanted = "ask one question, or use one of --chat, --input and --score"
            raise UserError(f"{' and '.join(tasks)} exclude each other; {wanted}" if tasks else wanted)
        check_flags(self, task=tasks[0])
        if self.chat and self.shard_base:
            raise UserError("--shard_base goes with a question or --input or --score, not with --chat")
        if self.input and Path(self.output or "").suffix != ".jsonl":
            raise UserError("--input needs an --output that ends in .jsonl")
        if self.score and self.output and Path(self.output).suffix != ".json":
            raise UserError("the --output of --score must end in .json")
        if self.max_new_tokens is not None and self.max_length is not None and not self.chat:
            raise UserError("--max_new_tokens and --max_length exclude each other; choose one")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be above 0 and at most 1, not {self.top_p}")
        self.columns = self.columns and as_text(self.columns, "--columns")
        parse_columns(self.columns)
        self.question = self.question and as_text(self.question, "the question")
        longest = self.max_length or MAX_LENGTH
        if self.chat and (self.max_new_tokens or 1) >= longest:
            raise UserError(f"--max_new_tokens must leave room for a question in --max_length ({longest})")
        if self.num_return_sequences > 1 and not self.do_sample and self.num_return_sequences > self.num_beams:
            raise UserError(f"--num_return_sequences {self.num_return_sequences} needs --do_sample, or as many --num_beams")
        if self.do_sample and self.num_return_sequences > self.num_beams > 1:
            raise UserError("--num_return_sequences cannot be above --num_beams, where there are beams")
