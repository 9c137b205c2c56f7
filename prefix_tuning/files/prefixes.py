"""Prefix files, ours and PEFT's."""

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file

from prefix_tuning.errors import UserError
from prefix_tuning.files.names import ADAPTER_CONFIG_FILE, ADAPTER_FILE, ENCODER_FILE
from prefix_tuning.files.reading import locate, opened, read_tensors, recorded_base
from prefix_tuning.files.writing import atomic_write, write_json
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder, flatten, unflatten


def save_encoder(folder: Path, encoder: PrefixEncoder, base: dict) -> None:
    """Writes the trainable weights, with the shape of the prefix and the `fingerprint` of its base in the metadata."""
    metadata = {
        "format": "pt",
        "prefix_config": json.dumps(dataclasses.asdict(encoder.config)),
        "base_model": json.dumps(base),
    }
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    with atomic_write(folder / ENCODER_FILE) as draft:
        save_file(weights, draft, metadata)


def save_adapter(folder: Path, prefix: torch.Tensor, config: PrefixConfig, base: dict) -> None:
    """Writes a baked prefix (layers, 2, heads, tokens, head_dim) as PEFT stores it, with the `fingerprint` of its base."""
    metadata = {"format": "pt", "base_model": json.dumps(base)}
    with atomic_write(folder / ADAPTER_FILE) as draft:
        save_file({"prompt_embeddings": flatten(prefix).cpu().contiguous()}, draft, metadata)
    description = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base["name_or_path"],
        "inference_mode": True,
        "num_transformer_submodules": 1,
        **dataclasses.asdict(config),
    }
    write_json(folder / ADAPTER_CONFIG_FILE, description)


class SavedPrefix(NamedTuple):
    """A baked prefix, (layers, 2, heads, tokens, head_dim) in float32, and what it notes of the base it was trained on: a
    `fingerprint`, or for PEFT's the name alone."""

    tensor: torch.Tensor
    base: dict


def load_encoder(name: str | Path) -> tuple[PrefixEncoder, dict]:
    """Reads the trainable weights that a run saved, and the `fingerprint` of their base.

    name: an output folder, a PEFT adapter's folder, or the name of either on the hub. Where there is only a baked prefix, as
    PEFT saves it, the encoder is one without projection that emits it. Raises UserError if there is neither, or if it is
    broken.
    """
    path = locate(name, ENCODER_FILE)
    if path is None:
        tensor, base = load_prefix(name)
        layers, _, heads, tokens, head_dim = tensor.shape
        encoder = PrefixEncoder(PrefixConfig(tokens, layers, heads, heads * head_dim, heads * head_dim, False))
        encoder.initialize("text", tensor)
        print(f"{name}: holds a baked prefix and no encoder; its numbers are trained directly, without a projection")
        return encoder, base
    with opened(path) as file:
        try:
            config = PrefixConfig(**json.loads(file.metadata()["prefix_config"]))
        except (KeyError, TypeError, ValueError, UserError) as error:
            raise UserError(f"{path}: holds no valid prefix_config: {error}") from error
        with torch.device("meta"):  # learn the expected shapes before anything is allocated
            encoder = PrefixEncoder(config)
        expected = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
        if "text_prefix" in file.keys():  # noqa: SIM118 (safe_open has no __contains__)
            expected["text_prefix"] = (config.num_virtual_tokens, config.num_layers * 2 * config.token_dim)
        weights, base = read_tensors(path, file, expected), recorded_base(path, file)
    return PrefixEncoder.from_weights(config, weights), base


def load_prefix(name: str | Path) -> SavedPrefix:
    """Reads a baked prefix, ours or PEFT's.

    name: an output folder of train.py, a PEFT adapter's folder, or the name of either on the hub. Raises UserError if there
    is none, or one that is no prefix for a causal language model.
    """
    config_path, path = locate(name, ADAPTER_CONFIG_FILE), locate(name, ADAPTER_FILE)
    if config_path is None:
        raise UserError(f"{name}: holds no prefix ({ADAPTER_CONFIG_FILE} is missing); train one with train.py")
    if path is None:
        pickled = locate(name, "adapter_model.bin") is not None
        hint = "adapter_model.bin is a pickled file, which is never read; have PEFT save it as safetensors"
        raise UserError(f"{name}: {ADAPTER_FILE} is missing" + (f"; {hint}" if pickled else ""))
    try:
        config = json.loads(config_path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{config_path}: cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "PREFIX_TUNING":
        raise UserError(f"{config_path}: describes no PREFIX_TUNING adapter")
    if config.get("task_type") not in ("CAUSAL_LM", None):
        raise UserError(f"{config_path}: is for the task {config['task_type']}, not for CAUSAL_LM")
    try:
        shape = PrefixConfig(
            **{key: config[key] for key in ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")},
            encoder_hidden_size=1,
            prefix_projection=False,
        )
    except (KeyError, UserError) as error:
        raise UserError(f"{config_path}: {error}") from error
    expected = {"prompt_embeddings": (shape.num_virtual_tokens, shape.num_layers * 2 * shape.token_dim)}
    with opened(path) as file:
        flat = read_tensors(path, file, expected)["prompt_embeddings"].float()
        base = recorded_base(path, file)
    base["name_or_path"] = config.get("base_model_name_or_path")
    return SavedPrefix(unflatten(flat, shape.num_layers, shape.num_attention_heads), base)
