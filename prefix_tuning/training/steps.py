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

    # From 1.
    number: int
    batches: list[Batch]
    # Of all ranks. The loss of the step is the mean over all labels.
    labels: int
    tokens: int
    # Where the next step begins: its epoch, and the index of its first row in the order of that epoch.
    next_epoch: int
    next_row: int


@dataclass
class Steps:
    """The steps of a run after step `done`. The next one starts at index `row` in the order of `epoch`.

    train_set: the tokenised rows. seed: decides the order of the rows, a new one for each epoch; None: the order of the
    dataset. rows_per_step: of all ranks. max_tokens: of one forward pass. equal_passes: all ranks run equally many passes,
    because a sharded base is gathered by all of them in each pass.
    """

    train_set: Dataset
    rows_per_step: int
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
        """All ranks iterate together, and exchange four numbers before each step. If one of them was sent a signal, the
        iteration ends early, before the same step in all of them.
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
            # A tensor: as a list, ten million numbers take 400 MB.
            order = torch.arange(rows)
            if self.seed is not None:
                order = torch.randperm(rows, generator=torch.Generator().manual_seed(self.seed + epoch))
            for start in range(row, rows, self.rows_per_step):
                if left <= 0:
                    return
                left -= 1
                end = start + self.rows_per_step
                yield order[start:end].tolist(), *((epoch, end) if end < rows else (epoch + 1, 0))
            row = 0
