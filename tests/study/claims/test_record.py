import json

import pytest

from prefix_tuning.study.claims.record import Chart, Finding, Part
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
        {"numbers": [1.5]},
        3.0,
    )


@pytest.mark.parametrize(
    "agreements, verdict",
    [((True, True), "agrees"), ((False, False), "DISAGREES"), ((True, False, False), "agrees in 1/3 parts")],
)
def test_the_verdict_line(agreements, verdict):
    found = finding(*agreements)
    facts = "; ".join(f"found {number}" for number in range(len(agreements)))
    assert found.line() == f"{verdict}: title (Someone 2020): {facts}"


def test_a_finding_survives_json():
    found = finding(True, False)
    assert Finding.from_json(json.loads(json.dumps(found.to_json()))) == found
