"""Reads the training rows, and the held-out rows from a dataset of their own or as a share of the training rows."""

import torch
from datasets import Dataset

from prefix_tuning.data.columns import parse_columns
from prefix_tuning.data.readers import load_rows
from prefix_tuning.errors import UserError
from prefix_tuning.settings import DEFAULT_HELD_OUT, FEWEST_TO_SPLIT, MOST_HELD_OUT


def load_splits(
    dataset: str,
    eval_dataset: str | None,
    eval_fraction: float | None,
    columns: str | None,
    seed: int,
    needing: str = "",
    may_lack: bool = False,
) -> tuple[Dataset, Dataset | None]:
    """The training rows, and the held-out rows or None: rows of eval_dataset, or else a share of `dataset`.

    The arguments are train.py's flags of the same names. seed: decides which rows are held out. needing: the given flags
    that need held-out rows, for a message. may_lack: rows may lack their answers. Raises UserError for rows that cannot be
    read or divided.
    """
    given = parse_columns(columns)
    rows = load_rows(dataset, ("train",), given, may_lack=may_lack)
    if eval_dataset:
        return rows, load_rows(eval_dataset, ("validation", "test", "train"), given, may_lack=may_lack)
    held_out = number_held_out(dataset, len(rows), eval_fraction, needing)
    if not held_out:
        return rows, None
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    chosen, others = (part.sort().values.numpy() for part in (order[:held_out], order[held_out:]))
    return rows.select(others), rows.select(chosen)


def number_held_out(dataset: str, rows: int, eval_fraction: float | None, needing: str) -> int:
    """Number of held-out rows. Raises UserError if flags are `needing` them and there are none, or if no others are left."""
    if eval_fraction is None:
        if rows >= FEWEST_TO_SPLIT:
            return min(round(DEFAULT_HELD_OUT * rows), MOST_HELD_OUT)
        if needing:
            reason = f"{rows} rows are too few to hold some out by default"
            raise UserError(f"{dataset}: {reason}; give --eval_dataset or --eval_fraction, or leave out {needing}")
        return 0
    held_out = round(rows * eval_fraction)
    if eval_fraction and not 0 < held_out < rows:
        raise UserError(f"--eval_fraction {eval_fraction} of {rows} rows leaves one side empty")
    return held_out
