"""Signals that ask a run to stop. They are recorded at once, and the run stops where it can be saved.

The handler of SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal is closed) only stores the signal's number. Training reads
it at each step, evaluation at each forward pass, `generate` at each token. All ranks stop at the same step or pass.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from prefix_tuning import distributed
from prefix_tuning.errors import Interrupted

_SIGNALS = {signal.SIGINT, signal.SIGTERM}
_HANGUPS: set[int] = set() if sys.platform == "win32" else {signal.SIGHUP}
_heard = 0


def heard() -> int:
    """The number of the signal that this process has got while `listening`; 0 if there was none."""
    return _heard


@contextmanager
def listening(announcement: str) -> Iterator[None]:
    """A context in which a signal is recorded and main prints `announcement`. The same signal again ends the process.

    But where one event sends a signal twice, later signals are ignored: Slurm sends one to torchrun and to its processes,
    and torchrun forwards its own; when a terminal is closed, its shell sends SIGHUP, and so does the system when the shell
    ends. A signal that was ignored before, by nohup or in a shell's background job, stays ignored. Only the main thread can
    have handlers; in another thread this is a no-op.
    """
    global _heard
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def record(number: int, frame) -> None:
        global _heard
        comes_twice = distributed.torchrun_job() or number in _HANGUPS
        if not comes_twice:
            signal.signal(number, signal.SIG_DFL)
        elif _heard:
            return
        _heard = number
        if distributed.is_main():
            hint = "" if comes_twice else " (once more: it stops at once)"
            text = f"\n{signal.Signals(number).name}: {announcement}{hint}\n"
            # os.write, because the signal may have interrupted a print, which is not reentrant. OSError, because the signal
            # may have ended the reader of stderr too.
            with suppress(OSError):
                os.write(2, text.encode())

    heeded = [number for number in _SIGNALS | _HANGUPS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, record) for number in heeded}
    try:
        yield
    finally:
        _heard = 0
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def when_continued(action: Callable[[], None]) -> Iterator[None]:
    """A context in which `action` is called when the process goes on after Ctrl-Z or SIGSTOP.

    A no-op on Windows, which has neither, and outside the main thread, which alone can have handlers.
    """
    if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCONT, lambda number, frame: action())
    try:
        yield
    finally:
        signal.signal(signal.SIGCONT, before)


def stop_if_heard() -> None:
    """Raises Interrupted in all ranks if one of them has got a signal. All ranks call this together: it is an all-reduce."""
    if number := distributed.max_over_ranks(_heard):
        raise Interrupted(f"{signal.Signals(number).name}: stopped", number)
