import pytest

from prefix_tuning.study.claims import trials
from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.petrov import identity, unlock


def test_identity_agrees_on_a_real_prefix(tiny):
    finding = identity(Lab(tiny))
    assert finding.verdict.en == "agrees" and len(finding.table) == 5


def test_unlock_has_a_known_task_a_new_one_and_a_control(staged):
    found = {("short", "prefix"): 0.9, ("reversed", "prefix"): 0.0, ("copied", "prefix"): 0.7}
    assert staged(unlock, lambda trial: (1, 1, found.get((trial.task, trial.method), 0.9))) == [True] * 5
    found["copied", "prefix"] = 0.0  # then it is not the order
    assert staged(unlock, lambda trial: (1, 1, found.get((trial.task, trial.method), 0.9))) == [True] * 4 + [None]
    assert staged(unlock, lambda trial: (1, 1, 0.4)) == [False] * 4 + [None]


def test_more_steps_are_more_steps(tiny, monkeypatch):
    seen = []
    monkeypatch.setattr(trials, "tune", lambda trial, scale, rate, seed: seen.append((scale.steps, rate, seed)))
    with pytest.raises(AttributeError):  # nothing was trained
        trials.train_longer(trials.Longer(trials.Trial("prefix"), 0.01, 10), tiny)
    assert seen == [(10 * tiny.steps, 0.01, 1)]
