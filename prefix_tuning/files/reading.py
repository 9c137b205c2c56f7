"""Finds and reads the files of a prefix. They may come from anyone, so their content is checked before it is used."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
from safetensors import SafetensorError, safe_open
from transformers.utils import cached_file

from prefix_tuning.errors import UserError, reason_of
from prefix_tuning.files.names import ADAPTER_CONFIG_FILE

Kind = TypeVar("Kind")


def locate(name: str | Path, file: str) -> Path | None:
    """The path of `file` in a folder, or in a repository on the hub; None if it has no such file.

    name: a folder, or USER/NAME on the hub. Raises UserError if it is neither.
    """
    path = Path(name)
    if path.is_dir():
        return path / file if (path / file).exists() else None
    if isinstance(name, Path) or path.is_absolute() or path.parent.is_dir() or name[:1] == "." or name.count("/") != 1:
        raise UserError(f"{name}: no such folder; train a prefix with train.py")
    try:
        # Every repository of a prefix has this file. If it is not found, the name is wrong or the hub cannot be reached; one
        # question to the hub tells at once, while a download would try six times and give up after half a minute.
        if try_to_load_from_cache(name, ADAPTER_CONFIG_FILE) is None:
            get_hf_file_metadata(hf_hub_url(name, ADAPTER_CONFIG_FILE))
        cached_file(name, ADAPTER_CONFIG_FILE)
        found = find_file(name, file)
    except Exception as error:  # no network, no such repository, no access: each raises a class of its own
        reason = reason_of(error)
        raise UserError(f"{name}: no such folder, nor a repository of the hub that can be reached: {reason}") from error
    return Path(found) if found else None


def find_file(name: str, file: str) -> str | None:
    """The path of a file in a folder, or in a repository on the hub, which is downloaded; None if there is no such file."""
    return cached_file(name, file, _raise_exceptions_for_missing_entries=False)


@contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """Opens a safetensors file for the block. Raises UserError if it is missing, or if the block finds it broken."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: is not a safetensors file: {error}") from error


def read_tensors(path: Path, file: safe_open, expected: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of an open file. Raises UserError unless they have exactly the `expected` names and shapes, a
    floating-point dtype, and only finite values. path: for the message.
    """
    found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 (safe_open has no __iter__)
    if wrong := sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)):
        name, others = wrong[0], f", and {len(wrong) - 1} more differ" if len(wrong) > 1 else ""
        pair = found.get(name, "missing"), expected.get(name, "no tensor of that name")
        raise UserError("{}: {} is {} where {} is expected{}".format(path, name, *pair, others))
    # Copies, because a file's tensors are not aligned in memory as torch's own are, and alignment may change how a matmul
    # rounds.
    tensors = {name: file.get_tensor(name).clone() for name in expected}
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise UserError(f"{path}: {name} holds values that are not finite numbers")
    return tensors


def recorded(path: Path, file: safe_open, key: str, kind: type[Kind]) -> Kind | None:
    """The value of a key in a file's metadata, where it is JSON of this kind; None if there is none, as in PEFT's files.

    Raises UserError if it is of another kind. path: for the message.
    """
    try:
        value = json.loads((file.metadata() or {}).get(key, "null"))
    except ValueError as error:
        raise UserError(f"{path}: holds no valid {key}: {error}") from error
    if value is not None and not isinstance(value, kind):
        raise UserError(f"{path}: holds no valid {key}: {value!r}")
    return value
