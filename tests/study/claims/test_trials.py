import math

import pytest
import torch

from prefix_tuning.study.claims import trials
from prefix_tuning.study.claims.methods import METHODS
from prefix_tuning.study.claims.tasks import load_task
from prefix_tuning.study.claims.trials import Measured, Trial, Tuned, drawn, measure, sample_batches, tune
from prefix_tuning.study.scoring import Score


def test_medians_are_taken_over_the_seeds():
    found = Measured(0.01, {}, [3.0, 1.0, 2.0], [9.0, 7.0, 70.0], [0.5, 0.1, 0.2])
    assert [found.median(name) for name in ("train_loss", "held_out_loss", "exact_match")] == [2.0, 9.0, 0.2]


def test_a_training_depends_on_its_seed_alone(tiny):
    first, again, other = (tune(Trial("prefix", rows=4), tiny, 0.01, seed).encoder.bake() for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.allclose(first, other)


def test_rows_are_drawn_by_the_seed():
    rows = load_task("short").train
    first, again, other = (drawn(rows, 5, seed)["input_ids"] for seed in (1, 1, 2))
    assert first == again != other and len(first) == 5
    assert drawn(rows, None, 1) is rows


def test_scored_rows_are_spread_evenly():
    rows = load_task("short").held_out
    ids = [row for batch in sample_batches(rows, 7) for row in batch.input_ids.split(batch.lengths)]
    expected = [rows[number * len(rows) // 7]["input_ids"] for number in range(7)]
    assert sorted(map(torch.Tensor.tolist, ids)) == sorted(expected)


def test_the_best_rate_is_found_on_other_rows_and_taken_for_all_seeds(tiny, monkeypatch):
    """The staged loss on the choosing rows is lowest at 1e-3, two grid points below the start of the search."""
    asked = []

    def staged(trial, scale, rate, seed):
        asked.append((rate, seed))
        return Staged(rate)

    class Staged:
        def __init__(self, rate):
            self.rate = rate

        def score_on(self, batches):
            return Score(math.inf if self.rate < 5e-4 else 1 + abs(math.log10(self.rate) + 3), 0.5)

    monkeypatch.setattr(trials, "tune", staged)
    found = measure(Trial("prefix"), tiny.__class__(**vars(tiny) | {"seeds": (7, 8, 9)}))
    assert found.rate == 1e-3 and found.tried["0.00032"] is None and len(found.exact_match) == 3
    assert [seed for rate, seed in asked if rate != 1e-3] == [7] * (len(asked) - 3)
    assert sorted(seed for rate, seed in asked if rate == 1e-3) == [7, 8, 9]


@pytest.mark.parametrize("method", ["infix", "full"])
def test_a_real_trial(tiny, method):
    found = measure(Trial(method, rows=4, tokens=2), tiny)
    assert f"{found.rate:g}" in found.tried and all(map(math.isfinite, found.held_out_loss))
    assert 3 <= len(found.tried) <= 8


def test_a_loss_that_is_no_number_counts_as_infinite(base, monkeypatch):
    monkeypatch.setattr(trials, "score_prefix", lambda *arguments: Score(math.nan, 0.0))
    assert Tuned(METHODS["prefix"], base, None).score_on([], torch.zeros(1)).loss == math.inf


def test_a_longer_training_multiplies_the_steps(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(trials, "tune", lambda trial, scale, rate, seed: seen.append((scale.steps, rate, seed)))
    with pytest.raises(AttributeError):  # nothing was trained
        trials.train_longer(trials.Longer(trials.Trial("prefix"), 0.01, 10), tiny)
    assert seen == [(10 * tiny.steps, 0.01, 1)]
