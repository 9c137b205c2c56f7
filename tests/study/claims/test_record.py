import json

import pytest

from prefix_tuning.study.claims.record import Chart, Finding, Part, above
from prefix_tuning.study.page import Text


def finding(*agreements):
    return Finding(
        Text("题", "title"),
        "Someone 2020, arXiv 1, figure 2",
        Text("说", "says"),
        Text("跑", "ran"),
        [Part(Text(f"甲{number}", f"found {number}"), agrees) for number, agrees in enumerate(agreements)],
        [[Text("名", "name"), "b"], ["1", Text("二", "2")]],
        [Chart("line", "x", "y", [1, 2], {"a": [0.5, None]}, log_x=True)],
    )


@pytest.mark.parametrize(
    "agreements, verdict",
    [
        ((True, True), "agrees"),
        ((False, False), "DISAGREES"),
        ((None, None), "open"),
        ((True, False, False), "agrees 1x, DISAGREES 2x"),
        ((True, None), "agrees 1x, open 1x"),
        ((False, None), "DISAGREES 1x, open 1x"),
    ],
)
def test_the_verdict_line(agreements, verdict):
    found = finding(*agreements)
    facts = "; ".join(f"found {number}" for number in range(len(agreements)))
    assert found.line() == f"{verdict}: title (Someone 2020): {facts}"


def test_seeds_that_do_not_agree_leave_it_open():
    assert above([0.5, 0.6], [0.3, 0.4]) is True
    assert above([0.3, 0.4], [0.5, 0.6]) is False
    assert above([0.3, 0.6], [0.4, 0.5]) is None
    assert above([0.5], [0.5]) is None


def test_a_finding_becomes_json():
    found = json.loads(json.dumps(finding(True, None).to_json()))
    assert found["title"] == ["题", "title"] and [part["agrees"] for part in found["parts"]] == [True, None]
