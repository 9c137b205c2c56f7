from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.trials import Trial


def staged(trial, scale):
    return trial.method, scale.steps


def test_a_trial_of_several_claims_is_measured_once(tiny):
    calls = []

    def imap(function, items):
        calls.append(items)
        return map(function, items)

    lab = Lab(tiny, imap)
    a, b, c = (Trial(name) for name in "abc")
    assert lab.run(staged, [a, b, a]) == [["a", 2], ["b", 2], ["a", 2]]  # as JSON gives them back
    assert lab.run(staged, [c, b]) == [["c", 2], ["b", 2]]
    assert calls == [[a, b], [c]]
