"""A command beside a busy process. test_cores.py starts it without the OMP_WAIT_POLICY of conftest.py."""

import os
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import torch

from prefix_tuning.command import run_command


def wait_until(done):
    started = time.perf_counter()
    while not done():
        assert time.perf_counter() < started + 20


def seconds_of_spinning():
    """Processor time of this process in ten short pauses, each after a kernel of two threads."""
    values, over, spent = torch.zeros(2**17), threading.Event(), 0.0
    for _ in range(10):
        values.add_(1)
        started = time.process_time()
        over.wait(0.01)
        spent += time.process_time() - started
    return spent


@contextmanager
def busy_core():
    """Binds this thread, and no other of this process, to one core, on which another process is busy."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(before)})
    other = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        other.kill()
        other.wait()
        os.sched_setaffinity(0, before)


def threads():
    return len(os.listdir("/proc/self/task"))


def give_way():
    """The command."""
    with busy_core():
        wait_until(lambda: threads() > before + 1)
    assert seconds_of_spinning() < spinning / 3


torch.set_num_threads(2)
spinning, before = seconds_of_spinning(), threads()
run_command(lambda argv: give_way)
wait_until(lambda: threads() == before)
assert seconds_of_spinning() > spinning / 3
