"""Attention that returns its weights: how much a prefix draws in each layer and head.

Legend: R rows, T tokens of all rows (packed, model/batch.py), S tokens of the longest row, L layers, H heads, P prefix
tokens, D head_dim.

model/attention.py runs softmax and sum in one kernel, which returns no weights. `attending` replaces the base's attention
for a while by a function with the same arguments. The rest is the forward pass that trains a prefix (model/bloom.py,
model/decoder.py).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch

from prefix_tuning.model.attention import as_grid
from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import Bloom, PackedModel
from prefix_tuning.model.decoder import attention_weights


@contextmanager
def attending(base: PackedModel, attend_in: Callable[[int], Callable[..., torch.Tensor]]) -> Iterator[None]:
    """Inside, layer l of the base attends by `attend_in(l)`, which takes the arguments of the base's own: those of
    model/attention.py's `attend`, and in other families than Bloom also those of `attention_weights`, by name.
    """
    base.attend_in = attend_in
    try:
        yield
    finally:
        del base.attend_in  # the class has its own


@contextmanager
def running(base: PackedModel, forward_in: Callable[[int, Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Inside, layer l of the base runs `forward_in(l, own)` in its packed forward, where `own` is what it runs otherwise."""
    decoder: Any = base.get_decoder()
    layers, name = (decoder.h, "forward_packed") if isinstance(base, Bloom) else (decoder.layers, "forward")
    for number, layer in enumerate(layers):
        setattr(layer, name, forward_in(number, getattr(layer, name)))
    try:
        yield
    finally:
        for layer in layers:
            delattr(layer, name)  # the class has its own


def attend_with_weights(
    qkv: torch.Tensor,
    prefix: torch.Tensor,
    batch: Batch,
    bias: torch.Tensor,
    watch: Callable[[torch.Tensor], None],
    **scores: Any,
) -> torch.Tensor:
    """`attend` as a textbook writes it: (T, H, D).

    watch: is called with the weights, (R, H, S, P + S); ignore those where a shorter row has no token. The weights of each
    query sum to 1, or to less in a model with sinks. scores: the cap and the sinks of `attention_weights`.
    """
    query, key, value = as_grid(qkv, prefix, batch)
    weights = attention_weights(query, key, bias, **scores)
    watch(weights)
    return batch.from_grid((weights @ value).transpose(1, 2))


def watching(base: PackedModel, watch: Callable[[int, torch.Tensor], None]) -> AbstractContextManager[None]:
    """Inside, `watch(layer, weights)` is called for each layer of each forward pass. weights: see `attend_with_weights`."""

    def attend_in(layer: int) -> Callable[..., torch.Tensor]:
        return lambda qkv, prefix, batch, bias, label_positions_only, **scores: attend_with_weights(
            qkv, prefix, batch, bias, partial(watch, layer), **scores
        )

    return attending(base, attend_in)
