"""Where the trainings of the claims run: in this process, or in a pool of two."""

import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, TypeVar

import datasets
import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from prefix_tuning.study.claims.settings import Scale
from prefix_tuning.study.claims.trials import Measured, measure

Imap = Callable[[Callable[[Any], Any], list[Any]], Iterator[Any]]
Key = TypeVar("Key")


class Lab:
    """What a claim needs: the scale of its experiments, a process pool, and the results so far.

    imap: like `map`, for functions of a module and values that can be pickled. results: as JSON gives them back, by function
    and item. keep: is called after each new result. title: of the progress bar.
    """

    def __init__(self, scale: Scale, imap: Imap = map):
        self.scale, self.imap, self.title = scale, imap, ""
        self.results: dict[str, Any] = {}
        self.keep: Callable[[], None] = lambda: None

    def run_trials(self, trials: Mapping[Key, Any], by: Callable[..., Measured] = measure) -> dict[Key, Measured]:
        """Measures each trial, by `measure` or another function. Returns what was found under the keys of the trials."""
        found = self.run(by, list(trials.values()))
        return {key: Measured(*figures) for key, figures in zip(trials, found, strict=True)}

    def run(self, function: Callable[..., Any], items: list[Any]) -> list[Any]:
        """function(item, scale), which JSON can hold, for each item. What `results` holds already is not run again."""
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
    """Inside, a `map` that runs in two processes of one thread each. Whatever ends the block ends the processes.

    Trainings depend on their seeds alone, so the numbers are the same as in one process with one thread.
    """
    with multiprocessing.get_context("spawn").Pool(2, init_worker) as pool:  # after an error or Ctrl-C, it terminates them
        yield pool.imap
        pool.close()
        pool.join()


def init_worker() -> None:
    """One thread and no progress bars. The parent handles Ctrl-C. If the parent is killed, this process ends too: it would
    otherwise wait for work for ever.
    """
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    disable_progress_bar()  # transformers' own
    parent = multiprocessing.parent_process()
    if parent is not None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())  # an orderly exit gives semaphores back
        threading.Thread(target=end_with, args=(parent,), daemon=True).start()


def end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)
