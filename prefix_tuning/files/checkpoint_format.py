"""Checkpoints on disk."""

import hashlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from prefix_tuning.errors import UserError
from prefix_tuning.files.reading import opened
from prefix_tuning.files.writing import atomic_write


def save_checkpoint(folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict, keep: int | None) -> Path:
    """Writes checkpoint-STEP.safetensors, then removes all but the `keep` newest; None keeps all. state: anything JSON."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state)
    written = folder / f"checkpoint-{step}.safetensors"
    with atomic_write(written) as draft:
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
    with opened(path) as file:
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
