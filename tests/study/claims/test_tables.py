from prefix_tuning.study.claims.tables import medians, table_of, training, training_once
from prefix_tuning.study.claims.trials import Measured
from prefix_tuning.study.page import Text

FOUND = Measured(0.01, {"0.01": 1.0}, [0.1, 0.3, 0.2], [1.0, 3.0, 2.0], [0.5, 0.25, 1.0])


def test_a_row_has_medians_and_each_seed():
    head, row = table_of(Text("名", "name"), ["a"], [FOUND])
    assert len(head) == len(row)
    assert row == ["a", "0.01", "0.2000", "2.0000", "50.0%", "50.0%, 25.0%, 100.0%"]


def test_medians_are_over_the_seeds():
    assert medians([FOUND], "held_out_loss") == [2.0] and medians([FOUND]) == [0.5]


def test_what_was_run_is_said_with_its_numbers(tiny):
    assert "2 steps of 2 rows, float32" in training(tiny).en and "每步 2 行，" in training(tiny).zh
    assert "2 steps of 2 rows out of 8, float32" in training(tiny, 8).en and "每步 2 行（共 8 行）" in training(tiny, 8).zh
    assert "2 steps at the demo's rate of 0.005" in training_once(tiny).en
