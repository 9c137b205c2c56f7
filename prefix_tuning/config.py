"""Every setting of the program, as dataclasses: their fields are the flags of train.py and infer.py, their help the manual.

Names are those of transformers' TrainingArguments and PEFT's PrefixTuningConfig wherever these have one. Nothing here
imports torch, so that `--help` answers at once.
"""

import dataclasses
import importlib.util
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from prefix_tuning import demo


class UserError(Exception):
    """Something that the user can mend. Its message is one line that names the file, row or flag, and the way out."""


def reason_of(error: Exception) -> str:
    """What an error of a library says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: no half of a character (a lone surrogate) is in it."""
    return value.isprintable() or not re.search("[\ud800-\udfff]", value)


def as_text(argument: str, name: str) -> str:
    """A text of the command line, where Python took its UTF-8 for ASCII. Raises UserError if it is none."""
    try:
        return argument if is_text(argument) else os.fsencode(argument).decode()
    except UnicodeError as error:
        raise UserError(f"{name} holds bytes that are no UTF-8 text") from error


MOST = 2**62  # of what torch takes as a seed, with room to count on


class Interrupted(Exception):
    """A signal asked the run to stop, and it has saved itself. `signal` is the signal's number."""

    def __init__(self, message: str, signal: int):
        super().__init__(message)
        self.signal = signal


@dataclass(frozen=True)
class PrefixConfig:
    """The shape of a prefix and of the encoder that learns it; PEFT's names for them.

    Raises UserError if a number is not positive or if the heads do not divide token_dim.
    """

    num_virtual_tokens: int
    num_layers: int
    num_attention_heads: int
    token_dim: int  # the model's hidden size
    encoder_hidden_size: int  # width of the projection's hidden layer
    prefix_projection: bool

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if name == "prefix_projection":
                if not isinstance(value, bool):
                    raise UserError(f"{name} must be true or false, not {value!r}")
            elif isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.token_dim % self.num_attention_heads:
            raise UserError(f"num_attention_heads {self.num_attention_heads} does not divide token_dim {self.token_dim}")


def _flag(default, help: str):
    return field(default=default, metadata={"help": help})


_FORCE = "Use a prefix even if the base has other weights or another tokenizer than the one that it was trained on."


_SHARD_BASE = (
    "Split the weights of the base over the processes that torchrun starts, and gather them layer by layer: for a base that "
    "is larger than one device. The result stays the same. Reads safetensors only."
)
_SHARD_DEGREE = (
    "With --shard_base: how many processes share one copy of the base; None: all. On several machines, those of one if the "
    "base fits there: then gathering stays off the network."
)


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str = _flag(
        demo.MODEL, "The frozen Bloom: a hub name, a folder, or the mini Bloom that comes with this program."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _flag(
        "auto",
        "Compute type of the frozen model. auto: bf16 on CUDA that has it, fp16 with loss scaling on CUDA that has not, "
        "fp32 elsewhere. The encoder and the optimizer are always fp32.",
    )
    device: str = _flag("auto", "auto (CUDA, else Apple's mps, else CPU), or a torch device such as cuda:1.")
    shard_base: bool = _flag(False, _SHARD_BASE)
    shard_degree: int | None = _flag(None, _SHARD_DEGREE)
    force: bool = _flag(False, _FORCE)


@dataclass
class DataArguments:
    _argument_group_name = "data"

    dataset: str = _flag(
        demo.DATASETS[0],
        "Training rows with the columns instruction, input (may be missing) and output: a .json, .jsonl, .csv or "
        ".parquet file, a folder written by save_to_disk, a hub name, or a bundled set.",
    )
    eval_dataset: str | None = _flag(None, "Held-out rows, named in the same ways.")
    eval_fraction: float = _flag(0.0, "Without --eval_dataset: hold out this share of the training rows.")
    eval_exact_match: bool = _flag(
        False, "Also answer the held-out questions greedily and report the share of exactly right answers."
    )
    max_length: int = _flag(256, "Tokens per row, prompt and answer together; what is longer is cut off.")


@dataclass
class PrefixArguments:
    _argument_group_name = "prefix"

    num_virtual_tokens: int = _flag(10, "Length of the prefix.")
    prefix_projection: bool = _flag(True, "Learn the prefix through an MLP (false: learn its numbers directly).")
    encoder_hidden_size: int | None = _flag(None, "Width of the MLP's hidden layer; None: the model's hidden size.")
    prefix_init: Literal["random", "zero", "text"] = _flag(
        "random", "Start from random numbers as PEFT does, from zeros, or from the keys and values of --init_text."
    )
    init_text: str | None = _flag(None, "The text for --prefix_init text; best an instruction that fits the task.")
    prefix_from: str | None = _flag(
        None, "Go on from the trainable weights of an earlier run: its output folder. Fixes all other prefix flags."
    )


@dataclass
class LoopArguments:
    _argument_group_name = "training"

    per_device_train_batch_size: int = _flag(
        1, "Rows per step are this times --gradient_accumulation_steps, times the number of processes."
    )
    gradient_accumulation_steps: int = _flag(
        8, "See above. How a step's rows share forward passes is up to --max_tokens_per_batch."
    )
    num_train_epochs: float = _flag(1.0, "How often to go through the training rows; fractions are allowed.")
    max_tokens_per_batch: int | None = _flag(
        None, "Tokens of one forward pass: less saves memory, the result stays the same; None: chosen by device and model."
    )
    gradient_checkpointing: bool = _flag(
        False, "Compute each layer twice instead of keeping its inner values: less memory, the same result."
    )
    torch_compile: bool = _flag(
        False, "Compile the layers with torch.compile before training. On a CPU it gains nothing; on a GPU, try it."
    )
    max_steps: int = _flag(-1, "Stop after this many optimizer steps instead; 0 only saves the initial prefix.")
    learning_rate: float = _flag(
        5e-5, "AdamW's peak learning rate. Narrow encoders need larger ones: 5e-3 suits the mini Bloom."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant_with_warmup"] = _flag(
        "linear", "Shape of the learning rate after the warm-up."
    )
    warmup_steps: int = _flag(0, "Steps over which the learning rate rises from 0.")
    weight_decay: float = _flag(0.0, "AdamW's weight decay; biases are exempt.")
    max_grad_norm: float = _flag(1.0, "Clip the encoder's gradient to this norm; 0 turns clipping off.")
    shuffle: bool = _flag(True, "Draw a new order of the rows for each epoch.")
    seed: int = _flag(42, "Decides the initial weights, the held-out share and the order of the rows.")


@dataclass
class OutputArguments:
    _argument_group_name = "output"

    output_dir: str = _flag("./chatbot", "Where the prefix and the metrics are saved.")
    overwrite_output_dir: bool = _flag(
        False, "Replace the finished run that --output_dir holds, or discard the checkpoints of an unfinished one."
    )
    logging_steps: int = _flag(10, "Write a line of metrics.jsonl every this many steps.")
    eval_steps: int | None = _flag(None, "Evaluate every this many steps; None: at the end of each epoch.")
    save_steps: int = _flag(500, "Write a checkpoint every this many steps; 0: only when a signal stops the run.")
    save_total_limit: int | None = _flag(2, "Keep this many of the newest checkpoints; None: all.")
    report_to: Literal["none", "tensorboard"] = _flag(
        "none", "Also write the metrics for TensorBoard, to the folder tensorboard in --output_dir."
    )
    push_to_hub: str | None = _flag(None, "Upload the finished prefix to this repository of the hub: NAME or USER/NAME.")
    resume_from_checkpoint: str | None = _flag(
        None, "Resume a run that stopped: latest (of those in --output_dir), a checkpoint, or a folder that holds some."
    )
    save_best: bool = _flag(False, "Save the prefix with the lowest eval loss instead of the last one.")
    early_stopping_patience: int | None = _flag(None, "Stop after this many evaluations in a row without a lower eval loss.")


@dataclass
class TrainConfig(OutputArguments, LoopArguments, PrefixArguments, DataArguments, ModelArguments):
    """All settings of one training run. Raises UserError for values that make no sense."""

    def __post_init__(self):
        at_least = {
            "num_virtual_tokens": 1, "max_length": 1, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1,
            "max_steps": -1, "warmup_steps": 0, "weight_decay": 0, "max_grad_norm": 0, "logging_steps": 1, "seed": 0,
            "learning_rate": 0, "eval_fraction": 0, "encoder_hidden_size": 1, "eval_steps": 1, "num_train_epochs": 0,
            "max_tokens_per_batch": 1, "save_steps": 0, "save_total_limit": 1, "early_stopping_patience": 1,
        }  # fmt: skip
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value >= least):
                raise UserError(f"--{name} must be at least {least}, not {value}")
        if self.seed > MOST:
            raise UserError(f"--seed must be at most {MOST}, not {self.seed}")
        if self.num_train_epochs == 0 and self.max_steps < 0:
            raise UserError("--num_train_epochs 0 trains nothing; --max_steps 0 saves the initial prefix")
        if self.eval_fraction >= 1:
            raise UserError(f"--eval_fraction must be below 1, not {self.eval_fraction}")
        if self.eval_fraction and self.eval_dataset:
            raise UserError("--eval_fraction and --eval_dataset exclude each other; choose one")
        for name in ("save_best", "early_stopping_patience", "eval_steps", "eval_exact_match"):
            if getattr(self, name) and not (self.eval_fraction or self.eval_dataset):
                raise UserError(f"--{name} needs held-out rows: --eval_dataset or --eval_fraction")
        if self.encoder_hidden_size and not self.prefix_projection:
            raise UserError("--encoder_hidden_size is the width of the projection, and --prefix_projection false has none")
        self.init_text = self.init_text and as_text(self.init_text, "--init_text")
        if self.prefix_init == "text" and not self.init_text:
            raise UserError("--prefix_init text needs a text: --init_text '...'")
        if self.init_text and self.prefix_init != "text":
            raise UserError("--init_text is used by --prefix_init text only; add that flag or leave the text out")
        if self.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--report_to tensorboard needs a package that is not here: pip install tensorboard")
        folder = Path(self.output_dir).absolute()
        try:
            existing = next(place for place in (folder, *folder.parents) if place.exists())
        except OSError as error:
            raise UserError(f"--output_dir {self.output_dir}: {error.strerror}; name another folder") from error
        if not existing.is_dir():
            raise UserError(f"--output_dir {self.output_dir}: {existing.name} is a file; name a folder")
        if not os.access(existing, os.W_OK):
            raise UserError(f"--output_dir {self.output_dir}: no permission to write there; name another folder")


@dataclass
class AskArguments:
    _argument_group_name = "what to answer"

    chat: bool = _flag(False, "A conversation in the terminal; /help there lists its commands.")
    input: str | None = _flag(
        None,
        "Answer the rows of a .jsonl, .json, .csv or .parquet file. Columns: instruction; also input and prefix (a name, or "
        "base) if there are such.",
    )
    score: str | None = _flag(
        None, "Loss and perplexity of given answers by the base and every prefix: a dataset with outputs, as for train.py."
    )
    output: str | None = _flag(
        None,
        "Where the answers to --input go, a .jsonl file: each row and its response; or the figures of --score, a .json.",
    )
    resume: bool = _flag(False, "Go on with an --output that a stopped run left unfinished; give the same flags as before.")
    batch_size: int = _flag(64, "Rows that each process answers at once, with --input.")
    compare: bool = _flag(False, "Answer by the frozen base alone, and by every prefix.")


@dataclass
class BaseArguments:
    _argument_group_name = "base"

    model_name_or_path: str | None = _flag(None, "The base, where it is not found under the name that the prefix notes.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _flag("auto", "Compute type, as for train.py.")
    device: str = _flag("auto", "auto (CUDA, else Apple's mps, else CPU), or a torch device such as cuda:1.")
    shard_base: bool = _flag(False, _SHARD_BASE)
    shard_degree: int | None = _flag(None, _SHARD_DEGREE)
    force: bool = _flag(False, _FORCE)


@dataclass
class DecodingArguments:
    _argument_group_name = "decoding"

    max_new_tokens: int | None = _flag(None, "Longest answer, in tokens; None: 128.")
    max_length: int | None = _flag(
        None,
        "Longest question and answer together, in tokens, instead of --max_new_tokens. With --chat: the longest talk that "
        f"the model sees, answer included; None: {DataArguments.max_length}, as train.py's.",
    )
    do_sample: bool = _flag(False, "Draw tokens at random instead of always taking the likeliest.")
    temperature: float = _flag(1.0, "With --do_sample: below 1 is more careful, above 1 more daring.")
    top_p: float = _flag(1.0, "With --do_sample: draw from the likeliest tokens that hold this much probability.")
    top_k: int = _flag(50, "With --do_sample: draw from this many of the likeliest tokens; 0 for all.")
    seed: int = _flag(42, "With --do_sample: the same seed draws the same answer.")
    repetition_penalty: float = _flag(1.0, "Above 1, tokens that have come before are less likely.")
    num_beams: int = _flag(1, "Beam search with this many beams.")
    num_return_sequences: int = _flag(1, "Answers to each question; needs --do_sample, or as many --num_beams.")
    cache: Literal["dynamic", "static"] = _flag(
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
            if not 0 <= getattr(self, name) <= MOST:
                raise UserError(f"--{name} must be at least 0 and at most {MOST}, not {getattr(self, name)}")
        self.question = self.question and as_text(self.question, "the question")
        longest = self.max_length or DataArguments.max_length
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
