"""The frozen base: loading Bloom, and the forward pass that training runs through it.

transformers' Bloom computes every position of a padded batch, attention included, and logits for all of them. Training a
prefix needs less: no padding in the linear layers, and logits only where there is a label. `packed_logits` runs the frozen
layers' own weights over *packed* tokens, all rows of a batch end to end in one (total_tokens, hidden) matrix. Only attention
needs to know where a row begins, so only there the tokens are laid out as a padded (rows, max_length) grid.

Generation uses transformers' own forward and `generate`, with the prefix as `past_key_values`.
"""

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, BloomForCausalLM, DynamicCache, PreTrainedTokenizerBase
from transformers.models.bloom.modeling_bloom import BloomBlock, build_alibi_tensor

from prefix_tuning import demo
from prefix_tuning.config import UserError
from prefix_tuning.data import Batch


def resolve_device(name: str) -> torch.device:
    """The device for a --device flag. Raises UserError if this machine has no such device."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not available here: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} is none that this program runs on; use cpu, cuda or mps")
    return device


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The compute type for a --precision flag: the one place where it is decided. Raises UserError for fp16 off CUDA."""
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        ampere_or_later = torch.cuda.get_device_properties(device).major >= 8  # the first with bf16 units
        return torch.bfloat16 if ampere_or_later else torch.float16
    if precision == "fp16" and device.type != "cuda":
        raise UserError("--precision fp16 needs CUDA; use fp32 (or auto) here")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def load_base(name: str, dtype: torch.dtype, device: torch.device) -> tuple[BloomForCausalLM, PreTrainedTokenizerBase]:
    """Loads a Bloom model and its tokenizer by bundled name, hub name or path, and freezes the model.

    Returns the model in `dtype` on `device`, in eval mode, with no parameter requiring a gradient, and its tokenizer with
    left padding. Raises UserError if there is no such model or if it is no Bloom.
    """
    path = demo.resolve(name)
    try:
        kind = AutoConfig.from_pretrained(path).model_type
        if kind != "bloom":
            raise UserError(f"--model_name_or_path {name} is a {kind} model; this program tunes Bloom")
        model, report = BloomForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"--model_name_or_path {name} cannot be loaded: {str(error).strip()[:300]}") from error
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"--model_name_or_path {name} lacks {len(missing)} of its weights, such as {missing[0]}")
    return model.requires_grad_(False).eval().to(device), tokenizer


def prefix_cache(prefix: torch.Tensor, rows: int, dtype: torch.dtype) -> DynamicCache:
    """The prefix as transformers' past_key_values, the same for all `rows` of a batch.

    prefix: (layers, 2, heads, tokens, head_dim). A forward pass extends the cache in place: make a new one for each call.
    """
    pairs = prefix.to(dtype).unsqueeze(2).expand(-1, -1, rows, -1, -1, -1)
    return DynamicCache([(key, value) for key, value in pairs])


@torch.no_grad()
def text_prefix(
    model: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, num_virtual_tokens: int
) -> torch.Tensor:
    """The keys and values that the frozen model computes for `text`: (layers, 2, heads, num_virtual_tokens, head_dim).

    A text of fewer tokens is repeated, a longer one cut. Raises UserError if the text has no token at all.
    """
    ids = tokenizer(text).input_ids
    if not ids:
        raise UserError("--init_text is empty; --prefix_init text needs a text of at least one token")
    ids = (ids * -(-num_virtual_tokens // len(ids)))[:num_virtual_tokens]
    cache = model(torch.tensor([ids], device=model.device), use_cache=True).past_key_values
    return torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]).float()


def packed_logits(
    model: BloomForCausalLM, batch: Batch, prefix: torch.Tensor | None, gradient_checkpointing: bool = False
) -> torch.Tensor:
    """Logits (labels, vocab_size) at the labelled positions of a packed batch, in the model's dtype.

    prefix: (layers, 2, heads, tokens, head_dim), or None for the base without one. Same numbers as transformers' forward
    with the prefix as past_key_values and the rows padded to one length. gradient_checkpointing keeps only each layer's
    input for the backward pass and computes the layer again there: the same bits, less memory, a third more work.
    """
    body = model.transformer
    hidden = body.word_embeddings_layernorm(body.word_embeddings(batch.input_ids))
    prefix_length = 0 if prefix is None else prefix.shape[3]
    bias = attention_bias(model.config.n_head, prefix_length, batch.max_length, hidden)
    for index, block in enumerate(body.h):
        prefix_pair = None if prefix is None else prefix[index].to(hidden.dtype)
        # After the last attention no token looks at another: only positions with a label go on.
        wanted = batch.label_positions if index == len(body.h) - 1 else None
        arguments = (block, hidden, batch, bias, prefix_pair, wanted)
        if gradient_checkpointing:
            hidden = checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            hidden = _block(*arguments)
    return model.lm_head(body.ln_f(hidden))


def loss_sum(
    model: BloomForCausalLM, batch: Batch, prefix: torch.Tensor | None, gradient_checkpointing: bool = False
) -> torch.Tensor:
    """Cross-entropy in nats, summed over the labels of the batch: a scalar, at least float32."""
    logits = packed_logits(model, batch, prefix, gradient_checkpointing)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    return F.cross_entropy(logits, batch.labels, reduction="sum")


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
    bias = (slopes * distance).masked_fill(distance > 0, -torch.inf).to(like.dtype)
    return bias.unsqueeze(0)  # of three axes only, CPU attention takes its slow path


def _block(
    block: BloomBlock,
    hidden: torch.Tensor,
    batch: Batch,
    bias: torch.Tensor,
    prefix_pair: torch.Tensor | None,
    wanted: torch.Tensor | None,
) -> torch.Tensor:
    """One decoder layer over packed tokens: (total_tokens, hidden) -> (total_tokens, hidden).

    wanted: the positions whose output is needed, if not all: the result is then (positions, hidden).
    """
    normed = block.input_layernorm(hidden)
    residual = normed if block.apply_residual_connection_post_layernorm else hidden
    context = _attention(block.self_attention, normed, batch, bias, prefix_pair)
    if wanted is not None:
        context, residual = context.index_select(0, wanted), residual.index_select(0, wanted)
    hidden = block.self_attention.dense(context) + residual

    normed = block.post_attention_layernorm(hidden)
    residual = normed if block.apply_residual_connection_post_layernorm else hidden
    inner = F.gelu(block.mlp.dense_h_to_4h(normed), approximate="tanh")  # Bloom's GELU, in one kernel
    return block.mlp.dense_4h_to_h(inner) + residual


def _attention(
    attention: nn.Module, normed: torch.Tensor, batch: Batch, bias: torch.Tensor, prefix_pair: torch.Tensor | None
) -> torch.Tensor:
    """Attention of every row over [prefix; row]: (total_tokens, hidden) -> (total_tokens, hidden)."""
    grid = batch.to_grid(attention.query_key_value(normed))
    rows, length, _ = grid.shape
    grid = grid.view(rows, length, attention.num_heads, 3, attention.head_dim)
    query, key, value = grid.permute(3, 0, 2, 1, 4)  # each (rows, heads, length, head_dim)
    if prefix_pair is not None:
        prefix_key, prefix_value = prefix_pair.unsqueeze(1).expand(-1, rows, -1, -1, -1)
        key, value = torch.cat((prefix_key, key), dim=2), torch.cat((prefix_value, value), dim=2)
    context = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    return batch.from_grid(context.transpose(1, 2).reshape(rows, length, -1))
