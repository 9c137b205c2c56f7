"""What breaks without a part of the prefix: the pairs of a layer, a head or a token, all keys, all values."""

from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F

from prefix_tuning.model.attention import attention_bias
from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import Bloom, PackedBlock
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
    base: Bloom,
    batches: list[Batch],
    prefix: torch.Tensor,
    shares: list[list[float]],
    alone: Score,
    advance: Callable[[int], object] = lambda rows: None,
) -> dict:
    """Loss and exact match without each part of a prefix (L, 2, H, P, D), the worst loss first.

    shares: (L, H), from `attention_shares`. alone: the score of the base. advance: is called with the number of rows that
    have passed through the base; together, each row passes `passes_of_removals` times.

    Removed pairs take no share of the attention, as if they had never been there. With "keys only", values are 0: the prefix
    only draws attention away from the text. With "values only", keys are 0: the distance alone decides how much of each
    value is added.

    whole, base: the scores of the prefix and of the base alone. parts: for each removal its kind (layer, head, token, keys
    only, values only), where it is, and its scores. left_out: number of heads that were not removed.
    """
    heads = heads_by_share(shares)
    removed = list(_parts(prefix, sorted(heads[:MOST_HEADS])))
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


def passes_of_removals(prefix: torch.Tensor) -> int:
    """How often `removals` runs the rows through the base: for the whole prefix, each part and both halves."""
    layers, _, heads, length, _ = prefix.shape
    return layers + min(MOST_HEADS, layers * heads) + length + 3


@torch.no_grad()
def _hidden_without(base: Bloom, batch: Batch, prefix: torch.Tensor, parts: list[Part]) -> Iterator[torch.Tensor]:
    """The input of the head at the labels, (N, E): with the whole prefix, and then without each part.

    Layers below a part do not change without it. So each pass begins at the first layer of the part, with what the whole
    prefix gave there.
    """
    body = base.transformer
    blocks = cast(list[PackedBlock], body.h)
    hidden = body.word_embeddings_layernorm(F.embedding(batch.input_ids, base.gathered(body.word_embeddings.weight)))
    bias = attention_bias(base.config.n_head, prefix.shape[3], batch.max_length, hidden)

    def layer_of(layer: int, hidden: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return blocks[layer].forward_packed(
            hidden, batch, bias, prefix[layer], label_positions_only=layer == len(blocks) - 1
        )

    inputs = [hidden]
    for layer in range(len(blocks)):
        inputs.append(layer_of(layer, inputs[-1], bias))
    yield body.ln_f(inputs[-1])
    for part in parts:
        hidden = inputs[part.first]
        for layer in range(part.first, len(blocks)):
            left = bias.clone()
            left[..., : prefix.shape[3]].masked_fill_(part.pairs[layer][None, :, None, :], -torch.inf)
            hidden = layer_of(layer, hidden, left)
        yield body.ln_f(hidden)


def _parts(prefix: torch.Tensor, heads: list[tuple[int, int]]) -> Iterator[Part]:
    """The parts that are removed one at a time."""
    layers, _, _, length, _ = prefix.shape
    nothing = torch.zeros_like(prefix[:, 0, :, :, 0], dtype=torch.bool)

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
