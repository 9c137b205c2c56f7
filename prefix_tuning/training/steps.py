"""STEPS"""

import itertools
import math
from collections.abc import Iterator

import torch

from prefix_tuning import distributed
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.state import Progress


def count_steps(config: TrainConfig, rows: int, start: Progress) -> int:
    """Optimizer steps of the whole run, of which `start` has some behind it; never fewer than those."""
    if config.max_steps >= 0:
        return max(config.max_steps, start.step)
    # What is done counts as it was done; the rest is counted in steps of today's size.
    rows_per_step = global_batch_size(config)
    steps_per_epoch = math.ceil(rows / rows_per_step)
    passed = start.epoch * steps_per_epoch + math.ceil(start.row / rows_per_step)
    return start.step + max(0, math.ceil(config.num_train_epochs * steps_per_epoch) - passed)


def global_batch_size(config: TrainConfig) -> int:
    """Rows of an optimizer step, of all processes together."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * distributed.world_size()


def stops_early(config: TrainConfig, progress: Progress) -> bool:
    patience = config.early_stopping_patience
    return patience is not None and progress.evaluations_since_best >= patience


def step_rows(
    config: TrainConfig, rows: int, rows_per_step: int, total_steps: int, first_epoch: int = 0, row: int = 0
) -> Iterator[list[int]]:
    """The places of the rows of each optimizer step, from one of an epoch on. An epoch's last step takes what is left."""
    steps = 0
    for epoch in itertools.count(first_epoch):
        order = torch.arange(rows)  # a tensor, because a list of ten million numbers takes 400 MB
        if config.shuffle:
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(config.seed + epoch))
        for start in range(row, rows, rows_per_step):
            if steps == total_steps:
                return
            steps += 1
            yield order[start : start + rows_per_step].tolist()
        row = 0
