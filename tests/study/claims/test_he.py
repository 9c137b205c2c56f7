from prefix_tuning.study.claims.he import gated
from prefix_tuning.study.claims.lab import Lab


def test_both_forms_are_the_same_numbers(tiny):
    finding = gated(Lab(tiny))
    assert finding.verdict.en == "agrees" and len(finding.parts) == 2
    assert [len(row) for row in finding.table] == [7] * 5
