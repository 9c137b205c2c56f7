"""stdout and stderr of a command: a screen that people look at, or answers that must arrive."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from prefix_tuning.errors import UserError


class Screen:
    """A text stream that drops output which cannot be written, without an error. In all else it is `stream`.

    Without it, a run that has trained for hours would end with its log: because the disk is full, the terminal is closed, or
    the reader has ended (`| head`; with `2>&1 | tee log`, Ctrl-C ends tee too).
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        # ValueError: the stream is closed, or cannot encode the text.
        with suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)


class Answers(Screen):
    """stdout that raises UserError if it cannot be written. BrokenPipeError, where the reader has ended, stays.

    Without it, a full disk would end `python infer.py ... > answers.txt` in a traceback.
    """

    def write(self, text: str) -> int:
        with self._checked():
            return self._stream.write(text)

    def flush(self) -> None:
        with self._checked():
            self._stream.flush()

    @contextmanager
    def _checked(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            # Python flushes the rest at exit, and would fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            if isinstance(error, BrokenPipeError):
                raise
            raise UserError(f"stdout cannot be written: {error.strerror}") from error
