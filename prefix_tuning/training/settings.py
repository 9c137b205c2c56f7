"""Every setting of train.py."""

import importlib.util
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from prefix_tuning import bundled
from prefix_tuning.errors import UserError
from prefix_tuning.settings import FORCE_HELP, MAX_LENGTH, MAX_SEED, SHARD_BASE_HELP, SHARD_DEGREE_HELP, flag
from prefix_tuning.text import as_text


@dataclass
class ModelArguments:
    _argument_group_name = "model"

    model_name_or_path: str = flag(
        bundled.MODEL, "The frozen Bloom: a hub name, a folder, or the mini Bloom that comes with this program."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = flag(
        "auto",
        "Compute type of the frozen model. auto: bf16 on CUDA that has it, fp16 with loss scaling on CUDA that has not, "
        "fp32 elsewhere. The encoder and the optimizer are always fp32.",
    )
    device: str = flag("auto", "auto (CUDA, else Apple's mps, else CPU), or a torch device such as cuda:1.")
    shard_base: bool = flag(False, SHARD_BASE_HELP)
    shard_degree: int | None = flag(None, SHARD_DEGREE_HELP)
    force: bool = flag(False, FORCE_HELP)


@dataclass
class DataArguments:
    _argument_group_name = "data"

    dataset: str = flag(
        bundled.DATASETS[0],
        "Training rows with the columns instruction, input (may be missing) and output: a .json, .jsonl, .csv or "
        ".parquet file, a folder written by save_to_disk, a hub name, or a bundled set.",
    )
    eval_dataset: str | None = flag(None, "Held-out rows, named in the same ways.")
    eval_fraction: float = flag(0.0, "Without --eval_dataset: hold out this share of the training rows.")
    eval_exact_match: bool = flag(
        False, "Also answer the held-out questions greedily and report the share of exactly right answers."
    )
    max_length: int = flag(MAX_LENGTH, "Tokens per row, prompt and answer together; what is longer is cut off.")


@dataclass
class PrefixArguments:
    _argument_group_name = "prefix"

    num_virtual_tokens: int = flag(10, "Length of the prefix.")
    prefix_projection: bool = flag(True, "Learn the prefix through an MLP (false: learn its numbers directly).")
    encoder_hidden_size: int | None = flag(None, "Width of the MLP's hidden layer; None: the model's hidden size.")
    prefix_init: Literal["random", "zero", "text"] = flag(
        "random", "Start from random numbers as PEFT does, from zeros, or from the keys and values of --init_text."
    )
    init_text: str | None = flag(None, "The text for --prefix_init text; best an instruction that fits the task.")
    prefix_from: str | None = flag(
        None, "Go on from the trainable weights of an earlier run: its output folder. Fixes all other prefix flags."
    )


@dataclass
class LoopArguments:
    _argument_group_name = "training"

    per_device_train_batch_size: int = flag(
        1, "Rows per step are this times --gradient_accumulation_steps, times the number of processes."
    )
    gradient_accumulation_steps: int = flag(
        8, "See above. How a step's rows share forward passes is up to --max_tokens_per_batch."
    )
    num_train_epochs: float = flag(1.0, "How often to go through the training rows; fractions are allowed.")
    max_tokens_per_batch: int | None = flag(
        None, "Tokens of one forward pass: less saves memory, the result stays the same; None: chosen by device and model."
    )
    gradient_checkpointing: bool = flag(
        False, "Compute each layer twice instead of keeping its inner values: less memory, the same result."
    )
    torch_compile: bool = flag(
        False, "Compile the layers with torch.compile before training. On a CPU it gains nothing; on a GPU, try it."
    )
    max_steps: int = flag(-1, "Stop after this many optimizer steps instead; 0 only saves the initial prefix.")
    learning_rate: float = flag(
        5e-5, "AdamW's peak learning rate. Narrow encoders need larger ones: 5e-3 suits the mini Bloom."
    )
    lr_scheduler_type: Literal["linear", "cosine", "constant_with_warmup"] = flag(
        "linear", "Shape of the learning rate after the warm-up."
    )
    warmup_steps: int = flag(0, "Steps over which the learning rate rises from 0.")
    weight_decay: float = flag(0.0, "AdamW's weight decay; biases are exempt.")
    max_grad_norm: float = flag(1.0, "Clip the encoder's gradient to this norm; 0 turns clipping off.")
    shuffle: bool = flag(True, "Draw a new order of the rows for each epoch.")
    seed: int = flag(42, "Decides the initial weights, the held-out share and the order of the rows.")


@dataclass
class OutputArguments:
    _argument_group_name = "output"

    output_dir: str = flag("./chatbot", "Where the prefix and the metrics are saved.")
    overwrite_output_dir: bool = flag(
        False, "Replace the finished run that --output_dir holds, or discard the checkpoints of an unfinished one."
    )
    logging_steps: int = flag(10, "Write a line of metrics.jsonl every this many steps.")
    eval_steps: int | None = flag(None, "Evaluate every this many steps; None: at the end of each epoch.")
    save_steps: int = flag(500, "Write a checkpoint every this many steps; 0: only when a signal stops the run.")
    save_total_limit: int | None = flag(2, "Keep this many of the newest checkpoints; None: all.")
    report_to: Literal["none", "tensorboard"] = flag(
        "none", "Also write the metrics for TensorBoard, to the folder tensorboard in --output_dir."
    )
    push_to_hub: str | None = flag(None, "Upload the finished prefix to this repository of the hub: NAME or USER/NAME.")
    resume_from_checkpoint: str | None = flag(
        None, "Resume a run that stopped: latest (of those in --output_dir), a checkpoint, or a folder that holds some."
    )
    save_best: bool = flag(False, "Save the prefix with the lowest eval loss instead of the last one.")
    early_stopping_patience: int | None = flag(None, "Stop after this many evaluations in a row without a lower eval loss.")


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
        if self.seed > MAX_SEED:
            raise UserError(f"--seed must be at most {MAX_SEED}, not {self.seed}")
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
