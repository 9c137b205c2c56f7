"""Everything that changes while a run goes on, and how it becomes a checkpoint and a run again."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from transformers import get_scheduler

from prefix_tuning.config import TrainConfig, UserError
from prefix_tuning.encoder import PrefixEncoder

# Settings that decide what the next step does. A run that goes on with others would be neither the old one nor a new one.
DECISIVE = (
    "precision", "max_length", "num_virtual_tokens", "prefix_projection", "encoder_hidden_size", "prefix_init", "init_text",
    "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type", "warmup_steps",
    "weight_decay", "max_grad_norm", "shuffle", "seed", "eval_fraction",
)  # fmt: skip


@dataclass
class Progress:
    """Where a run stands, in plain numbers. Raises ValueError for what is none."""

    step: int = 0
    epoch: int = 0  # the next row to train on: its epoch, and its place in the order of that epoch
    row: int = 0
    rows_per_step: int = 0
    seconds: float = 0.0  # of training; evaluation and saving do not count
    tokens: int = 0
    logged_step: int = 0  # the same three at the last line of metrics
    logged_seconds: float = 0.0
    logged_tokens: int = 0
    evaluated_step: int = -1
    best_step: int = -1
    best_loss: float | None = None
    evaluations_since_best: int = 0

    def __post_init__(self):
        for name, value in vars(self).items():
            if not isinstance(value, (int, float)) and not (name == "best_loss" and value is None):
                raise ValueError(f"{name} is no number, but {value!r}")


class TrainingState:
    """The encoder, what trains it, and the figures on the way.

    On the device, so that the loop need not wait for it: `losses`, the sum of the losses since the last line of metrics;
    `bad_step`, the first step whose loss or gradient was not finite; `good_prefix`, the prefix of the last step before that.
    """

    def __init__(self, config: TrainConfig, encoder: PrefixEncoder, total_steps: int, model_dtype: torch.dtype):
        self.encoder, self.progress = encoder, Progress()
        self.optimizer = make_optimizer(encoder, config)
        self.scheduler = get_scheduler(config.lr_scheduler_type, self.optimizer, config.warmup_steps, total_steps)
        self.good_prefix = encoder.bake()
        device = self.good_prefix.device
        # Only fp16 needs its loss scaled; where it is off, the scaler passes everything through.
        self.scaler = torch.amp.GradScaler(device.type, enabled=model_dtype == torch.float16)
        self.losses = torch.zeros((), device=device)
        self.bad_step = torch.full((), math.inf, device=device)
        self.best_weights: dict[str, torch.Tensor] = {}
        self.compile_seconds = 0.0

    def note_evaluation(self, loss: float, keep_best: bool) -> None:
        """Takes note of an eval loss, and of the weights if it is the lowest so far and they are to be kept."""
        progress = self.progress
        progress.evaluated_step, progress.evaluations_since_best = progress.step, progress.evaluations_since_best + 1
        if progress.best_loss is None or loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.evaluations_since_best = loss, progress.step, 0
            if keep_best:
                self.best_weights = {name: tensor.cpu().clone() for name, tensor in self.encoder.state_dict().items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors of a checkpoint, by name."""
        own = {name: getattr(self, name) for name in ("losses", "bad_step", "good_prefix")}
        weights = {f"encoder.{name}": tensor for name, tensor in self.encoder.state_dict().items()}
        best = {f"best.{name}": tensor for name, tensor in self.best_weights.items()}
        moments = {
            f"optimizer.{name}.{key}": value
            for name, parameter in self.encoder.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }
        random = {"random.cpu": torch.get_rng_state()}
        if self.losses.is_cuda:
            random["random.cuda"] = torch.cuda.get_rng_state(self.losses.device)
        return {**own, **weights, **best, **moments, **random}

    def numbers(self) -> dict:
        """The rest of a checkpoint, as JSON takes it."""
        return {
            "progress": dataclasses.asdict(self.progress),
            "scheduler_steps": self.scheduler.last_epoch,
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, tensors: dict[str, torch.Tensor], numbers: dict) -> None:
        """Becomes the state that `tensors` and `numbers` describe. Raises KeyError or ValueError if they describe none."""
        if numbers["progress"].keys() != vars(self.progress).keys():
            raise ValueError("the checkpoint notes other figures than this program")
        self.progress = Progress(**numbers["progress"])
        device = self.losses.device
        for name in ("losses", "bad_step", "good_prefix"):
            setattr(self, name, tensors[name].to(device))
        with torch.no_grad():
            for name, tensor in self.encoder.state_dict().items():
                if tensors[f"encoder.{name}"].shape != tensor.shape:
                    raise ValueError(f"encoder.{name} has another shape")
                tensor.copy_(tensors[f"encoder.{name}"])
        for name, parameter in self.encoder.named_parameters():
            self.optimizer.state[parameter] = {
                key: tensors[f"optimizer.{name}.{key}"].to(parameter.device) for key in ("step", "exp_avg", "exp_avg_sq")
            }
        self.best_weights = {
            name.removeprefix("best."): tensor for name, tensor in tensors.items() if name.startswith("best.")
        }
        if steps := numbers["scheduler_steps"]:
            # The rate is a function of the step alone: stand before the step, and take it.
            vars(self.scheduler).update(last_epoch=steps - 1, _step_count=steps + 1)
            self.scheduler.step()
        self.scaler.load_state_dict(numbers["scaler"])
        torch.set_rng_state(tensors["random.cpu"])
        if self.losses.is_cuda and "random.cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random.cuda"], device)


def make_optimizer(encoder: PrefixEncoder, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW as transformers' Trainer sets it up: its betas and eps, no decay for biases."""
    parameters = list(encoder.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")  # one kernel for all parameters
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=fused)


def identity(config: TrainConfig, base: dict, rows: str, dtype: torch.dtype) -> dict:
    """What a checkpoint and the run that goes on from it must have in common. base: a `fingerprint`; rows: a `digest`."""
    return {
        **{name: getattr(config, name) for name in DECISIVE},
        "precision": str(dtype).removeprefix("torch."),
        **{f"base model's {key}": value for key, value in base.items() if key != "name_or_path"},
        "dataset": rows,
    }


def check_same_run(noted: dict, now: dict, checkpoint: str) -> None:
    """Raises UserError naming what differs, if a checkpoint was made by a run of another `identity`."""
    differing = [name for name in now if noted.get(name) != now[name]]
    if not differing:
        return
    said = [
        f"--{name} {noted.get(name)}, not {now[name]}" if name in DECISIVE else f"another {name.replace('_', ' ')}"
        for name in differing
    ]
    raise UserError(f"{checkpoint}: was made with {'; '.join(said)}; go on with the same, or train anew without it")
