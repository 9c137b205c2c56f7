from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.petrov import identity, unlock


def test_identity_agrees_on_a_real_prefix(tiny):
    finding = identity(Lab(tiny))
    assert finding.verdict.en == "agrees" and len(finding.table) == 5
    assert max(map(max, finding.numbers["scaled"])) < 1e-6


def test_unlock_has_a_known_task_and_a_new_one(staged):
    found = {("short", "prefix"): 0.9, ("short", "full"): 0.9, ("reversed", "prefix"): 0.0, ("reversed", "full"): 0.9}
    assert staged(unlock, lambda trial: (1, 1, found[trial.task, trial.method])) == [True, True, True]
    assert staged(unlock, lambda trial: (1, 1, 0.5)) == [False, False, False]
