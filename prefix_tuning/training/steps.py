"""Which rows make up each optimizer step, in which order, and this rank's share of them as packed batches.

plain.py runs each row by itself, in the same order.
"""

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from datasets import Dataset

from prefix_tuning import distributed, signals
from prefix_tuning.data.rows import take
from prefix_tuning.model.batch import EMPTY_BATCH, Batch, count_labels, pack


class Step(NamedTuple):
    """One optimizer step: this rank's batches, and what all ranks have agreed on."""

    number: int  # from 1
    batches: list[Batch]
    labels: int  # of all ranks; the loss of the step is the mean over them
    tokens: int  # of all ranks
    next_epoch: int  # where the step after this one begins: its epoch,
    next_row: int  # and the place of its first row in the order of that epoch


@dataclass
class Steps:
    """The steps of a run after step `done`. The next one starts at position `row` in the order of `epoch`.

    train_set: the tokenised rows. seed: decides the order of the rows, a new one for each epoch; None: as they are.
    max_tokens: of one forward pass. equal_passes: all ranks run equally many passes, as a sharded base wants it.
    """

    train_set: Dataset
    rows_per_step: int  # of all ranks
    total: int
    max_tokens: int
    seed: int | None = None
    equal_passes: bool = False
    done: int = 0
    epoch: int = 0
    row: int = 0

    @property
    def per_epoch(self) -> int:
        return math.ceil(len(self.train_set) / self.rows_per_step)

    def __iter__(self) -> Iterator[Step]:
        """All ranks iterate together: before each step they exchange four numbers. Ends early, in all of them before the
        same step, once one was sent a signal.
        """
        for number, (indices, next_epoch, next_row) in enumerate(self._order(), start=self.done + 1):
            examples = take(self.train_set, distributed.share(indices))
            batches = list(pack(examples, self.max_tokens))
            own_tokens = sum(len(example.input_ids) for example in examples)
            own = (count_labels(examples), own_tokens, len(batches), signals.heard())
            labels, tokens, passes, heard = zip(*distributed.gather_numbers(own), strict=True)
            if any(heard):
                return
            if self.equal_passes:
                batches += [EMPTY_BATCH] * (max(passes) - len(batches))
            yield Step(number, batches, sum(labels), sum(tokens), next_epoch, next_row)

    def _order(self) -> Iterator[tuple[list[int], int, int]]:
        """The row numbers of each step that is left, and where the next step begins. An epoch's last step may have fewer."""
        rows, left, row = len(self.train_set), self.total - self.done, self.row
        for epoch in itertools.count(self.epoch):
            order = torch.arange(rows)  # a tensor: as a list, ten million numbers take 400 MB
            if self.seed is not None:
                order = torch.randperm(rows, generator=torch.Generator().manual_seed(self.seed + epoch))
            for start in range(row, rows, self.rows_per_step):
                if left <= 0:
                    return
                left -= 1
                end = start + self.rows_per_step
                yield order[start:end].tolist(), *((epoch, end) if end < rows else (epoch + 1, 0))
            row = 0
