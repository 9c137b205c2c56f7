"""What a run leaves on disk, and how it is read back: safetensors and JSON, nothing that could run code.

prefix_encoder.safetensors   the trainable weights, for `--prefix_from`; shape and base in the metadata
adapter_model.safetensors    the baked prefix, as PEFT stores it
adapter_config.json          its description, as PEFT reads it
checkpoint-STEP.safetensors  all that a killed run needs to go on: tensors, the rest as JSON in the metadata, a checksum
"""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers.utils import cached_file

from prefix_tuning import demo
from prefix_tuning.config import PrefixConfig, UserError, reason_of
from prefix_tuning.encoder import PrefixEncoder, flatten, unflatten

ENCODER_FILE = "prefix_encoder.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG_FILE = "adapter_config.json"
_DRAFT = ".draft"  # marks the folder of a file that is being written


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which becomes `path` when the block ends well: the file appears whole or not at all.

    Raises UserError where the system refuses, because the disk is full, say.
    """
    # A folder of its own, because safetensors, too, writes to a file of another name first.
    folder = path.with_name(f".{path.name}{_DRAFT}")
    draft = folder / path.name
    try:
        folder.mkdir(exist_ok=True)
        yield draft
        draft.chmod(folder.stat().st_mode & 0o666)  # safetensors makes its files for their owner alone
        with open(draft, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(draft, path)
        _flush_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot be written: {error}; what was there before is untouched") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _flush_folder(folder: Path) -> None:
    """Makes a rename in `folder` outlast a power cut. Windows cannot, and need not."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_drafts(folder: Path) -> None:
    """Removes what killed runs left half-written in `folder`."""
    for draft in folder.glob(f".*{_DRAFT}"):
        shutil.rmtree(draft)


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as draft:
        draft.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", "utf-8")


LOCAL = "local:"  # marks a name that only its owner can resolve


def portable_name(name: str) -> str:
    """How files refer to a model or dataset: bundled and hub names as they are, a local path by its last part, marked."""
    path = Path(name)
    if name and (path.exists() or path.is_absolute()):
        return demo.name_of(path.resolve()) or LOCAL + path.resolve().name
    return name


def base_of(prefix_name: str, noted: str | None) -> str:
    """The base model that a saved prefix notes. Raises UserError where the note leads nowhere on another machine."""
    if not noted or noted.startswith(LOCAL):
        known = f"the local model {noted.removeprefix(LOCAL)!r}" if noted else "a model that it does not name"
        raise UserError(f"{prefix_name}: was trained on {known}; say where it is: --model_name_or_path PATH")
    return noted


def save_encoder(folder: Path, encoder: PrefixEncoder, base: dict) -> None:
    """Writes the trainable weights, with the shape of the prefix and the `fingerprint` of its base in the metadata."""
    metadata = {
        "format": "pt",
        "prefix_config": json.dumps(dataclasses.asdict(encoder.config)),
        "base_model": json.dumps(base),
    }
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    with replacing(folder / ENCODER_FILE) as draft:
        save_file(weights, draft, metadata)


def save_adapter(folder: Path, prefix: torch.Tensor, config: PrefixConfig, base: dict) -> None:
    """Writes a baked prefix (layers, 2, heads, tokens, head_dim) as PEFT stores it, with the `fingerprint` of its base."""
    metadata = {"format": "pt", "base_model": json.dumps(base)}
    with replacing(folder / ADAPTER_FILE) as draft:
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


class Prefix(NamedTuple):
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
    path = _locate(name, ENCODER_FILE)
    if path is None:
        tensor, base = load_prefix(name)
        layers, _, heads, tokens, head_dim = tensor.shape
        encoder = PrefixEncoder(PrefixConfig(tokens, layers, heads, heads * head_dim, heads * head_dim, False))
        encoder.initialize("text", tensor)
        print(f"{name}: holds a baked prefix and no encoder; its numbers are trained directly, without a projection")
        return encoder, base
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
        weights, base = _read_tensors(path, file, expected), _noted_base(path, file)
    return PrefixEncoder.from_weights(config, weights), base


def load_prefix(name: str | Path) -> Prefix:
    """Reads a baked prefix, ours or PEFT's.

    name: an output folder of train.py, a PEFT adapter's folder, or the name of either on the hub. Raises UserError if there
    is none, or one that is no prefix for a causal language model.
    """
    config_path, path = _locate(name, ADAPTER_CONFIG_FILE), _locate(name, ADAPTER_FILE)
    if config_path is None:
        raise UserError(f"{name}: holds no prefix ({ADAPTER_CONFIG_FILE} is missing); train one with train.py")
    if path is None:
        pickled = _locate(name, "adapter_model.bin") is not None
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
    with _opened(path) as file:
        flat = _read_tensors(path, file, expected)["prompt_embeddings"].float()
        base = _noted_base(path, file)
    base["name_or_path"] = config.get("base_model_name_or_path")
    return Prefix(unflatten(flat, shape.num_layers, shape.num_attention_heads), base)


def _locate(name: str | Path, file: str) -> Path | None:
    """A file of a folder, or of a repository on the hub; None if that has no such file. Raises UserError without either."""
    path = Path(name)
    if path.is_dir():
        return path / file if (path / file).exists() else None
    is_path = isinstance(name, Path) or path.is_absolute() or path.parent.is_dir() or name.startswith(".")
    if is_path or name.count("/") != 1:
        raise UserError(f"{name}: no such folder; train a prefix with train.py")
    try:
        cached_file(name, ADAPTER_CONFIG_FILE)  # every such repository has it: else it is none, or out of reach
        found = find_file(name, file)
    except OSError as error:
        reason = reason_of(error)
        raise UserError(f"{name}: no such folder, nor a repository of the hub that can be reached: {reason}") from error
    return Path(found) if found else None


def find_file(name: str, file: str) -> str | None:
    """The path of a file of a folder, or of a repository on the hub, which is fetched; None if there is no such file."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False)


def _noted_base(path: Path, file) -> dict:
    try:
        base = json.loads((file.metadata() or {}).get("base_model", "{}"))
    except ValueError as error:
        raise UserError(f"{path}: holds no valid base_model: {error}") from error
    if not isinstance(base, dict):
        raise UserError(f"{path}: holds no valid base_model: {base!r}")
    return base


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


def save_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, keep: int | None) -> Path:
    """Writes checkpoint-STEP.safetensors, then removes all but the `keep` newest; None keeps all. state: anything JSON."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state)
    written = folder / f"checkpoint-{step}.safetensors"
    with replacing(written) as draft:
        save_file(tensors, draft, {"format": "pt", "state": text, "sha256": _checksum(tensors, text)})
    for path in find_checkpoints(folder)[: -keep if keep else 0]:
        path.unlink()
    return written


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, oldest first, intact or not."""
    found = folder.glob("checkpoint-*.safetensors")
    return sorted((path for path in found if path.stem.removeprefix("checkpoint-").isdecimal()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("checkpoint-"))


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """The tensors and the state of one checkpoint. Raises UserError if it is missing or damaged."""
    with _opened(path) as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if metadata.get("sha256") != _checksum(tensors, metadata.get("state", "")):
        raise UserError(f"{path}: is damaged, or no checkpoint (its checksum does not match its content)")
    state = json.loads(metadata["state"])
    if not isinstance(state, dict):
        raise UserError(f"{path}: is no checkpoint of this program")
    return tensors, state


def newest_checkpoint(where: str, output_dir: Path) -> tuple[Path, dict[str, torch.Tensor], dict] | None:
    """The checkpoint that --resume_from_checkpoint names: its path, tensors and state.

    where: a checkpoint; a folder, of which the newest intact one is taken; or "latest" for those in `output_dir`, and None
    if the run was killed before it had one. Damaged ones are named on stderr and passed over. Raises UserError if `where`
    holds none.
    """
    folder = output_dir if where == "latest" else Path(where)
    if folder.is_file():
        return folder, *load_checkpoint(folder)
    for path in reversed(find_checkpoints(folder)):
        try:
            return path, *load_checkpoint(path)
        except UserError as error:
            print(f"passed over: {error}", file=sys.stderr)
    if where != "latest":
        raise UserError(f"--resume_from_checkpoint {where}: no such checkpoint, nor a folder that holds an intact one")
    print(f"{output_dir} holds no checkpoint to resume from: starting from the beginning")
    return None


def _checksum(tensors: dict[str, torch.Tensor], state: str) -> str:
    digest = hashlib.sha256(state.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


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
