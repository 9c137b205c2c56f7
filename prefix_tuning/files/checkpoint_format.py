"""Checkpoints on disk: checkpoint-STEP.safetensors, after STEP optimizer steps.

A safetensors file (writing.py: `write_tensors`) with the tensors of `TrainingState.tensors`, by PART.NAME:

    encoder.*, step.*, exp_avg.*, exp_avg_sq.*   the encoder's weights and AdamW's state of each
    figures.*                                    loss sum, gradient norm, first bad step and last good prefix
    best.*                                       with --save_best, the weights of the lowest eval loss

and in its metadata

    format   "pt"
    state    JSON: TrainingState.numbers (progress, loss scale, the encoder's shape, history); `run`, by which a resume
             knows that it is the same run; metrics_bytes, the length of metrics.jsonl
    sha256   of `state` and all tensors: safetensors itself does not notice a flipped bit
"""

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from prefix_tuning.errors import UserError
from prefix_tuning.files.reading import opened
from prefix_tuning.files.writing import write_tensors


def save_checkpoint(
    folder: Path, step: int, tensors: dict[str, torch.Tensor], state: dict[str, Any], keep: int | None
) -> None:
    """Writes a checkpoint, then removes all but the `keep` newest; None keeps all. state: what JSON can hold."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(state)
    write_tensors(checkpoint_path(folder, step), tensors, {"state": text, "sha256": _checksum(tensors, text)})
    for path in find_checkpoints(folder)[: -keep if keep else 0]:
        path.unlink()


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}.safetensors"


def find_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in `folder` by ascending step, whether intact or damaged."""
    found = folder.glob("checkpoint-*.safetensors")
    return sorted((path for path in found if path.stem.removeprefix("checkpoint-").isdecimal()), key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.stem.removeprefix("checkpoint-"))


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors, on the CPU, and the state of one checkpoint. Raises UserError if it is missing or damaged."""
    with opened(path) as file:
        metadata = file.metadata() or {}
        # Copies, for their alignment, as in `read_tensors`.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if metadata.get("sha256") != _checksum(tensors, metadata.get("state", "")):
        raise UserError(f"{path}: is damaged, or no checkpoint (its checksum does not match its content)")
    state = json.loads(metadata["state"])
    if not isinstance(state, dict):
        raise UserError(f"{path}: is no checkpoint of this program")
    return tensors, state


def newest_checkpoint(where: str, output_dir: Path) -> tuple[Path, dict[str, torch.Tensor], dict[str, Any]] | None:
    """The checkpoint that --resume_from_checkpoint names: its path, tensors and state.

    where: a checkpoint; a folder, for its newest intact one; or "latest", for that of `output_dir`, and None if it has none
    because the run was killed too early. Damaged ones are skipped and named on stderr. Raises UserError if `where` is a
    damaged checkpoint, or holds no intact one.
    """
    folder = output_dir if where == "latest" else Path(where)
    if folder.is_file():
        return folder, *load_checkpoint(folder)
    for path in reversed(find_checkpoints(folder)):
        try:
            return path, *load_checkpoint(path)
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr)
    if where != "latest":
        raise UserError(f"--resume_from_checkpoint {where}: no such checkpoint, nor a folder that holds an intact one")
    print(f"{output_dir} holds no checkpoint to resume from: starting from the beginning")
    return None


def _checksum(tensors: dict[str, torch.Tensor], state: str) -> str:
    digest = hashlib.sha256(state.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
