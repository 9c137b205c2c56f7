"""The learning rate, found by a few short trials before the run.

Which rate suits depends on the encoder's width, on whether there is a projection, on the number of virtual tokens, the base
and the length of the run; no single default fits (tests/benchmarks/README.md has the table). Each trial trains a copy of the
encoder, which is then thrown away, on the first training rows of the run: the same rows for each, so that the losses can be
compared. Its rate falls linearly to zero, as it does in most runs. The rates are half a decade apart, and loss over rate has
one valley, so the search walks downhill from the middle and tries no more rates than it must.
"""

import copy
import math
import time
from dataclasses import asdict, dataclass, replace

from prefix_tuning.model.bloom import Bloom
from prefix_tuning.text import duration
from prefix_tuning.training.loop import optimizer_step
from prefix_tuning.training.state import TrainingState
from prefix_tuning.training.steps import Steps

SHARE = 0.1  # of the run's steps, for all trials together
FEWEST_STEPS = 8  # of a trial, also where the run is short
USUAL_TRIALS = 4
FIRST_RATE = 1e-2
LOWEST, HIGHEST = 1e-5, 10.0


@dataclass
class Search:
    """What was tried: the rates, in this order, and the loss at the end of each trial; which was taken."""

    rates: list[float]
    losses: list[float]
    rate: float
    steps: int  # of a trial
    seconds: float

    def record(self) -> dict:
        """As a line of metrics.jsonl. A loss that was not finite is None."""
        losses = [loss if math.isfinite(loss) else None for loss in self.losses]
        return {"learning_rate_search": asdict(self) | {"losses": losses}}

    def __str__(self) -> str:
        tried = ", ".join(f"{rate:.1e} ({loss:.3f})" for rate, loss in sorted(zip(self.rates, self.losses, strict=True)))
        taken = f"learning rate {self.rate:.1e}, found in {duration(self.seconds)}"
        return f"{taken}: loss after {self.steps} steps at {tried}"


def find_learning_rate(base: Bloom, state: TrainingState, steps: Steps) -> Search:
    """Searches for a learning rate for the run that `state` and `steps` begin, which stay as they are. All ranks call this
    together, and find the same.
    """
    begun, length = time.perf_counter(), max(FEWEST_STEPS, round(SHARE * steps.total / USUAL_TRIALS))
    losses: dict[int, float] = {}  # by half decades above FIRST_RATE

    def loss_at(place: int) -> float:
        if place not in losses:
            losses[place] = trial(base, state, steps, rate_of(place), length)
        return losses[place]

    place = 0
    for way in (1, -1):
        while LOWEST < rate_of(place + way) < HIGHEST and loss_at(place + way) < loss_at(place):
            place += way
    rates = [rate_of(place) for place in losses]
    return Search(rates, [*losses.values()], rate_of(place), length, time.perf_counter() - begun)


def rate_of(place: int) -> float:
    """The rate so many half decades above FIRST_RATE, to two digits."""
    return float(f"{FIRST_RATE * 10 ** (place / 2):.1e}")


def trial(base: Bloom, state: TrainingState, steps: Steps, rate: float, length: int) -> float:
    """Trains a copy of the encoder for so many steps. Returns the mean loss of the last quarter of them, in nats."""
    copied = copy.deepcopy(state)
    copied.progress.peak_learning_rate, copied.schedule = rate, lambda updates: 1 - updates / length
    losses = []
    for step in replace(steps, total=length):
        _, loss, _ = optimizer_step(base, copied, step)
        losses.append(loss.item())
    last = losses[-math.ceil(length / 4) :]
    mean = sum(last) / len(last)
    return mean if math.isfinite(mean) else math.inf
