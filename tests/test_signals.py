import signal
import sys

import pytest

from prefix_tuning import distributed, signals


@pytest.mark.parametrize("job", [None, "torchrun"])
def test_two_signals_at_once_are_one(job, monkeypatch, capfd):
    """As torchrun sends them: its own, and the terminal's that it passes on."""
    monkeypatch.setattr(distributed, "torchrun_job", lambda: job)
    monkeypatch.setattr(sys, "unraisablehook", pytest.fail)  # what Python calls for "ignored due to race condition"
    both = {signal.SIGINT, signal.SIGTERM}
    with signals.listening("stops"):
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        for number in both:
            signal.raise_signal(number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        heard = signals.heard()
    assert heard in both and not signals.heard() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    said = capfd.readouterr().err
    assert f"{signal.Signals(heard).name}: stops" in said and said.count(": stops") == (1 if job else 2)


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.listening("stops"):
            signal.raise_signal(signal.SIGINT)
            assert not signals.heard()
    finally:
        signal.signal(signal.SIGINT, before)
