"""Everything that changes while a run goes on, and how it becomes a checkpoint and a run again."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from transformers import get_scheduler

from prefix_tuning.model.encoder import PrefixEncoder
from prefix_tuning.training.settings import TrainConfig


class NotFinite(Exception):
    """The loss or the gradient of `step` was not finite; `good_prefix` is the last prefix for which both were, if any."""

    def __init__(self, step: int, good_prefix: torch.Tensor | None):
        self.step, self.good_prefix = step, good_prefix


@dataclass
class Progress:
    """Where a run stands, in plain numbers. Raises ValueError for one of another type."""

    step: int = 0
    epoch: int = 0  # the next row to train on: its epoch, and its place in the order of that epoch
    row: int = 0
    rows_per_step: int = 0
    seconds: float = 0.0  # of training; evaluation and saving do not count
    tokens: int = 0
    logged_step: int = 0  # the same three at the last line of metrics
    logged_seconds: float = 0.0
    logged_tokens: int = 0
    learning_rate: float = 0.0  # of the last step
    evaluated_step: int = -1
    best_step: int = -1
    best_loss: float | None = None
    evaluations_since_best: int = 0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if not isinstance(value := getattr(self, field.name), field.type):
                raise ValueError(f"{field.name} is {value!r}, which is no {field.type}")


class TrainingState:
    """The encoder, what trains it, and the figures on the way.

    On the device, so that the loop need not wait for it: `losses`, the sum of the losses since the last line of metrics;
    `grad_norm`, of the last step before clipping; `bad_step`, the first step whose loss or gradient was not finite;
    `good_prefix`, the prefix of the last step before that.
    """

    FIGURES = ("losses", "grad_norm", "bad_step", "good_prefix")
    MOMENTS = ("step", "exp_avg", "exp_avg_sq")  # AdamW's, of each parameter

    def __init__(self, config: TrainConfig, encoder: PrefixEncoder, total_steps: int, model_dtype: torch.dtype):
        self.encoder, self.progress = encoder, Progress()
        self.optimizer = make_optimizer(encoder, config)
        self.scheduler = get_scheduler(config.lr_scheduler_type, self.optimizer, config.warmup_steps, total_steps)
        self.good_prefix = encoder.bake()
        device = self.good_prefix.device
        # Only fp16 needs its loss scaled; where it is off, the scaler passes everything through.
        self.scaler = torch.amp.GradScaler(device.type, enabled=model_dtype == torch.float16)
        self.losses, self.grad_norm = torch.zeros((), device=device), torch.zeros((), device=device)
        self.bad_step = torch.full((), math.inf, device=device)
        self.best_weights: dict[str, torch.Tensor] = {}
        self.compile_seconds = 0.0

    def check_finite(self) -> None:
        """Raises NotFinite if a loss or gradient so far was not finite, or the weights are not. Waits for the device."""
        weights_finite = self.encoder.bake().isfinite().all()
        first = torch.where(weights_finite, self.bad_step, self.bad_step.clamp(max=self.progress.step + 1)).item()
        if first < math.inf:
            raise NotFinite(int(first), self.good_prefix if first > 1 else None)

    def note_evaluation(self, loss: float, keep_best: bool) -> None:
        """Takes note of an eval loss, and of the weights if it is the lowest so far and they are to be kept."""
        progress = self.progress
        progress.evaluated_step, progress.evaluations_since_best = progress.step, progress.evaluations_since_best + 1
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.evaluations_since_best = loss, progress.step, 0
            if keep_best:
                self.best_weights = {name: tensor.cpu().clone() for name, tensor in self.encoder.state_dict().items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of a checkpoint, by PART.NAME."""
        moments = {name: self.optimizer.state[parameter] for name, parameter in self.encoder.named_parameters()}
        parts = {
            "figures": {name: getattr(self, name) for name in self.FIGURES},
            "encoder": self.encoder.state_dict(),
            "best": self.best_weights,
            # None of them exists while fp16 has skipped every step.
            **{key: {name: own[key] for name, own in moments.items() if own} for key in self.MOMENTS},
        }
        return {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}

    def numbers(self) -> dict:
        """The rest of a checkpoint, as JSON takes it."""
        return {
            "progress": dataclasses.asdict(self.progress),
            "prefix_config": dataclasses.asdict(self.encoder.config),
            "scheduler_steps": self.scheduler.last_epoch,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, tensors: dict[str, torch.Tensor], numbers: dict) -> None:
        """Becomes the state that a checkpoint describes, whose weights the encoder has already.

        Raises KeyError, TypeError or ValueError if it describes no such state, or holds a tensor that has no use here.
        """
        if numbers["progress"].keys() != vars(self.progress).keys():
            raise ValueError("the checkpoint notes other figures than this program")
        self.progress = Progress(**numbers["progress"])
        weights, parameters = self.encoder.state_dict(), dict(self.encoder.named_parameters())
        expected = {
            "figures": {name: getattr(self, name) for name in self.FIGURES},
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
            if found and _kinds(found) != _kinds(expected[part]):
                raise ValueError(f"the checkpoint's {part} is {_kinds(found)}, not {_kinds(expected[part])}")
        for name in self.FIGURES:
            setattr(self, name, parts["figures"][name].to(self.losses.device))
        self.best_weights = parts["best"]
        if any(parts[key] for key in self.MOMENTS):
            for name, parameter in parameters.items():
                self.optimizer.state[parameter] = {key: parts[key][name].to(parameter.device) for key in self.MOMENTS}
        if steps := numbers["scheduler_steps"]:
            # step() recomputes the rate from last_epoch, so it is set to one less first.
            vars(self.scheduler).update(last_epoch=steps - 1, _step_count=steps + 1)
            self.scheduler.step()
        self.scaler.load_state_dict(numbers["scaler"])


def _kinds(tensors: dict[str, torch.Tensor]) -> dict[str, tuple]:
    return {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}


def make_optimizer(encoder: PrefixEncoder, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW as transformers' Trainer sets it up: its betas and eps, no decay for biases."""
    parameters = list(encoder.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")  # one kernel for all parameters
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=fused)
