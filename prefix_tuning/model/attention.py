"""Attention of every row over [prefix; row], with ALiBi and the causal mask as one additive bias.

Legend: R rows, T tokens of all rows (packed, batch.py), S tokens of the longest row, H heads of queries, G heads of keys and
values (in Bloom G = H), P prefix tokens, D head_dim.

Prefix and text meet in the `torch.cat` of two functions, `as_grid` and `_query_chunks`. For token i of a row, in each head:

    scores  = q_i . [K_prefix ; K_row]^T / sqrt(D) + bias_i           (P + S)
    context = softmax(scores) @ [V_prefix ; V_row]                    (D)

Queries come from the text alone: a prefix token computes nothing, it has keys and values, but no query. Token i sees all P
prefix tokens, and the tokens of its own row up to i. Both share one softmax, so the text loses the attention that the prefix
gets: if the prefix draws a share a of it, the text's part of the context is what it would be without a prefix, times (1 -
a).

Bloom knows of positions by ALiBi alone (Press et al. 2022): a key d positions before the query is penalised by slope_h * d.
There is one slope for each head: 2 ** (-8 * h / H) for h = 1 .. H where H is a power of two. The prefix has the positions
0 .. P-1, and the row starts at position P, so prefix token j is P + i - j positions before token i:

    bias_i = [-slope_h * (P + i), ..., -slope_h * (i + 1) | -slope_h * i, ..., -slope_h, 0, -inf, ...]    prefix | row

- Steep heads (h = 1: slope 0.7 for 16 heads) cannot see a prefix from a distance: 64 tokens on, they penalise it by 45
  nats. The flattest heads (slope 0.004) see it from everywhere. Learned keys can make up for some of that.
- A prefix of P + 5 tokens changes no score and no bias between the tokens of a row. Prefix token j is then P + 5 + i - j
  positions before token i, so its penalty grows by 5 * slope_h. The attention weights do change, because the new keys are
  part of the same softmax.
- A model with rotary positions has no such bias but the causal mask, and may have fewer heads of keys and values than of
  queries (decoder.py).

`attend` has two forms, equal but for rounding. `attend_padded` lays the rows out as a padded grid and calls torch once: few
kernels, as suits a GPU and short rows. `attend_rows` loops over the rows, as suits a CPU and long rows: no padding, few
masked keys are computed, and only inputs and outputs are kept for the backward pass.

For a base in bf16, all of it runs in bfloat16 on CUDA. On a CPU it runs in float32, and row by row in whichever of the two
is faster (`row_dtype`). The prefix arrives in float32 and is cast here, before `torch.cat`.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from prefix_tuning.model.batch import Batch
from prefix_tuning.model.cpu import attends_in_bf16

# The kernels behind scaled_dot_product_attention on a CPU. AttendRows calls them on a part of the queries at a time. The
# public function returns no log of the softmax's sum, and would keep its own copy of the keys of each part for the way back.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

QUERY_CHUNK = 128  # queries per kernel: smaller chunks skip more masked keys, larger ones launch fewer kernels
SHORT_ROW = 48  # tokens: a CPU takes longer to launch the kernels of a shorter row than to run them (tests/benchmarks)


def attention_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype in which a model of this dtype computes attention: its own, but at least float32 on a CPU. There, the
    backward pass of torch's kernel is 2 to 5 times slower in bfloat16.
    """
    return torch.promote_types(dtype, torch.float32) if device.type == "cpu" else dtype


def row_dtype(dtype: torch.dtype, head_dim: int) -> torch.dtype:
    """The same for `attend_rows`, whose backward pass in bfloat16 is our own: bfloat16 where the CPU is faster in it."""
    in_bf16 = dtype == torch.bfloat16 and attends_in_bf16(head_dim)
    return dtype if in_bf16 else torch.promote_types(dtype, torch.float32)


def attention_bias(num_heads: int, prefix_length: int, max_length: int, like: torch.Tensor) -> torch.Tensor:
    """The bias of the formula above: (1, H, S, P + S), on the device of `like` and in its `attention_dtype`.

    transformers' Bloom adds slope * key position instead. For one query the two differ by a constant, which softmax cancels;
    but distances are smaller than absolute positions, so rounding them to bfloat16 loses less. One bias serves rows of any
    length: padding comes after the row, where the causal mask hides it.
    """
    keys = torch.arange(prefix_length + max_length, device=like.device)
    distance = keys - keys[prefix_length:, None]  # 0 at the query itself, negative before it
    slopes = alibi_slopes(num_heads).to(like.device, torch.promote_types(like.dtype, torch.float32))[:, None, None]
    bias = (slopes * distance).masked_fill(distance > 0, -torch.inf).to(attention_dtype(like.dtype, like.device))
    return aligned(bias.unsqueeze(0))  # the batch axis avoids the slow kernel that SDPA uses for a 3-D mask on a CPU


def aligned(bias: torch.Tensor) -> torch.Tensor:
    """The same numbers, whose rows begin at multiples of 8 in memory. Otherwise CUDA's kernel copies them in each layer."""
    keys = bias.shape[-1]
    return F.pad(bias, (0, -keys % 8))[..., :keys]


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """slope_h of the formula above: (H,), float32."""
    return build_alibi_tensor(torch.ones(1, 2), num_heads, torch.float32)[:, 0, 1]  # slope * position, at position 1


# Row lengths differ from batch to batch, so it would be compiled anew for each.
@torch.compiler.disable
def attend(
    qkv: torch.Tensor, prefix: torch.Tensor, batch: Batch, bias: torch.Tensor, label_positions_only: bool
) -> torch.Tensor:
    """Attention of every row over [prefix; row]: (T, H, D).

    qkv: (T, G, H / G + 2, D), in the model's dtype: of each group the queries, then the key and the value that they share.
    Bloom's query_key_value returns it so, with one query. prefix: (2, G, P, D), key and value, in any dtype. bias: (1, H or
    1, S, P + S), `attention_bias`. label_positions_only: the caller reads the result at label positions only; elsewhere it
    may hold any finite number.
    """
    if qkv.device.type == "cpu" and len(qkv) >= SHORT_ROW * batch.rows:
        return attend_rows(qkv, prefix, batch, bias, label_positions_only)
    return attend_padded(qkv, prefix, batch, bias)


def attend_padded(qkv: torch.Tensor, prefix: torch.Tensor, batch: Batch, bias: torch.Tensor) -> torch.Tensor:
    """`attend` on all rows at once, as a grid that is padded to the longest row."""
    context = F.scaled_dot_product_attention(*as_grid(qkv, prefix, batch), attn_mask=bias)
    return batch.from_grid(context.transpose(1, 2))


def as_grid(qkv: torch.Tensor, prefix: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (R, H, S, D), keys and values (R, H, P + S, D) of all rows, the prefix's keys and values in front, in their
    `attention_dtype`.
    """
    qkv = qkv.to(attention_dtype(qkv.dtype, qkv.device))
    query, key, value = _split(batch.to_grid(qkv).permute(0, 2, 3, 1, 4))  # each (R, G, H / G or 1, S, D)
    prefix_key, prefix_value = prefix.to(qkv.dtype)[:, None, :, None].expand(-1, batch.rows, -1, -1, -1, -1)
    key, value = torch.cat((prefix_key, key), dim=3), torch.cat((prefix_value, value), dim=3)
    key, value = (x.expand(-1, -1, query.shape[2], -1, -1).flatten(1, 2) for x in (key, value))
    return query.flatten(1, 2), key, value


def _split(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value: views of qkv (..., H / G + 2, S, D)."""
    return qkv.split((qkv.shape[-3] - 2, 1, 1), dim=-3)


def attend_rows(
    qkv: torch.Tensor, prefix: torch.Tensor, batch: Batch, bias: torch.Tensor, label_positions_only: bool
) -> torch.Tensor:
    """`attend` row by row, long rows in chunks of queries. CPU only."""
    first_queries = batch.first_labels if label_positions_only else [0] * batch.rows
    qkv = qkv.to(row_dtype(qkv.dtype, qkv.shape[3]))
    return AttendRows.apply(qkv, prefix, bias, batch.lengths, first_queries)


class AttendRows(torch.autograd.Function):
    """Flash attention (Dao et al. 2022), chunk by chunk.

    Its backward pass recomputes the softmax from queries, keys and the log of the softmax's sum. So no layer keeps its
    (H, S, P + S) weights; only the bias has that shape, once per batch. Gradients: for prefix, and for qkv if it needs one.
    """

    @staticmethod
    def forward(ctx, qkv, prefix, bias, lengths, first_queries):
        context = torch.zeros_like(qkv[:, :, :-2], memory_format=torch.contiguous_format)
        log_sums = []
        for queries, _, query, key, value, visible in _query_chunks(qkv, prefix, bias, lengths, first_queries):
            result, log_sum = _flash(query, key, value, attn_mask=visible)
            context[queries] = result.permute(2, 0, 1, 3)
            log_sums.append(log_sum)
        ctx.save_for_backward(qkv, prefix, bias, context, *log_sums)
        ctx.rows = lengths, first_queries
        return context.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_context):
        qkv, prefix, bias, context, *log_sums = ctx.saved_tensors
        # Chunks of one row add up, so in bf16 the sum is kept in float32.
        grad_qkv = torch.zeros_like(qkv, dtype=torch.promote_types(qkv.dtype, torch.float32))
        grad_prefix = torch.zeros_like(prefix)
        prefix_length = prefix.shape[2]
        # The first layer's qkv depends on nothing that is trained. There, only the prefix needs gradients.
        into_rows = ctx.needs_input_grad[0]
        chunks = _query_chunks(qkv, prefix, bias, *ctx.rows)
        grad_context = grad_context.view_as(context)
        for (queries, keys, query, key, value, visible), log_sum in zip(chunks, log_sums, strict=True):
            if not into_rows:
                key, value, visible = key[:, :, :prefix_length], value[:, :, :prefix_length], visible[..., :prefix_length]
            grad, result = (x[queries].permute(1, 2, 0, 3) for x in (grad_context, context))
            backward = _matmul_backward if qkv.dtype == torch.bfloat16 else _flash_backward_of_groups
            grad_query, grad_key, grad_value = backward(grad, query, key, value, result, log_sum, visible)
            grad_prefix[0] += grad_key[:, :prefix_length]
            grad_prefix[1] += grad_value[:, :prefix_length]
            if into_rows:
                grad_qkv[queries, :, :-2] = grad_query.permute(2, 0, 1, 3)
                grad_qkv[keys, :, -2] += grad_key[:, prefix_length:].transpose(0, 1)
                grad_qkv[keys, :, -1] += grad_value[:, prefix_length:].transpose(0, 1)
        return grad_qkv.to(qkv.dtype) if into_rows else None, grad_prefix, None, None, None


def _flash_backward_of_groups(grad, query, key, value, result, log_sum, bias) -> tuple[torch.Tensor, ...]:
    """The gradients of queries (G, H / G, q, D), and of keys and values (G, k, D), summed over the queries of a group."""
    grad_query, *grads = _flash_backward(grad, query, key, value, result, log_sum, 0.0, False, attn_mask=bias)
    return grad_query, *(x.sum(1) for x in grads)


def _matmul_backward(grad, query, key, value, result, log_sum, bias) -> tuple[torch.Tensor, ...]:
    """The same by four matmuls in bfloat16, which are faster than torch's kernel (cpu.py).

        weights = exp(scores - log_sum)         d value = weights^T @ grad
        d scores = weights * (grad @ value^T - sum(grad * result))
        d query = d scores @ key / sqrt(D)      d key = d scores^T @ query / sqrt(D)

    A reader who does not care about CPUs may skip it.
    """
    key, value, scale = key[:, 0], value[:, 0], key.shape[3] ** -0.5
    query, grad, result = (x.flatten(1, 2) for x in (query, grad, result))  # the queries of a group, one after the other
    weights = (query @ key.mT).float().mul_(scale).unflatten(1, bias.shape[1:3]).add_(bias).sub_(log_sum.unsqueeze(3)).exp_()
    weights = weights.flatten(1, 2)
    shift = (grad.float() * result.float()).sum(2, keepdim=True)
    grad_scores = (grad @ value.mT).float().sub_(shift).mul_(weights).mul_(scale).to(query.dtype)
    grad_query = (grad_scores @ key).unflatten(1, bias.shape[1:3])
    return grad_query, grad_scores.mT @ query, weights.to(grad.dtype).mT @ grad


def _query_chunks(
    qkv: torch.Tensor, prefix: torch.Tensor, bias: torch.Tensor, lengths: list[int], first_queries: list[int]
) -> Iterator[tuple]:
    """Cuts packed rows into chunks of neighbouring queries. Yields for each chunk:

    - two slices of the packed axis: its queries, and the tokens of their row up to the last of them;
    - query, key and value, each (G, H / G, queries or visible keys, D), the prefix's keys and values in front;
    - their bias.

    To the kernels, a group is a row of the batch. Its keys are expanded to all its queries, which copies nothing.

    first_queries: for each row, the index of the first query in it that is needed.
    """
    (_, groups, prefix_length, _), queries, start = prefix.shape, qkv.shape[2] - 2, 0
    prefix_key, prefix_value = prefix.to(qkv.dtype).unsqueeze(2)
    bias = bias[0].expand(groups * queries, -1, -1).unflatten(0, (groups, queries))
    for length, first in zip(lengths, first_queries, strict=True):
        query, key, value = _split(qkv[start : start + length].permute(1, 2, 0, 3))
        key, value = torch.cat((prefix_key, key), dim=2), torch.cat((prefix_value, value), dim=2)
        key, value = (x.expand(-1, queries, -1, -1) for x in (key, value))
        for begin in range(first, length, QUERY_CHUNK):
            end = min(begin + QUERY_CHUNK, length)
            visible = prefix_length + end  # the keys of the whole prefix, and of the row up to the last query
            yield (
                slice(start + begin, start + end),
                slice(start, start + end),
                query[:, :, begin:end],
                key[:, :, :visible],
                value[:, :, :visible],
                bias[:, :, begin:end, :visible],
            )
        start += length
