"""The two commands: flags in, `train` or an answer out. torch is imported only once the flags are known to be good."""

import dataclasses
import difflib
import itertools
import os
import shlex
import sys
import time
from collections.abc import Callable

from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from prefix_tuning import demo
from prefix_tuning.config import (
    AskArguments,
    BaseArguments,
    DataArguments,
    DecodingArguments,
    InferConfig,
    Interrupted,
    LoopArguments,
    ModelArguments,
    OutputArguments,
    PrefixArguments,
    TrainConfig,
    UserError,
)

DEMO_FLAGS = " ".join(f"--{name} {value}" for name, value in demo.SETTINGS.items())
TRAIN_HELP = (
    f"Tune a prefix for a frozen Bloom. With no model and no dataset named, the bundled demo runs, with {DEMO_FLAGS}"
)
# What --prefix_from settles.
PREFIX_SHAPE = {field.name for field in dataclasses.fields(PrefixArguments)} - {"prefix_from"}


class _Parser(HfArgumentParser):
    """Dataclasses to flags, with mistakes as UserError."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.add_argument("--debug", action="store_true", help="Show where in the program an error was raised.")

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help")

    def parse(self, argv: list[str]) -> tuple[dict, set[str]]:
        """Returns the value of every flag by name, and the names of those that the command line gives."""
        # A bare `--compare` before a question must not take the question for its value.
        switches = {
            name for action in self._actions if action.nargs == "?" and action.const for name in action.option_strings
        }
        argv = [
            f"{part}=true" if part in switches and after.lower() not in ("true", "false") else part
            for part, after in itertools.zip_longest(argv, argv[1:], fillvalue="")
        ]
        *parts, unknown = self.parse_args_into_dataclasses(argv, return_remaining_strings=True, look_for_args_file=False)
        values = {name: value for part in parts for name, value in vars(part).items() if name != "debug"}
        if unknown:
            known = {name for action in self._actions for name in action.option_strings}
            close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=1)
            self.error(f"unknown argument {unknown[0]}" + (f", did you mean {close[0]}?" if close else ""))
        names = {part.split("=")[0].lstrip("-").replace("-", "_") for part in argv if part.startswith("--")}
        return values, {name for name in values if name in names or f"no_{name}" in names}


def _is_main() -> bool:
    """Whether this process is alone, or the first of those that torchrun has started: the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def _run(command: Callable[[list[str]], None]) -> None:
    """Runs a command; a user's mistake becomes one line on stderr and exit code 2, a bug keeps its traceback."""
    for stream in filter(None, (sys.stdin, sys.stdout, sys.stderr)):  # a closed one is None
        stream.reconfigure(errors="replace")  # what is no character, or cannot be shown, becomes a ? instead of an error
    disable_progress_bar()  # transformers' own, one per file of weights; ours stay
    try:
        command(sys.argv[1:])
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        if not _is_main():
            time.sleep(5)  # if main says the same, torchrun ends this process before it repeats it
        who = "" if _is_main() else f"process {os.environ['RANK']}: "
        print(f"{who}error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        if _is_main():
            print(stop, file=sys.stderr)
        sys.exit(128 + stop.signal)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + 13)


def parse_train_config(argv: list[str]) -> TrainConfig:
    """Turns train.py's command line into its settings. Raises UserError for what makes no sense.

    Where model and dataset are bundled ones, the demo's own settings replace the defaults, and are printed.
    """
    groups = (ModelArguments, DataArguments, PrefixArguments, LoopArguments, OutputArguments)
    parser = _Parser(groups, prog="train.py", description=TRAIN_HELP, allow_abbrev=False)
    values, given = parser.parse(argv)
    if values["model_name_or_path"] == demo.MODEL and values["dataset"] in demo.DATASETS:
        skipped = given | (PREFIX_SHAPE if values["prefix_from"] else set())
        settings = {name: value for name, value in demo.SETTINGS.items() if name not in skipped}
        if not given & {"eval_dataset", "eval_fraction"}:
            settings["eval_dataset"] = values["dataset"] + "-eval"
        parser.set_defaults(**settings)
        values, _ = parser.parse(argv)
        flags = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in settings.items())
        if _is_main():
            print(f"The bundled demo's own settings, which any flag overrides:\n  {flags}")
    if values["prefix_from"] and (clash := sorted(given & PREFIX_SHAPE)):
        raise UserError(f"--prefix_from already fixes the prefix; leave out --{', --'.join(clash)}")
    return TrainConfig(**values)


def _train(argv: list[str]) -> None:
    config = parse_train_config(argv)
    from prefix_tuning.training import train

    train(config)


def parse_infer_config(argv: list[str]) -> InferConfig:
    """Turns infer.py's command line into its settings. Raises UserError for what makes no sense."""
    groups = (AskArguments, BaseArguments, DecodingArguments)
    parser = _Parser(groups, prog="infer.py", description="Ask a frozen Bloom with a prefix.", allow_abbrev=False)
    parser.add_argument("question", nargs="?", help="The question, e.g. 法国的首都是哪里？")
    parser.add_argument(
        "--prefix",
        action="append",
        metavar="[NAME=]DIR",
        help="A prefix: an output folder of train.py, a PEFT adapter's folder, or either's name on the hub. May be given "
        "several times; the first answers where none is named (default: ./chatbot).",
    )
    values, _ = parser.parse(argv)
    return InferConfig(**{name: value for name, value in values.items() if value is not None})


def _infer(argv: list[str]) -> None:
    config = parse_infer_config(argv)
    from prefix_tuning.inference import infer

    infer(config)


def train_command() -> None:
    _run(_train)


def infer_command() -> None:
    _run(_infer)
