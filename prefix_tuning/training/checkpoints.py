"""Checkpoints: what they hold, when they are written, and how a run resumes from one.

checkpoint-STEP.safetensors is written after STEP optimizer steps (files/writing.py: `write_tensors`). It holds all that the
next steps depend on (state.py), so in float32 on a CPU a resumed run equals an uninterrupted one bit for bit: the tensors of
`TrainingState.tensors`, by PART.NAME,

    encoder.*, step.*, exp_avg.*, exp_avg_sq.*   the encoder's weights, and AdamW's state of each
    figures.*                                    loss sum, gradient norm, first bad step and last good prefix
    best.*                                       with --save_best, the weights of the lowest eval loss

and in its metadata

    format   "pt"
    state    JSON: TrainingState.numbers (progress, loss scale, the encoder's shape, history); `run`, by which a resume
             knows that it is the same run; metrics_bytes, the length of metrics.jsonl
    sha256   of `state` and all tensors: safetensors itself does not notice a flipped bit

The base is not in it, because it never changes; the resumed run compares its fingerprint.
"""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prefix_tuning import distributed
from prefix_tuning.devices import PRECISIONS
from prefix_tuning.errors import Interrupted, UserError
from prefix_tuning.files.names import ADAPTER_CONFIG_FILE, CARD_FILE, CONFIG_FILE, ENCODER_FILE, METRICS_FILE
from prefix_tuning.files.reading import opened
from prefix_tuning.files.writing import write_tensors
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder
from prefix_tuning.settings import names_on_resume
from prefix_tuning.training.metrics import Metrics
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.state import Progress, TrainingState

# The settings by what a resume does with them (prefix_tuning/settings.py explains the rules).
SAME, CONTENT = (names_on_resume(TrainConfig, rule) for rule in ("same", "content"))


# 1. The files


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

    where: a checkpoint, or a folder, whose newest intact checkpoint is taken. "latest" stands for `output_dir`; if that
    holds no checkpoint, because the run was killed too early, the result is None. Damaged checkpoints are skipped and named
    on stderr. Raises UserError if `where` is a damaged checkpoint, or a folder without an intact one.
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


# 2. When a run writes them


class Checkpoints:
    """Writes the checkpoints of a run to its folder: after every `save_steps` steps (0: never), when a signal stops the run,
    and when an error ends an evaluation or a line of metrics. The `save_total_limit` newest stay; None: all.

    run: its `identity`; a resumed run must have the same. newest: the checkpoint from which this run was
    resumed, if it was.
    """

    def __init__(
        self, folder: Path, run: dict, newest: Path | None, save_steps: int = 0, save_total_limit: int | None = None
    ):
        self.folder, self.run, self.newest = folder, run, newest
        self.save_steps, self.save_total_limit = save_steps, save_total_limit

    def due(self, state: TrainingState) -> bool:
        return self.save_steps > 0 and state.progress.step % self.save_steps == 0

    def save(self, state: TrainingState, metrics: Metrics) -> None:
        """Writes a checkpoint. All ranks call this together; main writes."""
        distributed.check_equal(list(state.encoder.parameters()), "weights")
        self._write(state, metrics)
        # In all ranks: each may have to say how to resume.
        self.newest = checkpoint_path(self.folder, state.progress.step)

    def _write(self, state: TrainingState, metrics: Metrics) -> None:
        if distributed.is_main():
            numbers = {"run": self.run, "metrics_bytes": metrics.flushed_bytes(), **state.numbers()}
            save_checkpoint(self.folder, state.progress.step, state.tensors(), numbers, self.save_total_limit)
            self.newest = checkpoint_path(self.folder, state.progress.step)

    @contextmanager
    def checkpoint_on_error(self, state: TrainingState, metrics: Metrics) -> Iterator[None]:
        """Writes a checkpoint if a signal or an error ends the block. Use it only around code that changes no weights.

        A signal ends the block in all ranks together.
        """
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Interrupted):
                # A checkpoint of weights that are not finite would replace a good one.
                state.check_finite()
            if state.progress.step:
                self._write(state, metrics)
            if isinstance(error, Interrupted):
                # All wait until it is written: torchrun stops all processes when the first one ends.
                distributed.barrier()
            raise

    def how_to_resume(self) -> str:
        """Part of a message: the newest checkpoint and how to resume from it, or nothing if there is none."""
        if self.newest is None:
            return ""
        where = "latest" if self.newest.parent.resolve() == self.folder.resolve() else self.newest
        return f"; {self.newest} is intact, resume with --resume_from_checkpoint {where}"


# 3. Resuming: from which checkpoint, what must be the same as before, and what happens to the rest of the folder


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
    """Whether this torchrun job started the run in this folder, before a failure made it start its processes again."""
    try:
        recorded = json.loads((output_dir / CONFIG_FILE).read_text("utf-8"))["ran_with"]["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return job is not None and recorded == job


def find_resumed(output_dir: Path, where: str | None, overwrite: bool) -> Resumed | None:
    """The checkpoint to resume from, chosen by rank 0. None if there is none, or none is wanted.

    where: --resume_from_checkpoint. After a failure torchrun restarts its processes; these resume from the newest checkpoint
    of this run, whatever `where` says. Raises UserError if the output folder holds what the run would replace,
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

    where: --resume_from_checkpoint, for which this folder holds no checkpoint.
    """
    if (folder / ADAPTER_CONFIG_FILE).exists():
        raise UserError(f"{folder} holds a prefix already; add --overwrite_output_dir or name another --output_dir")
    if find_checkpoints(folder) and where != "latest":
        hint = "resume it with --resume_from_checkpoint latest, or start anew with --overwrite_output_dir"
        raise UserError(f"{folder} holds checkpoints of a run that did not finish; {hint}")
    # Somebody may keep only what --prefix_from reads.
    if (folder / ENCODER_FILE).exists():
        hint = "add --overwrite_output_dir or name another --output_dir"
        raise UserError(f"{folder} holds trainable weights ({ENCODER_FILE}), which new ones would replace; {hint}")
    if (folder / CARD_FILE).exists():
        raise UserError(f"{folder} holds a {CARD_FILE}, which a model card would replace; name another folder")


def identity(settings: dict, dtype: torch.dtype, contents: dict[str, object]) -> dict:
    """What a checkpoint and the run that resumes from it must have in common, as JSON.

    settings: all of the command's. dtype: the compute type that --precision means on this machine. contents: for each
    setting in CONTENT, a hash of what it names, or several hashes by name; None if it names nothing. Of --prefix_from only
    the last part of the path counts, as the weights come from the checkpoint. The template is the one that is used, chat or
    notebook; None stands for the notebook's, because checkpoints of earlier versions record none.
    """
    same = {name: settings[name] for name in SAME}
    same["precision"] = next(name for name, kind in PRECISIONS.items() if kind == dtype)
    same["prefix_from"] = same["prefix_from"] and Path(same["prefix_from"]).resolve().name
    same["template"] = "chat" if same["template"] == "chat" else None
    return same | {name: contents[name] for name in CONTENT}


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
