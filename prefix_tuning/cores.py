"""Cores that are shared with other programs.

A kernel of torch ends when its slowest thread does. Until then the other threads spin: on an idle machine they go on sooner
than threads that sleep and have to be woken. On a busy machine they take the cores from the very thread that they wait for,
so one other program makes a training three to six times slower, not twice. `giving_way` makes them spin only where nobody
waits.

libgomp reads the environment's OMP_WAIT_POLICY and GOMP_SPINCOUNT once, when torch is imported. But by its manual, threads
spin 300,000 times as a rule and 100 times while there are more OpenMP threads than cores. So a few more threads, which only
sleep, switch the spinning off, and on again when they end. The results are the same bits.
"""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

LOOK = 0.5  # seconds for which threads spin while it is measured whether other programs need the cores
REST = 5.0  # seconds without spinning where they do
# A machine counts as busy if this program's threads wait longer than that for a core, in seconds per second, all together.
# Two threads beside three busy programs, on 2 cores, waited 1.2.
BUSY = 0.1
# With many more cores than threads, another program finds a free one, and switching the spinning off takes many threads.
MOST_SLEEPERS = 4


@contextmanager
def giving_way() -> Iterator[None]:
    """A context in which torch's threads do not spin while other programs need the cores.

    A no-op where the user has set OMP_WAIT_POLICY or GOMP_SPINCOUNT, and on other systems than Linux, whose torch has
    another library for its threads.
    """
    if sys.platform != "linux" or {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & os.environ.keys():
        yield
        return
    over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(over, torch.get_num_threads()), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _watch(over: threading.Event, threads: int) -> None:
    """Switches the spinning off and on until `over`. threads: of one kernel."""
    if threads == 1:
        return
    # With the thread that starts the kernels, 1 + (threads - 1) * (sleepers + 1) threads are more than the cores.
    sleepers = (len(os.sched_getaffinity(0)) - 1) // (threads - 1)
    if sleepers > MOST_SLEEPERS:
        return
    before = seconds_in_queue()
    while not over.wait(LOOK):
        now = seconds_in_queue()
        if now - before > BUSY * LOOK:
            crowd = [threading.Thread(target=_sleep, args=(over, threads), daemon=True) for _ in range(sleepers)]
            for thread in crowd:
                thread.start()
            for thread in crowd:
                thread.join()
            now = seconds_in_queue()
        before = now


def _sleep(over: threading.Event, threads: int) -> None:
    # A kernel that is large enough for all threads. Each thread that starts kernels gets a team of its own from libgomp,
    # which ends with it.
    torch.zeros(threads * 2**15)
    over.wait(REST)


def seconds_in_queue() -> float:
    """How long the threads of this process that still run have been ready, while other threads had the cores."""
    nanoseconds = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # the thread has just ended
            nanoseconds += int(file.read_text().split()[1])
    return nanoseconds / 1e9
