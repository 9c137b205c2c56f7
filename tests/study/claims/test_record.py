import json

import pytest

from prefix_tuning.study.claims.record import Chart, Finding, Part, above, chart_of, table_of, training, training_once
from prefix_tuning.study.claims.trials import Measured
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


FOUND = Measured(0.01, {"0.01": 1.0}, [0.1, 0.3, 0.2], [1.0, 3.0, 2.0], [0.5, 0.25, 1.0])


def test_a_row_has_medians_and_each_seed():
    head, row = table_of(Text("名", "name"), {"a": FOUND})
    assert len(head) == len(row)
    assert row == ["a", "0.01", "0.2000", "2.0000", "50.0%", "50.0%, 25.0%, 100.0%"]


def test_a_picture_shows_the_medians_of_each_series():
    chart = chart_of("held_out_loss", Text("行", "rows"), [20, Text("全", "all")], {Text("甲", "a"): [FOUND, FOUND]})
    assert chart.x == [20, "all · 全"] and chart.series == {"a · 甲": [2.0, 2.0]} and chart.kind == "bar"


def test_what_was_run_is_said_with_its_numbers(tiny):
    assert "2 steps of 2 rows, float32" in training(tiny).en and "每步 2 行，" in training(tiny).zh
    assert "2 steps of 2 rows out of 8, float32" in training(tiny, 8).en and "每步 2 行（共 8 行）" in training(tiny, 8).zh
    assert "2 steps at the demo's rate of 0.005" in training_once(tiny).en
