"""Attention that returns its weights: how much a prefix draws in each layer and head.

Legend: R rows, T tokens of all rows (packed, model/batch.py), S tokens of the longest row, L layers, H heads, P prefix
tokens, D head_dim.

model/attention.py runs softmax and sum in one kernel, which returns no weights. `attending` replaces the base's attention
for a while by a function with the same arguments. The rest is the forward pass that trains a prefix (model/bloom.py).
"""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import cast

import torch

from prefix_tuning.model.attention import as_grid
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


def attend_with_weights(
    qkv: torch.Tensor, prefix: torch.Tensor, batch: Batch, bias: torch.Tensor, watch: Callable[[torch.Tensor], None]
) -> torch.Tensor:
    """`attend` as a textbook writes it: (T, H, D).

    watch: is called with the weights, (R, H, S, P + S). The weights of each query sum to 1; ignore those where a shorter row
    has no token.
    """
    query, key, value = as_grid(qkv, prefix, batch)
    weights = (query @ key.mT / math.sqrt(query.shape[-1]) + bias).softmax(dim=-1)
    watch(weights)
    return batch.from_grid((weights @ value).transpose(1, 2))


def watching(base: Bloom, watch: Callable[[int, torch.Tensor], None]) -> AbstractContextManager[None]:
    """Inside, `watch(layer, weights)` is called for each layer of each forward pass. weights: see `attend_with_weights`."""

    def attend_in(layer: int) -> Callable[..., torch.Tensor]:
        return lambda qkv, prefix, batch, bias, label_positions_only: attend_with_weights(
            qkv, prefix, batch, bias, partial(watch, layer)
        )

    return attending(base, attend_in)
