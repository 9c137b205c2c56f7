"""The commands train.py and infer.py: from flags to settings, and to the function that runs them.

Importing this module loads neither transformers nor torch, so that --help is quick: see command.py.
"""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Callable
from functools import partial

from prefix_tuning import bundled
from prefix_tuning.command import is_main, run_command
from prefix_tuning.errors import UserError
from prefix_tuning.inference.settings import AskArguments, DecodingArguments, InferConfig
from prefix_tuning.settings import SharedBaseArguments
from prefix_tuning.training.settings import (
    DataArguments,
    DistillationArguments,
    LoopArguments,
    ModelArguments,
    OutputArguments,
    PrefixArguments,
    TrainConfig,
)

DEMO_FLAGS = " ".join(f"--{name} {value}" for name, value in bundled.SETTINGS.items())
TRAIN_HELP = f"Tune a prefix for a frozen model. With no model and no dataset, the bundled demo runs, with {DEMO_FLAGS}"
# The flags that --help shows first.
MOST_USED_IN_TRAINING = (
    "dataset", "model_name_or_path", "output_dir", "eval_dataset", "learning_rate", "num_train_epochs", "num_virtual_tokens",
    "per_device_train_batch_size", "max_length", "resume_from_checkpoint",
)  # fmt: skip
MOST_USED_IN_INFERENCE = (
    "question", "prefix", "compare", "chat", "input", "output", "score", "model_name_or_path", "max_new_tokens", "do_sample",
)  # fmt: skip
# --prefix_from fixes these, because the encoder that it loads already has them.
PREFIX_SHAPE = {field.name for field in dataclasses.fields(PrefixArguments)} - {"prefix_from"}


def parse_train_config(argv: list[str]) -> TrainConfig:
    """The settings of train.py's command line. Raises UserError for settings that make no sense.

    If model and dataset are bundled, the demo's settings replace the defaults, and are printed.
    """
    from prefix_tuning.parser import Parser

    groups = (
        ModelArguments,
        DataArguments,
        PrefixArguments,
        DistillationArguments,
        LoopArguments,
        OutputArguments,
    )
    parser = Parser(groups, MOST_USED_IN_TRAINING, prog="train.py", description=TRAIN_HELP)
    values, given = parser.parse(argv)
    if settings := bundled.settings_for(values["model_name_or_path"], values["dataset"]):
        skipped = given | (PREFIX_SHAPE if values["prefix_from"] else set())
        settings = {name: value for name, value in settings.items() if name not in skipped}
        if not given & {"eval_dataset", "eval_fraction"}:
            settings["eval_dataset"] = values["dataset"] + "-eval"
        elif not (values["eval_dataset"] or values["eval_fraction"]):
            settings = {name: value for name, value in settings.items() if not name.startswith("eval_")}
        parser.set_defaults(**settings)
        values, _ = parser.parse(argv)
        flags = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in settings.items())
        if is_main():
            print(f"The bundled demo's own settings, which any flag overrides:\n  {flags}")
    if values["prefix_from"] and (clash := sorted(given & PREFIX_SHAPE)):
        raise UserError(f"--prefix_from already fixes the prefix; leave out --{', --'.join(clash)}")
    return TrainConfig(**values)


def _train(argv: list[str]) -> Callable[[], object]:
    config = parse_train_config(argv)
    from prefix_tuning.training.run import train

    return partial(train, config)


def parse_infer_config(argv: list[str]) -> InferConfig:
    """The settings of infer.py's command line. Raises UserError for settings that make no sense."""
    from prefix_tuning.parser import Parser

    groups = (AskArguments, SharedBaseArguments, DecodingArguments)
    parser = Parser(groups, MOST_USED_IN_INFERENCE, prog="infer.py", description="Ask a frozen model with a prefix.")
    parser.add_argument(
        "question",
        nargs="?",
        default=argparse.SUPPRESS,
        help="The question, in quotes. A question that begins with - goes after --.",
    )
    parser.add_prefix_flag("; the first answers where none is named")
    values, _ = parser.parse(argv)
    return InferConfig(**values)


def _infer(argv: list[str]) -> Callable[[], object]:
    config = parse_infer_config(argv)
    from prefix_tuning.inference.run import infer

    return partial(infer, config)


def train_command() -> None:
    run_command(_train)


def infer_command() -> None:
    run_command(_infer, stdout_is_answers=True)


if __name__ == "__main__":
    print("error: prefix_tuning.cli is no command; run train.py or infer.py", file=sys.stderr)
    sys.exit(2)
