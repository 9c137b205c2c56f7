"""The same prefix for other frozen decoders: Llama, Qwen, Mistral, Gemma and their relatives, by one attention function.

Legend: R rows, T tokens of all rows (packed, batch.py), S tokens of the longest row, N labels, L layers, H heads of queries,
G heads of keys and values, P prefix tokens, D head_dim.

bloom.py writes out Bloom's forward. The other families need none of their own: their layers in transformers call attention
through a table of functions (AttentionInterface), and `attend_packed` is one more entry. All that transformers does around
it, such as norms, rotation, experts and MLPs, treats every token alike, so it takes packed rows as it is. For token i of a
row, in each head h of queries:

    g       = h // (H / G)                                              its group
    scores  = R(P + i) W_q x_i . [K_prefix,g ; R(P + j) W_k x_j] * scale    j = 0 .. i
    context = softmax(scores) @ [V_prefix,g ; W_v x_j]

What is different from Bloom (attention.py):

- Rotation. R(p) turns each pair of a query's or key's numbers by an angle that grows with its position p (Su et al. 2021).
  R(a) q . R(b) k depends on a - b alone. A row's positions begin at P, as if P tokens stood in front of it. The prefix is
  learned as keys are *after* rotation, so it is not turned here; there is no slope that hides it from a distance.
- Grouped heads. H / G heads of queries share the keys and values of one group, so a prefix is (L, 2, G, P, D).
- No bias but the mask: token i sees the prefix and its row up to i; in a layer with a sliding window of w, of both together
  the last w positions up to its own.
- Gemma 2 bounds scores and logits by cap * tanh(x / cap). gpt-oss gives each head a sink, a score that takes a share of the
  softmax and adds no value. Cohere and Granite multiply the logits by a constant.

The sums themselves are those of attention.py: `attend` runs over [prefix; row]. What bloom.py saves, this file saves too,
but for one thing: the MLP of the last layer runs at all positions, not at label positions alone.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, BloomForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from prefix_tuning.model.attention import aligned, as_grid, attend, attention_dtype
from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import Bloom, PackedModel, add_packed_forward, empty_prefix

PACKED = "packed_prefix"  # the name of `attend_packed` in transformers' table

# The model_type of each family that tests/model/test_decoder.py holds to transformers' own forward. Others may have layers
# that are no attention, keys and values of other shapes, a head with arithmetic of its own, or a table of positions with an
# end (GPT-2, OPT).
FAMILIES = {
    "apertus", "arcee", "cohere", "cohere2", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text", "glm", "glm4",
    "gpt_neox", "gpt_oss", "granite", "granitemoe", "hunyuan_v1_dense", "llama", "ministral", "mistral", "mixtral", "olmo",
    "olmo2", "olmo3", "olmoe", "phi", "phi3", "qwen2", "qwen3", "qwen3_moe", "seed_oss", "smollm3", "starcoder2",
}  # fmt: skip


class Decoder(PackedModel):
    """What a causal language model of transformers lacks for training a prefix. `as_packed` adds it."""

    family: type[PreTrainedModel]  # transformers' own class, such as LlamaForCausalLM
    attend_in = staticmethod(lambda layer: attend_scores)

    def packed_hidden(self, batch: Batch, prefix: torch.Tensor | None) -> torch.Tensor:
        prefix = empty_prefix(self.config).to(self.device) if prefix is None else prefix
        first = prefix.shape[3]
        positions = torch.cat([torch.arange(first, first + length) for length in batch.lengths]).to(self.device)

        @functools.cache
        def mask_of(window: int | None, dtype: torch.dtype) -> torch.Tensor:
            """All layers with this window share one mask."""
            return aligned(_mask(first, batch.max_length, window, self.device).to(dtype))

        embeddings: Any = self.get_input_embeddings()
        embedded = F.embedding(batch.input_ids, self.gathered(embeddings.weight))
        if hasattr(embeddings, "embed_scale"):  # Gemma's
            embedded = embedded * embeddings.embed_scale.to(embedded.dtype)
        with packed_attention(self.config):
            output = self.get_decoder()(
                inputs_embeds=embedded.unsqueeze(0),
                position_ids=positions.unsqueeze(0),
                use_cache=False,
                prefix=prefix,
                batch=batch,
                mask_of=mask_of,
                attend_in=self.attend_in,
            )
        return output.last_hidden_state[0].index_select(0, batch.label_positions)

    def head_inputs(self, hidden):
        head, config = self.get_output_embeddings(), self.config
        # Cohere multiplies the logits by one constant, Granite divides them by another. The head is linear, so its input may
        # be multiplied instead.
        scale = getattr(config, "logit_scale", None) or 1 / getattr(config, "logits_scaling", 1)
        cap = getattr(config, "final_logit_softcapping", None)
        bias = None if head.bias is None else self.gathered(head.bias)
        return hidden * scale, self.gathered(head.weight), bias, cap


def as_packed(model: PreTrainedModel) -> PackedModel:
    """Makes a loaded model a Bloom or a Decoder, in place. Its weights and transformers' own forward and `generate` stay."""
    if isinstance(model, BloomForCausalLM):
        model.__class__ = Bloom
        add_packed_forward(model)
    else:
        model.__class__ = decoder_class(type(model))  # type: ignore[arg-type]  # mypy takes models for unhashable
    return cast(PackedModel, model)


def layers_of(model: PackedModel) -> list[nn.Module]:
    """The decoder layers, in their order."""
    return [module for module in model.base_model.modules() if isinstance(module, GradientCheckpointingLayer)]


@functools.cache
def decoder_class(family: type) -> type:
    """The class of a family's models that are Decoders too. family: transformers' own, such as LlamaForCausalLM."""
    return type(family.__name__, (Decoder, family), {"__module__": family.__module__, "family": family})


def sliding_window(config: PreTrainedConfig) -> int | None:
    """The tokens that the layers with a sliding window see, up to the query's own; None if there are no such layers."""
    kinds = getattr(config, "layer_types", None)
    return None if kinds and "sliding_attention" not in kinds else getattr(config, "sliding_window", None)


@contextmanager
def packed_attention(config: PreTrainedConfig) -> Iterator[None]:
    """Inside, models with this config run `attend_packed`, and build no mask: transformers knows none for its name."""
    own = config._attn_implementation
    config._attn_implementation = PACKED
    try:
        yield
    finally:
        config._attn_implementation = own


# Row lengths differ from batch to batch, so it would be compiled anew for each.
@torch.compiler.disable
def attend_packed(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float | None = None,
    *,
    prefix: torch.Tensor,
    batch: Batch,
    mask_of: Callable[[int | None, torch.dtype], torch.Tensor],
    attend_in: Callable[[int], Callable[..., torch.Tensor]],
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_,
) -> tuple[torch.Tensor, None]:
    """Attention of every row over [prefix; row], as transformers calls it: (1, T, H, D), and no weights.

    query (1, H, T, D), key and value (1, G, T, D): packed, after rotation. prefix: (L, 2, G, P, D), in any dtype. s_aux:
    (H,), the sinks. `packed_hidden` gives prefix, batch, the model's attend_in, and mask_of, which returns the mask for a
    window in a dtype; the module gives the others.
    """
    layer, dtype = cast(int, module.layer_idx), attention_dtype(query.dtype, query.device)
    own_dtype, head_dim, groups = query.dtype, query.shape[3], key.shape[1]
    # `attend` divides by the root. Another scale is put into the query, and on a CPU `torch.cat` then makes all float32.
    if scaling not in (None, head_dim**-0.5):
        query = query.to(dtype) * (scaling * head_dim**0.5)
    parts = query.unflatten(1, (groups, -1)), key.unsqueeze(2), value.unsqueeze(2)
    qkv = torch.cat(parts, dim=2)[0].permute(2, 0, 1, 3)  # (T, G, H / G + 2, D)
    mask, last = mask_of(sliding_window, dtype), layer == len(prefix) - 1
    context = attend_in(layer)(qkv, prefix[layer], batch, mask, label_positions_only=last, cap=softcap, sinks=s_aux)
    return context.to(own_dtype).unsqueeze(0), None


AttentionInterface.register(PACKED, attend_packed)


def _mask(prefix_length: int, max_length: int, window: int | None, device: torch.device) -> torch.Tensor:
    """0 where a query sees a key, -inf elsewhere: (1, 1, S, P + S), float32. window: tokens that it sees; None: all."""
    keys = torch.arange(prefix_length + max_length, device=device)
    distance = keys[prefix_length:, None] - keys  # of a key before the query
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return torch.zeros_like(distance, dtype=torch.float32).masked_fill(hidden, -torch.inf)[None, None]


def attend_scores(
    qkv: torch.Tensor,
    prefix: torch.Tensor,
    batch: Batch,
    mask: torch.Tensor,
    label_positions_only: bool,
    cap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`attend` of attention.py, also with scores that torch's kernels do not know. cap, sinks: see `attention_weights`."""
    if cap is None and sinks is None:
        return attend(qkv, prefix, batch, mask, label_positions_only)
    query, key, value = as_grid(qkv, prefix, batch)
    weights = attention_weights(query, key, mask, cap, sinks)
    return batch.from_grid((weights @ value).transpose(1, 2))


def attention_weights(
    query: torch.Tensor,
    key: torch.Tensor,
    bias: torch.Tensor,
    cap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The softmax over the keys (R, H, P + S, D) for queries (R, H, S, D): (R, H, S, P + S).

    cap: of the scores. sinks: (H,), one more score in each head. With sinks, the weights of a query sum to less than 1.
    """
    scores = query @ key.mT * query.shape[3] ** -0.5
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores + bias
    if sinks is not None:
        scores = torch.cat((scores, sinks.to(scores.dtype).view(-1, 1, 1).expand(*scores.shape[:3], 1)), dim=3)
    return scores.softmax(-1)[..., : key.shape[2]]
