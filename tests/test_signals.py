import signal
import sys
import threading

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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_an_ignored_signal_stays_ignored(number):
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with signals.listening("stops"):
            signal.raise_signal(number)
            assert not signals.heard()
    finally:
        signal.signal(number, before)


def test_a_closed_terminal_sends_sighup_twice_and_the_second_one_does_not_kill(capfd):
    with signals.listening("stops"):
        signal.raise_signal(signal.SIGHUP)
        assert callable(signal.getsignal(signal.SIGHUP)) and signals.heard() == signal.SIGHUP
        signal.raise_signal(signal.SIGHUP)
    assert capfd.readouterr().err == "\nSIGHUP: stops\n"
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_DFL


def test_a_continued_process_calls_the_action_in_its_main_thread_only():
    calls = []
    before = signal.getsignal(signal.SIGCONT)
    with signals.when_continued(lambda: calls.append("main")):
        signal.raise_signal(signal.SIGCONT)
    assert calls == ["main"] and signal.getsignal(signal.SIGCONT) is before

    def elsewhere():
        with signals.when_continued(lambda: calls.append("no")):
            calls.append("thread")

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert calls == ["main", "thread"]
