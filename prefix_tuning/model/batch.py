"""Rows as token ids, and batches of them without padding.

Legend: R rows of a batch, T tokens of all its rows together, S tokens of its longest row, N labels.

A batch is *packed*: its rows lie end to end in one axis of T tokens. Linear layers and layer norms treat every token alike,
so they need no more; only attention has to know where a row begins (attention.py). transformers pads to R x S instead.

Only the answer is to be learned, not the prompt. So prompt positions get the label -100, which torch's cross_entropy and
transformers ignore.
"""

import bisect
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

IGNORED = -100  # the label of a position that is no part of the loss


@dataclass
class Example:
    """One row as token ids. labels[i] is input_ids[i] in the answer, and IGNORED in the prompt."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class Batch:
    """Rows end to end, without padding. All tensors are int64.

    input_ids:        (T,)
    label_positions:  (N,) the packed positions whose output predicts a label: each is one before the labelled token
    labels:           (N,) the token ids to predict there
    lengths:          R numbers, the tokens of each row
    first_labels:     R numbers, the first index in each row whose output predicts a label; the row's length if none does
    grid:             how T tokens fill R x S points; None if no row is shorter than S
    """

    input_ids: torch.Tensor
    label_positions: torch.Tensor
    labels: torch.Tensor
    lengths: list[int]
    first_labels: list[int]
    grid: "Grid | None"

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    def to(self, device: torch.device) -> "Batch":
        """This batch on `device`. A copy to CUDA starts from pinned memory, so it waits for no kernel."""

        def move(value):
            if isinstance(value, Grid):
                return Grid(*map(move, value))
            if not isinstance(value, torch.Tensor):
                return value
            return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)

        return Batch(**{name: move(value) for name, value in vars(self).items()})

    def filled(self, multiple: int) -> "Batch":
        """This batch, on the CPU, with filler that rounds T and N up to a multiple. None of it reaches the result:

        - Filler tokens are one more row, which has no label. Attention keeps rows apart, so no other row sees it. It attends
          to the prefix, but no label position reads its output, so the prefix gets no gradient from it.
        - Filler labels predict token 0 at packed position 0, which is a real token. Their losses come after the N real
          ones, and `label_losses` cuts them off; so their gradient is zero.
        """
        tokens, labels = -len(self.input_ids) % multiple, -len(self.labels) % multiple
        row = [tokens] if tokens else []
        lengths = self.lengths + row
        return Batch(
            input_ids=F.pad(self.input_ids, (0, tokens)),
            label_positions=F.pad(self.label_positions, (0, labels)),
            labels=F.pad(self.labels, (0, labels)),
            lengths=lengths,
            first_labels=self.first_labels + row,  # the length of the new row: it has no label
            grid=_grid(lengths),
        )

    def to_grid(self, packed: torch.Tensor) -> torch.Tensor:
        """(T, ...) -> (R, S, ...). After the end of a shorter row its last token is repeated, and has no gradient there."""
        if self.grid is not None:
            packed = Gather.apply(packed, self.grid.tokens, self.grid.slots, None)
        return packed.unflatten(0, (self.rows, self.max_length))

    def from_grid(self, grid: torch.Tensor) -> torch.Tensor:
        """(R, S, ...) -> (T, ...), the inverse of `to_grid`."""
        flat = grid.flatten(0, 1)
        return flat if self.grid is None else Gather.apply(flat, self.grid.slots, self.grid.tokens, self.grid.padding)


class Grid(NamedTuple):
    """Where each token is in the flattened (R, S) grid, and back.

    slots:    (T,) int64, the point of each token
    tokens:   (R * S,) int64, the token of each point; after the end of a row, its last token
    padding:  (R * S,) bool, whether a point lies after the end of its row
    """

    slots: torch.Tensor
    tokens: torch.Tensor
    padding: torch.Tensor


class Gather(torch.autograd.Function):
    """values[index], whose gradient is gathered, too: gradient[inverse], and zero where `padding` is true.

    torch's own gradient adds up what an index reads more than once. On CUDA, a sum of the same bits in every run needs a
    sorted index, and sorting took a fifth of a training step's launches.
    """

    @staticmethod
    def forward(ctx, values, index, inverse, padding):
        ctx.save_for_backward(inverse, padding)
        return values.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        inverse, padding = ctx.saved_tensors
        gradient = gradient.index_select(0, inverse)
        if padding is not None:
            gradient.masked_fill_(padding.view(-1, *[1] * (gradient.dim() - 1)), 0)
        return gradient, None, None, None


def pack(examples: list[Example], max_tokens: int) -> Iterator[Batch]:
    """Packs the examples into batches of up to `max_tokens` tokens, rows of similar length together, the longest first.

    A longer row is a batch of its own. There are as few batches as this order allows, and the largest of them has as few
    tokens as their number allows, so it takes no more memory than it must.
    """
    rows = sorted(examples, key=lambda example: len(example.input_ids), reverse=True)
    fewest = len(_runs(rows, max_tokens))
    limit = bisect.bisect_left(range(max_tokens), -fewest, key=lambda limit: -len(_runs(rows, limit)))
    yield from map(_batch, _runs(rows, limit))


def _runs(rows: list[Example], max_tokens: int) -> list[list[Example]]:
    """Cuts rows into runs of up to `max_tokens` tokens, or of one longer row."""
    runs: list[list[Example]] = []
    tokens = 0
    for row in rows:
        tokens += len(row.input_ids)
        if not runs or tokens > max_tokens:
            runs.append([])
            tokens = len(row.input_ids)
        runs[-1].append(row)
    return runs


def _batch(rows: list[Example]) -> Batch:
    lengths = [len(row.input_ids) for row in rows]
    # The output at position i predicts token i + 1, so labels are shifted by one, within their row.
    shifted = [[*row.labels[1:], IGNORED] for row in rows]
    flat = torch.tensor(list(itertools.chain(*shifted)))
    label_positions = (flat != IGNORED).nonzero().flatten()
    return Batch(
        input_ids=torch.tensor(list(itertools.chain(*(row.input_ids for row in rows)))),
        label_positions=label_positions,
        labels=flat[label_positions],
        lengths=lengths,
        first_labels=[next((i for i, label in enumerate(row) if label != IGNORED), len(row)) for row in shifted],
        grid=_grid(lengths),
    )


def _grid(lengths: list[int]) -> Grid | None:
    counts, longest = torch.tensor(lengths), max(lengths)
    padding = torch.arange(longest) >= counts[:, None]
    if not padding.any():
        return None
    tokens = torch.minimum(torch.arange(longest), counts[:, None] - 1) + (counts.cumsum(0) - counts)[:, None]
    return Grid((~padding).flatten().nonzero().flatten(), tokens.flatten(), padding.flatten())


# All ranks that share a base must run equally many passes: a rank with fewer batches adds this one. It has no labels, so its
# loss is empty and its gradient zero.
EMPTY_BATCH = _batch([Example([0], [IGNORED])])


def count_labels(examples: list[Example]) -> int:
    """Number of labels that are predicted. A row's first token is not: no token comes before it."""
    return sum(label != IGNORED for example in examples for label in example.labels[1:])
