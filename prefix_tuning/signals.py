"""Signals that ask a run to stop: recorded at once, acted on where the run can be saved.

The handler of SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal is closed) only stores the signal's number. Steps and
evaluations read it at each step and each forward pass, `generate` at each token, and all processes agree to stop at the
same one.
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
    """The number of the signal that this process got while `listening`; 0 if there was none."""
    return _heard


@contextmanager
def listening(announcement: str) -> Iterator[None]:
    """Inside, a signal is recorded and main prints `announcement`; the same one again ends the process at once.

    Not so where one event sends it twice: then later signals are ignored. Slurm sends one to torchrun and to its processes,
    and torchrun forwards its own. When a terminal is closed, its shell sends SIGHUP, and the system another as that ends.
    A signal that was ignored before, as in a shell's background job or by nohup, stays ignored. Only the main thread can
    have handlers; in another this is a no-op.
    """
    global _heard
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame) -> None:
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
            with suppress(OSError):  # the signal may have ended stderr's reader too
                os.write(2, text.encode())  # print is not reentrant, and this may have interrupted one

    heeded = [number for number in _SIGNALS | _HANGUPS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield
    finally:
        _heard = 0
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def when_continued(action: Callable[[], None]) -> Iterator[None]:
    """Inside, `action` is called when the process goes on after it was stopped by Ctrl-Z or SIGSTOP. Windows has neither.

    Only the main thread can have handlers; in another this is a no-op.
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
    """Raises Interrupted in all processes if one of them got a signal. All call this together: it is an all-reduce."""
    if number := distributed.max_over_ranks(_heard):
        raise Interrupted(f"{signal.Signals(number).name}: stopped", number)
