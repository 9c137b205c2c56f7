"""Resuming a run: from which checkpoint, what must be the same as before, and what happens to the rest of the folder.

A checkpoint holds all that the next steps depend on (state.py), so a resumed run equals an uninterrupted one bit for bit.
"""

import json
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from prefix_tuning import distributed
from prefix_tuning.devices import PRECISIONS
from prefix_tuning.errors import UserError
from prefix_tuning.files.checkpoint_format import find_checkpoints, load_checkpoint, newest_checkpoint, step_of
from prefix_tuning.files.names import ADAPTER_CONFIG_FILE, CARD_FILE, CONFIG_FILE, ENCODER_FILE, METRICS_FILE
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder
from prefix_tuning.settings import names_on_resume
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.state import Progress, TrainingState

# The settings by what a resume does with them; settings.py says what each rule means.
SAME, CONTENT = (names_on_resume(TrainConfig, rule) for rule in ("same", "content"))


class Resumed(NamedTuple):
    """The checkpoint that a run resumes from: its path, its tensors, and its numbers (TrainingState.numbers and more)."""

    path: Path
    tensors: dict[str, torch.Tensor]
    numbers: dict

    def progress(self) -> Progress:
        """The numbers of the run so far."""
        return Progress(**self.numbers["progress"])

    def encoder(self) -> PrefixEncoder:
        """The encoder with its weights, on the CPU. Raises UserError if they do not fit the recorded shape."""
        own = "encoder."
        weights = {name.removeprefix(own): tensor for name, tensor in self.tensors.items() if name.startswith(own)}
        try:
            return PrefixEncoder.from_weights(PrefixConfig(**self.numbers["prefix_config"]), weights)
        except (KeyError, TypeError, RuntimeError, UserError) as error:
            raise UserError(f"{self.path}: is no checkpoint of this program: {error!r}") from error


def started_by(job: str | None, output_dir: Path) -> bool:
    """Whether the run in this folder was started by this same torchrun, before a failure."""
    try:
        recorded = json.loads((output_dir / CONFIG_FILE).read_text("utf-8"))["ran_with"]["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return job is not None and recorded == job


def find_resumed(output_dir: Path, where: str | None, overwrite: bool) -> Resumed | None:
    """The checkpoint to resume from, as main finds it. None if there is none, or none is wanted.

    where: --resume_from_checkpoint. After a failure torchrun restarts its processes: then it is the newest checkpoint of
    this run, wherever the run was started from. Raises UserError if the output folder holds what the run would replace,
    unless it may `overwrite` that.
    """
    found = None
    if distributed.is_main():
        restarted = started_by(distributed.torchrun_job(), output_dir)
        if restarted and find_checkpoints(output_dir):
            where = "latest"
        found = newest_checkpoint(where, output_dir) if where else None
        own = found and found[0].parent.samefile(output_dir)
        if found and own and found[0].name not in [path.name for path in find_checkpoints(output_dir)]:
            raise UserError(f"{found[0]}: rename it to checkpoint-STEP.safetensors to resume from it in its own folder")
        if not (restarted or overwrite or own):
            refuse_to_replace(output_dir, where)
    path = distributed.broadcast_object(found and str(found[0]))
    if path is None:
        return None
    resumed = Resumed(*(found or (Path(path), *load_checkpoint(Path(path)))))
    try:
        if not (isinstance(resumed.numbers["run"], dict) and isinstance(resumed.numbers["metrics_bytes"], int)):
            raise ValueError("it records no run")
        resumed.progress()
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: is no checkpoint of this program: {error!r}") from error
    return resumed


def refuse_to_replace(folder: Path, where: str | None) -> None:
    """Raises UserError if a folder holds a prefix, checkpoints other than damaged ones, trainable weights, or a README.md.

    where: --resume_from_checkpoint, which has found none in this folder.
    """
    if (folder / ADAPTER_CONFIG_FILE).exists():
        raise UserError(f"{folder} holds a prefix already; add --overwrite_output_dir or name another --output_dir")
    if find_checkpoints(folder) and where != "latest":
        hint = "resume it with --resume_from_checkpoint latest, or start anew with --overwrite_output_dir"
        raise UserError(f"{folder} holds checkpoints of a run that did not finish; {hint}")
    if (folder / ENCODER_FILE).exists():  # alone, as somebody may keep what --prefix_from reads
        hint = "add --overwrite_output_dir or name another --output_dir"
        raise UserError(f"{folder} holds trainable weights ({ENCODER_FILE}), which new ones would replace; {hint}")
    if (folder / CARD_FILE).exists():
        raise UserError(f"{folder} holds a {CARD_FILE}, which a model card would replace; name another folder")


def identity(config: TrainConfig, dtype: torch.dtype, contents: dict[str, object]) -> dict:
    """What a checkpoint and the run that resumes from it must have in common, as JSON.

    dtype: the compute type that --precision means on this machine. contents: for each setting in CONTENT, a hash of what
    it names, or several hashes by name; None if it names nothing. Of --prefix_from only the last part of the path counts,
    as the weights come from the checkpoint.
    """
    settings = {name: getattr(config, name) for name in SAME}
    settings["precision"] = next(name for name, kind in PRECISIONS.items() if kind == dtype)
    settings["prefix_from"] = config.prefix_from and Path(config.prefix_from).resolve().name
    return settings | {name: contents[name] for name in CONTENT}


def check_same_run(resumed: Resumed, run: dict) -> None:
    """Raises UserError naming what differs, if the checkpoint was made by a run of another `identity`."""
    recorded, differences = resumed.numbers["run"], []
    for name, now in run.items():
        before = recorded.get(name)
        if before == now:
            continue
        if name in SAME:
            before, now = ("unset" if value is None else value for value in (before, now))
            differences.append(f"--{name} {before}, not {now}")
        elif isinstance(before, dict) and isinstance(now, dict):
            differences.append(f"another --{name} ({', '.join(key for key in now if before.get(key) != now[key])})")
        else:
            differences.append(
                f"no --{name}" if before is None else f"another --{name}" if now else f"--{name}, and now without"
            )
    if differences:
        hint = "resume with the same, or start anew without --resume_from_checkpoint"
        raise UserError(f"{resumed.path}: was made with {'; '.join(differences)}; {hint}")


def restore(state: TrainingState, resumed: Resumed) -> None:
    """Restores `state` as it was in the checkpoint. Raises UserError if that is not a checkpoint of such a state."""
    try:
        state.restore(resumed.tensors, resumed.numbers)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise UserError(f"{resumed.path}: is no checkpoint of this run: {error!r}") from error
    print(f"resuming after step {state.progress.step}, from {resumed.path}")


def metrics_so_far(resumed: Resumed | None) -> bytes:
    """The content of metrics.jsonl when the checkpoint was written; later lines will be written again."""
    if resumed is None:
        return b""
    file, length = resumed.path.with_name(METRICS_FILE), resumed.numbers["metrics_bytes"]
    lines = file.read_bytes()[:length] if file.exists() else b""
    if len(lines) < length:
        print(f"{file}: is shorter than at the checkpoint; the missing lines cannot be restored", file=sys.stderr)
    return lines[: lines.rfind(b"\n") + 1]


def clear_checkpoints(folder: Path, resumed: Resumed | None) -> None:
    """Leaves in `folder` only the checkpoints that led to the one that is resumed, so that its newest is always the run's.

    Later ones, intact or not, are renamed; those of a run that is replaced are removed.
    """
    if resumed is None:
        for path in folder.glob("checkpoint-*.set-aside"):
            path.unlink()
    for path in find_checkpoints(folder):
        if resumed is None or not path.parent.samefile(resumed.path.parent):
            path.unlink()
        elif step_of(path) > resumed.progress().step:
            aside = path.with_suffix(".set-aside")
            os.replace(path, aside)
            print(f"{path} is later than {resumed.path.name}: renamed to {aside.name}", file=sys.stderr)
