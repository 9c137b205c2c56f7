"""The files of a prefix: the encoder, which can be trained further, and the baked prefix, which PEFT can load too.

Letters: P prefix tokens, L layers, H heads of keys and values, D head_dim (H * D is token_dim, the hidden size of Bloom), E
encoder_hidden_size.

Both tensor files are safetensors (`write_tensors` in writing.py): float32, little-endian, the last axis contiguous.

prefix_encoder.safetensors     the state_dict of PrefixEncoder
    embedding.weight           (P, H * D); without the projection (P, L * 2 * H * D), and then it is the only tensor
    transform.0.weight, .bias  (E, H * D), (E,)
    transform.2.weight, .bias  (L * 2 * H * D, E), (L * 2 * H * D,)
    text_prefix                (P, L * 2 * H * D), only if the training started from a text
    first_token                (1, L * 2 * H * D), only if the first token is frozen
    metadata                   format: "pt"; as JSON, prefix_config: PrefixConfig, and base_model: `fingerprint` of the base

adapter_model.safetensors      what `PeftModel.from_pretrained` reads
    prompt_embeddings          (P, L * 2 * H * D); the last axis is layer 0 key, layer 0 value, layer 1 key, ..., each of
                               H heads of D numbers: [p, ((2 * l + kv) * H + h) * D + d] is prefix[l, kv, h, p, d]
    metadata                   format: "pt"; base_model as above; history: JSON, whether rows of the training had history
                               (null: not known); template: JSON, the chat template of the training, an object with
                               chat_template and enable_thinking (null: the notebook's); distilled, only after a
                               distillation: JSON, an object that describes the teacher (training/teacher.py). PEFT neither
                               writes nor reads base_model, history, template and distilled

adapter_config.json            PEFT's description: peft_type PREFIX_TUNING, the shape, the name of the base

At bloom-1b4-zh's shape (L 24, H 16, D 128) and P 10, prompt_embeddings takes 4 * 10 * 98,304 bytes, 3.9 MB.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prefix_tuning.errors import UserError
from prefix_tuning.files.names import ADAPTER_CONFIG_FILE, ADAPTER_FILE, ENCODER_FILE
from prefix_tuning.files.reading import Kind, locate, opened, read_tensors, recorded
from prefix_tuning.files.writing import write_json, write_tensors
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder, flatten, unflatten

# The fields of PEFT's description that are read below, or that do not change how a baked prefix is used. Any other field
# that is set may change it: modules_to_save, for example, replaces weights of the base.
_PEFT_FIELDS = {
    "auto_mapping", "base_model_name_or_path", "encoder_hidden_size", "inference_mode", "init_weights",
    "num_attention_heads", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "peft_type", "peft_version",
    "prefix_projection", "revision", "task_type", "token_dim",
}  # fmt: skip


# What the metadata of a baked prefix record about its training, beside the base.
_RECORDS: dict[str, type] = {"history": bool, "template": dict, "distilled": dict}


class SavedPrefix(NamedTuple):
    """A baked prefix, (L, 2, H, P, D) in float32 on the CPU, and what its files record about its training.

    recorded_base: the `fingerprint` of the base, or {"name_or_path": ...} if PEFT wrote the files. If it is known whether
    rows had history, the entry `history` says so. If rows were written in a chat template, the entry `template` has it.
    After a distillation, the entry `distilled` describes the teacher.
    """

    tensor: torch.Tensor
    recorded_base: dict[str, Any]


def save_encoder(folder: Path, encoder: PrefixEncoder, base: dict[str, Any]) -> None:
    """Writes the trainable weights. base: the `fingerprint` of the base they were trained on."""
    metadata = {"prefix_config": json.dumps(dataclasses.asdict(encoder.config)), "base_model": json.dumps(base)}
    write_tensors(folder / ENCODER_FILE, encoder.state_dict(), metadata)


def save_adapter(
    folder: Path,
    prefix: torch.Tensor,
    config: PrefixConfig,
    base: dict[str, Any],
    history: bool | None = None,
    template: dict[str, Any] | None = None,
    distilled: dict[str, Any] | None = None,
) -> None:
    """Writes a baked prefix (L, 2, H, P, D) as PEFT stores it.

    base: the `fingerprint` of the base. history: whether training rows had history; None: not known. template: the chat
    template of the training (data/templates.py) as a dict; None: the notebook's. distilled: describes the teacher of a
    distillation.
    """
    metadata = {"base_model": json.dumps(base), "history": json.dumps(history), "template": json.dumps(template)}
    if distilled:
        metadata["distilled"] = json.dumps(distilled)
    write_tensors(folder / ADAPTER_FILE, {"prompt_embeddings": flatten(prefix)}, metadata)
    description = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.get("name_or_path"),
        "inference_mode": True,
        "num_transformer_submodules": 1,
        **dataclasses.asdict(config),
    }
    write_json(folder / ADAPTER_CONFIG_FILE, description)


def save_prefix(folder: Path, prefix: SavedPrefix) -> None:
    """Writes a baked prefix that has no encoder, as PEFT stores it."""
    base = dict(prefix.recorded_base)
    records = {name: base.pop(name, None) for name in _RECORDS}
    save_adapter(folder, prefix.tensor.float(), _config_of(prefix.tensor), base, **records)


def _config_of(prefix: torch.Tensor) -> PrefixConfig:
    """The shape of an encoder without projection whose embedding is this prefix (L, 2, H, P, D)."""
    layers, _, heads, tokens, head_dim = prefix.shape
    return PrefixConfig(tokens, layers, heads, heads * head_dim, heads * head_dim, prefix_projection=False)


def load_encoder(name: str | Path) -> tuple[PrefixEncoder, dict[str, Any]]:
    """Reads the encoder that a run saved, on the CPU, and what its file records about its base.

    name: an output folder, a PEFT adapter's folder, or the name of either on the hub. If there is only a baked prefix, the
    encoder has no projection, and its embedding is that prefix. Raises UserError if there is neither, or if it is broken.
    """
    path = locate(name, ENCODER_FILE)
    if path is None:
        tensor, base = load_prefix(name)
        encoder = PrefixEncoder(_config_of(tensor))
        encoder.initialize("text", tensor)
        print(f"{name}: holds a baked prefix and no encoder; its numbers are trained directly, without a projection")
        return encoder, base
    with opened(path) as file:
        try:
            config = PrefixConfig(**json.loads(file.metadata()["prefix_config"]))
        except (KeyError, TypeError, ValueError, UserError) as error:
            raise UserError(f"{path}: holds no valid prefix_config: {error}") from error
        # The shapes are compared on the meta device, before memory is allocated for what the file claims.
        with torch.device("meta"):
            encoder = PrefixEncoder(config)
        expected = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
        for constant, tokens in (("text_prefix", config.num_virtual_tokens), ("first_token", 1)):
            if constant in file.keys():  # noqa: SIM118 (safe_open has no __contains__)
                expected[constant] = (tokens, config.num_layers * 2 * config.token_dim)
        weights, base = read_tensors(path, file, expected), recorded(path, file, "base_model", dict) or {}
    return PrefixEncoder.from_weights(config, weights), base


def load_prefix(name: str | Path) -> SavedPrefix:
    """Reads a baked prefix, written by train.py or by PEFT.

    name: an output folder of train.py, a PEFT adapter's folder, or the name of either on the hub. Raises UserError if there
    is none, if it is broken, or if it is for another task than causal language modelling.
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
    if unknown := [name for name, value in config.items() if value and name not in _PEFT_FIELDS]:
        raise UserError(f"{config_path}: sets {', '.join(unknown)}, which this program does not know how to apply")
    if config.get("num_transformer_submodules") not in (1, None):
        raise UserError(f"{config_path}: is for {config['num_transformer_submodules']} submodules, and a decoder is one")
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
    flat_shape = (shape.num_virtual_tokens, shape.num_layers * 2 * shape.token_dim)
    with opened(path) as file:
        flat = read_tensors(path, file, {"prompt_embeddings": flat_shape})["prompt_embeddings"].float()
        base = recorded(path, file, "base_model", dict) or {}
        records = {name: recorded(path, file, name, kind) for name, kind in _RECORDS.items()}
    base |= {name: record for name, record in records.items() if record is not None}
    base["name_or_path"] = config.get("base_model_name_or_path")
    if config.get("revision"):  # of the base: PEFT alone writes one
        base["revision"] = config["revision"]
    return SavedPrefix(unflatten(flat, shape.num_layers, shape.num_attention_heads), base)


def recorded_history(name: str | Path) -> bool | None:
    """Whether training rows of a prefix had history, as its files record it; None if they do not, as PEFT's.

    name: as for `load_prefix`. Raises UserError if there is no such folder, or if what it holds is broken.
    """
    return _record_of(name, "history", bool)


def recorded_template(name: str | Path) -> dict[str, Any] | None:
    """The chat template of the training of a prefix, as its files record it; None: the notebook's.

    name, errors: as for `recorded_history`.
    """
    return _record_of(name, "template", dict)


def _record_of(name: str | Path, key: str, kind: type[Kind]) -> Kind | None:
    path = locate(name, ADAPTER_FILE)
    if path is None:
        return None
    with opened(path) as file:
        return recorded(path, file, key, kind)
