"""CK"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefix_tuning import distributed
from prefix_tuning.errors import Interrupted
from prefix_tuning.files.checkpoint_format import save_checkpoint
from prefix_tuning.training.metrics import MetricsFile
from prefix_tuning.training.resume import Resumed
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.state import TrainingState


class Checkpoints:
    """Writes the checkpoints of a run. run: its `identity`; resumed: where it comes from, if it is resumed."""

    def __init__(self, config: TrainConfig, run: dict, resumed: Resumed | None):
        self.folder, self.run, self.save_total_limit = Path(config.output_dir), run, config.save_total_limit
        self.newest = resumed.path if resumed else None  # the one to resume from, should the run stop

    def save(self, state: TrainingState, metrics: "MetricsFile") -> None:
        """Writes a checkpoint. All processes call this together; main writes."""
        distributed.check_equal(list(state.encoder.parameters()), "weights")
        self._write(state, metrics)

    def _write(self, state: TrainingState, metrics: "MetricsFile") -> None:
        if distributed.is_main():
            numbers = {"run": self.run, "metrics_bytes": metrics.flushed_bytes(), **state.numbers()}
            step, keep = state.progress.step, self.save_total_limit
            self.newest = save_checkpoint(self.folder, step, state.tensors(), numbers, keep)

    @contextmanager
    def saved_if_left(self, state: TrainingState, metrics: "MetricsFile") -> Iterator[None]:
        """Around what changes no weights: writes a checkpoint if a signal or an error ends it early."""
        try:
            yield
        except BaseException as error:
            if state.progress.step:
                self._write(state, metrics)
            if isinstance(error, Interrupted):
                distributed.barrier()  # until it is written: torchrun stops all processes when the first one ends
            raise

    def how_to_resume(self) -> str:
        """Part of a message: the newest checkpoint and how to resume from it, if there is one."""
        if self.newest is None:
            return ""
        where = "latest" if self.newest.parent.samefile(self.folder) else self.newest
        return f"; {self.newest} is intact, resume with --resume_from_checkpoint {where}"
