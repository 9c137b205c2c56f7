"""How much attention a prefix draws: by layer and head, and by distance from the prefix.

Legend: R rows, T tokens of all rows (packed, model/batch.py), S tokens of the longest row, N labels, L layers, H heads of
queries, G heads of keys and values (H in Bloom), P prefix tokens.
"""

import torch

from prefix_tuning.model.attention import alibi_slopes
from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import Bloom, PackedModel
from prefix_tuning.study.attention import watching

FEWEST_ROWS = 5  # a mean over fewer rows is not taken, so distances end with the fifth longest row


@torch.no_grad()
def attention_shares(base: PackedModel, batches: list[Batch], prefix: torch.Tensor) -> dict:
    """The share of attention that goes to the prefix (L, 2, G, P, D), 0 to 1.

    share: (L, H), the mean over all answer positions, those whose output predicts a label
    by_distance: (L, H, K), the mean over all rows at their token 1, 2, ... K, answer or not
    slopes: (H,), ALiBi's: a key d positions before the query is penalised by slope * d nats; None in other families
    """
    layers, heads, length = len(prefix), base.config.num_attention_heads, prefix.shape[3]
    longest = max(batch.max_length for batch in batches)
    answers, labels = torch.zeros(layers, heads, dtype=torch.float64), 0
    by_distance, rows = torch.zeros(layers, heads, longest, dtype=torch.float64), torch.zeros(longest)
    for batch in batches:
        batch = batch.to(base.device)
        indices = torch.cat([torch.arange(tokens) for tokens in batch.lengths])  # of each token in its row

        def add(layer: int, weights: torch.Tensor, batch: Batch = batch, indices: torch.Tensor = indices) -> None:
            share = batch.from_grid(weights[..., :length].sum(dim=-1).transpose(1, 2))  # (T, H)
            answers[layer] += share[batch.label_positions].cpu().double().sum(dim=0)
            by_distance[layer].index_add_(1, indices, share.cpu().double().T)

        with watching(base, add):
            base.packed_hidden(batch, prefix)
        labels += len(batch.labels)
        rows += torch.bincount(indices, minlength=longest)
    enough = rows >= min(FEWEST_ROWS, rows[0].item())
    return {
        "share": (answers / labels).tolist(),
        "by_distance": (by_distance / rows)[:, :, enough].tolist(),
        "slopes": alibi_slopes(heads).tolist() if isinstance(base, Bloom) else None,
    }


def heads_by_share(shares: list[list[float]]) -> list[tuple[int, int]]:
    """Layer and head of each share (L, H), the largest share first."""
    heads = [(layer, head) for layer, line in enumerate(shares) for head in range(len(line))]
    return sorted(heads, key=lambda one: -shares[one[0]][one[1]])
