"""Which base a prefix belongs to: fingerprints, and names that are valid on any machine."""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prefix_tuning import bundled
from prefix_tuning.base_model.sharding import first_row, sum_of_parts
from prefix_tuning.errors import UserError
from prefix_tuning.model.encoder import key_value_shape
from prefix_tuning.text import named

# Stands before the name of a file or folder that only the machine of the training has.
LOCAL = "local:"


def portable_name(name: str) -> str:
    """The name that files record for a model or dataset.

    A bundled or hub name stays as it is; of a path, only the last part is kept: /home/me/rows.jsonl is local:rows.jsonl.
    """
    path = Path(name)
    # `named`, because JSON cannot hold a folder name whose bytes are not UTF-8, such as one from an old Chinese archive.
    if name and (path.exists() or path.is_absolute()):
        return bundled.name_of(path.resolve()) or LOCAL + named(path.resolve().name)
    return name


def base_of(prefix_name: str, recorded: str | None) -> str:
    """The recorded name of a prefix's base. Raises UserError if it is missing, or a path on the machine of the training."""
    if not recorded or recorded.startswith(LOCAL):
        known = f"the local model {recorded.removeprefix(LOCAL)!r}" if recorded else "a model that it does not name"
        raise UserError(f"{prefix_name}: was trained on {known}; say where it is: --model_name_or_path PATH")
    return recorded


def check_base(
    prefix_shape: tuple[int, ...], recorded: dict[str, Any], base: dict[str, Any], prefix_name: str, force: bool
) -> None:
    """Raises UserError unless a prefix (layers, 2, heads, tokens, head_dim) can be used on a base.

    recorded: the `fingerprint` of the base that the prefix was trained on. base: the fingerprint of the base in use.

    Layers, heads and head_dim must be equal. Other weights, another tokenizer or other special tokens are refused; with
    `force`, a line on stderr names the difference instead. Another name is only mentioned on stderr, and so is a prefix
    without a fingerprint, such as one that PEFT has saved.
    """
    layers, _, heads, _, head_dim = prefix_shape
    needed = (base["n_layer"], base["n_head"], base["hidden_size"] // base["n_head"])
    if (layers, heads, head_dim) != needed:
        raise UserError(
            f"{prefix_name}: a prefix for {layers} layers of {heads} x {head_dim}, but {base['name_or_path']} has "
            "{} layers of {} x {}; use the base that it was trained on".format(*needed)
        )
    name = recorded.get("name_or_path")
    if "tokenizer" not in recorded:
        version = f", revision {recorded['revision']}" if "revision" in recorded else ""
        print(f"{prefix_name}: has no fingerprint of the base that it belongs to; it names {name}{version}", file=sys.stderr)
        return
    # An entry that is None or missing cannot be compared: the weights of a base in float16, or the special tokens of a
    # prefix that an earlier version saved.
    keys = ("weights", "tokenizer", "special_tokens")
    pairs = {key: (_compared(recorded.get(key)), _compared(base[key])) for key in keys}
    differing = [key.replace("_", " ") for key, (theirs, ours) in pairs.items() if theirs and ours and theirs != ours]
    message = f"{prefix_name}: was trained on {name}; {base['name_or_path']} has the same shape, but not the same "
    if differing and not force:
        raise UserError(f"{message}{' and '.join(differing)}; use the right base, or add --force to use it anyway")
    if differing or name != base["name_or_path"]:
        print(f"{message}{' and '.join(differing) or 'name'}", file=sys.stderr)


def _compared(entry: Any) -> Any:
    """A fingerprint's entry without the token that pads, which makes no difference because padding is masked."""
    return {kind: token for kind, token in entry.items() if kind != "pad"} if isinstance(entry, dict) else entry


def fingerprint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> dict[str, Any]:
    """Tells one base from another, in a form that JSON can hold. All processes that share a sharded base call this together.

        name_or_path                                its `portable_name`
        n_layer, n_head, hidden_size                the shape of its keys and values: layers, heads, heads * head_dim
        vocab_size                                  the number of its tokens
        weights                                     a hash over about 64 numbers of every tensor; None in float16
        tokenizer                                   a hash over the vocabulary; None without a tokenizer
        special_tokens                              the ids of BOS, EOS, PAD and UNK; None without a tokenizer

    The numbers are rounded to bfloat16 first, so that float32 and bfloat16 give the same hash. float16 rounds differently.
    """
    layers, heads, head_dim = key_value_shape(model.config)
    weights = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, torch.Tensor):  # the state_dict of torch's quantised layers also has other entries
            weights.update(name.encode() + _sample(tensor).float().numpy().tobytes())
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items())) if tokenizer else ""
    special = {kind: getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad", "unk")} if tokenizer else None
    return {
        "name_or_path": portable_name(model.name_or_path or ""),
        "n_layer": layers,
        "n_head": heads,
        "hidden_size": heads * head_dim,
        "vocab_size": model.config.vocab_size,
        "weights": None if model.dtype == torch.float16 else weights.hexdigest(),
        "tokenizer": hashlib.sha256(vocabulary.encode()).hexdigest() if tokenizer else None,
        "special_tokens": special,
    }


def recorded_end(fingerprint: dict[str, Any]) -> int | None:
    """The EOS of the tokenizer that a prefix was trained with, by the fingerprint in its file; None if that names none."""
    special_tokens = fingerprint.get("special_tokens")
    eos = special_tokens.get("eos") if isinstance(special_tokens, dict) else None
    return eos if type(eos) is int else None


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """About 64 of a tensor's numbers, evenly spaced, in bfloat16 on the CPU. For a sharded tensor, ranks all-reduce."""
    # An odd stride visits every column of a matrix whose width is a power of two.
    stride = tensor.numel() // 64 | 1
    if not isinstance(tensor, DTensor):
        return tensor.flatten()[::stride].bfloat16().cpu()
    indices = torch.arange(0, tensor.numel(), stride) - first_row(tensor) * (tensor.numel() // tensor.shape[0])
    local = tensor.to_local().flatten()
    mine = (indices >= 0) & (indices < len(local))
    # The bits are summed as integers. All ranks but the one that has the number add zero, so the sum is exact.
    bits = torch.zeros(len(indices), dtype=torch.int32)
    bits[mine] = local[indices[mine].to(local.device)].bfloat16().cpu().view(torch.int16).int()
    return sum_of_parts(bits, tensor).short().view(torch.bfloat16)
