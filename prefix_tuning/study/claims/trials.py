"""Trainings and their scores: one method on one task, at the rate that suits it, for each seed."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar, cast

import torch
from datasets import Dataset

from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import Bloom, Objective, PackedModel
from prefix_tuning.model.encoder import PrefixEncoder
from prefix_tuning.study.claims.methods import METHODS, Encoder, FullTuning, Method
from prefix_tuning.study.claims.settings import Scale
from prefix_tuning.study.claims.tasks import bundled_base, load_task
from prefix_tuning.study.scoring import Score, pack_rows, score_prefix, spaced
from prefix_tuning.training.learning_rate import rate_at, walk_downhill
from prefix_tuning.training.loop import optimizer_step
from prefix_tuning.training.state import TrainingState, make_optimizer, make_schedule
from prefix_tuning.training.steps import Steps

MAX_TOKENS = 4096  # in a forward pass
MAX_GRAD_NORM = 1.0  # as in train.py
Run = TypeVar("Run")


@dataclass(frozen=True)
class Trial:
    """What is trained, apart from seed and rate. rows: how many of the task's training rows the seed draws. None: all."""

    method: str
    task: str = "short"
    rows: int | None = None
    tokens: int = 16


class Tuned(NamedTuple):
    """A method after its training, and the base that belongs to it."""

    method: Method
    base: Bloom
    encoder: Encoder

    def score_on(self, batches: list[Batch], prefix: torch.Tensor | None = None) -> Score:
        """The score with its own prefix, or with another one."""
        with self.method.attention(self.base):
            return score(self.base, batches, self.encoder.bake() if prefix is None else prefix)


def score(base: PackedModel, batches: list[Batch], prefix: torch.Tensor) -> Score:
    """A loss that is no number counts as infinite."""
    found = score_prefix(base, batches, prefix)
    return found if math.isfinite(found.loss) else found._replace(loss=math.inf)


class Measured(NamedTuple):
    """The scores of one trial. Each list has a number per seed.

    rate: the best of those tried. tried: rate -> loss on the validation rows, with the first seed; None: not finite.
    train_loss, held_out_loss: nats per label. exact_match: the share of held-out rows that are answered exactly.
    """

    rate: float
    tried: dict[str, float | None]
    train_loss: list[float]
    held_out_loss: list[float]
    exact_match: list[float]

    def median(self, figure: str) -> float:
        return statistics.median(getattr(self, figure))


def tune(trial: Trial, scale: Scale, rate: float, seed: int) -> Tuned:
    """Trains on the CPU, in float32."""
    frozen, tokenizer = bundled_base()
    method, rows = METHODS[trial.method], drawn(load_task(trial.task).train, trial.rows, seed)
    torch.manual_seed(seed)
    made = method.make(frozen, tokenizer, trial.tokens)
    base = made.base if isinstance(made, FullTuning) else frozen
    with method.attention(base):
        fit(base, cast(PrefixEncoder, made), rows, scale, rate, seed)
    return Tuned(method, base, made)


def fit(objective: Objective, encoder: PrefixEncoder, rows: Dataset, scale: Scale, rate: float, seed: int) -> None:
    """Trains the encoder in place, as train.py does: AdamW, gradients clipped, the rate falling linearly to zero."""
    schedule = make_schedule("linear", 0, scale.steps)
    state = TrainingState(encoder, make_optimizer(encoder, 0.0), schedule, MAX_GRAD_NORM, loss_scaling=False)
    state.progress.peak_learning_rate = rate
    for step in Steps(rows, min(scale.rows_per_step, len(rows)), scale.steps, MAX_TOKENS, seed=seed):
        optimizer_step(objective, state, step)


def drawn(rows: Dataset, count: int | None, seed: int) -> Dataset:
    """`count` of the rows, drawn by the seed. None: all of them."""
    if count is None or count >= len(rows):
        return rows
    return rows.select(torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:count].tolist())


def search(
    train: Callable[[float, int], Run], loss_of: Callable[[Run], float], first_rate: int, seeds: Sequence[int]
) -> tuple[float, dict[str, float | None], list[Run]]:
    """The best rate, by whole trainings with the first seed; the losses at all rates; and a training for each seed.

    train(rate, seed) returns what `loss_of` scores. The rates are half a decade apart and tried downhill, from the first one
    (training/learning_rate.py).
    """
    runs: dict[int, Run] = {}

    def loss_at(index: int) -> float:
        runs[index] = train(rate_at(index), seeds[0])
        return loss_of(runs[index])

    losses = walk_downhill(loss_at, first_rate)
    best = min(losses, key=lambda index: losses[index])
    tried = {f"{rate_at(index):g}": loss if math.isfinite(loss) else None for index, loss in sorted(losses.items())}
    return rate_at(best), tried, [runs[best], *(train(rate_at(best), seed) for seed in seeds[1:])]


def measure(trial: Trial, scale: Scale) -> Measured:
    """Finds the trial's rate, and scores the trainings of all seeds at that rate.

    The losses that decide are computed on validation rows, which are neither trained on nor scored.
    """
    task = load_task(trial.task)
    validation = sample_batches(task.validation, scale.scored // 2)
    rate, tried, runs = search(
        lambda rate, seed: tune(trial, scale, rate, seed),
        lambda run: run.score_on(validation).loss,
        METHODS[trial.method].first_rate,
        scale.seeds,
    )
    held_out = [run.score_on(sample_batches(task.held_out, scale.scored)) for run in runs]
    trained_on = (drawn(task.train, trial.rows, seed) for seed in scale.seeds)
    train = [run.score_on(sample_batches(rows, scale.scored)).loss for run, rows in zip(runs, trained_on, strict=True)]
    return Measured(rate, tried, train, *map(list, zip(*held_out, strict=True)))


class Longer(NamedTuple):
    """A job: one training of a trial at a rate, with the first seed and `times` the steps."""

    trial: Trial
    rate: float
    times: int


def train_longer(job: Longer, scale: Scale) -> dict[str, float]:
    """Its scores on held-out rows."""
    tuned = tune(job.trial, replace(scale, steps=job.times * scale.steps), job.rate, scale.seeds[0])
    return tuned.score_on(sample_batches(load_task(job.trial.task).held_out, scale.scored))._asdict()


def sample_batches(rows: Dataset, count: int) -> list[Batch]:
    """Up to `count` of the rows, evenly spaced, packed."""
    return pack_rows(spaced(rows, count), MAX_TOKENS)
