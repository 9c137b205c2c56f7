"""The claims about texts that become prefixes: on staged figures, and each with real trainings of a few steps."""

import json
import math
from dataclasses import replace

import pytest
import torch

from prefix_tuning.model.distillation import Distillation
from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.reading import (
    LONG,
    MOST,
    SHORT,
    Reading,
    Shorter,
    TwoSheets,
    compose,
    composed,
    learn,
    measure_reading,
    measure_shorter,
    objective,
    reader,
    score_on,
    sheet,
    shorter,
    size,
    text_start,
    turned,
)
from prefix_tuning.study.claims.trials import sample_batches
from prefix_tuning.training.start import start_pairs
from prefix_tuning.training.teacher import read_pairs


def test_the_objective_is_compared_for_each_start(staged):
    shares = {
        ("divergence", "random"): 0.5,
        ("answers", "random"): 0.4,
        ("divergence", "first"): 0.6,
        ("answers", "first"): 0.7,
    }
    assert staged(objective, lambda trial: (1, 1, shares[trial.loss, trial.start])) == [True, False]


def test_each_start_from_the_text_is_compared_with_a_random_one(staged):
    by_mlp, direct = {"random": 0.5, "first": 0.6, "chunks": 0.7}, {"random": 0.5, "first": 0.6, "chunks": 0.4}
    assert staged(text_start, lambda trial: (1, 1, (by_mlp if trial.projection else direct)[trial.start])) == [True, None]


# 64 tokens are more than a tenth of the sheet.
@pytest.mark.parametrize("by_tokens, agrees", [({2: 0.5, 4: 0.91, 64: 0.5}, True), ({2: 1.0, 4: 0.89, 64: 1.0}, False)])
def test_a_tenth_of_the_tokens_has_to_keep_most_of_the_answers(staged, by_tokens, agrees):
    def figures(trial):
        return 1, 1, by_tokens[trial.tokens] if trial.loss == "divergence" else 1.0 if trial.tokens is None else 0.1

    assert staged(size, figures) == [agrees]


@pytest.mark.parametrize("together, near, agrees", [(0.3, 0.6, [True, False]), (0.6, 0.3, [False, True])])
def test_prefixes_side_by_side_are_compared_with_the_middle_between_alone_and_nothing(staged, together, near, agrees):
    jobs = {"text": 0.8, "alone": 0.9, "together": together, "near": near, "nothing": 0.1}
    assert staged(composed, lambda trial: (1, 1, 0.9), jobs) == agrees


def test_there_is_no_verdict_on_a_short_prefix_of_a_long_one(staged):
    assert staged(shorter, lambda trial: (1, 1, 0.9)) == [None]


def test_a_sheet_and_its_questions():
    one, again, other = sheet(1), sheet.__wrapped__(1), sheet(2)
    assert one.ids == again.ids != other.ids and torch.equal(one.pairs, again.pairs)
    assert one.pairs.shape[3] == len(one.ids) and (len(one.train), len(one.held_out)) == (2 * MOST, MOST)
    asked, held_out = ({tuple(row) for row in rows["input_ids"]} for rows in (one.train, one.held_out))
    assert len(asked) == 2 * MOST and not asked & held_out


def test_all_pairs_of_a_sheet_are_the_sheet_in_front(tiny):
    one, all_of_it = sheet(1), learn(Reading("none", "first", None), sheet(1), tiny, 0.0, 1)
    assert torch.allclose(all_of_it, one.pairs, atol=1e-5)
    assert score_on(one.held_out, all_of_it).exact_match > score_on(one.held_out, one.pairs[:, :, :, :0]).exact_match + 0.5


def test_untrained_pairs_stay_the_sheets(tiny):
    one, pairs = sheet(1), learn(Reading("none", "chunks", 5), sheet(1), tiny, 0.0, 1)
    assert torch.allclose(pairs, start_pairs(reader()[0], one.ids, 5, "chunks"))


@pytest.mark.parametrize("loss", ["divergence", "answers", "none"])
def test_a_real_reading(tiny, loss):
    found = measure_reading(Reading(loss, "first", 4), tiny)
    assert len(found.exact_match) == len(tiny.seeds) and all(map(math.isfinite, found.held_out_loss + found.train_loss))
    assert (found.tried == {}) == (loss == "none")


def test_each_loss_lowers_itself(tiny):
    """Twenty steps; the divergence from the sheet in front, and the cross-entropy of the answers."""
    scale, (base, _), one = replace(tiny, steps=20, rows_per_step=8), reader(), sheet(1)
    (batch,) = sample_batches(one.train, 20)
    losses = {"divergence": Distillation(base, one.pairs), "answers": base}
    start = learn(Reading("none", "first", 8), one, scale, 0.0, 1)
    for name, loss in losses.items():
        tuned = learn(Reading(name, "first", 8), one, scale, 0.01, 1)
        before, after = (loss.label_losses(batch, prefix).mean() for prefix in (start, tuned))
        assert after < 0.8 * before


def test_two_sheets_are_scored_alone_and_side_by_side(tiny):
    """With all pairs of each sheet, which need no training, two sheets read by themselves side by side still answer."""
    reading = Reading("none", "first", None)
    found = compose(TwoSheets(reading, 0.0, 1), tiny)
    assert found["alone"] > 0.9 and found["text"] > 0.9 and found["nothing"] < 0.3
    assert found["nothing"] < found["near"] <= 1 and found["nothing"] < found["together"] <= 1


def test_the_order_of_two_prefixes_says_nothing_where_keys_are_turned():
    base, one = reader()[0], sheet(1)
    (batch,) = sample_batches(one.held_out, 8)
    first, second = one.pairs[:, :, :, :100], one.pairs[:, :, :, 100:]
    both, turned_round = (base.label_losses(batch, torch.cat(order, dim=3)) for order in ((first, second), (second, first)))
    assert torch.allclose(both, turned_round, atol=1e-4)


def test_pairs_that_are_turned_are_those_of_a_text_that_stands_later():
    base, ids = reader()[0], sheet(1).ids
    assert torch.allclose(turned(sheet(1).pairs, 7), read_pairs(base, ids, len(ids), first_position=7), atol=1e-4)


def test_a_real_short_prefix_of_a_long_one(tiny):
    (found,) = Lab(tiny).run(measure_shorter, [Shorter(SHORT, LONG, 0.01)])
    assert json.loads(json.dumps(found)) and math.isfinite(found[3][0])
