"""How well the base answers with a prefix: loss and exact match in one forward pass."""

import math
from typing import NamedTuple

import torch
from datasets import Dataset

from prefix_tuning.data.rows import take
from prefix_tuning.model.batch import Batch, pack
from prefix_tuning.model.bloom import PackedModel, head_logits


class Score(NamedTuple):
    """loss: mean cross-entropy per label in nats. exact_match: share of rows all of whose labels are the likeliest token."""

    loss: float
    exact_match: float


def interval(share: float, rows: int) -> tuple[float, float]:
    """The 95 % interval, by Wilson, for the share among all rows like these."""
    z = 1.96
    middle, half = share + z**2 / (2 * rows), z * math.sqrt(share * (1 - share) / rows + (z / (2 * rows)) ** 2)
    return (middle - half) / (1 + z**2 / rows), (middle + half) / (1 + z**2 / rows)


def spaced(rows: Dataset, count: int) -> Dataset:
    """Up to `count` of the rows, evenly spaced."""
    return rows.select(spaced_indices(len(rows), count))


def spaced_indices(length: int, count: int) -> list[int]:
    """Up to `count` indices below `length`, evenly spaced."""
    count = min(count, length)
    return [number * length // count for number in range(count)]


def pack_rows(tokenized: Dataset, max_tokens: int) -> list[Batch]:
    """The rows that `data.rows.tokenize` returns as packed batches."""
    return list(pack(take(tokenized, list(range(len(tokenized)))), max_tokens))


def label_logits(base: PackedModel, batch: Batch, prefix: torch.Tensor | None) -> torch.Tensor:
    """The logits at the labels of a batch: (N, V), at least float32. prefix: (L, 2, H, P, D), or None for the base alone."""
    return head_logits(*base.head_inputs(base.packed_hidden(batch, prefix)))


@torch.no_grad()
def score_prefix(base: PackedModel, batches: list[Batch], prefix: torch.Tensor | None) -> Score:
    """Loss and exact match over all batches. prefix: (L, 2, H, P, D), or None for the base alone."""
    tally = Tally()
    for batch in batches:
        batch = batch.to(base.device)
        tally.add(base, batch, base.packed_hidden(batch, prefix))
    return tally.total()


class Tally:
    """The sums of a Score, batch by batch.

    Greedy generation repeats the answer of a row if and only if each of its labels, EOS included, is the likeliest token
    after the labels before it. So exact match needs no generation. If a row was cut, this holds for what is left of its
    answer; in a talk, for all its answers, each after the true ones before it.
    """

    def __init__(self) -> None:
        self.loss, self.labels, self.right, self.rows = 0.0, 0, 0, 0

    def add(self, base: PackedModel, batch: Batch, hidden: torch.Tensor) -> None:
        """hidden: (N, E), the input of the head at the labels of the batch."""
        losses, likeliest = base.head_scores(hidden, batch.labels)
        wrong = torch.zeros(batch.rows, dtype=torch.bool, device=base.device)
        wrong[label_rows(batch)[likeliest != batch.labels]] = True
        self.loss += losses.sum().item()
        self.labels += len(batch.labels)
        self.right += int((~wrong).sum())
        self.rows += batch.rows

    def total(self) -> Score:
        return Score(self.loss / self.labels, self.right / self.rows)


def label_rows(batch: Batch) -> torch.Tensor:
    """The row that each label of a batch belongs to: (N,), int64."""
    ends = torch.tensor(batch.lengths, device=batch.labels.device).cumsum(0)
    return torch.searchsorted(ends, batch.label_positions, right=True)
