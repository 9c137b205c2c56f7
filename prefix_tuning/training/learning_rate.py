"""The learning rate, found by a few short trials before the run.

Which rate suits depends on the encoder's width, on whether there is a projection, on the base and on the length of the
run; no single default fits (tests/benchmarks/README.md has tables, and what else was tried). A trial trains a copy of the
encoder, which is then thrown away, on the first training rows of the run, while the rate falls to zero as it does in most
runs. All trials see the same rows, so their losses can be compared even where they are noisy.

The rates of the trials are half a decade apart. Loss over rate has one valley, so the search walks downhill from a first
guess and stops where both neighbours are worse; a parabola through these three gives its lowest point. A longer run wants a
lower rate than a short one: the best rate falls as a power of the number of steps (Bjorck et al. 2025, "Scaling Optimal LR
Across Token Horizons", ICLR, arXiv 2409.19913: 0.32 in pre-training; here 0.25 fits better), and what the trials found is
lowered accordingly.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

from prefix_tuning.errors import UserError
from prefix_tuning.model.bloom import Objective
from prefix_tuning.model.encoder import PrefixConfig
from prefix_tuning.text import duration
from prefix_tuning.training.loop import optimizer_step
from prefix_tuning.training.state import TrainingState
from prefix_tuning.training.steps import Steps

# In a long run, all trials together take at most this share of its steps.
SHARE = 0.1
# At most this many trials are made; most searches make 3 to 5.
MOST_TRIALS = 8
# A trial has at least this many steps, unless the run itself is shorter.
FEWEST_STEPS = 8
# The exponent of the number of steps, explained above.
HORIZON = 0.25
LOWEST_RATE, HIGHEST_RATE = 1e-6, 10.0


@dataclass
class Search:
    """The trials, in their order, and the rate that was found.

    losses: mean training loss in nats at the end of each trial. steps: of one trial. seconds: of all trials together.
    """

    rates: list[float]
    losses: list[float]
    steps: int
    rate: float
    seconds: float

    def record(self) -> dict:
        """As a line of metrics.jsonl. A loss that was not finite is None."""
        found = asdict(self) | {"losses": [loss if math.isfinite(loss) else None for loss in self.losses]}
        return {"search_seconds": round(found.pop("seconds"), 3), "learning_rate_search": found}

    def __str__(self) -> str:
        tried = ", ".join(f"{loss:.3f} at {rate:.1e}" for rate, loss in sorted(zip(self.rates, self.losses, strict=True)))
        taken = f"learning rate {self.rate:.1e}, found in {duration(self.seconds)}"
        return f"{taken} (loss after {self.steps} steps: {tried})"


def find_learning_rate(objective: Objective, state: TrainingState, steps: Steps) -> Search | None:
    """Finds the peak learning rate of the run, prints it and sets it in `state`. Nothing else of the state changes.

    Returns None, and makes no trial, if the rate is known already or there is no step to train. All ranks call this together
    and find the same rate. Raises UserError if no loss is finite at any rate.

    A run of one step takes the first guess. Its only loss is computed before its only update, so trials could not differ.
    """
    if state.progress.peak_learning_rate is not None or steps.total == 0:
        return None
    if steps.total == 1:
        state.progress.peak_learning_rate = guess = rate_at(first_guess(state.encoder.config))
        print(f"learning rate {guess:.1e}, guessed by the width of the encoder: one step is too few for trials")
        return None
    print("looking for a learning rate")
    begun = time.perf_counter()
    length = max(min(FEWEST_STEPS, steps.total), int(SHARE * steps.total / MOST_TRIALS))
    losses = walk_downhill(
        lambda index: trial(objective, state, steps, rate_at(index), length), first_guess(state.encoder.config)
    )
    if min(losses.values()) == math.inf:
        tried = ", ".join(f"{rate_at(index):.1e}" for index in losses)
        raise UserError(f"no loss was finite at any of the rates {tried}; try --precision fp32, or give --learning_rate")
    found = 10 ** (valley(losses) / 2) * (length / steps.total) ** HORIZON
    rates, taken = [rate_at(index) for index in losses], float(f"{found:.1e}")
    search = Search(rates, [*losses.values()], length, taken, time.perf_counter() - begun)
    state.progress.peak_learning_rate = search.rate
    print(search)
    return search


def rate_at(index: int) -> float:
    """10 ** (index / 2), rounded to two digits: the rates of the grid are half a decade apart."""
    return float(f"{10 ** (index / 2):.1e}")


def first_guess(config: PrefixConfig) -> int:
    """The index of the rate to begin with.

    Adam moves each weight by about the learning rate. A number of the prefix is a sum over as many weights as the encoder is
    wide, so a wide encoder wants a low rate. Without a projection each number is one weight.
    """
    guess = 2 / config.encoder_hidden_size if config.prefix_projection else 0.3
    return round(2 * math.log10(guess))


def walk_downhill(loss_at: Callable[[int], float], index: int) -> dict[int, float]:
    """The losses that were tried, by index, in their order: from `index` on, as long as they fall, to both sides."""
    losses = {index: loss_at(index)}
    for way in (-1, 1):
        while len(losses) < MOST_TRIALS and LOWEST_RATE < rate_at(index + way) < HIGHEST_RATE and index + way not in losses:
            losses[index + way] = loss_at(index + way)
            if not losses[index + way] < losses[index]:
                break
            index += way
    return losses


def valley(losses: dict[int, float]) -> float:
    """The lowest point of a parabola through the lowest loss and its two neighbours, at most half an index from it."""
    lowest = min(losses, key=lambda index: losses[index])
    left, middle, right = (losses.get(lowest + side, math.inf) for side in (-1, 0, 1))
    curvature = left - 2 * middle + right
    if not (math.isfinite(curvature) and curvature > 0):
        return lowest
    return lowest + (left - right) / (2 * curvature)


def trial(objective: Objective, state: TrainingState, steps: Steps, rate: float, length: int) -> float:
    """Trains a copy of the encoder for `length` steps. Returns the mean loss in nats of the last quarter of them."""
    copied = copy.deepcopy(state)
    copied.progress.peak_learning_rate, copied.schedule = rate, lambda updates: 1 - updates / length
    losses = [optimizer_step(objective, copied, step)[1] for step in replace(steps, total=length)]
    last = losses[-math.ceil(length / 4) :]
    mean = sum(loss.item() for loss in last) / len(last)
    return mean if math.isfinite(mean) else math.inf
