import json
import re

import pytest
import torch
from answers import FRANCE, refuses, run_infer
from datasets import Dataset, DatasetDict
from models import plain_loss
from rows import questions, write_rows

from prefix_tuning import bundled
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import take, tokenize
from prefix_tuning.evaluation import evaluate_rows, perplexity
from prefix_tuning.files.prefixes import load_prefix


def test_scores_are_the_evaluations(tmp_path, tuned, prefixes, tokenizer, capsys):
    rows = [
        row | {"output": answer} for row, answer in zip(questions(9), ["巴黎", "法国的首都是巴黎。", "4"] * 3, strict=True)
    ]
    source, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "scores.json"
    run_infer("--score", source, *prefixes, "--output", output, "--precision", "fp32")
    out, err = capsys.readouterr()
    assert all(re.search(rf"\r{name}: 100%.* 9/9 .*row/s", err) for name in ("base", "short", "sentence"))
    header, *lines, total = out.splitlines()
    assert header.split() == [
        "row",
        "labels",
        "base",
        "loss",
        "perplexity",
        "short",
        "loss",
        "perplexity",
        *header.split()[8:],
    ]
    scores = json.loads(output.read_text("utf-8"))
    assert [row["instruction"] for row in scores["rows"]] == [row["instruction"] for row in rows]
    base, _ = load_base(bundled.MODEL, torch.float32, torch.device("cpu"))
    all_rows = load_rows(str(source), ("train",))
    for name, folder in {"base": None, **tuned}.items():
        prefix = load_prefix(str(folder)).tensor if folder else None
        mean, _ = evaluate_rows(base, tokenize(all_rows, tokenizer, 10**6), prefix, 100)
        assert scores["all"]["loss"][name] == pytest.approx(mean, rel=1e-5)
        assert scores["all"]["perplexity"][name] == pytest.approx(perplexity(mean), rel=1e-5)
        for index, row in enumerate(scores["rows"]):
            alone, _ = evaluate_rows(base, tokenize(all_rows.select([index]), tokenizer, 10**6), prefix, 100)
            assert row["loss"][name] == pytest.approx(alone, rel=1e-4)
            assert f"{row['loss'][name]:.4f}" in lines[index].split()
        assert f"{scores['all']['loss'][name]:.4f}" in total.split()
    refuses("scores.json is there already; name another", "--score", source, *prefixes, "--output", output)
    refuses("'output' is empty", "--score", write_rows(source, [{"instruction": "a", "output": " "}]), *prefixes)


def test_talks_and_other_columns_are_scored(tmp_path, tuned, tokenizer, capsys):
    said = [("user", FRANCE), ("assistant", "巴黎"), ("user", "3加5等于多少？"), ("assistant", "8")]
    talk = {"messages": [{"role": role, "content": text} for role, text in said]}
    flags = ["--prefix", f"short={tuned['short']}", "--precision", "fp32"]
    source, output = write_rows(tmp_path / "talks.json", [talk]), tmp_path / "scores.json"
    run_infer("--score", source, *flags, "--output", output)
    captured = capsys.readouterr()
    assert f"{source}: each row of messages is read as a talk\n" in captured.err
    header, row, _ = captured.out.splitlines()
    assert header.startswith("   row") and row.endswith("  3加5等于多少？")
    (figures,) = json.loads(output.read_text("utf-8"))["rows"]
    assert figures["history"] == [FRANCE, "巴黎"] and figures["labels"] == 4  # two answers, each with its end
    base, _ = load_base(bundled.MODEL, torch.float32, torch.device("cpu"))
    examples = take(tokenize(load_rows(str(source), ("train",)), tokenizer, 10**6), [0])
    for name, prefix in (("base", None), ("short", load_prefix(str(tuned["short"])).tensor)):
        assert figures["loss"][name] == pytest.approx(plain_loss(base, examples, prefix).item() / 4, rel=1e-5)
    other = write_rows(tmp_path / "rows.csv", [{"frage": FRANCE, "antwort": "巴黎"}])
    run_infer("--score", other, *flags, "--columns", "instruction=frage,output=antwort")
    captured = capsys.readouterr()
    assert f"{other}: frage is read as instruction, antwort as output\n" in captured.err and FRANCE in captured.out


def test_of_a_source_with_splits_the_test_rows_are_scored_in_full(tmp_path, tuned, tokenizer):
    long = "一二三四五六七八九十" * 80
    train, test = ({"instruction": "数到十", "output": answer} for answer in ("十", long))
    DatasetDict({"train": Dataset.from_list([train]), "test": Dataset.from_list([test])}).save_to_disk(tmp_path / "both")
    run_infer("--score", tmp_path / "both", "--prefix", tuned["short"], "--output", tmp_path / "scores.json")
    (row,) = json.loads((tmp_path / "scores.json").read_text("utf-8"))["rows"]
    assert row["output"] == long and row["labels"] == len(tokenizer(long).input_ids) + 1 > 513
