"""METRICS"""

import json
import math
import os
from typing import TextIO

import torch

from prefix_tuning.errors import UserError
from prefix_tuning.files.names import METRICS_FILE
from prefix_tuning.training.state import TrainingState


class MetricsFile:
    """metrics.jsonl: a JSON object per line, readable while the run goes on. Raises UserError where it cannot be written.

    board: a SummaryWriter that is shown the same figures, or None.
    """

    def __init__(self, file: TextIO, board=None):
        self.file, self.board = file, board

    def write(self, record: dict) -> None:
        # JSON has no infinity and no NaN.
        record = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in record.items()}
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"{METRICS_FILE}: cannot be written: {error}") from error
        if self.board and "step" in record:
            for name, value in record.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, record["step"])
            self.board.flush()

    def write_interval(self, state: TrainingState, steps_per_epoch: int) -> dict:
        """Writes the line of the steps since the last one, and starts a new interval. Waits for the device."""
        progress = state.progress
        steps, seconds = progress.step - progress.logged_step, progress.seconds - progress.logged_seconds
        loss, grad_norm = torch.stack((state.losses / steps, state.grad_norm)).tolist()
        epoch = progress.epoch + math.ceil(progress.row / progress.rows_per_step) / steps_per_epoch
        line = {
            "step": progress.step,
            "epoch": round(epoch, 4),
            "loss": loss,
            "learning_rate": progress.learning_rate,
            "grad_norm": grad_norm,
            "tokens_per_second": round((progress.tokens - progress.logged_tokens) / seconds, 1),
        }
        self.write(line)
        state.losses.zero_()
        progress.logged_step, progress.logged_seconds = progress.step, progress.seconds
        progress.logged_tokens = progress.tokens
        return line

    def flushed_bytes(self) -> int:
        """The length of the file, all of which is on the disk now."""
        os.fsync(self.file.fileno())
        return self.file.tell()
