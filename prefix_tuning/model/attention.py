"""Attention of packed rows, each over [prefix; row], with ALiBi and the causal mask as one additive bias.

Two forms of one thing, equal but for rounding. `attend_padded` lays the rows out as a padded grid and leaves it to torch:
few kernels, as suits a GPU and short rows. `attend_rows` goes through them one by one, as suits a CPU and long rows: no
padding, less work for keys in a query's future, and nothing kept for the backward pass but what went in and what came out.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from prefix_tuning.model.batch import Batch

# What scaled_dot_product_attention runs on a CPU. Called by name, because the backward pass below works on parts of it.
_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


QUERIES_AT_ONCE = 128  # fewer skip more of the future, more waste less time between kernels


SHORT_ROW = 48  # tokens; below, a CPU takes longer to start a row's kernels than to run them (tests/benchmarks/NOTES.md)


def attention_bias(num_heads: int, prefix_length: int, max_length: int, like: torch.Tensor) -> torch.Tensor:
    """ALiBi and the causal mask as one additive bias (1, heads, max_length, prefix_length + max_length), typed as `like`.

    Query i stands at position prefix_length + i and sees keys up to its own position; a key `d` positions back is
    penalised by slope * d. Bloom itself adds slope * key position; softmax cannot tell the difference, and distances stay
    small where bfloat16 is exact. Rows need no mask of their own: padding stands right of the tokens, so causality hides it.
    """
    keys = torch.arange(prefix_length + max_length, device=like.device)
    distance = keys - keys[prefix_length:, None]
    # Two positions are enough to read the slopes off transformers' own table.
    slopes = build_alibi_tensor(torch.ones(1, 2, device=like.device), num_heads, torch.float32)[:, :, 1:]
    slopes = slopes.to(torch.promote_types(like.dtype, torch.float32))
    bias = (slopes * distance).masked_fill(distance > 0, -torch.inf).to(like.dtype)
    return bias.unsqueeze(0)  # of three axes only, CPU attention takes its slow path


@torch.compiler.disable  # every batch has other lengths: compiled, it would be compiled anew each time
def attend(qkv: torch.Tensor, prefix: torch.Tensor, batch: Batch, bias: torch.Tensor, only_labels: bool) -> torch.Tensor:
    """Attention of every row over [prefix; row]: (total_tokens, heads, head_dim).

    qkv: (total_tokens, heads, 3, head_dim), as Bloom's query_key_value emits it. prefix: (2, heads, tokens, head_dim).
    only_labels: the result is used at label positions only; elsewhere it may hold anything.
    """
    if qkv.device.type == "cpu" and len(qkv) >= SHORT_ROW * batch.rows:
        return attend_rows(qkv, prefix, batch, bias, only_labels)
    return attend_padded(qkv, prefix, batch, bias)


def attend_padded(qkv: torch.Tensor, prefix: torch.Tensor, batch: Batch, bias: torch.Tensor) -> torch.Tensor:
    """`attend` on all rows at once, as a grid that is padded to the longest row."""
    query, key, value = batch.to_grid(qkv).permute(3, 0, 2, 1, 4)  # each (rows, heads, max_length, head_dim)
    prefix_key, prefix_value = prefix.to(qkv.dtype).unsqueeze(1).expand(-1, batch.rows, -1, -1, -1)
    key, value = torch.cat((prefix_key, key), dim=2), torch.cat((prefix_value, value), dim=2)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return batch.from_grid(context.transpose(1, 2))


def attend_rows(
    qkv: torch.Tensor, prefix: torch.Tensor, batch: Batch, bias: torch.Tensor, only_labels: bool
) -> torch.Tensor:
    """`attend` row by row, and long rows in pieces. CPU only."""
    first_queries = batch.first_labels if only_labels else [0] * batch.rows
    return _AttendRows.apply(qkv, prefix, bias, batch.lengths, first_queries)


class _AttendRows(torch.autograd.Function):
    """Flash attention (Dao et al. 2022) piece by piece. Its backward pass needs no more than the inputs, the result and the
    logarithms of the softmax's sums, and it can be taken for some of the keys only."""

    @staticmethod
    def forward(ctx, qkv, prefix, bias, lengths, first_queries):
        context = torch.zeros_like(qkv[:, :, 0], memory_format=torch.contiguous_format)
        log_sums = []
        for queries, _, query, key, value, visible in _query_chunks(qkv, prefix, bias, lengths, first_queries):
            result, log_sum = _flash(query, key, value, attn_mask=visible)
            context[queries] = result[0].transpose(0, 1)
            log_sums.append(log_sum)
        ctx.save_for_backward(qkv, prefix, bias, context, *log_sums)
        ctx.rows = lengths, first_queries
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_context):
        qkv, prefix, bias, context, *log_sums = ctx.saved_tensors
        grad_qkv, grad_prefix = torch.zeros_like(qkv), torch.zeros_like(prefix)
        prefix_length = prefix.shape[2]
        # Nothing below the first layer is trained: there only the prefix's own keys and values want a gradient.
        into_rows = ctx.needs_input_grad[0]
        pieces = _query_chunks(qkv, prefix, bias, *ctx.rows)
        for (queries, keys, query, key, value, visible), log_sum in zip(pieces, log_sums, strict=True):
            if not into_rows:
                key, value, visible = key[:, :, :prefix_length], value[:, :, :prefix_length], visible[..., :prefix_length]
            grad, result = (x[queries].transpose(0, 1).unsqueeze(0) for x in (grad_context, context))
            grads = _flash_backward(grad, query, key, value, result, log_sum, 0.0, False, attn_mask=visible)
            grad_query, grad_key, grad_value = (x[0].transpose(0, 1) for x in grads)
            grad_prefix[0] += grad_key[:prefix_length].transpose(0, 1)
            grad_prefix[1] += grad_value[:prefix_length].transpose(0, 1)
            if into_rows:
                grad_qkv[queries, :, 0] = grad_query
                grad_qkv[keys, :, 1] += grad_key[prefix_length:]
                grad_qkv[keys, :, 2] += grad_value[prefix_length:]
        return grad_qkv if into_rows else None, grad_prefix, None, None, None


def _query_chunks(qkv: torch.Tensor, prefix: torch.Tensor, bias: torch.Tensor, lengths: list[int], first_queries: list[int]):
    """Cuts packed rows into pieces of neighbouring queries and yields for each:

    where its queries stand among the packed tokens, and where the row's tokens up to the last of them, as slices;
    query, key and value (1, heads, queries or keys, head_dim); their part of the bias.
    """
    prefix_length, start = prefix.shape[2], 0
    prefix_key, prefix_value = prefix.to(qkv.dtype).unsqueeze(1)
    for length, first in zip(lengths, first_queries, strict=True):
        query, key, value = qkv[start : start + length].unsqueeze(0).permute(3, 0, 2, 1, 4)
        key, value = torch.cat((prefix_key, key), dim=2), torch.cat((prefix_value, value), dim=2)
        for begin in range(first, length, QUERIES_AT_ONCE):
            end = min(begin + QUERIES_AT_ONCE, length)
            seen = prefix_length + end
            yield (
                slice(start + begin, start + end),
                slice(start, start + end),
                query[:, :, begin:end],
                key[:, :, :seen],
                value[:, :, :seen],
                bias[:, :, begin:end, :seen],
            )
        start += length
