"""From token ids to packed batches."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

IGNORED = -100  # the label of a position that does not count, as in torch's cross_entropy


@dataclass
class Example:
    """One row as token ids. labels[i] is input_ids[i] where it is part of the answer, IGNORED where of the prompt."""

    input_ids: list[int]
    labels: list[int]


@dataclass
class Batch:
    """Rows end to end, without padding. All tensors are int64.

    input_ids:        (total_tokens,)
    label_positions:  (labels,) the packed position whose output predicts the label, one before the labelled token
    labels:           (labels,) the token ids to predict
    lengths:          tokens of each row
    first_labels:     of each row, the first place in it whose output predicts a label; its length if there is none
    slots:            (total_tokens,) place of each token in the flattened (rows, max_length) grid; None if it has no padding
    """

    input_ids: torch.Tensor
    label_positions: torch.Tensor
    labels: torch.Tensor
    lengths: list[int]
    first_labels: list[int]
    slots: torch.Tensor | None

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def max_length(self) -> int:
        return max(self.lengths)

    def to(self, device: torch.device) -> "Batch":
        """This batch on `device`. From pinned memory, so that a CUDA copy waits for nothing that is still computing."""

        def move(value):
            if not isinstance(value, torch.Tensor):
                return value
            return value.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else value.to(device)

        return Batch(**{name: move(value) for name, value in vars(self).items()})

    def to_grid(self, packed: torch.Tensor) -> torch.Tensor:
        """(total_tokens, ...) -> (rows, max_length, ...), zeros where a row is shorter."""
        if self.slots is not None:
            grid = packed.new_zeros(self.rows * self.max_length, *packed.shape[1:])
            packed = grid.index_copy(0, self.slots, packed)
        return packed.unflatten(0, (self.rows, self.max_length))

    def from_grid(self, grid: torch.Tensor) -> torch.Tensor:
        """(rows, max_length, ...) -> (total_tokens, ...): `to_grid` undone."""
        flat = grid.flatten(0, 1)
        return flat if self.slots is None else flat.index_select(0, self.slots)


def pack(examples: list[Example], max_tokens: int) -> Iterator[Batch]:
    """Packs the examples into batches of up to `max_tokens` tokens, rows of similar length together.

    A row that is longer than `max_tokens` makes a batch of its own.
    """
    rows: list[Example] = []
    tokens = 0
    for example in sorted(examples, key=lambda example: len(example.input_ids)):
        if rows and tokens + len(example.input_ids) > max_tokens:
            yield _batch(rows)
            rows, tokens = [], 0
        rows.append(example)
        tokens += len(example.input_ids)
    if rows:
        yield _batch(rows)


def _batch(rows: list[Example]) -> Batch:
    lengths = [len(row.input_ids) for row in rows]
    # Position i predicts token i + 1: shift the labels to where their prediction is made.
    shifted = [[*row.labels[1:], IGNORED] for row in rows]
    flat = torch.tensor(list(itertools.chain(*shifted)))
    label_positions = (flat != IGNORED).nonzero().flatten()
    in_row = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return Batch(
        input_ids=torch.tensor(list(itertools.chain(*(row.input_ids for row in rows)))),
        label_positions=label_positions,
        labels=flat[label_positions],
        lengths=lengths,
        first_labels=[next((i for i, label in enumerate(row) if label != IGNORED), len(row)) for row in shifted],
        slots=None if bool(in_row.all()) else in_row.flatten().nonzero().flatten(),
    )


# A batch that asks for nothing: one token, no label.
EMPTY_BATCH = _batch([Example([0], [IGNORED])])


def count_labels(examples: list[Example]) -> int:
    """How many labels are predicted: a row's first token has nothing before it that could."""
    return sum(label != IGNORED for example in examples for label in example.labels[1:])
