import pytest
import torch
from datasets import Dataset
from helpers import complete, metrics_of, plain_loss, random_bloom, write_jsonl

from prefix_tuning import PrefixBloom
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import take, tokenize
from prefix_tuning.evaluation import SPARE_TOKENS, answer_turns, exact_match, expected_answers, last_turn
from prefix_tuning.files.prefixes import load_prefix
from prefix_tuning.model.batch import IGNORED
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig


def turns_of(rows, tokenizer, max_length=256):
    tokenized = tokenize(rows, tokenizer, max_length)
    return [last_turn(example) for example in take(tokenized, range(len(tokenized)))]


def test_answers_for_exact_match_are_as_long_as_the_outputs(tuned_model, tokenizer, mixed):
    def row(prompt):
        answer = complete(tuned_model, tokenizer, [prompt], prefix_name="sentence", max_new_tokens=64, do_sample=False)[0]
        return {
            "instruction": prompt.removeprefix("Human: ").partition("\n\n")[0],
            "input": "",
            "output": answer,
            "history": [],
        }

    rows = Dataset.from_list([row(prompt) for prompt in mixed[0][:4]])
    turns = turns_of(rows, tokenizer)
    answers = answer_turns(PrefixBloom(tuned_model), tokenizer, turns, tuned_model.prefixes["sentence"], 1000)
    assert answers == expected_answers(tokenizer, turns) == rows["output"] and exact_match(answers, rows["output"]) == 1


def test_evaluation_agrees_with_the_plain_forward(quick_settings, tokenizer):
    train(TrainConfig(**quick_settings | {"eval_dataset": quick_settings["dataset"]}))
    first, *_, last = [line for line in metrics_of(quick_settings["output_dir"]) if "eval_loss" in line]
    tokenized = tokenize(load_rows(quick_settings["dataset"], ("train",)), tokenizer, 256)
    examples = take(tokenized, list(range(len(tokenized))))
    labels = sum(label != IGNORED for example in examples for label in example.labels[1:])
    prefix, _ = load_prefix(quick_settings["output_dir"])
    for line, used in ((first, None), (last, prefix)):
        expected = plain_loss(random_bloom(), examples, used).item() / labels
        assert line["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_a_talk_is_asked_with_its_history_in_front(tuned_model, tokenizer, tmp_path):
    said = [
        ("user", "法国的首都是哪里？"),
        ("assistant", "巴黎"),
        ("user", "3加5等于多少？"),
        ("assistant", "八八八八八八八八"),
    ]
    row = {"messages": [{"role": role, "content": text} for role, text in said]}
    rows = load_rows(write_jsonl(tmp_path / "a.jsonl", row), ("train",))
    turns = turns_of(rows, tokenizer)
    (answer,) = answer_turns(PrefixBloom(tuned_model), tokenizer, turns, tuned_model.prefixes["sentence"], 1000)
    ids = take(tokenize(rows, tokenizer, 256), [0])[0].input_ids
    prompt = ids[: -len(tokenizer(said[-1][1]).input_ids) - 1]
    assert tokenizer.decode(prompt).count("</s>Human: ") == 1
    most = len(ids) - len(prompt) + SPARE_TOKENS
    output = tuned_model.generate(torch.tensor([prompt]), prefix_name="sentence", max_new_tokens=most, do_sample=False)
    assert answer == tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True)
