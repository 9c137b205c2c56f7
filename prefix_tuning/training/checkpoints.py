"""When a run is saved, so that it can be resumed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefix_tuning import distributed
from prefix_tuning.errors import Interrupted
from prefix_tuning.files.checkpoint_format import checkpoint_path, save_checkpoint
from prefix_tuning.training.metrics import Metrics
from prefix_tuning.training.state import TrainingState


class Checkpoints:
    """Writes the checkpoints of a run to its folder: after every `save_steps` steps (0: only where a signal or an error ends
    an evaluation, or a line of metrics cannot be written), of which the `save_total_limit` newest stay (None: all).

    run: what a run that resumes from them must have in common (resume.identity). newest: the checkpoint from which this run
    was resumed, if it was.
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
        self.newest = checkpoint_path(self.folder, state.progress.step)  # in all ranks: each may have to say how to resume

    def _write(self, state: TrainingState, metrics: Metrics) -> None:
        if distributed.is_main():
            numbers = {"run": self.run, "metrics_bytes": metrics.flushed_bytes(), **state.numbers()}
            save_checkpoint(self.folder, state.progress.step, state.tensors(), numbers, self.save_total_limit)
            self.newest = checkpoint_path(self.folder, state.progress.step)

    @contextmanager
    def saved_if_left(self, state: TrainingState, metrics: Metrics) -> Iterator[None]:
        """Around what changes no weights: writes a checkpoint if a signal or an error ends it early. A signal ends it in
        all ranks together.
        """
        try:
            yield
        except BaseException as error:
            if not isinstance(error, Interrupted):
                state.check_finite()  # a checkpoint of weights that are not finite would replace a good one
            if state.progress.step:
                self._write(state, metrics)
            if isinstance(error, Interrupted):
                distributed.barrier()  # until it is written: torchrun stops all processes when the first one ends
            raise

    def how_to_resume(self) -> str:
        """Part of a message: the newest checkpoint and how to resume from it, or nothing if there is none."""
        if self.newest is None:
            return ""
        where = "latest" if self.newest.parent.resolve() == self.folder.resolve() else self.newest
        return f"; {self.newest} is intact, resume with --resume_from_checkpoint {where}"
