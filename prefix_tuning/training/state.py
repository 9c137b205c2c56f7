"""All that changes while a run is training, and how it becomes a checkpoint and is restored.

All that the next steps depend on is here and in every checkpoint (`tensors` and `numbers` below), so in float32 on a CPU a
resumed run continues with the same bits: weights, AdamW's moments, the loss scale, the position in the order of the rows,
the number of updates, the peak learning rate, and what ends a run early. The sums of the current line of metrics.jsonl,
seconds, tokens and the best weights are there so that the figures continue, too.

Not in a checkpoint: the base, which never changes; the order of the rows, which follows from seed and epoch (steps.py); and
the state of any random generator, because nothing else is random: `forward_packed` applies no dropout.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import get_scheduler

from prefix_tuning import signals
from prefix_tuning.model.encoder import PrefixEncoder
from prefix_tuning.training.steps import Step


class NotFinite(Exception):
    """The loss or the gradient of `step` was not finite; `good_prefix` is the last prefix for which both were, if any."""

    def __init__(self, step: int, good_prefix: torch.Tensor | None):
        self.step, self.good_prefix = step, good_prefix


@dataclass
class Progress:
    """The numbers of a run so far. Raises ValueError if one has the wrong type."""

    step: int = 0
    # Updates of the weights: all steps but those that fp16 skipped.
    updates: int = 0
    # The next row to train on: its epoch, and its index in the order of that epoch.
    epoch: int = 0
    row: int = 0
    rows_per_step: int = 0
    # Of training, without evaluating and saving.
    seconds: float = 0.0
    tokens: int = 0
    # step, seconds and tokens at the last line of metrics.jsonl.
    logged_step: int = 0
    logged_seconds: float = 0.0
    logged_tokens: int = 0
    # Of the last step; and the highest of the run, None as long as it is not known (learning_rate.py finds it).
    learning_rate: float = 0.0
    peak_learning_rate: float | None = None
    evaluated_step: int = -1
    best_step: int = -1
    best_loss: float | None = None
    evaluations_since_best: int = 0

    def __post_init__(self):
        for name, kind in type(self).__annotations__.items():
            if not isinstance(value := getattr(self, name), kind):
                raise ValueError(f"{name} is {value!r}, not of the type {kind}")


class TrainingState:
    """The encoder, what trains it, and the figures of the run so far.

    schedule: the share of the peak learning rate, by the number of updates. loss_scaling: for fp16, where small gradients
    would become zero. history: whether any row that the weights were trained on, also before this run, had history; None:
    not known. template: the chat template of the rows, as a dict; None: the notebook's. distilled: the record of the teacher
    (teacher.py); None: there is none.

    Tensors on the device, so that the loop need not wait for it: `losses`, the sum of the losses since the last line of
    metrics.jsonl; `grad_norm`, of the last step before clipping; `bad_step`, the first step whose loss or gradient was not
    finite, else infinity; `good_prefix`, the prefix that the last step before that began with.
    """

    # The tensors named above, which a checkpoint holds beside the weights; and AdamW's tensors of each parameter.
    STATISTICS = ("losses", "grad_norm", "bad_step", "good_prefix")
    MOMENTS = ("step", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        encoder: PrefixEncoder,
        optimizer: torch.optim.AdamW,
        schedule: Callable[[int], float],
        max_grad_norm: float,
        loss_scaling: bool,
    ):
        self.encoder, self.optimizer, self.schedule, self.max_grad_norm = encoder, optimizer, schedule, max_grad_norm
        self.progress, self.clock = Progress(), Clock()
        self.good_prefix = encoder.bake()
        device = self.good_prefix.device
        # Where it is off, its methods are no-ops.
        self.scaler = torch.amp.GradScaler(device.type, enabled=loss_scaling)
        self.losses, self.grad_norm = torch.zeros((), device=device), torch.zeros((), device=device)
        self.bad_step = torch.full((), math.inf, device=device)
        self.best_weights: dict[str, torch.Tensor] = {}
        self.compile_seconds = 0.0
        self.history: bool | None = None
        self.template: dict[str, Any] | None = None
        self.distilled: dict[str, Any] | None = None

    def learning_rate(self) -> float:
        """The learning rate of the next update."""
        assert self.progress.peak_learning_rate is not None
        return self.progress.peak_learning_rate * self.schedule(self.progress.updates)

    def advance(self, step: Step, prefix: torch.Tensor, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
        """Records a step that is done. prefix, loss, grad_norm: what `optimizer_step` returned."""
        self.clock.lap()
        progress = self.progress
        progress.step, progress.epoch, progress.row = step.number, step.next_epoch, step.next_row
        progress.tokens += step.tokens
        progress.learning_rate = self.optimizer.param_groups[0]["lr"]
        self.losses += loss
        self.grad_norm = grad_norm
        # A gradient that overflowed fp16 is no fault: its step was skipped and the loss scale lowered.
        finite = loss.isfinite() & (grad_norm.isfinite() | self.scaler.is_enabled())
        self.bad_step = torch.where(finite, self.bad_step, self.bad_step.clamp(max=step.number))
        self.good_prefix = torch.where(self.bad_step > step.number, prefix, self.good_prefix)

    def check_finite(self) -> None:
        """Raises NotFinite if a loss or gradient so far was not finite, or the weights are not. Waits for the device."""
        weights_finite = self.encoder.bake().isfinite().all()
        first = torch.where(weights_finite, self.bad_step, self.bad_step.clamp(max=self.progress.step + 1)).item()
        if first < math.inf:
            raise NotFinite(int(first), self.good_prefix if first > 1 else None)

    def note_evaluation(self, loss: float, keep_best: bool) -> None:
        """Records an eval loss, and the weights if it is the lowest so far and they are to be kept."""
        progress = self.progress
        progress.evaluated_step, progress.evaluations_since_best = progress.step, progress.evaluations_since_best + 1
        if math.isfinite(loss) and (progress.best_loss is None or loss < progress.best_loss):
            progress.best_loss, progress.best_step, progress.evaluations_since_best = loss, progress.step, 0
            if keep_best:
                self.best_weights = {name: tensor.cpu().clone() for name, tensor in self.encoder.state_dict().items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of a checkpoint, by PART.NAME."""
        moments = {name: self.optimizer.state[parameter] for name, parameter in self.encoder.named_parameters()}
        parts = {
            "figures": {name: getattr(self, name) for name in self.STATISTICS},
            "encoder": self.encoder.state_dict(),
            "best": self.best_weights,
            # None of them exists while fp16 has skipped every step.
            **{key: {name: own[key] for name, own in moments.items() if own} for key in self.MOMENTS},
        }
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def numbers(self) -> dict:
        """The rest of a checkpoint, as JSON."""
        self.progress.seconds = self.clock.seconds()
        return {
            "progress": dataclasses.asdict(self.progress),
            "prefix_config": dataclasses.asdict(self.encoder.config),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
        }

    def restore(self, tensors: dict[str, torch.Tensor], numbers: dict) -> None:
        """Restores all that a checkpoint holds but the weights, which the encoder has already, and `history` (run.py).

        Raises KeyError, TypeError or ValueError if it is not of such a state, or holds a tensor that has no use here.
        """
        if numbers["progress"].keys() != vars(self.progress).keys():
            raise ValueError("the checkpoint holds other figures than this program")
        self.progress = Progress(**numbers["progress"])
        self.clock = Clock(self.progress.seconds)
        weights, parameters = self.encoder.state_dict(), dict(self.encoder.named_parameters())
        expected = {
            "figures": {name: getattr(self, name) for name in self.STATISTICS},
            "encoder": weights,
            "best": weights,
            "step": {name: torch.zeros(()) for name in parameters},
            "exp_avg": parameters,
            "exp_avg_sq": parameters,
        }
        parts: dict[str, dict[str, torch.Tensor]] = {part: {} for part in expected}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        for part, found in parts.items():
            if found and _shapes_and_dtypes(found) != _shapes_and_dtypes(expected[part]):
                raise ValueError(
                    f"the checkpoint's {part} is {_shapes_and_dtypes(found)}, not {_shapes_and_dtypes(expected[part])}"
                )
        for name in self.STATISTICS:
            setattr(self, name, parts["figures"][name].to(self.losses.device))
        self.best_weights = parts["best"]
        if any(parts[key] for key in self.MOMENTS):
            for name, parameter in parameters.items():
                self.optimizer.state[parameter] = {key: parts[key][name].to(parameter.device) for key in self.MOMENTS}
        self.scaler.load_state_dict(numbers["scaler"])


def _shapes_and_dtypes(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


class Clock:
    """Counts seconds while it is `running` and not `stopped`. It starts at the seconds of the earlier part of a resumed run.

    A lap is the time of a step. If the process was stopped during one, by Ctrl-Z or SIGSTOP, nobody knows for how long, so
    such a lap counts at most as much as the longest one before it.
    """

    def __init__(self, seconds: float = 0.0):
        self._seconds = seconds
        # When the lap began; None: the clock does not run.
        self._since: float | None = None
        self._longest = 0.0
        self._stood_still = False

    def seconds(self) -> float:
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def lap(self) -> None:
        """Ends a lap, if the clock runs, and begins the next one."""
        if self._since is None:
            return
        now = time.perf_counter()
        taken = now - self._since
        if self._stood_still and self._longest:
            taken = min(taken, self._longest)
        self._seconds, self._since = self._seconds + taken, now
        self._longest, self._stood_still = max(self._longest, taken), False

    def _note_stop(self) -> None:
        self._stood_still = True

    @contextmanager
    def running(self) -> Iterator[None]:
        self._since = time.perf_counter()
        try:
            with signals.when_continued(self._note_stop):
                yield
        finally:
            self.lap()
            self._since = None

    @contextmanager
    def stopped(self) -> Iterator[None]:
        self.lap()
        self._since = None
        try:
            yield
        finally:
            self._since, self._stood_still = time.perf_counter(), False


def make_optimizer(encoder: PrefixEncoder, weight_decay: float) -> torch.optim.AdamW:
    """AdamW as transformers' Trainer sets it up: its betas and eps, no decay for biases. It gets nothing but the encoder.
    Its learning rate is set before each step (loop.py).
    """
    parameters = list(encoder.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    # One kernel for all parameters, where torch has it.
    fused = parameters[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.999), eps=1e-8, fused=fused)


def make_schedule(name: str, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """The learning rate as a share of its peak, by the updates that are done. name: one of transformers' `get_scheduler`."""
    # Only the scheduler's lambda is used, and not the optimizer that it asks for.
    unused = torch.optim.SGD([torch.zeros(())], lr=1.0)
    (share,) = get_scheduler(name, unused, warmup_steps, total_steps).lr_lambdas
    return share
