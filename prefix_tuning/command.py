"""Shared by all command lines of this package: errors in one line, exit codes, signals, usable streams.

--help and mistakes in flags are quick, because torch and transformers load late. A command imports parser.py, and with it
transformers, when it starts; it imports torch when its flags have been checked.
"""

import codecs
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prefix_tuning.errors import Interrupted, UserError
from prefix_tuning.screen import Answers, Screen


def is_main() -> bool:
    """Whether this is rank 0, which prints for all ranks. It reads torchrun's variable, because torch is not loaded yet."""
    return os.environ.get("RANK", "0") == "0"


def run_command(prepare: Callable[[list[str]], Callable[[], object]], stdout_is_answers: bool = False) -> None:
    """Runs a command and sets the exit code.

    2: a UserError, as one line on stderr. 128 + N: signal N. 1: a bug, with its traceback.

    prepare: checks the arguments of the command line, imports the command, and returns it ready to be called.
    stdout_is_answers: the command ends if stdout cannot be written (screen.py).
    """
    _open_streams(stdout_is_answers)
    try:
        try:
            with _default_sigint():
                command = prepare(sys.argv[1:])
                from transformers.utils.logging import disable_progress_bar

                from prefix_tuning.cores import giving_way

                # transformers shows one for each file of weights.
                disable_progress_bar()
            with giving_way():
                command()
        finally:
            # Here, and not at exit, so that the handlers below see its errors.
            sys.stdout.flush()
    except UserError as error:
        if "--debug" in sys.argv:
            raise
        _say(f"error: {' '.join(str(error).split())}")
        sys.exit(2)
    except Interrupted as stop:
        if is_main():
            print(stop, file=sys.stderr)
        sys.exit(128 + stop.signal)
    except KeyboardInterrupt:
        sys.exit(130)
    # The reader of stdout has ended, for example `head`. The number is SIGPIPE's, which Windows does not have.
    except BrokenPipeError:
        sys.exit(128 + 13)


def _say(line: str) -> None:
    """Prints a line to stderr. If several processes have the same line, one of them prints it."""
    if "RANK" in os.environ:
        from prefix_tuning import distributed

        if not distributed.first_to_say(line):
            return
    print(line if is_main() else f"process {os.environ['RANK']}: {line}", file=sys.stderr)


@contextmanager
def _default_sigint() -> Iterator[None]:
    """A context in which Ctrl-C ends the process as the system does it. Python would print a traceback of its imports."""
    handler = signal.getsignal(signal.SIGINT)
    # Otherwise it is ignored, as in a shell's background job, and stays so.
    if handler is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _open_streams(stdout_is_answers: bool) -> None:
    """Makes stdin, stdout and stderr usable.

    A closed stream becomes /dev/null. ASCII, which Python chooses without a locale, becomes UTF-8. Bytes that cannot be
    decoded, and characters that cannot be encoded, become a ?.
    """
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        # The caller has closed it.
        if stream is None:
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115 (stays open)
        stream.reconfigure(encoding="utf-8" if codecs.lookup(stream.encoding).name == "ascii" else None, errors="replace")
        if name != "stdin":
            stream = Answers(stream) if name == "stdout" and stdout_is_answers else Screen(stream)
        setattr(sys, name, stream)
