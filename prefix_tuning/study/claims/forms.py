"""Attention in other forms than `[prefix; row]`, for the blocks of the base (study/attention.py: `attending`).

Legend: R rows, T tokens of all rows (packed), S tokens of the longest row, H heads, P prefix tokens, D head_dim. Functions
named attend_* have the arguments of `attend` in model/attention.py and return (T, H, D).
"""

import math

import torch

from prefix_tuning.model.attention import alibi_slopes, as_grid, attend_padded
from prefix_tuning.model.batch import Batch


def attend_infix(
    qkv: torch.Tensor, pairs: torch.Tensor, batch: Batch, bias: torch.Tensor, only_labels: bool
) -> torch.Tensor:
    """Infix tuning (Li & Liang 2021, section 7.3): the pairs stand inside the row, before the last token of its prompt.

    The output of that token is the first that predicts the answer, so all positions that predict see the pairs, and no other
    does. Tokens after the pairs are P positions farther from those before. pairs: (2, H, P, D).
    """
    length = pairs.shape[2]
    first = torch.tensor(batch.first_labels, device=qkv.device)[:, None]  # the index in its row of the prompt's last token
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

    These are two separate softmaxes; the share follows from their sums.
    """
    query, key, value = as_grid(qkv, prefix, batch)
    length = prefix.shape[2]
    scores = query @ key.mT / math.sqrt(query.shape[-1]) + bias  # (R, H, S, P + S)
    on_prefix, on_text = scores[..., :length], scores[..., length:]
    share = torch.sigmoid(on_prefix.logsumexp(-1, keepdim=True) - on_text.logsumexp(-1, keepdim=True))
    of_text, of_prefix = on_text.softmax(-1) @ value[:, :, length:], on_prefix.softmax(-1) @ value[:, :, :length]
    return batch.from_grid(((1 - share) * of_text + share * of_prefix).transpose(1, 2))
