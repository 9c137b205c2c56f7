import itertools
import math
import signal
from pathlib import Path

import torch
from datasets import Dataset
from forks import in_forks
from runs import metrics_of

from prefix_tuning import distributed, signals
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import tokenize
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.steps import Steps


def rows_of(count):
    """Tokenised rows of two tokens. The second token and its label are the number of the row."""
    return Dataset.from_dict(
        {"input_ids": [[0, row] for row in range(count)], "labels": [[-100, row] for row in range(count)]}
    )


def order(steps):
    """The rows of each step."""
    return [sorted(int(label) for batch in step.batches for label in batch.labels) for step in steps]


def test_every_row_comes_once_an_epoch_and_the_last_step_takes_the_rest():
    for seed, rest in itertools.product((7, None), (4, 1)):
        steps = Steps(rows_of(36 + rest), rows_per_step=6, total=14, max_tokens=4, seed=seed)
        assert steps.per_epoch == 7 and [step.number for step in steps] == list(range(1, 15))
        assert [(step.labels, step.tokens, len(step.batches)) for step in steps] == [(6, 12, 3)] * 6 + [
            (rest, 2 * rest, math.ceil(rest / 2))
        ] + [(6, 12, 3)] * 6 + [(rest, 2 * rest, math.ceil(rest / 2))]
        found = order(steps)
        epochs = [list(itertools.chain(*found[:7])), list(itertools.chain(*found[7:]))]
        assert all(sorted(epoch) == list(range(36 + rest)) for epoch in epochs)
        assert (epochs[0] != epochs[1]) == (seed is not None)


def test_each_step_says_where_the_next_one_begins():
    steps = list(Steps(rows_of(10), rows_per_step=4, total=7, max_tokens=100, seed=1))
    assert [(step.next_epoch, step.next_row) for step in steps] == [(0, 4), (0, 8), (1, 0), (1, 4), (1, 8), (2, 0), (2, 4)]
    even = Steps(rows_of(8), rows_per_step=4, total=4, max_tokens=100)
    assert [(step.next_epoch, step.next_row) for step in even] == [(0, 4), (1, 0), (1, 4), (2, 0)]
    for done, step in enumerate(steps[:-1], start=1):
        rest = Steps(rows_of(10), 4, 7, 100, seed=1, done=done, epoch=step.next_epoch, row=step.next_row)
        assert order(rest) == order(steps[done:]) and next(iter(rest)).number == done + 1
    assert list(Steps(rows_of(10), 4, 7, 100, done=7, epoch=2, row=4)) == []


def test_the_order_of_an_epoch_depends_on_the_seed_and_its_number_alone():
    for epoch in range(3):
        expected = torch.randperm(10, generator=torch.Generator().manual_seed(7 + epoch)).tolist()
        for rows_per_step in (2, 5):
            steps = Steps(rows_of(10), rows_per_step, total=10 // rows_per_step, max_tokens=2, seed=7, epoch=epoch)
            assert [int(label) for step in steps for batch in step.batches for label in batch.labels] == expected


def test_a_signal_ends_the_steps_before_the_next_one():
    numbers = []
    with signals.listening("stops"):
        for step in Steps(rows_of(10), rows_per_step=4, total=7, max_tokens=100):
            numbers.append(step.number)
            if step.number == 3:
                signal.raise_signal(signal.SIGTERM)
    assert numbers == [1, 2, 3]


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
    def flat(rows_per_step, total, epoch=0, row=0):
        steps = Steps(rows_of(30), rows_per_step, total, 2, seed=3, epoch=epoch, row=row)  # two tokens are one row
        return [row for indices, *_ in steps._order() for row in indices]

    whole = flat(4, 24)  # three epochs of 7 steps of 4 rows and one of 2
    assert sorted(whole[:30]) == sorted(whole[30:60]) == list(range(30)) and whole[:30] != whole[30:60]
    for epoch, row in ((0, 8), (1, 0), (1, 12)):
        rest = whole[30 * epoch + row :]
        for rows_per_step in (2, 4, 6):
            assert flat(rows_per_step, 100, epoch, row)[: len(rest)] == rest


def test_forks_share_each_step_and_make_equally_many_passes_of_a_sharded_base():
    """A pass takes one row of 2 tokens. Of the five rows of a step, one process has three and the other two."""

    def work():
        found = []
        for options in ({}, {"equal_passes": True}):
            for step in Steps(rows_of(7), rows_per_step=5, total=2, max_tokens=2, **options):
                labels = [label for batch in step.batches for label in batch.labels.tolist()]
                found.append((len(step.batches), labels, step.labels, step.tokens))
        return found

    (first, second), codes = in_forks(2, work)
    assert codes == [0, 0]
    assert first == [(3, [0, 2, 4], 5, 10), (1, [5], 2, 4)] * 2
    assert second == [(2, [1, 3], 5, 10), (1, [6], 2, 4), (3, [1, 3], 5, 10), (1, [6], 2, 4)]


def test_forks_stop_together_once_one_has_heard_a_signal():
    def work():
        numbers = []
        with signals.listening("stops"):
            for step in Steps(rows_of(10), rows_per_step=4, total=7, max_tokens=100):
                numbers.append(step.number)
                if (distributed.rank(), step.number) == (1, 3):
                    signal.raise_signal(signal.SIGTERM)
        return numbers

    assert in_forks(2, work) == ([[1, 2, 3]] * 2, [0, 0])
