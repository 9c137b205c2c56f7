import re

import pytest
from rows import write_jsonl
from runs import assert_same_run

from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.splits import load_splits, number_held_out
from prefix_tuning.errors import UserError
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig


def test_eval_fraction_holds_rows_out(quick_settings):
    train_rows, held_out = load_splits(quick_settings["dataset"], None, 0.25, None, seed=1)
    assert (len(train_rows), len(held_out)) == (30, 10)
    everything = load_rows(quick_settings["dataset"], ("train",)).to_list()
    assert sorted(train_rows.to_list() + held_out.to_list(), key=str) == sorted(everything, key=str)
    again, _ = load_splits(quick_settings["dataset"], None, 0.25, None, seed=1)
    assert again.to_list() == train_rows.to_list()
    other, _ = load_splits(quick_settings["dataset"], None, 0.25, None, seed=2)
    assert other.to_list() != train_rows.to_list()
    with pytest.raises(UserError, match="leaves one side empty"):
        load_splits(quick_settings["dataset"], None, 0.001, None, seed=1)


@pytest.mark.parametrize("rows, held_out", [(39, 0), (40, 2), (1000, 50), (4000, 200), (100_000, 200)])
def test_a_twentieth_is_held_out_by_default_and_none_of_few_rows(rows, held_out):
    assert number_held_out("rows.jsonl", rows, None, "") == held_out
    assert number_held_out("rows.jsonl", rows, 0.0, "") == 0


def test_a_flag_that_needs_held_out_rows_and_too_few_rows_to_hold_some_out(quick_settings, tmp_path):
    rows = write_jsonl(tmp_path / "rows.jsonl", *[{"instruction": "法国？", "output": "巴黎"}] * 39)
    config = TrainConfig(**quick_settings | {"dataset": rows, "eval_fraction": None, "eval_steps": 2, "save_best": True})
    with pytest.raises(UserError, match=r"39 rows are too few .* or leave out --eval_steps, --save_best$"):
        train(config)


def test_rows_without_labels_are_counted_and_all_of_them_are_an_error(quick_settings, capsys):
    train(TrainConfig(**quick_settings | {"max_length": 26}))
    assert "of 40 rows, whose prompts alone fill --max_length 26" in capsys.readouterr().out
    with pytest.raises(UserError, match="no row has a label left"):
        train(TrainConfig(**quick_settings | {"max_length": 5, "overwrite_output_dir": True}))


def test_cut_answers_are_counted_also_from_the_cache(quick_settings, capsys):
    source = quick_settings["dataset"]
    quick_settings |= {"eval_dataset": source, "overwrite_output_dir": True, "max_steps": 0}

    def lines(max_length):
        train(TrainConfig(**quick_settings | {"max_length": max_length}))
        pattern = rf"{source}: (\d+) of (\d+) answers are cut or left out; --max_length (\d+) would keep them all"
        return [tuple(map(int, found)) for found in re.findall(pattern, capsys.readouterr().out)]

    (cut, answers, longest), *same = lines(26)
    assert 0 < cut < answers == 40 and same == [(cut, answers, longest)] and lines(26) == [same[0]] * 2
    assert lines(longest) == [] and [needed for _, _, needed in lines(longest - 1)] == [longest] * 2


def test_other_columns_are_trained_on_and_named(quick_settings, tmp_path, capsys):
    rows = [{"frage": f"{number}加5等于几？", "antwort": str(number + 5)} for number in range(6)]
    quick_settings |= {"dataset": write_jsonl(tmp_path / "rows.jsonl", *rows)}
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: its columns are not known .*'frage', 'antwort'; .*--columns"):
        train(TrainConfig(**quick_settings))
    quick_settings |= {"columns": "instruction=frage,output=antwort", "eval_dataset": quick_settings["dataset"]}
    capsys.readouterr()
    train(TrainConfig(**quick_settings | {"save_steps": 1}))
    line = f"{quick_settings['dataset']}: frage is read as instruction, antwort as output\n"
    assert capsys.readouterr().out.count(line) == 2
    # Under our names they are the same rows: the run may be resumed with them.
    same = [{"instruction": row["frage"], "output": row["antwort"]} for row in rows]
    ours = {"dataset": write_jsonl(tmp_path / "ours.jsonl", *same), "eval_dataset": str(tmp_path / "ours.jsonl")}
    train(TrainConfig(**quick_settings | ours | {"columns": None, "output_dir": str(tmp_path / "again")}))
    assert_same_run(quick_settings["output_dir"], tmp_path / "again")
    resumed = quick_settings | ours | {"columns": None, "resume_from_checkpoint": "latest", "max_steps": 4}
    train(TrainConfig(**resumed))
    with pytest.raises(UserError, match="another --dataset"):
        train(TrainConfig(**resumed | {"dataset": write_jsonl(tmp_path / "other.jsonl", *same[1:]), "max_steps": 5}))


def test_talks_are_trained_and_evaluated_on(quick_settings, tmp_path, capsys):
    talk = [("human", "法国？"), ("gpt", "巴黎"), ("human", "德国？"), ("gpt", "柏林")]
    rows = [{"conversations": [{"from": role, "value": text} for role, text in talk]}] * 6
    source = write_jsonl(tmp_path / "talks.jsonl", *rows)
    train(TrainConfig(**quick_settings | {"dataset": source, "eval_dataset": source, "eval_exact_match": True}))
    out = capsys.readouterr().out
    assert out.count(f"{source}: each row of conversations is read as a talk\n") == 2
    assert "exact match" in out and "question     德国？" in out and "expected     柏林" in out
