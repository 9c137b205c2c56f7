"""Attention in other forms than `[prefix; row]`, to be put on the blocks of the base (study/attention.py: `attending`).

Legend: R rows, T tokens of all rows (packed), S tokens of the longest row, H heads, P prefix tokens, D head_dim. All
functions named attend_* have the arguments of model/attention.py's `attend` and return (T, H, D).
"""

import math

import torch

from prefix_tuning.model.attention import alibi_slopes, attend_padded
from prefix_tuning.model.batch import Batch


def attend_infix(
    qkv: torch.Tensor, pairs: torch.Tensor, batch: Batch, bias: torch.Tensor, only_labels: bool
) -> torch.Tensor:
    """Infix tuning (Li & Liang 2021, section 7.3): the pairs stand inside of the row, before the last token of its prompt.

    That token is the first whose output predicts the answer, so all positions that predict see the pairs and no other does.
    What stands behind the pairs is P positions further from what stands before them. pairs: (2, H, P, D).
    """
    length = pairs.shape[2]
    first = torch.tensor(batch.first_labels, device=qkv.device)[:, None]  # the row's place of the last token of its prompt
    token = torch.arange(batch.max_length, device=qkv.device)
    positions = token + length * (token >= first)  # (R, S)
    keys = torch.cat((first + torch.arange(length, device=qkv.device), positions), dim=1)  # (R, P + S)
    distance = keys[:, None, :] - positions[:, :, None]  # (R, S, P + S), negative before the query
    slopes = alibi_slopes(qkv.shape[1]).to(qkv)  # (H)
    own = (slopes[:, None, None] * distance[:, None]).masked_fill(distance[:, None] > 0, -torch.inf)
    return attend_padded(qkv, pairs, batch, own)


def attend_gated(
    qkv: torch.Tensor, prefix: torch.Tensor, batch: Batch, bias: torch.Tensor, only_labels: bool
) -> torch.Tensor:
    """The adapter form of He et al. 2021 (arXiv 2110.04366, section 3.1): the prefix beside the attention, behind a gate.

    (1 - share) * softmax(q K^T) V + share * softmax(q P_k^T) P_v

    Each softmax is one of its own; the share follows from their sums.
    """
    query, key, value = batch.to_grid(qkv).permute(3, 0, 2, 1, 4)  # each (R, H, S, D)
    prefix_key, prefix_value = prefix.to(qkv.dtype)  # each (H, P, D)
    length, scale = prefix.shape[2], math.sqrt(query.shape[-1])
    on_prefix = query @ prefix_key.mT / scale + bias[..., :length]  # (R, H, S, P)
    on_text = query @ key.mT / scale + bias[..., length:]  # (R, H, S, S)
    share = torch.sigmoid(on_prefix.logsumexp(-1, keepdim=True) - on_text.logsumexp(-1, keepdim=True))
    context = (1 - share) * (on_text.softmax(-1) @ value) + share * (on_prefix.softmax(-1) @ prefix_value)
    return batch.from_grid(context.transpose(1, 2))
