"""BLOOM"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers import BloomForCausalLM, Cache, DynamicCache
from transformers.models.bloom.modeling_bloom import BloomBlock

from prefix_tuning.base_model.sharding import begin_pass, call, gathered
from prefix_tuning.model.attention import attend, attention_bias
from prefix_tuning.model.batch import Batch


def prefix_cache(prefixes: list[torch.Tensor], cache: Cache | None = None) -> tuple[Cache, torch.Tensor]:
    """Prefixes, one for each row of a batch, as transformers' past_key_values, and the attention mask that goes with them.

    prefixes: each (layers, 2, heads, tokens, head_dim); shorter ones are padded on the left. The mask is (rows, longest),
    int64, 0 where there is padding; the text's own mask belongs behind it. cache: an empty one to fill; None: a new
    DynamicCache. A forward pass extends it in place: make a new one for each call.
    """
    longest = max(prefix.shape[3] for prefix in prefixes)
    mask = torch.tensor([[0] * (longest - prefix.shape[3]) + [1] * prefix.shape[3] for prefix in prefixes])
    rows = torch.stack([F.pad(prefix, (0, 0, longest - prefix.shape[3], 0)) for prefix in prefixes], dim=2)
    cache = DynamicCache() if cache is None else cache
    for layer, (key, value) in enumerate(rows):
        cache.update(key, value, layer)
    return cache, mask.to(rows.device)


def run_block(
    block: BloomBlock, hidden: torch.Tensor, batch: Batch, bias: torch.Tensor, prefix: torch.Tensor, only_labels: bool
) -> torch.Tensor:
    """One decoder layer over packed tokens: (total_tokens, hidden) -> (total_tokens, hidden), or (labels, hidden) if only
    the labelled positions are wanted. prefix: (2, heads, tokens, head_dim)."""
    attention, mlp = block.self_attention, block.mlp
    normed = block.input_layernorm(hidden)
    residual = normed if block.apply_residual_connection_post_layernorm else hidden
    qkv = attention.query_key_value(normed).view(-1, attention.num_heads, 3, attention.head_dim)
    context = attend(qkv, prefix, batch, bias, only_labels).flatten(1)
    if only_labels:
        context, residual = (x.index_select(0, batch.label_positions) for x in (context, residual))
    hidden = attention.dense(context) + residual

    normed = block.post_attention_layernorm(hidden)
    residual = normed if block.apply_residual_connection_post_layernorm else hidden
    inner = F.gelu(mlp.dense_h_to_4h(normed), approximate="tanh")  # Bloom's GELU, in one kernel
    return mlp.dense_4h_to_h(inner) + residual


def block_runner(gradient_checkpointing: bool = False, torch_compile: bool = False) -> Callable[..., torch.Tensor]:
    """`run_block`, or what behaves like it.

    gradient_checkpointing keeps only a layer's input for the backward pass and computes the layer again there: the same
    bits, less memory, a third more work. torch_compile fuses what lies between the matrix products, once for all layers and
    all lengths; it starts to compile at its first call.
    """
    run = torch.compile(run_block, dynamic=True) if torch_compile else run_block
    if gradient_checkpointing:
        return functools.partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    return run


def packed_hidden(
    model: BloomForCausalLM, batch: Batch, prefix: torch.Tensor | None, run: Callable[..., torch.Tensor] = run_block
) -> torch.Tensor:
    """What the lm_head reads at the labelled positions of a packed batch: (labels, hidden), in the model's dtype.

    prefix: (layers, 2, heads, tokens, head_dim), or None for the base without one. run: a `block_runner`. Same numbers as
    transformers' forward with the prefix as past_key_values and the rows padded to one length.
    """
    body, shape = model.transformer, model.config
    hidden = body.word_embeddings_layernorm(F.embedding(batch.input_ids, gathered(body.word_embeddings.weight)))
    if prefix is None:
        prefix = hidden.new_empty(shape.n_layer, 2, shape.n_head, 0, shape.hidden_size // shape.n_head)
    bias = attention_bias(shape.n_head, prefix.shape[3], batch.max_length, hidden)
    for index, block in enumerate(body.h):
        # After the last attention no token looks at another: only positions with a label go on.
        hidden = call(run, block, hidden, batch, bias, prefix[index], index == len(body.h) - 1)
    return body.ln_f(hidden)


def label_losses(
    model: BloomForCausalLM, batch: Batch, prefix: torch.Tensor | None, run: Callable[..., torch.Tensor] = run_block
) -> torch.Tensor:
    """Cross-entropy in nats of every label of the batch: (labels,), at least float32. Arguments: `packed_hidden`."""
    begin_pass(model)
    return call(_label_losses, model, batch, prefix, run)


def _label_losses(model, batch, prefix, run):
    hidden = packed_hidden(model, batch, prefix, run)
    return _FrozenHeadLoss.apply(hidden, gathered(model.lm_head.weight), batch.labels)


class _FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy of hidden (labels, hidden) @ weight (vocab_size, hidden).T against labels (labels,), label by label.

    The weight is frozen, so the only gradient is that of `hidden`, and it can be had slice by slice as soon as a slice's
    logits are known: a whole (labels, vocab_size) tensor never exists. (The idea is Liger Kernel's.)
    """

    LABELS_AT_ONCE = 256  # enough to keep the matrix products busy

    @staticmethod
    def forward(ctx, hidden, weight, labels):
        if ctx.needs_input_grad[1]:
            raise ValueError("the lm_head must be frozen: this loss has no gradient for it")
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        losses = hidden.new_empty(len(labels), dtype=torch.promote_types(hidden.dtype, torch.float32))
        for start in range(0, len(labels), _FrozenHeadLoss.LABELS_AT_ONCE):
            part = slice(start, start + _FrozenHeadLoss.LABELS_AT_ONCE)
            log_probabilities = F.linear(hidden[part], weight).to(losses.dtype).log_softmax(-1)
            label = labels[part].unsqueeze(1)
            losses[part] = -log_probabilities.gather(1, label).squeeze(1)
            if grad is not None:
                error = log_probabilities.exp_().scatter_add_(1, label, -torch.ones_like(label, dtype=losses.dtype))
                grad[part] = error.to(weight.dtype) @ weight
        ctx.save_for_backward(grad)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
        (grad,) = ctx.saved_tensors
        return grad * grad_losses.unsqueeze(1).to(grad.dtype), None, None
