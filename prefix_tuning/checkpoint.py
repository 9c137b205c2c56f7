"""What a run leaves on disk, and how it is read back: safetensors and JSON, nothing that could run code.

prefix_encoder.safetensors   the trainable weights, for `--prefix_from`; shape and base in the metadata
adapter_model.safetensors    the baked prefix, as PEFT stores it
adapter_config.json          its description, as PEFT reads it
"""

import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import BloomConfig

from prefix_tuning.config import PrefixConfig, UserError
from prefix_tuning.encoder import PrefixEncoder, flatten, unflatten

ENCODER_FILE = "prefix_encoder.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes `path` when the block ends well: the file appears whole or not at all."""
    draft = path.with_name(f".{path.name}.draft")
    try:
        yield draft
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")


LOCAL = "local:"  # marks a name that only its owner can resolve


def portable_name(name: str) -> str:
    """How files refer to a model or dataset: bundled and hub names as they are, a local path by its last part, marked."""
    path = Path(name)
    return LOCAL + path.resolve().name if path.exists() or path.is_absolute() else name


def base_of(prefix_name: str, noted: str | None) -> str:
    """The base model that a saved prefix notes. Raises UserError where the note leads nowhere on another machine."""
    if not noted or noted.startswith(LOCAL):
        known = f"the local model {noted.removeprefix(LOCAL)!r}" if noted else "a model that it does not name"
        raise UserError(f"{prefix_name}: was trained on {known}; say where it is: --model_name_or_path PATH")
    return noted


def save_encoder(folder: Path, encoder: PrefixEncoder, base_name: str, base_config: BloomConfig) -> None:
    """Writes the trainable weights, with the shape of the prefix and of its base in the metadata."""
    base = {key: getattr(base_config, key) for key in ("hidden_size", "n_layer", "n_head", "vocab_size")}
    metadata = {
        "format": "pt",
        "prefix_config": json.dumps(dataclasses.asdict(encoder.config)),
        "base_model": json.dumps({"name_or_path": portable_name(base_name), **base}),
    }
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    with replacing(folder / ENCODER_FILE) as draft:
        save_file(weights, draft, metadata)


def save_adapter(folder: Path, prefix: torch.Tensor, config: PrefixConfig, base_name: str) -> None:
    """Writes a baked prefix (layers, 2, heads, tokens, head_dim) as PEFT stores it."""
    with replacing(folder / ADAPTER_FILE) as draft:
        save_file({"prompt_embeddings": flatten(prefix).cpu().contiguous()}, draft, {"format": "pt"})
    description = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": portable_name(base_name),
        "inference_mode": True,
        "num_transformer_submodules": 1,
        **dataclasses.asdict(config),
    }
    write_json(folder / ADAPTER_CONFIG_FILE, description)


def load_encoder(folder: str) -> PrefixEncoder:
    """Reads the trainable weights that a run saved in `folder`. Raises UserError if they are not there or broken."""
    path = Path(folder) / ENCODER_FILE
    with _opened(path) as file:
        try:
            config = PrefixConfig(**json.loads(file.metadata()["prefix_config"]))
        except (KeyError, TypeError, ValueError, UserError) as error:
            raise UserError(f"{path}: holds no valid prefix_config: {error}") from error
        with torch.device("meta"):  # learn the expected shapes before anything is allocated
            encoder = PrefixEncoder(config)
        expected = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
        if "text_prefix" in file.keys():  # noqa: SIM118 (safe_open has no __contains__)
            expected["text_prefix"] = (config.num_virtual_tokens, config.num_layers * 2 * config.token_dim)
        weights = _read_tensors(path, file, expected)
    encoder.text_prefix = weights.pop("text_prefix", None)
    encoder.load_state_dict(weights, strict=False, assign=True)
    return encoder.requires_grad_()


def load_prefix(folder: str) -> tuple[torch.Tensor, str | None]:
    """Reads a baked prefix, ours or PEFT's: (layers, 2, heads, tokens, head_dim) in float32, and the base model it notes.

    Raises UserError if the folder holds none, or one that is no prefix for a causal language model.
    """
    config_path, path = Path(folder) / ADAPTER_CONFIG_FILE, Path(folder) / ADAPTER_FILE
    try:
        config = json.loads(config_path.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder}: holds no prefix ({ADAPTER_CONFIG_FILE} is missing); train one with train.py") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{config_path}: cannot be read: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "PREFIX_TUNING":
        raise UserError(f"{config_path}: describes no PREFIX_TUNING adapter")
    try:
        shape = PrefixConfig(
            **{key: config[key] for key in ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")},
            encoder_hidden_size=1,
            prefix_projection=False,
        )
    except (KeyError, UserError) as error:
        raise UserError(f"{config_path}: {error}") from error
    expected = {"prompt_embeddings": (shape.num_virtual_tokens, shape.num_layers * 2 * shape.token_dim)}
    with _opened(path) as file:
        flat = _read_tensors(path, file, expected)["prompt_embeddings"].float()
    return unflatten(flat, shape.num_layers, shape.num_attention_heads), config.get("base_model_name_or_path")


def check_fits(prefix_shape: tuple[int, ...], base_config: BloomConfig, prefix_name: str, base_name: str) -> None:
    """Raises UserError unless a prefix (layers, 2, heads, tokens, head_dim) has the shape that the base needs."""
    layers, _, heads, _, head_dim = prefix_shape
    needed = (base_config.n_layer, base_config.n_head, base_config.hidden_size // base_config.n_head)
    if (layers, heads, head_dim) != needed:
        raise UserError(
            f"{prefix_name}: a prefix for {layers} layers of {heads} x {head_dim}, but {base_name} has "
            "{} layers of {} x {}; use the base that it was trained on".format(*needed)
        )


@contextmanager
def _opened(path: Path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is not a safetensors file: {error}") from error


def _read_tensors(path: Path, file, expected: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of an open file, which must have just these names and shapes, in a float type, and be finite."""
    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    if found != expected:
        raise UserError(f"{path}: holds {found} where {expected} is expected")
    # The file's memory has an alignment of its own; a copy has torch's, so matrix products round as before the saving.
    tensors = {name: file.get_tensor(name).clone() for name in expected}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds values that are no finite numbers")
    return tensors
