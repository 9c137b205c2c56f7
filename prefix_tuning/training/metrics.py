"""metrics.jsonl: the figures of a run, step by step."""

import json
import math
import os
from pathlib import Path

import torch
from tqdm import tqdm

from prefix_tuning import distributed
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import METRICS_FILE
from prefix_tuning.text import duration
from prefix_tuning.training.report import open_board
from prefix_tuning.training.state import Clock, TrainingState
from prefix_tuning.training.steps import Steps


class TrainingBar(tqdm):
    """A progress bar over the steps of a run whose rate and remaining time do not count evaluations and checkpoints.

    clock: the run's.
    """

    def __init__(self, steps: Steps, clock: Clock):
        self.clock, self.begun = clock, clock.seconds()
        super().__init__(
            steps,
            "training",
            steps.total,
            initial=steps.done,
            unit="step",
            smoothing=0,  # then the rate is steps by `elapsed`
            disable=not distributed.is_main(),
        )

    @property
    def format_dict(self) -> dict:
        """What the bar shows."""
        return {**super().format_dict, "elapsed": self.clock.seconds() - self.begun}


class Metrics:
    """Writes a JSON object per line, readable while the run is training. Only main's figures reach a file.

    tensorboard: the figures are written for it as well. bar: a progress bar that shows the last line. Raises UserError where
    the file cannot be written.
    """

    def __init__(self, folder: Path, logging_steps: int, steps: Steps, tensorboard: bool = False):
        self.logging_steps, self.steps = logging_steps, steps
        self.bar: tqdm | None = None
        path = folder / METRICS_FILE if distributed.is_main() else os.devnull
        self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by __exit__)
        self.board = open_board(folder, steps.done) if tensorboard and distributed.is_main() else None

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def due(self, state: TrainingState) -> bool:
        step = state.progress.step
        return step % self.logging_steps == 0 or step == self.steps.total

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

    def write_interval(self, state: TrainingState, ended: bool = False) -> None:
        """Writes the line of the steps since the last one, and starts a new interval. Waits for the device.

        ended: whether the training is over, so that no time is left to be said.
        """
        progress, seconds = state.progress, state.clock.seconds()
        steps = progress.step - progress.logged_step
        loss, grad_norm = torch.stack((state.losses / steps, state.grad_norm)).tolist()
        taken = seconds - progress.logged_seconds
        speed, seconds_per_step = (progress.tokens - progress.logged_tokens) / taken, taken / steps
        epoch = progress.epoch + math.ceil(progress.row / progress.rows_per_step) / self.steps.per_epoch
        self.write(
            {
                "step": progress.step,
                "epoch": round(epoch, 4),
                "loss": loss,
                "learning_rate": progress.learning_rate,
                "grad_norm": grad_norm,
                "tokens_per_second": round(speed, 1),
            }
        )
        first = progress.logged_step <= self.steps.done  # line since the start
        if first and progress.step < self.steps.total and not ended:
            left = seconds_per_step * (self.steps.total - progress.step)
            tqdm.write(f"about {duration(left)} of training left, at {speed:,.0f} tokens/s")
        if self.bar is not None:
            rate = f"{progress.learning_rate:.2e}"
            self.bar.set_postfix(loss=f"{loss:.4f}", lr=rate, tok_s=f"{speed:,.0f}", refresh=False)
        state.losses.zero_()
        progress.logged_step, progress.logged_seconds, progress.logged_tokens = progress.step, seconds, progress.tokens

    def flushed_bytes(self) -> int:
        """The length of the file, all of which is on the disk now."""
        os.fsync(self.file.fileno())
        return self.file.tell()
