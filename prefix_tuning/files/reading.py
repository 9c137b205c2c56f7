"""Reading files of strangers."""

import json
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from prefix_tuning.errors import UserError, reason_of
from prefix_tuning.files.names import ADAPTER_CONFIG_FILE


def locate(name: str | Path, file: str) -> Path | None:
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


@contextmanager
def opened(path: Path):
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is not a safetensors file: {error}") from error


def read_tensors(path: Path, file, expected: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
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


def recorded_base(path: Path, file) -> dict:
    try:
        base = json.loads((file.metadata() or {}).get("base_model", "{}"))
    except ValueError as error:
        raise UserError(f"{path}: holds no valid base_model: {error}") from error
    if not isinstance(base, dict):
        raise UserError(f"{path}: holds no valid base_model: {base!r}")
    return base
