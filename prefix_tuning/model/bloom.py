"""Frozen Bloom with a second forward pass, for training a prefix.

Legend: R rows, T tokens of all rows (packed, batch.py), N labels, L layers, H heads, P prefix tokens, D head_dim,
E = H * D hidden size, V vocabulary.

plain.py gives the prefix to transformers' own forward as a cache of past keys and values. That forward computes every
position of a padded batch, and logits for all of them. Training a prefix needs less, so `Bloom.label_losses` runs the same
weights as follows:

- Tokens are packed: linear layers and layer norms see (T, E) without padding; only attention knows where rows begin.
- After the attention of the last layer, only the N label positions are left: no other output is part of the loss, and from
  there on no position reads another. On a CPU, that attention itself starts at a row's first label.
- Logits exist at these N only, and for a slice of them at a time, because a (N, V) matrix is often the largest tensor of
  all (FrozenHeadLoss).

The base does not change: its parameters have requires_grad False (base_model/loading.py), the optimizer gets the encoder's
parameters only (training/state.py), and a backward pass through this file yields a gradient for `prefix` alone. Gradients
still pass *through* the frozen layers, because layer l + 1 reads what the prefix changed in layer l.

Nothing runs under autocast. With a base in bf16:

                                              on CUDA     on a CPU
    encoder, prefix, optimizer                float32     float32      encoder.py says why
    hidden states, linear layers, norms       bfloat16    bfloat16     the dtype of the base
    attention, and the prefix in it           bfloat16    either       `attention_dtype`, `row_dtype`
    the matmuls of the head, and back         bfloat16    bfloat16     FrozenHeadLoss
    softmax of the logits, losses             float32     float32      FrozenHeadLoss
    gradient of the prefix, over all passes   float32     float32      training/loop.py

A base in fp16 runs on CUDA only, with float16 in place of bfloat16, and its loss is scaled (training/loop.py).

decoder.py does the same for other families of models, with the same encoder, loop and files.
"""

from collections.abc import Callable
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from transformers import BloomForCausalLM, Cache, DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.models.bloom.modeling_bloom import BloomBlock

from prefix_tuning.model.attention import attend, attention_bias
from prefix_tuning.model.batch import Batch
from prefix_tuning.model.encoder import key_value_shape


class PackedBlock(BloomBlock):
    """A decoder layer of Bloom that can also run over packed tokens."""

    def forward_packed(
        self,
        hidden: torch.Tensor,
        batch: Batch,
        bias: torch.Tensor,
        prefix: torch.Tensor,
        attend: Callable[..., torch.Tensor],
        label_positions_only: bool,
    ) -> torch.Tensor:
        """(T, E) -> (T, E), or (N, E) if label_positions_only. prefix: this layer's, (2, H, P, D)."""
        attention, mlp = self.self_attention, self.mlp
        normed = self.input_layernorm(hidden)
        residual = normed if self.apply_residual_connection_post_layernorm else hidden
        qkv = attention.query_key_value(normed).view(-1, attention.num_heads, 3, attention.head_dim)
        context = attend(qkv, prefix, batch, bias, label_positions_only).flatten(1).to(hidden.dtype)
        if label_positions_only:
            context, residual = (x.index_select(0, batch.label_positions) for x in (context, residual))
        hidden = attention.dense(context) + residual

        normed = self.post_attention_layernorm(hidden)
        residual = normed if self.apply_residual_connection_post_layernorm else hidden
        inner = F.gelu(mlp.dense_h_to_4h(normed), approximate="tanh")  # Bloom's GELU, in one kernel instead of eight
        return mlp.dense_4h_to_h(inner) + residual


class Objective(Protocol):
    """What a prefix is trained and measured by: a PackedModel by its own loss, or a Distillation (distillation.py)."""

    @property
    def device(self) -> torch.device: ...

    def label_losses(self, batch: Batch, prefix: torch.Tensor | None) -> torch.Tensor:
        """The loss in nats at every label of the batch: (N,), at least float32. prefix: (L, 2, H, P, D), or None."""
        ...

    def label_scores(self, batch: Batch, prefix: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`label_losses`, without gradients, and the likeliest token at each label: (N,), int64."""
        ...


class PackedModel(PreTrainedModel, GenerationMixin):
    """A frozen causal language model as the training loop knows it: Bloom below, or a Decoder (decoder.py)."""

    # Override point: assign a function that takes the index of a layer and returns this layer's `attend`, for example one
    # that shows attention weights (study/attention.py).
    attend_in: Callable[[int], Callable[..., torch.Tensor]] = staticmethod(lambda layer: attend)
    # Returns the full weight of embeddings or head; sharding replaces it with a gather (base_model/sharding.py).
    gathered: Callable[[torch.Tensor], torch.Tensor] = staticmethod(lambda weight: weight)

    def label_losses(self, batch: Batch, prefix: torch.Tensor | None) -> torch.Tensor:
        """Cross-entropy in nats of every label of the batch: (N,), at least float32. prefix: see `packed_hidden`."""
        labels, batch = len(batch.labels), self.filled(batch)
        losses = self.head_losses(self.packed_hidden(batch, prefix), batch.labels)
        # Filler labels come last. Without their losses, they have no gradient either.
        return losses[:labels]

    @torch.no_grad()
    def label_scores(self, batch: Batch, prefix: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`label_losses`, without gradients, and the likeliest token at each label: (N,), int64."""
        labels, batch = len(batch.labels), self.filled(batch)
        losses, likeliest = self.head_scores(self.packed_hidden(batch, prefix), batch.labels)
        return losses[:labels], likeliest[:labels]

    def filled(self, batch: Batch) -> Batch:
        """The batch, with filler where oneDNN prepares and keeps a kernel for each shape of a bf16 matmul."""
        return batch.filled(64) if self.dtype == torch.bfloat16 and self.device.type == "cpu" else batch

    def packed_hidden(self, batch: Batch, prefix: torch.Tensor | None) -> torch.Tensor:
        """The input of the head at the label positions: (N, E), in the model's dtype.

        prefix: (L, 2, H, P, D), or None for the base alone. transformers' forward gives the same numbers over padded
        rows, with the prefix as past keys and values.
        """
        raise NotImplementedError

    def head_losses(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Cross-entropy of the head's logits for hidden (N, E) against labels (N,): (N,), at least float32."""
        hidden, weight, bias, cap = self.head_inputs(hidden)
        return FrozenHeadLoss.apply(hidden, weight, labels, bias, cap)

    def head_scores(self, hidden: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`head_losses`, and the likeliest token at each label: (N,) and (N,), int64."""
        hidden, weight, bias, cap = self.head_inputs(hidden)
        losses, likeliest = [], []
        for part, expected in zip(*(x.split(FrozenHeadLoss.LABELS_AT_ONCE) for x in (hidden, labels)), strict=True):
            logits = head_logits(part, weight, bias, cap)
            losses.append(F.cross_entropy(logits, expected, reduction="none"))
            likeliest.append(logits.argmax(dim=1))  # of equals the first, as in greedy generation
        return torch.cat(losses), torch.cat(likeliest)

    def head_inputs(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, float | None]:
        """The arguments with which `head_logits` returns this model's logits for the output of `packed_hidden`."""
        raise NotImplementedError


class Bloom(PackedModel, BloomForCausalLM):
    """BloomForCausalLM, and its packed forward. transformers' own forward and `generate` stay as they are."""

    def __init__(self, config):
        super().__init__(config)
        add_packed_forward(self)

    def packed_hidden(self, batch: Batch, prefix: torch.Tensor | None) -> torch.Tensor:
        body, blocks = self.transformer, cast(list[PackedBlock], self.transformer.h)
        hidden = body.word_embeddings_layernorm(F.embedding(batch.input_ids, self.gathered(body.word_embeddings.weight)))
        prefix = empty_prefix(self.config).to(hidden) if prefix is None else prefix
        bias = attention_bias(self.config.n_head, prefix.shape[3], batch.max_length, hidden)
        for layer, block in enumerate(blocks):
            last = layer == len(blocks) - 1
            hidden = block.forward_packed(
                hidden, batch, bias, prefix[layer], self.attend_in(layer), label_positions_only=last
            )
        return body.ln_f(hidden)

    def head_inputs(self, hidden):
        return hidden, self.gathered(self.lm_head.weight), None, None


def add_packed_forward(model: BloomForCausalLM) -> None:
    """Gives the layers of a Bloom `forward_packed`, in place. Their weights and transformers' own forward stay."""
    for block in model.transformer.h:
        # Sharding derives its own class from PackedBlock, which must stay.
        if not isinstance(block, PackedBlock):
            block.__class__ = PackedBlock


def head_logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, cap: float | None = None
) -> torch.Tensor:
    """The logits of hidden (N, E) by the head's weight (V, E): (N, V), at least float32.

    bias: (V,), which few families have. cap: bounds the logits by cap * tanh(logits / cap), as in Gemma 2.
    """
    logits = F.linear(hidden, weight, bias).to(torch.promote_types(hidden.dtype, torch.float32))
    return logits if cap is None else cap * torch.tanh(logits / cap)


class FrozenHeadLoss(torch.autograd.Function):
    """Cross-entropy of `head_logits` of hidden (N, E) against labels (N,), for each label.

        loss_n = logsumexp(logits_n) - logits_n[label_n]        d loss_n / d logits_n = softmax(logits_n) - onehot(label_n)

    A cap multiplies this by its own derivative, 1 - (logits_n / cap)^2.

    The weight is frozen, so only `hidden` gets a gradient. The forward pass computes it, while a slice's logits exist
    anyway, and the backward pass scales it. So at most LABELS_AT_ONCE rows of logits exist at any time. The idea is Liger
    Kernel's (Hsu et al. 2024, arXiv 2410.10989).

    fp16 has no number below 6e-8, and in a vocabulary of 250,000 tokens most probabilities are smaller. The loss scale comes
    too late for them, because it enters in the backward pass. So softmax - onehot is multiplied by FP16_SCALE before it is
    rounded to fp16: as much as a loss scale of 2**16 gives each of 64 labels, whose mean is the loss. `grad` stays float32.

    Raises ValueError if weight or bias require a gradient.
    """

    LABELS_AT_ONCE = 256  # enough to keep the matmuls busy
    FP16_SCALE = 2.0**10

    @staticmethod
    def forward(ctx, hidden, weight, labels, bias=None, cap=None):
        if any(ctx.needs_input_grad[1:]):
            raise ValueError("the lm_head must be frozen: this loss has no gradient for it")

        def cross_entropy(part, log_probabilities, wants_error):
            label = labels[part].unsqueeze(1)
            losses, error = -log_probabilities.gather(1, label).squeeze(1), None
            if wants_error:
                error = log_probabilities.exp_().scatter_add_(1, label, -torch.ones_like(label, dtype=losses.dtype))
            return losses, error

        return FrozenHeadLoss.slice_by_slice(ctx, hidden, weight, bias, cap, cross_entropy)

    @staticmethod
    def slice_by_slice(ctx, hidden, weight, bias, cap, loss_of) -> torch.Tensor:
        """The losses of hidden (N, E): (N,), at least float32. Their gradient in hidden is kept for the backward pass.

        loss_of: from a slice of N, its log-probabilities (n, V), which it may overwrite, and whether a gradient is wanted,
        to the losses (n,) and their gradient in the logits (n, V), both as if there were no cap.
        """
        losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        grad = torch.empty_like(hidden, dtype=losses.dtype) if ctx.needs_input_grad[0] else None
        for start in range(0, len(hidden), FrozenHeadLoss.LABELS_AT_ONCE):
            part = slice(start, start + FrozenHeadLoss.LABELS_AT_ONCE)
            logits = head_logits(hidden[part], weight, bias, cap)
            losses[part], error = loss_of(part, logits.log_softmax(-1), grad is not None)
            if grad is not None:
                grad[part] = FrozenHeadLoss._grad_hidden(error, logits, weight, cap)
        ctx.save_for_backward(grad)
        ctx.dtype = hidden.dtype
        return losses

    @staticmethod
    def _grad_hidden(error: torch.Tensor, logits: torch.Tensor, weight: torch.Tensor, cap: float | None) -> torch.Tensor:
        """From the gradient in the logits without a cap, `error` (N, V), which it overwrites, to that in hidden: (N, E)."""
        if cap is not None:
            error *= 1 - (logits / cap) ** 2
        if weight.dtype != torch.float16:
            return error.to(weight.dtype) @ weight
        error *= FrozenHeadLoss.FP16_SCALE
        return (error.to(weight.dtype) @ weight).to(error.dtype) / FrozenHeadLoss.FP16_SCALE

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_losses):
        (grad,) = ctx.saved_tensors
        return (grad * grad_losses.unsqueeze(1)).to(ctx.dtype), None, None, None, None


def empty_prefix(config: PreTrainedConfig) -> torch.Tensor:
    """The prefix of no tokens for a base of this configuration, which is the base alone: (L, 2, H, 0, D), float32."""
    layers, heads, head_dim = key_value_shape(config)
    return torch.empty(layers, 2, heads, 0, head_dim)


def prefix_cache(prefixes: list[torch.Tensor], cache: Cache | None = None) -> tuple[Cache, torch.Tensor]:
    """Prefixes, one for each row of a batch, as transformers' cache of past keys and values, and their attention mask.

    prefixes: each (L, 2, H, P, D); shorter ones are padded on the left. cache: an empty one to fill; None: a new
    DynamicCache. A forward pass extends a cache in place, so each call needs a new one. The mask is (R, longest P), int64, 0
    where a prefix is padded; the mask of the text follows it.
    """
    longest = max(prefix.shape[3] for prefix in prefixes)
    mask = torch.tensor([[0] * (longest - prefix.shape[3]) + [1] * prefix.shape[3] for prefix in prefixes], dtype=torch.long)
    rows = torch.stack([F.pad(prefix, (0, 0, longest - prefix.shape[3], 0)) for prefix in prefixes], dim=2)
    cache = DynamicCache() if cache is None else cache
    for layer, (key, value) in enumerate(rows):
        cache.update(key, value, layer)
    return cache, mask.to(rows.device)


def cached_pairs(cache: Cache) -> torch.Tensor:
    """The keys and values of a cache's first row, as a prefix: (L, 2, H, tokens, D)."""
    layers = cast(list[DynamicLayer], cache.layers)
    return torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in layers])  # type: ignore[index]
