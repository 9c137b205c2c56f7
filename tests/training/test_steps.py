import itertools
from pathlib import Path

from helpers import metrics_of

from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import tokenize
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.steps import step_rows


def test_every_row_comes_once_an_epoch_and_the_last_step_takes_the_rest(quick_settings):
    for shuffle, rest in itertools.product((True, False), (4, 1)):
        config = TrainConfig(**quick_settings | {"shuffle": shuffle})
        steps = list(step_rows(config, rows=36 + rest, rows_per_step=6, total_steps=14))
        assert [len(step) for step in steps] == [6, 6, 6, 6, 6, 6, rest] * 2
        epochs = [list(itertools.chain(*steps[:7])), list(itertools.chain(*steps[7:]))]
        assert all(sorted(epoch) == list(range(36 + rest)) for epoch in epochs)
        assert (epochs[0] != epochs[1]) == shuffle


def test_an_epoch_ends_with_its_last_row(quick_settings, tmp_path, tokenizer):
    """Seven rows in steps of six: the second step of each epoch has one."""
    rows = Path(quick_settings["dataset"]).read_text("utf-8").splitlines(True)[:7]
    (tmp_path / "seven.jsonl").write_text("".join(rows), "utf-8")
    seven = str(tmp_path / "seven.jsonl")
    summary = train(TrainConfig(**quick_settings | {"dataset": seven, "eval_dataset": seven, "max_steps": 4}))
    lines = metrics_of(quick_settings["output_dir"])
    assert [line["epoch"] for line in lines if "loss" in line] == [0.5, 1, 1.5, 2]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4]
    tokenized = tokenize(load_rows(seven, ("train",)), tokenizer, 256)
    assert summary["tokens"] == 2 * sum(map(len, tokenized["input_ids"]))


def test_rows_not_yet_seen_come_in_the_same_order_in_steps_of_another_size():
    config = TrainConfig(seed=3)

    def flat(*arguments):
        return [row for step in step_rows(config, 30, *arguments) for row in step]

    whole = flat(4, 24)  # three epochs of 7 steps of 4 rows and one of 2
    assert sorted(whole[:30]) == sorted(whole[30:60]) == list(range(30)) and whole[:30] != whole[30:60]
    for epoch, row in ((0, 8), (1, 0), (1, 12)):
        rest = whole[30 * epoch + row :]
        for rows_per_step in (2, 4, 6):
            assert flat(rows_per_step, 100, epoch, row)[: len(rest)] == rest
