"""Training seen from inside: what the prefix was at each checkpoint that its run kept."""

from pathlib import Path

import torch
from tqdm import tqdm

from prefix_tuning.files.checkpoint_format import find_checkpoints, load_checkpoint, step_of
from prefix_tuning.files.names import METRICS_FILE
from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import Bloom
from prefix_tuning.study.shares import attention_shares
from prefix_tuning.training.report import read_metrics
from prefix_tuning.training.resume import Resumed

MOST_CHECKPOINTS = 24  # evenly spaced, if there are more


def growth(base: Bloom, batches: list[Batch], folder: Path, prefix: torch.Tensor) -> dict | None:
    """The prefix at every checkpoint in an output folder, and at last; None if there is no checkpoint or no metrics.jsonl.

    step: of each. norm: mean length of its keys and of its values, each of D numbers (2). share: of attention, mean over
    heads, by layer (L). singular_values: of the prefix as a matrix (P, L * 2 * H * D), descending (P). losses: [step, loss]
    of the training rows, held_out: [step, loss]. left_out: checkpoints that were not looked at.
    """
    paths = find_checkpoints(folder)
    if not paths or not (folder / METRICS_FILE).is_file():
        return None
    chosen = [paths[round(place)] for place in torch.linspace(0, len(paths) - 1, min(len(paths), MOST_CHECKPOINTS)).tolist()]
    records = read_metrics(folder)
    stages = []
    for path in tqdm(chosen, desc="checkpoints", leave=False):
        stages.append(
            {"step": step_of(path), **_stage(base, batches, Resumed(path, *load_checkpoint(path)).encoder().bake())}
        )
    last = max(record.get("step", 0) for record in records)
    if last > stages[-1]["step"]:
        stages.append({"step": last, **_stage(base, batches, prefix)})
    return {
        "stages": stages,
        "losses": [[record["step"], record["loss"]] for record in records if record.get("loss") is not None],
        "held_out": [[record["step"], record["eval_loss"]] for record in records if record.get("eval_loss") is not None],
        "left_out": len(paths) - len(chosen),
    }


def _stage(base: Bloom, batches: list[Batch], prefix: torch.Tensor) -> dict:
    prefix = prefix.to(base.device, base.dtype)
    shares = torch.tensor(attention_shares(base, batches, prefix)["share"])
    return {
        "norm": prefix.float().norm(dim=-1).mean(dim=(0, 2, 3)).tolist(),
        "share": shares.mean(dim=1).tolist(),
        "singular_values": singular_values(prefix),
    }


def singular_values(prefix: torch.Tensor) -> list[float]:
    """Those of a prefix (L, 2, H, P, D) as a matrix with a row for each of its tokens: P numbers, descending."""
    return torch.linalg.svdvals(prefix.movedim(3, 0).flatten(1).double()).tolist()
