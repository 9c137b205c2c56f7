"""Loading the frozen base and its tokenizer."""

import sys
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from prefix_tuning import bundled
from prefix_tuning.base_model.layers import wrap_layers
from prefix_tuning.base_model.sharding import load_sharded
from prefix_tuning.distributed import is_main
from prefix_tuning.errors import UserError
from prefix_tuning.model.bloom import Bloom


def load_base(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    parts: int | None = None,
    gradient_checkpointing: bool = False,
    torch_compile: bool = False,
) -> tuple[Bloom, PreTrainedTokenizerBase]:
    """Loads a Bloom and its tokenizer by bundled name, hub name or path, and freezes the Bloom.

    parts: how many processes share one copy of the weights, of which each loads its part (sharding.py); None: each loads all
    of them. The flags are those of `wrap_layers`. Returns the model in `dtype` on `device`, in eval mode, with requires_grad
    False for every parameter, and the tokenizer, which pads on the left. No code that comes with a model is run:
    trust_remote_code is off, and transformers reads pickled weights with torch.load's weights_only. Raises UserError if
    there is no such model, if it is broken or no Bloom, or if its tokenizer does not fit it.
    """
    path = bundled.resolve(name)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type != "bloom":
            raise UserError(f"--model_name_or_path {name} is a {config.model_type} model; this program tunes Bloom")
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=False)
        _check_tokenizer(name, tokenizer, config.vocab_size)
        model = load_sharded(path, config, dtype, device, parts) if parts else _load_whole(name, path, dtype, device)
    except UserError:
        raise
    except Exception as error:  # transformers and tokenizers raise many classes for broken files
        raise UserError(f"--model_name_or_path {name} cannot be loaded: {str(error).strip()[:300]}") from error
    wrap_layers(model, gradient_checkpointing, torch_compile)
    return model, tokenizer


def _load_whole(name: str, path: str, dtype: torch.dtype, device: torch.device) -> Bloom:
    """The frozen model, read by transformers."""
    loaded: Any = Bloom.from_pretrained(path, dtype=dtype, output_loading_info=True)
    model, report = loaded
    if is_main() and not any(_has_file(path, file) for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        print(f"{name}: its weights are a pickled .bin file; safetensors is the safer format", file=sys.stderr)
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"--model_name_or_path {name} lacks {len(missing)} of its weights, such as {missing[0]}")
    return model.requires_grad_(False).eval().to(device)


def _has_file(path: str, file: str) -> bool:
    """Whether a model's folder, or its copy in the hub's cache, has this file."""
    return cached_file(path, file, local_files_only=True, _raise_exceptions_for_missing_entries=False) is not None


def _check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises UserError unless this tokenizer can be used with a base that has embeddings for `vocab_size` tokens."""
    if not tokenizer.is_fast:
        fault = "has no tokenizer.json; save it in that form"
    elif tokenizer.eos_token_id is None:
        fault = "has no EOS token, with which every answer ends; name one as eos_token in tokenizer_config.json"
    elif (tokens := max(tokenizer.get_vocab().values(), default=-1) + 1) > vocab_size:
        fault = f"has {tokens} tokens, but the base has embeddings for {vocab_size}; use the one that belongs to it"
    else:
        return
    raise UserError(f"--model_name_or_path {name}: its tokenizer {fault}")
