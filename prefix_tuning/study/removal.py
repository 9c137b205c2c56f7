"""What breaks without a part of the prefix: a layer's pairs, a head's, a token's, all keys, all values."""

from collections.abc import Iterator

import torch
from tqdm import tqdm

from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import Bloom
from prefix_tuning.study.attention import without
from prefix_tuning.study.scoring import score
from prefix_tuning.study.shares import heads_by_share

MOST_HEADS = 64  # that are removed one by one; of a larger base, those to which the prefix owes the most attention


def removals(base: Bloom, batches: list[Batch], prefix: torch.Tensor, shares: list[list[float]]) -> dict:
    """Loss and exact match without each part of a prefix (L, 2, H, P, D), the worst loss first.

    shares: (L, H), of `attention_shares`. Removed pairs take no share of the attention, as if they had never been there.
    With "keys only", values are 0, so that the prefix only draws attention away from the text; with "values only", keys
    are 0, so that the distance alone decides how much of each value is added.

    whole, base: the scores of the prefix and of the base alone. parts: of each removal its kind (layer, head, token, keys
    only, values only), its place and its scores. left_out: heads that were not removed.
    """
    scores = score(base, batches, prefix), score(base, batches, None)
    places = heads_by_share(shares)
    parts = []
    for kind, place, removed in tqdm(list(_parts(prefix, sorted(places[:MOST_HEADS]))), desc="without a part", leave=False):
        with without(base, removed):
            parts.append({"kind": kind, **place, **score(base, batches, prefix)._asdict()})
    for side, kind in enumerate(("values only", "keys only")):
        half = prefix.clone()
        half[:, side] = 0
        parts.append({"kind": kind, **score(base, batches, half)._asdict()})
    whole, alone = (one._asdict() for one in scores)
    parts.sort(key=lambda part: -part["loss"])
    return {"whole": whole, "base": alone, "parts": parts, "left_out": len(places[MOST_HEADS:])}


def _parts(prefix: torch.Tensor, heads: list[tuple[int, int]]) -> Iterator[tuple[str, dict[str, int], torch.Tensor]]:
    """Kind, place and pairs (L, H, P), bool, of everything that can be removed."""
    layers, _, _, length, _ = prefix.shape
    nothing = torch.zeros_like(prefix[:, 0, :, :, 0], dtype=torch.bool)

    def at(*place) -> torch.Tensor:
        removed = nothing.clone()
        removed[place] = True
        return removed

    for layer in range(layers):
        yield "layer", {"layer": layer}, at(layer)
    for layer, head in heads:
        yield "head", {"layer": layer, "head": head}, at(layer, head)
    for token in range(length):
        yield "token", {"token": token}, at(slice(None), slice(None), token)
