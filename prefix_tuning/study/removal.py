"""What breaks without a part of the prefix: the pairs of a layer, a head or a token, all keys, all values.

Legend: N labels, L layers, H heads of queries, G heads of keys and values (H in Bloom), P prefix tokens, D head_dim,
E hidden size.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import PackedModel
from prefix_tuning.study.attention import attending, running
from prefix_tuning.study.scoring import Score, Tally, score_prefix
from prefix_tuning.study.shares import heads_by_share

MOST_HEADS = 64  # heads that are removed one by one: those that give the prefix the most attention


class Part(NamedTuple):
    """A part of a prefix. where: its layer, head or token. pairs: (L, H, P), bool. first: its first layer."""

    kind: str
    where: dict[str, int]
    pairs: torch.Tensor
    first: int


def removals(
    base: PackedModel,
    batches: list[Batch],
    prefix: torch.Tensor,
    shares: list[list[float]],
    alone: Score,
    advance: Callable[[int], object] = lambda rows: None,
) -> dict:
    """Loss and exact match without each part of a prefix (L, 2, G, P, D), the worst loss first.

    shares: (L, H), from `attention_shares`. alone: the score of the base. advance: is called with the number of rows that
    have passed through the base; together, each row passes `passes_of_removals` times.

    Removed pairs take no share of the attention, as if they had never been there. A head is a head of queries: the others
    of its group keep the pairs. With "keys only", values are 0: the prefix only draws attention away from the text. With
    "values only", keys are 0: no query decides how much of each value is added, only the distance in Bloom.

    whole, base: the scores of the prefix and of the base alone. parts: for each removal its kind (layer, head, token, keys
    only, values only), where it is, and its scores. left_out: number of heads that were not removed.
    """
    heads = heads_by_share(shares)
    removed = list(_parts(prefix, base.config.num_attention_heads, sorted(heads[:MOST_HEADS])))
    whole, tallies = Tally(), [Tally() for _ in removed]
    for batch in batches:
        batch = batch.to(base.device)
        for tally, hidden in zip((whole, *tallies), _hidden_without(base, batch, prefix, removed), strict=True):
            tally.add(base, batch, hidden)
            advance(batch.rows)
    parts = [
        {"kind": part.kind, **part.where, **tally.total()._asdict()} for part, tally in zip(removed, tallies, strict=True)
    ]
    for side, kind in enumerate(("values only", "keys only")):
        half = prefix.clone()
        half[:, side] = 0
        parts.append({"kind": kind, **score_prefix(base, batches, half)._asdict()})
        advance(whole.rows)
    parts.sort(key=lambda part: -part["loss"])
    return {"whole": whole.total()._asdict(), "base": alone._asdict(), "parts": parts, "left_out": len(heads[MOST_HEADS:])}


def passes_of_removals(base: PackedModel, prefix: torch.Tensor) -> int:
    """How often `removals` runs the rows through the base: for the whole prefix, each part and both halves."""
    layers, length = len(prefix), prefix.shape[3]
    return layers + min(MOST_HEADS, layers * base.config.num_attention_heads) + length + 3


@torch.no_grad()
def _hidden_without(base: PackedModel, batch: Batch, prefix: torch.Tensor, parts: list[Part]) -> Iterator[torch.Tensor]:
    """The input of the head at the labels, (N, E): with the whole prefix, and then without each part.

    Layers below a part do not change without it. So in its pass they give at once what they gave with the whole prefix.
    """
    outputs: list[Any] = []  # of each layer, with the whole prefix

    def keep(layer: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        def forward_and_keep(*inputs, **options):
            outputs.append(forward(*inputs, **options))
            return outputs[-1]

        return forward_and_keep

    with running(base, keep):
        hidden = base.packed_hidden(batch, prefix)
    yield hidden
    for part in parts:

        def skip(layer: int, forward: Callable[..., Any], first: int = part.first) -> Callable[..., Any]:
            return forward if layer >= first else lambda *inputs, **options: outputs[layer]

        with running(base, skip), attending(base, _without(base.attend_in, part.pairs)):
            hidden = base.packed_hidden(batch, prefix)
        yield hidden


def _without(
    attend_in: Callable[[int], Callable[..., torch.Tensor]], pairs: torch.Tensor
) -> Callable[[int], Callable[..., torch.Tensor]]:
    """A model's `attend_in` without some pairs of the prefix: (L, H, P), bool. A bias of -inf hides them."""

    def attend_in_rest(layer: int) -> Callable[..., torch.Tensor]:
        attend, removed = attend_in(layer), pairs[layer]

        def attend_to_rest(qkv, prefix, batch, bias, *others, **scores):
            rest = bias.repeat(1, len(removed) // bias.shape[1], 1, 1)  # a bias for all heads becomes one for each
            rest[..., : removed.shape[1]].masked_fill_(removed[None, :, None, :], -torch.inf)
            return attend(qkv, prefix, batch, rest, *others, **scores)

        return attend_to_rest

    return attend_in_rest


def _parts(prefix: torch.Tensor, num_heads: int, heads: list[tuple[int, int]]) -> Iterator[Part]:
    """The parts that are removed one at a time. num_heads: H."""
    layers, length = len(prefix), prefix.shape[3]
    nothing = torch.zeros(layers, num_heads, length, dtype=torch.bool, device=prefix.device)

    def at(*index) -> torch.Tensor:
        removed = nothing.clone()
        removed[index] = True
        return removed

    for layer in range(layers):
        yield Part("layer", {"layer": layer}, at(layer), layer)
    for layer, head in heads:
        yield Part("head", {"layer": layer, "head": head}, at(layer, head), layer)
    for token in range(length):
        yield Part("token", {"token": token}, at(slice(None), slice(None), token), 0)
