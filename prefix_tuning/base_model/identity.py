"""Which base is this: fingerprint and names that hold on any machine."""

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import BloomForCausalLM, PreTrainedTokenizerBase

from prefix_tuning import bundled
from prefix_tuning.base_model.sharding import first_row, sum_of_parts
from prefix_tuning.errors import UserError

LOCAL = "local:"  # marks a name that only its owner can resolve


def portable_name(name: str) -> str:
    """How files refer to a model or dataset: bundled and hub names as they are, a local path by its last part, marked."""
    path = Path(name)
    if name and (path.exists() or path.is_absolute()):
        return bundled.name_of(path.resolve()) or LOCAL + path.resolve().name
    return name


def base_of(prefix_name: str, noted: str | None) -> str:
    """The base model that a saved prefix notes. Raises UserError where the note leads nowhere on another machine."""
    if not noted or noted.startswith(LOCAL):
        known = f"the local model {noted.removeprefix(LOCAL)!r}" if noted else "a model that it does not name"
        raise UserError(f"{prefix_name}: was trained on {known}; say where it is: --model_name_or_path PATH")
    return noted


def check_base(prefix_shape: tuple[int, ...], noted: dict, base: dict, prefix_name: str, force: bool) -> None:
    """Raises UserError unless a prefix (layers, 2, heads, tokens, head_dim) can be used on a base.

    noted, base: the `fingerprint` of the base that it was trained on, and of the one at hand. The shape must be right. Other
    weights, special tokens or another tokenizer are refused unless `force`. A prefix without a fingerprint passes, with a
    note on stderr.
    """
    layers, _, heads, _, head_dim = prefix_shape
    needed = (base["n_layer"], base["n_head"], base["hidden_size"] // base["n_head"])
    if (layers, heads, head_dim) != needed:
        raise UserError(
            f"{prefix_name}: a prefix for {layers} layers of {heads} x {head_dim}, but {base['name_or_path']} has "
            "{} layers of {} x {}; use the base that it was trained on".format(*needed)
        )
    name = noted.get("name_or_path")
    if "tokenizer" not in noted:
        print(f"{prefix_name}: does not say by a fingerprint which base it belongs to; it names {name}", file=sys.stderr)
        return
    # Weights that were rounded to float16 have no hash to compare; the special tokens are not noted by earlier versions.
    keys = ("weights", "tokenizer", "special_tokens")
    differing = [key.replace("_", " ") for key in keys if noted.get(key) and base[key] and noted[key] != base[key]]
    message = f"{prefix_name}: was trained on {name}; {base['name_or_path']} has the same shape, but not the same "
    if differing and not force:
        raise UserError(f"{message}{' and '.join(differing)}; use the right base, or add --force to go on")
    if differing or name != base["name_or_path"]:
        print(f"{message}{' and '.join(differing) or 'name'}", file=sys.stderr)


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
