"""Where the claims' trainings run: here, or in two processes at once."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any

import datasets
import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from prefix_tuning.study.claims.settings import Scale
from prefix_tuning.study.claims.trials import Measured, Trial, measure

Imap = Callable[[Callable[[Any], Any], list[Any]], Iterator[Any]]


class Lab:
    """What a claim needs: the scale of its experiments, and hands. A trial of several claims is measured once.

    imap: like `map`, for functions of a module and values that can be pickled. title: of the progress bar.
    """

    def __init__(self, scale: Scale, imap: Imap = map):
        self.scale, self.imap, self.title = scale, imap, ""
        self._measured: dict[Trial, Measured] = {}

    def measure(self, *trials: Trial) -> list[Measured]:
        left = [trial for trial in dict.fromkeys(trials) if trial not in self._measured]
        self._measured |= zip(left, self.map(partial(measure, scale=self.scale), left), strict=True)
        return [self._measured[trial] for trial in trials]

    def map(self, function: Callable[[Any], Any], items: list[Any]) -> list[Any]:
        """function(item) for each item, with a progress bar on stderr."""
        return list(tqdm(self.imap(function, items), total=len(items), desc=self.title, unit="trial", leave=False))


@contextmanager
def two_processes() -> Iterator[Imap]:
    """Inside, a `map` that runs in two processes of one thread each. Whatever ends the block ends them.

    Trainings depend on their seeds alone, so the numbers are those of one process with one thread.
    """
    with multiprocessing.get_context("spawn").Pool(2, settle) as pool:  # its end terminates them, Ctrl-C included
        yield pool.imap


def settle() -> None:
    """One thread, no progress bars, and an end together with the parent: Ctrl-C is its business, and if it is killed, this
    process would wait for work for ever.
    """
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    disable_progress_bar()  # transformers' own
    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())  # an orderly end: it gives its semaphores back
        threading.Thread(target=end_after, args=(parent,), daemon=True).start()


def end_after(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
