"""Where the claims' trainings run: here, or in two processes at once."""

import json
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
    """What a claim needs: the scale of its experiments, hands, and what was found so far.

    imap: like `map`, for functions of a module and values that can be pickled. results: as JSON gives them back, by what was
    run. keep: is called after each new one. title: of the progress bar.
    """

    def __init__(self, scale: Scale, imap: Imap = map):
        self.scale, self.imap, self.title = scale, imap, ""
        self.results: dict[str, Any] = {}
        self.keep: Callable[[], None] = lambda: None

    def measure(self, *trials: Trial) -> list[Measured]:
        return [Measured(*found) for found in self.run(measure, list(trials))]

    def run(self, function: Callable[..., Any], items: list[Any]) -> list[Any]:
        """function(item, scale) for each item, which JSON can hold; of those that `results` has, nothing is run again."""
        keys = [f"{function.__name__} {item!r}" for item in items]
        left = {key: item for key, item in zip(keys, items, strict=True) if key not in self.results}
        found = self.imap(partial(function, scale=self.scale), list(left.values()))
        bar = tqdm(found, total=len(left), desc=self.title, unit="trial", leave=False, disable=not left)
        for key, result in zip(left, bar, strict=True):
            self.results[key] = json.loads(json.dumps(result))
            self.keep()
        return [self.results[key] for key in keys]


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
