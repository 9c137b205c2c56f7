"""The frozen base: loading Bloom, and the forward pass that training runs through it.

transformers' Bloom computes every position of a padded batch, attention included, and logits for all of them. Training a
prefix needs less: no padding in the linear layers, and logits only where there is a label. `packed_hidden` runs the frozen
layers' own weights over *packed* tokens, all rows of a batch end to end in one (total_tokens, hidden) matrix. Only attention
needs to know where a row begins (attention.py), and the loss never holds all its logits at once.

Generation (generation.py) uses transformers' own forward and `generate`, with the prefix as `past_key_values`.
"""

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoTokenizer, BloomForCausalLM, Cache, DynamicCache, PreTrainedTokenizerBase
from transformers.models.bloom.modeling_bloom import BloomBlock
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from prefix_tuning import demo
from prefix_tuning.attention import attend, attention_bias
from prefix_tuning.checkpoint import portable_name
from prefix_tuning.config import UserError
from prefix_tuning.data import Batch
from prefix_tuning.distributed import is_main
from prefix_tuning.sharding import begin_pass, call, first_row, is_sharded, load_sharded, sum_of_parts, whole


def resolve_device(name: str) -> torch.device:
    """The device for a --device flag. Raises UserError if this machine has no such device.

    auto: CUDA; else mps, where there is one process; else the CPU. Of several processes each takes a CUDA device of its own.
    """
    several = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and not several else "cpu"
    if several and name not in ("cuda", "cpu"):
        raise UserError(f"--device {name} cannot be shared by several processes; use cuda or cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not available here: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} is none that this program runs on; use cpu, cuda or mps")
    return device


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The compute type for a --precision flag: the one place where it is decided. Raises UserError for fp16 off CUDA."""
    if precision == "auto":
        if device.type != "cuda":
            return torch.float32
        ampere_or_later = torch.cuda.get_device_properties(device).major >= 8  # the first with bf16 units
        return torch.bfloat16 if ampere_or_later else torch.float16
    if precision == "fp16" and device.type != "cuda":
        raise UserError("--precision fp16 needs CUDA; use fp32 (or auto) here")
    return PRECISIONS[precision]


# For a look at which files of a model are here.
_ONLY_LOOK = {"local_files_only": True, "_raise_exceptions_for_missing_entries": False}


def load_base(
    name: str, dtype: torch.dtype, device: torch.device, parts: int | None = None
) -> tuple[BloomForCausalLM, PreTrainedTokenizerBase]:
    """Loads a Bloom model and its tokenizer by bundled name, hub name or path, and freezes the model.

    parts: how many processes share the weights, each loading a part only (sharding.py); None: each loads all. Returns the
    model in `dtype` on `device`, in eval mode, with no parameter requiring a gradient, and its tokenizer with left padding.
    Code that comes with a model is never run, and a pickled checkpoint is read only the way that runs none. Raises UserError
    if there is no such model, if it is broken, if it is no Bloom, or if its tokenizer cannot serve it.
    """
    path = demo.resolve(name)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type != "bloom":
            raise UserError(f"--model_name_or_path {name} is a {config.model_type} model; this program tunes Bloom")
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=False)
        _check_tokenizer(name, tokenizer, config.vocab_size)
        if parts:
            return load_sharded(path, config, dtype, device, parts), tokenizer
        model, report = BloomForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except UserError:
        raise
    except Exception as error:  # a broken file can make transformers and tokenizers raise anything
        raise UserError(f"--model_name_or_path {name} cannot be loaded: {str(error).strip()[:300]}") from error
    safe = any(cached_file(path, file, **_ONLY_LOOK) for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if not safe and is_main():
        print(f"{name}: its weights are a pickled .bin file; safetensors is the safer format", file=sys.stderr)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"--model_name_or_path {name} lacks {len(missing)} of its weights, such as {missing[0]}")
    return model.requires_grad_(False).eval().to(device), tokenizer


def _check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises UserError unless it can tokenise rows for a base of so many embeddings."""
    if not tokenizer.is_fast:
        fault = "has no tokenizer.json; save it in that form"
    elif tokenizer.eos_token_id is None:
        fault = "has no EOS token, with which every answer ends; name one as eos_token in tokenizer_config.json"
    elif (tokens := max(tokenizer.get_vocab().values(), default=-1) + 1) > vocab_size:
        fault = f"has {tokens} tokens, but the base has embeddings for {vocab_size}; use the one that belongs to it"
    else:
        return
    raise UserError(f"--model_name_or_path {name}: its tokenizer {fault}")


def fingerprint(model: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, int | str | dict | None]:
    """What tells one base from another: its name, its shape, a hash over 64 weights of every tensor, one over the vocabulary
    of the tokenizer, and the ids of its special tokens.

    The weights are rounded to bfloat16 first, so that the hash does not depend on the compute type; those that were rounded
    to float16 could not be compared, and get None. So does what belongs to the tokenizer where none is given.
    """
    shape = {name: getattr(model.config, name) for name in ("n_layer", "n_head", "hidden_size", "vocab_size")}
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        weights.update(name.encode() + _sample(tensor).float().numpy().tobytes())
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())) if tokenizer else ""
    special = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad", "unk")} if tokenizer else None
    return {
        "name_or_path": portable_name(model.name_or_path),
        **shape,
        "weights": None if model.dtype == torch.float16 else weights.hexdigest(),
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest() if tokenizer else None,
        "special_tokens": special,
    }


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Some 64 of a tensor's numbers, in bfloat16, on the CPU. Of a sharded one, all processes take part in it."""
    stride = tensor.numel() // 64 | 1  # odd: it passes through all columns
    if not isinstance(tensor, DTensor):
        return tensor.flatten()[::stride].bfloat16().cpu()
    places = torch.arange(0, tensor.numel(), stride) - first_row(tensor) * (tensor.numel() // tensor.shape[0])
    local = tensor.to_local().flatten()
    mine = (places >= 0) & (places < len(local))
    bits = torch.zeros(len(places), dtype=torch.int32)  # whole numbers, of which all but one are zero: the sum is exact
    bits[mine] = local[places[mine].to(local.device)].bfloat16().cpu().view(torch.int16).int()
    return sum_of_parts(bits, tensor).short().view(torch.bfloat16)


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


def held_per_token(model: BloomForCausalLM) -> int:
    """Bytes that a forward pass holds per token for its backward pass.

    A layer holds about ten numbers per token and hidden unit: four before the GELU, query, key and value, what attention
    returns, and what each of the two layer norms is given.
    """
    return 10 * model.config.hidden_size * model.config.n_layer * model.dtype.itemsize


def max_tokens_per_batch(model: BloomForCausalLM, wanted: int | None = None) -> int:
    """Tokens of one forward pass: those wanted, or what the device and the model suggest (tests/benchmarks/NOTES.md).

    What a pass holds for its backward pass stays within half a GiB on a CPU, where more than 640 tokens gain little;
    elsewhere within two GiB, or eight if every pass has to gather the base.
    """
    on_cpu = model.device.type == "cpu"
    budget = 29 if on_cpu else 33 if is_sharded(model) else 31
    fitting = max(1, 2**budget // held_per_token(model))
    return wanted or (min(640, fitting) if on_cpu else fitting)


def is_out_of_memory(error: Exception) -> bool:
    classes = (MemoryError, torch.OutOfMemoryError)
    return isinstance(error, classes) or "can't allocate memory" in str(error)  # a CPU's is a plain RuntimeError


@torch.no_grad()
def text_prefix(
    model: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, text: str, num_virtual_tokens: int
) -> torch.Tensor:
    """The keys and values that the frozen model computes for `text`: (layers, 2, heads, num_virtual_tokens, head_dim).

    A text of fewer tokens is repeated, a longer one cut. Raises UserError if the text has no token at all.
    """
    ids = tokenizer(text, split_special_tokens=True).input_ids
    if not ids:
        raise UserError("--init_text is empty; --prefix_init text needs a text of at least one token")
    ids = (ids * -(-num_virtual_tokens // len(ids)))[:num_virtual_tokens]
    cache = model(torch.tensor([ids], device=model.device), use_cache=True).past_key_values
    return torch.stack([torch.stack((layer.keys[0], layer.values[0])) for layer in cache.layers]).float()


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
    hidden = body.word_embeddings_layernorm(F.embedding(batch.input_ids, whole(body.word_embeddings.weight)))
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
    return _FrozenHeadLoss.apply(hidden, whole(model.lm_head.weight), batch.labels)


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
