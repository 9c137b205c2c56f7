import json
from pathlib import Path

import pytest
import torch
from answers import complete
from datasets import Dataset
from models import random_bloom, random_prefix
from runs import LATEST, assert_same_run, checkpoint_names, interrupt, metrics_without_timings

from prefix_tuning import evaluation
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import tokenize
from prefix_tuning.data.templates import prompt_of
from prefix_tuning.errors import UserError
from prefix_tuning.evaluation import Evaluator
from prefix_tuning.files.prefixes import load_prefix
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig


def test_a_run_ends_with_five_answers_of_base_and_prefix_beside_the_expected_ones(settings, tmp_path, capsys):
    rows = [json.loads(line) for line in Path(settings["eval_dataset"]).read_text("utf-8").splitlines()]
    rows[0]["output"] = "长" * 100  # too long to be shown
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    train(TrainConfig(**settings | {"eval_dataset": str(held_out)}))
    out = capsys.readouterr().out
    assert [out.count(f"\n  {title}") for title in ("frozen base", "with prefix", "expected")] == [5, 5, 5]
    for row in rows[1:6]:
        assert f"  question     {row['instruction']}\n" in out and f"  expected     {row['output']}\n" in out
    assert rows[0]["instruction"] not in out
    train(TrainConfig(**settings | LATEST | {"eval_dataset": str(held_out), "num_train_epochs": 2}))
    assert capsys.readouterr().out.count("\n  frozen base") == 5


def test_long_answers_are_not_shown(settings, tmp_path, capsys):
    held_out = tmp_path / "held-out.jsonl"
    held_out.write_text(json.dumps({"instruction": "问", "output": "长" * 100}) + "\n", "utf-8")
    train(TrainConfig(**settings | {"eval_dataset": str(held_out)}))
    assert "  expected  " not in capsys.readouterr().out


def test_each_line_names_whose_answer_it_shows(tuned_model, tokenizer, capsys):
    rows = load_rows("bundled:short-eval", ("train",)).select(range(3))
    tokenized = tokenize(rows, tokenizer, 256)
    evaluator = Evaluator(tuned_model, tokenizer, tokenized, 640, total_steps=1)
    # Answers take longer than losses, so nobody gets them unasked.
    assert evaluator(None, "frozen base").keys() == {"eval_loss", "eval_perplexity"}
    evaluator.show_answers(tuned_model.prefixes["short"])
    out = capsys.readouterr().out
    prompts = [prompt_of(question) for question in rows["instruction"]]
    for title, name in (("frozen base", "base"), ("with prefix", "short")):
        shown = [line[15:] for line in out.splitlines() if line.startswith(f"  {title}")]
        answers = complete(tuned_model, tokenizer, prompts, prefix_name=name, max_new_tokens=8, do_sample=False)
        assert len(shown) == 3
        for ours, text in zip(shown, answers, strict=True):
            assert text and ours.startswith(" ".join(text.split())[:4])


def test_tokens_and_not_characters_decide_what_is_too_long_to_be_shown(tokenizer, capsys):
    """126 characters of 64 tokens are shown, 16 characters of 65 tokens are not. EOS is one of them."""
    texts = {"fits": "北京" * 63, "long": "𠮷" * 16}
    rows = [
        {"instruction": name, "input": "", "output": text, "system": "", "history": [], "weights": []}
        for name, text in texts.items()
    ]
    model = random_bloom()
    tokenized = tokenize(Dataset.from_list(rows), tokenizer, 256)
    Evaluator(model, tokenizer, tokenized, 640, total_steps=1).show_answers(random_prefix(model))
    out = capsys.readouterr().out
    assert "question     fits\n" in out and "question     long\n" not in out and out.endswith("\n\n")


# Evaluations: the frozen base, steps 3, 6 and 9, and the last step, 11.
@pytest.mark.parametrize("evaluations, step", [(1, 0), (2, 3), (3, 6), (5, 11)], ids=["frozen base", "3", "6", "last step"])
def test_a_signal_during_an_evaluation_saves_at_once(small_pass_settings, tmp_path, capfd, evaluations, step):
    small_pass_settings |= {"save_steps": 0}
    train(TrainConfig(**small_pass_settings))
    stopped = small_pass_settings | {"output_dir": str(tmp_path / "stopped")}
    interrupt(stopped, evaluations)
    assert "SIGINT: the run stops once it is saved (once more: it stops at once)" in capfd.readouterr().err
    assert checkpoint_names(tmp_path / "stopped") == ([f"checkpoint-{step}"] if step else [])
    assert step not in [line["step"] for line in metrics_without_timings(tmp_path / "stopped") if "eval_loss" in line]
    train(TrainConfig(**stopped | LATEST))
    assert_same_run(stopped["output_dir"], small_pass_settings["output_dir"])


def test_a_signal_during_the_answers_of_an_evaluation_saves_at_once(small_pass_settings, tmp_path):
    small_pass_settings |= {"save_steps": 0, "eval_exact_match": True}
    train(TrainConfig(**small_pass_settings))
    stopped = small_pass_settings | {"output_dir": str(tmp_path / "stopped")}
    interrupt(stopped, 2, call=1, watched=(PrefixBloom, "generate"))
    assert checkpoint_names(tmp_path / "stopped") == ["checkpoint-3"]
    train(TrainConfig(**stopped | LATEST))
    assert_same_run(stopped["output_dir"], small_pass_settings["output_dir"])


def test_memory_that_runs_out_during_an_evaluation_loses_nothing(small_pass_settings, tmp_path, monkeypatch):
    small_pass_settings |= {"save_steps": 0, "max_steps": 12}  # so that an interval of evaluations ends with the run
    train(TrainConfig(**small_pass_settings))
    stopped, real, evaluations = (
        small_pass_settings | {"output_dir": str(tmp_path / "stopped")},
        evaluation.evaluate_rows,
        [],
    )

    def run_out(*arguments):
        evaluations.append(None)
        if len(evaluations) == 5:  # of the last step
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(evaluation, "evaluate_rows", run_out)
    with pytest.raises(UserError, match=r"ran out of memory; .*checkpoint-12\.safetensors is intact, resume with"):
        train(TrainConfig(**stopped))
    # The prefix of the last step is saved before it is evaluated.
    assert torch.equal(*(load_prefix(run["output_dir"])[0] for run in (stopped, small_pass_settings)))
    train(TrainConfig(**stopped | LATEST))
    assert_same_run(stopped["output_dir"], small_pass_settings["output_dir"])
