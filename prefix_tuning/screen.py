"""stdout and stderr, if only people look at them."""

from contextlib import suppress
from typing import TextIO


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
