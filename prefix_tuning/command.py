"""What every command line of this package shares: errors in one line, exit codes, signals, usable streams.

--help and mistakes in flags are answered quickly, because torch and transformers load late: a command imports parser.py, and
with it transformers, when it starts, and torch when its flags have been checked.
"""

import codecs
import io
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from prefix_tuning.errors import Interrupted, UserError
from prefix_tuning.screen import Screen


def is_main() -> bool:
    """Whether this process has rank 0, or is the only one: it prints for all. From torchrun's variable, without torch."""
    return os.environ.get("RANK", "0") == "0"


def run_command(prepare: Callable[[list[str]], Callable[[], object]], stdout_is_answers: bool = False) -> None:
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
        if is_main():
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
    print(line if is_main() else f"process {os.environ['RANK']}: {line}", file=sys.stderr)


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


class _Stdout(io.TextIOWrapper):
    """stdout whose errors are UserErrors, for a full disk say; BrokenPipeError, for a closed pipe, stays what it is."""

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
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())  # Python flushes the rest at exit; it would fail again
            if isinstance(error, BrokenPipeError):
                raise
            raise UserError(f"stdout cannot be written: {error.strerror}") from error


def _open_streams(stdout_is_answers: bool) -> None:
    """Makes stdin, stdout and stderr usable. Closed ones become /dev/null; ASCII, Python's choice without a locale, becomes
    UTF-8; bytes that cannot be decoded and characters that cannot be encoded become a ?. stderr becomes a Screen, and stdout
    too unless it carries answers."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller
            stream = open(os.devnull, "r" if name == "stdin" else "w")  # noqa: SIM115 (stays open)
        stream.reconfigure(encoding="utf-8" if codecs.lookup(stream.encoding).name == "ascii" else None, errors="replace")
        if name == "stdout" and stdout_is_answers:
            options = {
                option: getattr(stream, option) for option in ("encoding", "errors", "line_buffering", "write_through")
            }
            stream = _Stdout(stream.detach(), **options)
        elif name != "stdin":
            stream = Screen(stream)
        setattr(sys, name, stream)
