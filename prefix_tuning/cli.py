"""The commands train.py, infer.py, `python -m prefix_tuning.study` and `... .claims`: from flags on, to exit codes.

Importing this module loads neither transformers nor torch. parser.py imports transformers when a command starts; torch is
imported when the flags have been checked. So --help and mistakes in flags are answered quickly.
"""

import argparse
import codecs
import dataclasses
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from prefix_tuning import bundled
from prefix_tuning.errors import Interrupted, UserError
from prefix_tuning.inference.settings import AskArguments, DecodingArguments, InferConfig
from prefix_tuning.screen import Answers, Screen
from prefix_tuning.settings import SharedBaseArguments
from prefix_tuning.study.claims.settings import ClaimsConfig
from prefix_tuning.study.settings import StudyArguments, StudyBaseArguments, StudyConfig
from prefix_tuning.training.settings import (
    DataArguments,
    LoopArguments,
    ModelArguments,
    OutputArguments,
    PrefixArguments,
    TrainConfig,
)

DEMO_FLAGS = " ".join(f"--{name} {value}" for name, value in bundled.SETTINGS.items())
TRAIN_HELP = (
    f"Tune a prefix for a frozen Bloom. With no model and no dataset named, the bundled demo runs, with {DEMO_FLAGS}"
)
# The flags that --help shows first.
MOST_USED_IN_TRAINING = (
    "dataset", "model_name_or_path", "output_dir", "eval_dataset", "learning_rate", "num_train_epochs", "num_virtual_tokens",
    "per_device_train_batch_size", "max_length", "resume_from_checkpoint",
)  # fmt: skip
MOST_USED_IN_INFERENCE = (
    "question", "prefix", "compare", "chat", "input", "output", "score", "model_name_or_path", "max_new_tokens", "do_sample",
)  # fmt: skip
MOST_USED_IN_STUDY = ("prefix", "dataset", "output", "rows", "question")
PREFIX_HELP = "A prefix: an output folder of train.py, a PEFT adapter's folder, or either's name on the hub. May be repeated"
PREFIX_DEFAULT = "(default: ./chatbot)."
PREFIX_FLAG: dict[str, Any] = {"action": "append", "default": argparse.SUPPRESS, "metavar": "[NAME=]DIR"}
# --prefix_from fixes these, because the encoder that it loads already has them.
PREFIX_SHAPE = {field.name for field in dataclasses.fields(PrefixArguments)} - {"prefix_from"}


def _is_main() -> bool:
    """Whether this process has rank 0, or is the only one: it prints for all. From torchrun's variable, without torch."""
    return os.environ.get("RANK", "0") == "0"


def _run(prepare: Callable[[list[str]], Callable[[], object]], stdout_is_answers: bool = False) -> None:
    """Runs a command and sets the exit code: 2 for a UserError, which is one line on stderr; 128 + the signal's number for a
    signal; 1 for a bug, with its traceback.

    prepare: checks the arguments of the command line, imports what the command takes, and returns it ready to be called.
    stdout_is_answers: a stdout that cannot be written ends the command. A screen, as stderr always is, does not.
    """
    _open_streams(stdout_is_answers)
    try:
        try:
            with _default_sigint():
                command = prepare(sys.argv[1:])
                from transformers.utils.logging import disable_progress_bar

                disable_progress_bar()  # transformers' own, one per file of weights
            command()
        finally:
            sys.stdout.flush()  # here, and not at exit, so that the handlers below see its errors
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        _say(f"error: {' '.join(str(error).split())}")
        sys.exit(2)
    except Interrupted as stop:
        if _is_main():
            print(stop, file=sys.stderr)
        sys.exit(128 + stop.signal)
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader of stdout, `head` say, has ended
        sys.exit(128 + 13)  # SIGPIPE


def _say(line: str) -> None:
    """Prints a line to stderr. Of several processes that report the same, one prints it."""
    if "RANK" in os.environ:
        from prefix_tuning import distributed

        if not distributed.first_to_say(line):
            return
    print(line if _is_main() else f"process {os.environ['RANK']}: {line}", file=sys.stderr)


@contextmanager
def _default_sigint() -> Iterator[None]:
    """Inside, Ctrl-C ends the process by the system's default action: during imports, Python's would print a traceback."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # else it is ignored, as in a shell's background job
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _open_streams(stdout_is_answers: bool) -> None:
    """Makes stdin, stdout and stderr usable. Closed ones become /dev/null; ASCII, Python's choice without a locale, becomes
    UTF-8; bytes that cannot be decoded and characters that cannot be encoded become a ?. stderr becomes a Screen, and stdout
    too unless it carries answers."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115 (stays open)
        stream.reconfigure(encoding="utf-8" if codecs.lookup(stream.encoding).name == "ascii" else None, errors="replace")
        if name != "stdin":
            stream = Answers(stream) if name == "stdout" and stdout_is_answers else Screen(stream)
        setattr(sys, name, stream)


def parse_train_config(argv: list[str]) -> TrainConfig:
    """The settings of train.py's command line. Raises UserError for settings that make no sense.

    If model and dataset are bundled, the demo's settings replace the defaults, and are printed.
    """
    from prefix_tuning.parser import Parser

    groups = (ModelArguments, DataArguments, PrefixArguments, LoopArguments, OutputArguments)
    parser = Parser(groups, MOST_USED_IN_TRAINING, prog="train.py", description=TRAIN_HELP)
    values, given = parser.parse(argv)
    if values["model_name_or_path"] == bundled.MODEL and values["dataset"] in bundled.DATASETS:
        skipped = given | (PREFIX_SHAPE if values["prefix_from"] else set())
        settings = {name: value for name, value in bundled.SETTINGS.items() if name not in skipped}
        if not given & {"eval_dataset", "eval_fraction"}:
            settings["eval_dataset"] = values["dataset"] + "-eval"
        elif not (values["eval_dataset"] or values["eval_fraction"]):
            settings.pop("eval_exact_match", None)
        parser.set_defaults(**settings)
        values, _ = parser.parse(argv)
        flags = " ".join(f"--{name} {shlex.quote(str(value))}" for name, value in settings.items())
        if _is_main():
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
    parser = Parser(groups, MOST_USED_IN_INFERENCE, prog="infer.py", description="Ask a frozen Bloom with a prefix.")
    parser.add_argument(
        "question",
        nargs="?",
        default=argparse.SUPPRESS,
        help="The question, in quotes. A question that begins with - goes after --.",
    )
    help = f"{PREFIX_HELP}; the first answers where none is named {PREFIX_DEFAULT}"
    parser.add_argument("--prefix", help=help, **PREFIX_FLAG)
    values, _ = parser.parse(argv)
    return InferConfig(**values)


def _infer(argv: list[str]) -> Callable[[], object]:
    config = parse_infer_config(argv)
    from prefix_tuning.inference.run import infer

    return partial(infer, config)


def parse_study_config(argv: list[str]) -> StudyConfig:
    """The settings that the study's command line gives. Raises UserError for those that make no sense."""
    from prefix_tuning.parser import Parser

    parser = Parser(
        (StudyArguments, StudyBaseArguments),
        MOST_USED_IN_STUDY,
        prog="python -m prefix_tuning.study",
        description="What a prefix does: its attention, what breaks without parts of it, and more, as one page of pictures.",
    )
    parser.add_argument("--prefix", help=f"{PREFIX_HELP} {PREFIX_DEFAULT}", **PREFIX_FLAG)
    values, _ = parser.parse(argv)
    return StudyConfig(**values)


def _study(argv: list[str]) -> Callable[[], object]:
    config = parse_study_config(argv)
    from prefix_tuning.study.run import study

    return partial(study, config)


def parse_claims_config(argv: list[str]) -> ClaimsConfig:
    """The settings of the claims' command line. Raises UserError for those that make no sense."""
    from prefix_tuning.parser import Parser

    description = "Try each claim of the papers in a small experiment on the bundled base, and write a page of the verdicts."
    values, _ = Parser((ClaimsConfig,), (), prog="python -m prefix_tuning.study.claims", description=description).parse(argv)
    return ClaimsConfig(**values)


def _claims(argv: list[str]) -> Callable[[], object]:
    config = parse_claims_config(argv)
    from prefix_tuning.study.claims.run import try_claims

    return partial(try_claims, config)


def train_command() -> None:
    _run(_train)


def infer_command() -> None:
    _run(_infer, stdout_is_answers=True)


def study_command() -> None:
    _run(_study)


def claims_command() -> None:
    _run(_claims)


if __name__ == "__main__":
    commands = "train.py, infer.py, python -m prefix_tuning.study or python -m prefix_tuning.study.claims"
    print(f"error: prefix_tuning.cli is no command; run {commands}", file=sys.stderr)
    sys.exit(2)
