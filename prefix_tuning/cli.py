"""The two commands: flags in, `train` or an answer out.

Importing this module is quick, so that Ctrl-C finds `_run` soon: transformers is imported by parser.py when a command runs,
and torch once its flags are known to be good.
"""

import argparse
import codecs
import dataclasses
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from prefix_tuning import bundled
from prefix_tuning.errors import Interrupted, UserError
from prefix_tuning.inference.settings import AskArguments, BaseArguments, DecodingArguments, InferConfig
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
# What --prefix_from settles.
PREFIX_SHAPE = {field.name for field in dataclasses.fields(PrefixArguments)} - {"prefix_from"}


def _is_main() -> bool:
    """Whether this process is alone, or the first of those that torchrun has started: the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def _run(prepare: Callable[[list[str]], Callable[[], object]]) -> None:
    """Runs a command; a user's mistake becomes one line on stderr and exit code 2, a bug keeps its traceback.

    prepare: reads the flags, imports what they ask for, and returns what is to be done.
    """
    _open_streams()
    try:
        try:
            with _default_sigint():
                command = prepare(sys.argv[1:])
                from transformers.utils.logging import disable_progress_bar

                disable_progress_bar()  # transformers' own, one per file of weights; ours stay
            command()
        finally:
            sys.stdout.flush()  # here, where an error has a handler
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
    except BrokenPipeError:  # whoever read the output has seen enough
        sys.exit(128 + 13)


def _say(line: str) -> None:
    """Prints to stderr, unless another process of this run has printed the same."""
    if "RANK" in os.environ:
        from prefix_tuning import distributed

        if not distributed.first_to_say(line):
            return
    print(line if _is_main() else f"process {os.environ['RANK']}: {line}", file=sys.stderr)


@contextmanager
def _default_sigint() -> Iterator[None]:
    """Lets Ctrl-C end the process by the system's default action: in an import, Python's handler would leave a traceback."""
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # else it is ignored, as in a shell's background job
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


class _Stdout(io.TextIOWrapper):
    """stdout: raises UserError where it cannot be written, on a full disk say, and BrokenPipeError where no one reads it."""

    def write(self, text: str) -> int:
        with self._checked():
            return super().write(text)

    def flush(self) -> None:
        with self._checked():
            super().flush()

    @contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # for what is still to be flushed
            if isinstance(error, BrokenPipeError):
                raise
            raise UserError(f"stdout cannot be written: {error.strerror}") from error


def _open_streams() -> None:
    """Makes stdin, stdout and stderr usable: closed ones are /dev/null; ASCII, which Python takes where it knows no locale,
    becomes UTF-8; what is no character, or cannot be shown, becomes a ?."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115 (stays open)
            setattr(sys, name, stream)
        stream.reconfigure(encoding="utf-8" if codecs.lookup(stream.encoding).name == "ascii" else None, errors="replace")
    options = {name: getattr(sys.stdout, name) for name in ("encoding", "errors", "line_buffering", "write_through")}
    sys.stdout = _Stdout(sys.stdout.detach(), **options)


def parse_train_config(argv: list[str]) -> TrainConfig:
    """Turns train.py's command line into its settings. Raises UserError for what makes no sense.

    Where model and dataset are bundled ones, the demo's own settings replace the defaults, and are printed.
    """
    from prefix_tuning.parser import Parser

    groups = (ModelArguments, DataArguments, PrefixArguments, LoopArguments, OutputArguments)
    parser = Parser(groups, prog="train.py", description=TRAIN_HELP, allow_abbrev=False)
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
    """Turns infer.py's command line into its settings. Raises UserError for what makes no sense."""
    from prefix_tuning.parser import Parser

    groups = (AskArguments, BaseArguments, DecodingArguments)
    parser = Parser(groups, prog="infer.py", description="Ask a frozen Bloom with a prefix.", allow_abbrev=False)
    parser.add_argument(
        "question",
        nargs="?",
        default=argparse.SUPPRESS,
        help="The question, e.g. 法国的首都是哪里？ One that begins with - goes behind --.",
    )
    parser.add_argument(
        "--prefix",
        action="append",
        default=argparse.SUPPRESS,
        metavar="[NAME=]DIR",
        help="A prefix: an output folder of train.py, a PEFT adapter's folder, or either's name on the hub. May be given "
        "several times; the first answers where none is named (default: ./chatbot).",
    )
    values, _ = parser.parse(argv)
    return InferConfig(**values)


def _infer(argv: list[str]) -> Callable[[], object]:
    config = parse_infer_config(argv)
    from prefix_tuning.inference.run import infer

    return partial(infer, config)


def train_command() -> None:
    _run(_train)


def infer_command() -> None:
    _run(_infer)
