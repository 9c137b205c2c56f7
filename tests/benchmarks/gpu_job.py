"""What the parts of gpu.py share: the device, and how time and memory are taken there."""

import gc
import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from prefix_tuning.devices import PRECISIONS, peak_memory_mb

# For each check or measurement of a part: its title, and a function that returns its figures by name.
Checks = Iterator[tuple[str, Callable[[], dict]]]


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class Job(NamedTuple):
    """One run of gpu.py. folder: where its files go."""

    device: str
    toy: bool
    folder: Path

    @property
    def on_cuda(self) -> bool:
        return self.device.startswith("cuda")

    @property
    def processes(self):
        """multiprocessing's functions. What has used CUDA cannot be forked; without CUDA a fork saves the imports."""
        return multiprocessing.get_context("spawn" if self.on_cuda else "fork")

    @property
    def precisions(self) -> list[str]:
        return [name for name in PRECISIONS if self.on_cuda or name != "fp16"]

    def shape(self, full: str) -> str:
        """The name of a shape in speed.py: the full one, or at toy size the toy of its family."""
        if not self.toy:
            return full
        return f"toy-{full.split('-')[0]}" if "-" in full else "toy"

    def finish(self) -> float:
        """Waits until the device has finished its work, and returns the time."""
        if self.on_cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def reset_peak(self) -> None:
        """Frees memory that nobody holds any more, and counts CUDA's peak memory from here."""
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return peak_memory_mb(torch.device(self.device))
