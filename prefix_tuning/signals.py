"""Signals that ask a run to stop: noted at once, acted on where the run can be saved.

SIGINT (Ctrl-C) and SIGTERM only set a number. The loop asks for it after each step, an evaluation after each pass, and
`stop_if_heard` lets all processes stop at the same place.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from prefix_tuning import distributed
from prefix_tuning.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_heard = 0


def heard() -> int:
    """The number of the signal that this process was sent while `listening`; 0 if there was none."""
    return _heard


@contextmanager
def listening(announcement: str) -> Iterator[None]:
    """Inside, a signal is noted and main prints `announcement`; the same one again ends the process at once.

    Under torchrun later ones are ignored: Slurm sends signals to torchrun and its processes alike, and torchrun passes them
    on. Signals that are ignored stay so, as in a shell's background job. Only a process's main thread can listen; elsewhere
    this is a no-op.
    """
    global _heard
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    hint = "" if distributed.torchrun_job() else " (once more: it stops at once)"

    def note(number: int, frame) -> None:
        global _heard
        if not distributed.torchrun_job():
            signal.signal(number, signal.SIG_DFL)
        elif _heard:
            return
        _heard = number
        if distributed.is_main():
            text = f"\n{signal.Signals(number).name}: {announcement}{hint}\n"
            os.write(2, text.encode())  # print could have been interrupted halfway, and cannot be entered twice

    heeded = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in heeded}
    try:
        yield
    finally:
        _heard = 0
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_if_heard() -> None:
    """Raises Interrupted in all processes if one of them has heard a signal. All call this together: it is an all-reduce."""
    if number := distributed.max_over_ranks(_heard):
        raise Interrupted(f"{signal.Signals(number).name}: stopped", number)
