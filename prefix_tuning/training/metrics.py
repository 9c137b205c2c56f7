"""metrics.jsonl: the figures of a run, step by step."""

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

from prefix_tuning import distributed
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import BOARD_FOLDER, METRICS_FILE
from prefix_tuning.text import duration
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
            # The rate is then steps divided by `elapsed`.
            smoothing=0,
            disable=not distributed.is_main(),
        )

    @property
    def format_dict(self) -> dict:
        """What the bar shows."""
        return {**super().format_dict, "elapsed": self.clock.seconds() - self.begun}


class Metrics:
    """Writes a JSON object per line, readable while the run is training. Only main's figures reach a file.

    tensorboard: the figures are written for it as well. bar: a progress bar that shows the last line. The methods raise
    UserError where a file cannot be written, on a full disk say; metrics.jsonl then holds whole lines only.
    """

    def __init__(self, folder: Path, logging_steps: int, steps: Steps, tensorboard: bool = False):
        self.logging_steps, self.steps = logging_steps, steps
        self.bar: tqdm | None = None
        self.path = folder / METRICS_FILE if distributed.is_main() else Path(os.devnull)
        self.board = open_board(folder, steps.done) if tensorboard and distributed.is_main() else None

    def due(self, state: TrainingState) -> bool:
        """Whether to write the line of the steps since the last one now."""
        step = state.progress.step
        return step > state.progress.logged_step and (step % self.logging_steps == 0 or step == self.steps.total)

    def write(self, record: dict) -> None:
        # JSON has no infinity and no NaN.
        record = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in record.items()}
        if self.board and "step" in record:
            with _explained(BOARD_FOLDER):
                for name, value in record.items():
                    if isinstance(value, float):
                        self.board.add_scalar(name, value, record["step"])
                self.board.flush()
        with _explained(METRICS_FILE):
            self._append(json.dumps(record) + "\n")

    def _append(self, line: str) -> None:
        left = line.encode()
        # Opened for each line and unbuffered: what a full disk refuses must not be tried again when the file is closed.
        with open(self.path, "ab", buffering=0) as file:
            whole = file.tell()
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(whole)
                raise

    def write_interval(self, state: TrainingState, ended: bool = False) -> None:
        """Writes the line of the steps since the last one, and starts a new interval. Waits for the device.

        ended: whether the training is over, so that no time is left to be said.
        """
        progress, seconds = state.progress, state.clock.seconds()
        steps = progress.step - progress.logged_step
        loss, grad_norm = torch.stack((state.losses / steps, state.grad_norm)).tolist()
        # A stop of the process may set the clock back.
        taken = max(seconds - progress.logged_seconds, 1e-9)
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
        first_line = progress.logged_step <= self.steps.done
        if first_line and progress.step < self.steps.total and not ended:
            left = seconds_per_step * (self.steps.total - progress.step)
            tqdm.write(f"about {duration(left)} of training left, at {speed:,.0f} tokens/s")
        if self.bar is not None:
            rate = f"{progress.learning_rate:.2e}"
            self.bar.set_postfix(loss=f"{loss:.4f}", lr=rate, tok_s=f"{speed:,.0f}", refresh=False)
        state.losses.zero_()
        progress.logged_step, progress.logged_seconds, progress.logged_tokens = progress.step, seconds, progress.tokens

    def flushed_bytes(self) -> int:
        """The length of the file, all of which is on the disk now."""
        with _explained(METRICS_FILE), open(self.path, "ab") as file:
            os.fsync(file.fileno())
            return file.tell()


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Inside, an error of the system becomes a UserError. name: the file or folder that is written."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{name}: cannot be written: {error}") from error


def open_board(folder: Path, step: int):
    """A SummaryWriter for TensorBoard, for a run that is at `step`. Figures of later steps are removed."""
    from torch.utils.tensorboard import SummaryWriter

    if step == 0:
        for old in (folder / BOARD_FOLDER).glob("events.out.tfevents.*"):
            old.unlink()
    return SummaryWriter(str(folder / BOARD_FOLDER), purge_step=step + 1 if step else 0)
