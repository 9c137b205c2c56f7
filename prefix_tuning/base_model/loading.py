"""Loading the frozen base and its tokenizer."""

from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, BloomConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from prefix_tuning import bundled
from prefix_tuning.base_model.layers import wrap_layers
from prefix_tuning.base_model.sharding import load_sharded
from prefix_tuning.base_model.special_tokens import align_special_tokens
from prefix_tuning.distributed import note
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import ADAPTER_CONFIG_FILE
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
    False for every parameter, and the tokenizer, which pads on the left, with EOS if it has no PAD. The tokenizer's EOS is
    one of the ends in the model's generation_config. An adapter in the model's folder is left out, and a line on stderr says
    so. No code that comes with a model is run: trust_remote_code is off, and transformers reads pickled weights with
    torch.load's weights_only. Raises UserError if there is no such model, if it is broken or no Bloom, if it computes
    otherwise than model/bloom.py, or if its tokenizer does not fit it.
    """
    path = bundled.resolve(name)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        if config.model_type != "bloom":
            raise UserError(f"--model_name_or_path {name} is a {config.model_type} model; this program tunes Bloom")
        _check_forward(name, config)
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=False)
        _check_tokenizer(name, tokenizer, config.vocab_size)
        model = load_sharded(path, config, dtype, device, parts) if parts else _load_whole(name, path, dtype, device)
    except UserError:
        raise
    except Exception as error:  # transformers and tokenizers raise many classes for broken files
        raise UserError(f"--model_name_or_path {name} cannot be loaded: {str(error).strip()[:300]}") from error
    if _has_adapter(path):
        hint = "merge it into the weights if it belongs to them"
        note(f"{name}: the adapter beside its weights ({ADAPTER_CONFIG_FILE}) is left out; {hint}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token serves
    align_special_tokens(model.generation_config, tokenizer, name)
    wrap_layers(model, gradient_checkpointing, torch_compile)
    return model, tokenizer


def _load_whole(name: str, path: str, dtype: torch.dtype, device: torch.device) -> Bloom:
    """The frozen model, read by transformers."""
    # If PEFT is installed, transformers attaches an adapter that lies beside the weights. The base must not depend on what
    # is installed: so transformers looks for an adapter in a folder that no base has.
    nowhere = {"subfolder": "no-adapter"}
    loaded: Any = Bloom.from_pretrained(path, dtype=dtype, output_loading_info=True, adapter_kwargs=nowhere)
    model, report = loaded
    if not any(_has_file(path, file) for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        note(f"{name}: its weights are a pickled .bin file; safetensors is the safer format")
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"--model_name_or_path {name} lacks {len(missing)} of its weights, such as {missing[0]}")
    return model.requires_grad_(False).eval().to(device)


def _has_file(path: str, file: str) -> bool:
    """Whether a model's folder, or its copy in the hub's cache, has this file."""
    return cached_file(path, file, local_files_only=True, _raise_exceptions_for_missing_entries=False) is not None


def _has_adapter(path: str) -> bool:
    """Whether an adapter lies beside a model's weights, in its folder or on the hub."""
    quietly = ("gated_repo", "missing_entries", "connection_errors")
    options: Any = {f"_raise_exceptions_for_{kind}": False for kind in quietly}
    return cached_file(path, ADAPTER_CONFIG_FILE, **options) is not None


def _check_forward(name: str, config: BloomConfig) -> None:
    """Raises UserError for a setting with which transformers' forward computes otherwise than the packed one does."""
    if config.slow_but_exact and config.pretraining_tp > 1:
        fault = 'slow_but_exact, with which transformers leaves out two biases of every layer; set "slow_but_exact": false'
    elif not getattr(config, "is_causal", True):
        fault = 'attention to later tokens; set "is_causal": true'
    else:
        return
    raise UserError(f"--model_name_or_path {name}: its config.json asks for {fault}")


def _check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises UserError unless this tokenizer can be used with a base that has embeddings for `vocab_size` tokens."""
    if not tokenizer.is_fast:
        fault = "has no tokenizer.json; save it in that form"
    elif tokenizer.eos_token_id is None:
        fault = "has no EOS token, with which every answer ends; name one as eos_token in tokenizer_config.json"
    elif (tokens := max(tokenizer.get_vocab().values()) + 1) > vocab_size:
        fault = f"has {tokens} tokens, but the base has embeddings for {vocab_size}; use the one that belongs to it"
    else:
        return
    raise UserError(f"--model_name_or_path {name}: its tokenizer {fault}")
