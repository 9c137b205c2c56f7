"""stdout and stderr where they are only for people to look at."""

from contextlib import suppress
from typing import TextIO


class Screen:
    """A text stream on which what cannot be written is dropped, and is no error. All else is left to `stream`.

    Its reader may have ended (`| head`; with `2>&1 | tee log`, Ctrl-C ends tee too), its terminal may be closed, or a log
    file's disk full. None of that may end a run that has trained for hours.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError, ValueError):  # ValueError: the stream is closed, or cannot encode the text
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str):
        return getattr(self._stream, name)
