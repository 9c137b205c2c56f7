"""Every setting of infer.py."""

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from prefix_tuning.errors import UserError
from prefix_tuning.settings import FORCE_HELP, MAX_LENGTH, MAX_SEED, SHARD_BASE_HELP, SHARD_DEGREE_HELP, flag
from prefix_tuning.text import as_text


@dataclass
class AskArguments:
    _argument_group_name = "what to answer"

    chat: bool = flag(False, "A conversation in the terminal; /help there lists its commands.")
    input: str | None = flag(
        None,
        "Answer the rows of a .jsonl, .json, .csv or .parquet file. Columns: instruction; also input and prefix (a name, or "
        "base) if there are such.",
    )
    score: str | None = flag(
        None, "Loss and perplexity of given answers by the base and every prefix: a dataset with outputs, as for train.py."
    )
    output: str | None = flag(
        None,
        "Where the answers to --input go, a .jsonl file: each row and its response; or the figures of --score, a .json.",
    )
    resume: bool = flag(False, "Go on with an --output that a stopped run left unfinished; give the same flags as before.")
    batch_size: int = flag(64, "Rows that each process answers at once, with --input.")
    compare: bool = flag(False, "Answer by the frozen base alone, and by every prefix.")


@dataclass
class BaseArguments:
    _argument_group_name = "base"

    model_name_or_path: str | None = flag(None, "The base, where it is not found under the name that the prefix notes.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag("auto", "Compute type, as for train.py.")
    device: str = flag("auto", "auto (CUDA, else Apple's mps, else CPU), or a torch device such as cuda:1.")
    shard_base: bool = flag(False, SHARD_BASE_HELP)
    shard_degree: int | None = flag(None, SHARD_DEGREE_HELP)
    force: bool = flag(False, FORCE_HELP)


@dataclass
class DecodingArguments:
    _argument_group_name = "decoding"

    max_new_tokens: int | None = flag(None, "Longest answer, in tokens; None: 128.")
    max_length: int | None = flag(
        None,
        "Longest question and answer together, in tokens, instead of --max_new_tokens. With --chat: the longest talk that "
        f"the model sees, answer included; None: {MAX_LENGTH}, as train.py's.",
    )
    do_sample: bool = flag(False, "Draw tokens at random instead of always taking the likeliest.")
    temperature: float = flag(1.0, "With --do_sample: below 1 is more careful, above 1 more daring.")
    top_p: float = flag(1.0, "With --do_sample: draw from the likeliest tokens that hold this much probability.")
    top_k: int = flag(50, "With --do_sample: draw from this many of the likeliest tokens; 0 for all.")
    seed: int = flag(42, "With --do_sample: the same seed draws the same answer.")
    repetition_penalty: float = flag(1.0, "Above 1, tokens that have come before are less likely.")
    num_beams: int = flag(1, "Beam search with this many beams.")
    num_return_sequences: int = flag(1, "Answers to each question; needs --do_sample, or as many --num_beams.")
    cache: Literal["dynamic", "static"] = flag(
        "dynamic", "static: past_key_values of fixed size, with which transformers compiles the model on CUDA."
    )


@dataclass
class InferConfig(DecodingArguments, BaseArguments, AskArguments):
    """All settings of infer.py. Raises UserError for values that make no sense."""

    question: str | None = None
    prefix: list[str] = field(default_factory=lambda: ["./chatbot"])  # each DIR or NAME=DIR

    def __post_init__(self):
        tasks = {"a question": self.question, "--chat": self.chat, "--input": self.input, "--score": self.score}
        if len(named := [name for name, value in tasks.items() if value]) != 1:
            wanted = "ask one question, or use one of --chat, --input and --score"
            raise UserError(f"{' and '.join(named)} exclude each other; {wanted}" if named else wanted)
        (task,) = named
        answering = ("a question", "--chat", "--input")
        users = {
            "output": ("--input", "--score"), "resume": ("--input",), "batch_size": ("--input",),
            "compare": ("a question", "--chat"), "num_return_sequences": ("a question", "--input"),
            "max_length": ("a question", "--chat"), "shard_base": ("a question", "--input", "--score"),
            **dict.fromkeys(("max_new_tokens", "do_sample", "repetition_penalty", "num_beams", "cache"), answering),
        }  # fmt: skip
        for name, using in users.items():
            if task not in using and getattr(self, name) != getattr(InferConfig, name):
                raise UserError(f"--{name} goes with {' or '.join(using)}, not with {task}")
        if self.input and Path(self.output or "").suffix != ".jsonl":
            raise UserError("--input needs an --output that ends in .jsonl")
        if self.score and self.output and Path(self.output).suffix != ".json":
            raise UserError("the --output of --score must end in .json")
        if self.max_new_tokens is not None and self.max_length is not None and not self.chat:
            raise UserError("--max_new_tokens and --max_length exclude each other; choose one")
        for name in ("max_new_tokens", "max_length", "batch_size", "num_beams", "num_return_sequences"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"--{name} must be at least 1, not {getattr(self, name)}")
        for name in ("temperature", "repetition_penalty"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 1e-5):
                raise UserError(f"--{name} must be at least 0.00001, not {getattr(self, name)}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"--top_p must be above 0 and at most 1, not {self.top_p}")
        for name in ("top_k", "seed"):
            if not 0 <= getattr(self, name) <= MAX_SEED:
                raise UserError(f"--{name} must be at least 0 and at most {MAX_SEED}, not {getattr(self, name)}")
        self.question = self.question and as_text(self.question, "the question")
        longest = self.max_length or MAX_LENGTH
        if self.chat and (self.max_new_tokens or 1) >= longest:
            raise UserError(f"--max_new_tokens must leave room for a question in --max_length ({longest})")
        for name in ("temperature", "top_p", "top_k"):
            if not self.do_sample and getattr(self, name) != getattr(InferConfig, name):
                raise UserError(f"--{name} is used with --do_sample only; add that flag")
        if self.num_return_sequences > 1 and not self.do_sample and self.num_return_sequences > self.num_beams:
            raise UserError(f"--num_return_sequences {self.num_return_sequences} needs --do_sample, or as many --num_beams")
        if self.do_sample and self.num_return_sequences > self.num_beams > 1:
            raise UserError("--num_return_sequences cannot be above --num_beams, where there are beams")

    def named_prefixes(self) -> dict[str, str]:
        """The folder, or hub name, of every --prefix, by its name: NAME=DIR gives one, else it is the last part of DIR."""
        folders: dict[str, str] = {}
        for given in self.prefix:
            name, equals, folder = given.partition("=")
            if not equals or "/" in name or os.path.exists(given):
                name, folder = Path(given).resolve().name, given
            if name == "base" or not name:
                raise UserError(
                    f"--prefix {given}: give it another name than {name!r}: --prefix NAME=DIR; base is the model's"
                )
            if name in folders:
                raise UserError(
                    f"--prefix {given}: there is a prefix {name} already; give it another name: --prefix NAME=DIR"
                )
            folders[name] = folder
        return folders
