"""Attention in the open: what a prefix draws in each layer and head.

Legend: R rows, T tokens of all rows (packed, model/batch.py), S tokens of the longest row, L layers, H heads, P prefix
tokens, D head_dim.

model/attention.py runs softmax and sum in one kernel, which shows no weights. Here an attention of the same arguments is put
on the blocks of the base for a while (`attending`); all else is the forward pass that trains a prefix (model/bloom.py).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import cast

import torch

from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import Bloom, PackedBlock


@contextmanager
def attending(base: Bloom, attend_in: Callable[[int], Callable[..., torch.Tensor]]) -> Iterator[None]:
    """Inside, layer l of the base attends by `attend_in(l)`, which takes the arguments of model/attention.py's `attend`."""
    blocks = cast(list[PackedBlock], base.transformer.h)
    for layer, block in enumerate(blocks):
        block.attend = attend_in(layer)
    try:
        yield
    finally:
        for block in blocks:
            del block.attend  # the class has its own


def attend_openly(
    qkv: torch.Tensor, prefix: torch.Tensor, batch: Batch, bias: torch.Tensor, watch: Callable[[torch.Tensor], None]
) -> torch.Tensor:
    """`attend` as a textbook writes it: (T, H, D). watch: is called with the weights, (R, H, S, P + S); those of each query
    sum to 1, and what stands where a shorter row has no token is of no meaning.
    """
    query, key, value = batch.to_grid(qkv).permute(3, 0, 2, 1, 4)  # each (R, H, S, D)
    prefix_key, prefix_value = prefix.to(qkv.dtype).unsqueeze(1).expand(-1, batch.rows, -1, -1, -1)
    key, value = torch.cat((prefix_key, key), dim=2), torch.cat((prefix_value, value), dim=2)
    weights = (query @ key.mT / math.sqrt(query.shape[-1]) + bias).softmax(dim=-1)
    watch(weights)
    return batch.from_grid((weights @ value).transpose(1, 2))


def watching(base: Bloom, watch: Callable[[int, torch.Tensor], None]) -> AbstractContextManager[None]:
    """Inside, `watch(layer, weights)` is called for each layer of each forward pass. weights: see `attend_openly`."""

    def attend_in(layer: int) -> Callable[..., torch.Tensor]:
        return lambda qkv, prefix, batch, bias, only_labels: attend_openly(qkv, prefix, batch, bias, partial(watch, layer))

    return attending(base, attend_in)
