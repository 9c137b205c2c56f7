"""Every setting of train.py. Imports no torch: see prefix_tuning/settings.py."""

import dataclasses
import importlib.util
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prefix_tuning import bundled
from prefix_tuning.data.columns import parse_columns
from prefix_tuning.errors import UserError
from prefix_tuning.settings import (
    COLUMNS_HELP,
    DEFAULT_HELD_OUT,
    FEWEST_TO_SPLIT,
    MAX_LENGTH,
    MAX_SEED,
    MOST_HELD_OUT,
    Needs,
    SharedBaseArguments,
    check_flags,
    content_flag,
    new_flag,
    same_flag,
)
from prefix_tuning.text import as_text

_HELD_OUT_ROWS = Needs(("may_hold_out",), "needs held-out rows: --eval_dataset or --eval_fraction")
_PROJECTION = Needs(("prefix_projection",), "is the width of the projection, and --prefix_projection false has none")


@dataclass
class ModelArguments(SharedBaseArguments):
    _argument_group_name = "model"

    model_name_or_path: str = content_flag(
        bundled.MODEL,
        "The frozen Bloom, Llama, Qwen, Gemma, ...: a hub name, a folder, or the mini Bloom that comes with this program.",
        is_path=True,
    )


@dataclass
class DataArguments:
    _argument_group_name = "data"

    dataset: str = content_flag(
        bundled.DATASETS[0],
        "Training rows: instruction and output; or question and answer, prompt and completion or response, query and "
        "response; or talks, in messages or conversations. A row may also have input (or context), system, and history: the "
        "turns before, whose answers are learned, too. A .json, .jsonl, .csv, .tsv or .parquet file, a folder written by "
        "save_to_disk, a hub name, or a bundled set.",
        is_path=True,
    )
    eval_dataset: str | None = content_flag(None, "Held-out rows, named in the same ways.", is_path=True)
    columns: str | None = new_flag(None, COLUMNS_HELP)  # a resume compares what is read: content of the two above
    eval_fraction: float | None = same_flag(
        None,
        "Without --eval_dataset: hold out this share of the training rows; 0: none. Default: "
        f"{DEFAULT_HELD_OUT:.0%}, {MOST_HELD_OUT} rows at most, if there are at least {FEWEST_TO_SPLIT} rows.",
        at_least=0,
    )
    eval_exact_match: bool = same_flag(
        False,
        "Also answer the held-out questions, and report the share of exact matches. Always greedily, without the "
        "repetition_penalty and the like that the base's generation_config may have. An answer that --max_length cuts is "
        "compared as far as it is kept.",
        needs=_HELD_OUT_ROWS,
    )
    template: Literal["auto", "notebook", "chat"] = same_flag(
        "auto",
        "How rows are written. chat: in the chat template of the base's tokenizer; notebook: as Human: ... and Assistant: "
        "...; auto: chat if the tokenizer has a chat template. The prefix records it, and infer.py follows.",
    )
    max_length: int = same_flag(MAX_LENGTH, "Tokens per row, prompt and answer together; the rest is cut off.", at_least=1)

    @property
    def may_hold_out(self) -> bool:
        """Whether there are to be held-out rows; of few rows, none are held out by default."""
        return self.eval_dataset is not None or self.eval_fraction != 0


@dataclass
class PrefixArguments:
    _argument_group_name = "prefix"

    num_virtual_tokens: int = same_flag(10, "Length of the prefix.", at_least=1)
    prefix_projection: bool = same_flag(True, "Learn the prefix through an MLP (false: learn its numbers directly).")
    encoder_hidden_size: int | None = same_flag(
        None, "Width of the MLP's hidden layer. Default: the width of the model's keys.", at_least=1, needs=_PROJECTION
    )
    prefix_init: Literal["random", "zero", "text"] = same_flag(
        "random",
        "Start from random numbers as PEFT does, from zeros, or from the keys and values of a text: --init_text, or else "
        "--distill_text.",
    )
    init_text: str | None = same_flag(None, "The text for --prefix_init text; best an instruction that fits the task.")
    init_from: Literal["first", "chunks"] = same_flag(
        "first", "With --prefix_init text: start from the text's first tokens, or from tokens at even steps of all of it."
    )
    freeze_first_token: bool = same_flag(
        False, "With --prefix_init text: do not train the first token, to which many models send spare attention."
    )
    prefix_from: str | None = same_flag(
        None,
        "Start from the trainable weights of an earlier run: its output folder. Fixes all other prefix flags.",
        is_path=True,
    )


@dataclass
class DistillationArguments:
    _argument_group_name = "distillation"

    distill_text: str | None = content_flag(
        None,
        "Train the prefix to predict what the base predicts with the text of this file in front of each row. A row may lack "
        "its output: then the base answers first, with the text in front.",
        is_path=True,
    )
    distill_prefix: str | None = content_flag(
        None, "The same with another prefix of this base in front, usually a longer one: an output folder.", is_path=True
    )
    distill_alpha: float = same_flag(
        0.0,
        "The share of the rows' own cross-entropy in the loss; the rest is the divergence from the teacher.",
        at_least=0,
        at_most=1,
        needs=Needs(("distill_text", "distill_prefix"), "needs a teacher: --distill_text or --distill_prefix"),
    )


@dataclass
class LoopArguments:
    _argument_group_name = "training"

    per_device_train_batch_size: int = same_flag(
        1, "Rows per step are this times --gradient_accumulation_steps, times the number of processes.", at_least=1
    )
    gradient_accumulation_steps: int = same_flag(
        8, "See above. How a step's rows share forward passes is up to --max_tokens_per_batch.", at_least=1
    )
    num_train_epochs: float = new_flag(
        1.0, "How often to go through the training rows; fractions are allowed.", at_least=0, at_most=10**9
    )
    max_tokens_per_batch: int | None = new_flag(
        None,
        "Tokens per forward pass; fewer take less memory, the result is the same. Default: by device and model.",
        at_least=1,
    )
    gradient_checkpointing: bool = new_flag(
        False, "Compute each layer twice instead of keeping its inner values: less memory, the same result."
    )
    torch_compile: bool = new_flag(
        False, "Compile the layers with torch.compile before training. On a CPU it gains nothing; on a GPU, try it."
    )
    max_steps: int = new_flag(-1, "Optimizer steps, instead of epochs; 0 only saves the initial prefix.", at_least=-1)
    learning_rate: float | None = same_flag(
        None, "AdamW's peak learning rate. Default: found by short trials on training rows. Trainer's is 5e-5.", at_least=0
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant_with_warmup"] = same_flag(
        "linear", "Shape of the learning rate after the warm-up."
    )
    warmup_steps: int = same_flag(0, "Steps over which the learning rate rises from 0.", at_least=0)
    weight_decay: float = same_flag(0.0, "AdamW's weight decay; biases are exempt.", at_least=0)
    max_grad_norm: float = same_flag(1.0, "Clip the encoder's gradient to this norm; 0 turns clipping off.", at_least=0)
    shuffle: bool = same_flag(True, "Draw a new order of the rows for each epoch.")
    seed: int = same_flag(
        42, "Decides the initial weights, the held-out share and the order of the rows.", at_least=0, at_most=MAX_SEED
    )


@dataclass
class OutputArguments:
    _argument_group_name = "output"

    output_dir: str = new_flag("./chatbot", "Where the prefix and the metrics are saved.", is_path=True)
    overwrite_output_dir: bool = new_flag(
        False, "Replace the finished run that --output_dir holds, or discard the checkpoints of an unfinished one."
    )
    logging_steps: int = new_flag(10, "Write a line of metrics.jsonl every this many steps.", at_least=1)
    eval_steps: int | None = new_flag(
        None, "Evaluate every this many steps. Default: at the end of each epoch.", at_least=1, needs=_HELD_OUT_ROWS
    )
    save_steps: int = new_flag(
        500, "Checkpoint every this many steps; 0: only when a signal or an error stops the run.", at_least=0
    )
    save_total_limit: int | None = new_flag(2, "Keep this many of the newest checkpoints.", at_least=1)
    report_to: Literal["none", "tensorboard"] = new_flag(
        "none", "Also write the metrics for TensorBoard, to the folder tensorboard in --output_dir."
    )
    push_to_hub: str | None = new_flag(None, "Upload the finished prefix to this repository of the hub: NAME or USER/NAME.")
    resume_from_checkpoint: str | None = new_flag(
        None,
        "Resume a run that stopped: latest (of those in --output_dir), a checkpoint, or a folder that holds some.",
        is_path=True,
    )
    save_best: bool = same_flag(False, "Save the prefix with the lowest eval loss, not the last.", needs=_HELD_OUT_ROWS)
    early_stopping_patience: int | None = new_flag(
        None, "Stop after this many evaluations in a row without a lower eval loss.", at_least=1, needs=_HELD_OUT_ROWS
    )


@dataclass
class TrainConfig(OutputArguments, LoopArguments, DistillationArguments, PrefixArguments, DataArguments, ModelArguments):
    """All settings of one training run. Raises UserError for values that make no sense."""

    def __post_init__(self) -> None:
        check_flags(self)
        if self.num_train_epochs == 0 and self.max_steps < 0:
            raise UserError("--num_train_epochs 0 trains nothing; --max_steps 0 saves the initial prefix")
        if self.eval_fraction is not None and self.eval_fraction >= 1:
            raise UserError(f"--eval_fraction must be below 1, not {self.eval_fraction}")
        if self.eval_fraction and self.eval_dataset:
            raise UserError("--eval_fraction and --eval_dataset exclude each other; choose one")
        self.columns = self.columns and as_text(self.columns, "--columns")
        parse_columns(self.columns)
        self.init_text = self.init_text and as_text(self.init_text, "--init_text")
        if self.distill_text and self.distill_prefix:
            raise UserError("--distill_text and --distill_prefix exclude each other; choose one")
        if self.distill_text and not Path(bundled.resolve(self.distill_text)).is_file():
            raise UserError(f"--distill_text {self.distill_text}: no such file")
        if self.prefix_init == "text" and not (self.init_text or self.distill_text):
            raise UserError("--prefix_init text needs a text: --init_text '...', or --distill_text FILE")
        if self.init_text and self.prefix_init != "text":
            raise UserError("--init_text is used by --prefix_init text only; add that flag or leave the text out")
        if self.prefix_init != "text":
            for name in ("init_from", "freeze_first_token"):
                if getattr(self, name) not in ("first", False):
                    raise UserError(f"--{name} is used by --prefix_init text only; add that flag or leave this one out")
        if self.freeze_first_token and self.num_virtual_tokens == 1:
            raise UserError("--freeze_first_token leaves nothing to train of one token; raise --num_virtual_tokens")
        if self.report_to == "tensorboard" and importlib.util.find_spec("tensorboard") is None:
            raise UserError("--report_to tensorboard needs a package that is not here: pip install tensorboard")
        _check_output_dir(self.output_dir)
        if self.push_to_hub == self.model_name_or_path:
            raise UserError(f"--push_to_hub {self.push_to_hub} is the base; name another repository")

    def need_held_out(self) -> str:
        """The flags given that have no effect without held-out rows, as they are written."""
        needing = (field for field in dataclasses.fields(self) if field.metadata["rules"].needs is _HELD_OUT_ROWS)
        return ", ".join(f"--{field.name}" for field in needing if getattr(self, field.name) != field.default)


def _check_output_dir(output_dir: str) -> None:
    """Raises UserError if this process cannot read and write the folder, or cannot make it."""
    folder = Path(output_dir).absolute()
    # lexists: a link that leads nowhere is found, too.
    existing = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not existing.is_dir():
        kind = "a link to no folder" if existing.is_symlink() else "a file"
        raise UserError(f"--output_dir {output_dir}: {existing.name} is {kind}; name a folder")
    if not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        raise UserError(f"--output_dir {output_dir}: no permission to read and write there; name another folder")
    if _is_model(folder / "config.json"):
        hint = "transformers would take the prefix for an adapter of it and fail to load it; name another folder"
        raise UserError(f"--output_dir {output_dir}: holds a model (config.json); {hint}")


def _is_model(config: Path) -> bool:
    """Whether this is the config.json of a model, and not of something else in that folder."""
    try:
        content = json.loads(config.read_text("utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return isinstance(content, dict) and bool(content.keys() & {"model_type", "architectures"})
