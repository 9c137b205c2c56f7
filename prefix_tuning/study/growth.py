"""Training seen from inside: the prefix at each checkpoint that its run kept."""

import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from prefix_tuning.errors import UserError
from prefix_tuning.files.names import CONFIG_FILE
from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import PackedModel
from prefix_tuning.study.shares import attention_shares
from prefix_tuning.training.checkpoints import Resumed, find_checkpoints, load_checkpoint, step_of
from prefix_tuning.training.output import read_metrics

MOST_CHECKPOINTS = 24  # if there are more, evenly spaced ones


def growth(base: PackedModel, batches: list[Batch], folder: Path, prefix: torch.Tensor) -> dict | None:
    """The prefix at the checkpoints in an output folder, and the prefix that was saved at the end.

    Damaged checkpoints are skipped and named on stderr. Returns None if no checkpoint or no metrics.jsonl is intact, else

    stages: in the order of the steps, the step and
        norm: the mean length of its keys and of its values, vectors of D numbers (2)
        share: of attention, mean over heads, by layer (L)
        singular_values: of the prefix as a matrix (P, L * 2 * H * D), descending (P)
    losses, held_out: [step, loss] on training rows and on held-out rows
    left_out: number of checkpoints that were not looked at
    """
    paths = find_checkpoints(folder)
    chosen = some_checkpoints(paths)
    try:
        records = read_metrics(folder)
        last = saved_step(records, json.loads((folder / CONFIG_FILE).read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    stages = {}
    for path in chosen:
        try:
            encoder = Resumed(path, *load_checkpoint(path)).encoder()
        except UserError as error:
            tqdm.write(f"skipped: {error}", file=sys.stderr)
            continue
        stages[step_of(path)] = _stage(base, batches, encoder.bake())
    if not stages:
        return None
    stages[last] = _stage(base, batches, prefix)
    return {
        "stages": [{"step": step, **stages[step]} for step in sorted(stages)],
        "losses": [[record["step"], record["loss"]] for record in records if record.get("loss") is not None],
        "held_out": [[record["step"], record["eval_loss"]] for record in records if record.get("eval_loss") is not None],
        "left_out": len(paths) - len(chosen),
    }


def some_checkpoints(paths: list[Path]) -> list[Path]:
    """Up to MOST_CHECKPOINTS of the paths, evenly spaced, with the first and the last."""
    indices = torch.linspace(0, len(paths) - 1, min(len(paths), MOST_CHECKPOINTS))
    return [paths[round(index)] for index in indices.tolist()]


def saved_step(records: list[dict], settings: dict) -> int:
    """The step whose prefix a finished run has saved: the last, or with save_best the one with the lowest held-out loss.

    records, settings: of its metrics.jsonl and training_config.json. Raises ValueError if there are no such records.
    """
    tuned = [record for record in records if "step" in record and not record.get("frozen_base")]
    if settings["save_best"]:
        return min((record["eval_loss"], record["step"]) for record in tuned if record.get("eval_loss") is not None)[1]
    return max(record["step"] for record in tuned)


def _stage(base: PackedModel, batches: list[Batch], prefix: torch.Tensor) -> dict:
    prefix = prefix.to(base.device, base.dtype)
    shares = torch.tensor(attention_shares(base, batches, prefix)["share"])
    return {
        "norm": prefix.float().norm(dim=-1).mean(dim=(0, 2, 3)).tolist(),
        "share": shares.mean(dim=1).tolist(),
        "singular_values": singular_values(prefix),
    }


def singular_values(prefix: torch.Tensor) -> list[float]:
    """The singular values of a prefix (L, 2, H, P, D) as a matrix with a row for each token: P numbers, descending."""
    return torch.linalg.svdvals(prefix.movedim(3, 0).flatten(1).cpu().double()).tolist()
