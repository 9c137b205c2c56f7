import copy
import sys

import pytest
from answers import FRANCE, GREEDY, complete, refuses, run_infer
from rows import write_rows

from prefix_tuning import PrefixBloom, load_prefix
from prefix_tuning.data.templates import prompt_of
from prefix_tuning.inference.ask import Answerer
from prefix_tuning.text import display_width


def test_max_length_counts_the_question_and_max_new_tokens_does_not(tuned, tokenizer, capsys):
    flags, prompt = [FRANCE, "--prefix", tuned["sentence"]], len(tokenizer(prompt_of(FRANCE)).input_ids)
    answers = []
    for more in ([], ["--max_new_tokens", 3], ["--max_length", prompt + 3]):
        run_infer(*flags, *more)
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1] == answers[2]
    refuses(f"--max_length {prompt} leaves no room", *flags, "--max_length", prompt)


def test_a_base_that_returns_dicts_and_ends_at_strings_answers(base, tuned, tokenizer, mixed, capsys):
    odd = copy.deepcopy(base)
    odd.generation_config.update(return_dict_in_generate=True, output_scores=True, stop_strings=["是"])
    model = PrefixBloom(odd, tokenizer)
    model.attach("sentence", load_prefix(tuned["sentence"]))
    prompts = mixed[0][:9]
    answers = complete(model, tokenizer, prompts, **GREEDY)
    plain = PrefixBloom(base, tokenizer)
    plain.attach("sentence", load_prefix(tuned["sentence"]))
    until = [text.partition("是")[0] + "是" * ("是" in text) for text in complete(plain, tokenizer, prompts, **GREEDY)]
    assert answers == until and any(answer.endswith("是") for answer in answers)
    for sequences in (1, 2):
        capsys.readouterr()
        options = {"num_beams": 1, "num_return_sequences": sequences, "max_new_tokens": 12, "do_sample": True, "top_k": 1}
        Answerer(model, tokenizer, options, seed=0).print_answers({"sentence": tokenizer(prompts[0]).input_ids})
        assert capsys.readouterr().out.splitlines() == answers[:1] * sequences


def test_a_question_is_answered_and_compared(prefixes, capsys):
    run_infer(FRANCE, *prefixes)
    assert capsys.readouterr().out == "巴黎\n"
    run_infer(FRANCE, *prefixes, "--compare")
    base, short, sentence = capsys.readouterr().out.splitlines()
    assert base.startswith("base      ") and short == "short     巴黎" and sentence.startswith("sentence  法国的首都是")
    run_infer(FRANCE, *prefixes, "--num_beams", "3", "--num_return_sequences", "2")
    assert capsys.readouterr().out.splitlines()[0] == "巴黎"
    run_infer(FRANCE, *prefixes, "--compare", "--num_beams", "2", "--num_return_sequences", "2")
    labels = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert labels == ["base", "base", "short", "short", "sentence", "sentence"]
    run_infer(FRANCE, *prefixes, "--max_length", "400")
    assert capsys.readouterr().out == "巴黎\n"
    refuses("--max_length 5 leaves no room for an answer", FRANCE, *prefixes, "--max_length", "5")


def test_drawn_answers_that_are_compared_are_those_of_each_prefix_alone(tuned_model, tokenizer, capsys):
    options = {"num_beams": 1, "num_return_sequences": 1, "max_new_tokens": 8, "do_sample": True, "temperature": 3.0}
    prompt = tokenizer(prompt_of(FRANCE)).input_ids
    answerer = Answerer(tuned_model, tokenizer, options, seed=3)

    def drawn(*names):
        answerer.print_answers(dict.fromkeys(names, prompt))
        return {name: "".join(pieces) for name, pieces in answerer.printed.items()}

    assert drawn("base", "short", "sentence") == drawn("base") | drawn("short") | drawn("sentence")


def test_wide_names_and_questions_stay_in_their_columns(tmp_path, tuned, capsys):
    named = ["--prefix", f"短={tuned['short']}", "--prefix", f"完整句子={tuned['sentence']}"]
    run_infer(FRANCE, *named, "--compare")
    base, short, sentence = capsys.readouterr().out.splitlines()
    assert base.startswith("base      ") and short == "短        巴黎" and sentence.startswith("完整句子  法国的首都是")
    long = "请用一句完整的话回答下面这个问题：" * 3
    run_infer("--score", write_rows(tmp_path / "rows.jsonl", [{"instruction": long, "output": "巴黎"}]), *named)
    header, row, _ = capsys.readouterr().out.splitlines()
    assert row.endswith("  " + long[:28] + "...")
    assert display_width(header.removesuffix("question")) == display_width(row.removesuffix(long[:28] + "..."))


@pytest.mark.parametrize(
    "terminal, environment, coloured",
    [
        (True, {"TERM": "xterm"}, True),
        (True, {"TERM": "dumb"}, False),
        (True, {"TERM": "xterm", "NO_COLOR": ""}, False),
        (False, {"TERM": "xterm"}, False),
    ],
)
def test_names_have_colours_on_a_terminal_that_has_them(
    random_model, tokenizer, monkeypatch, capsys, terminal, environment, coloured
):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    options = {"num_beams": 1, "num_return_sequences": 1, "max_new_tokens": 2, "do_sample": False}
    answerer = Answerer(random_model, tokenizer, options, seed=0)
    answerer.print_answers(dict.fromkeys(answerer.names(compare=True), tokenizer(FRANCE).input_ids))
    out = capsys.readouterr().out
    assert out.startswith("\033[33mbase  \033[0m" if coloured else "base  ")
    assert ("\033[36mfive  \033[0m" if coloured else "\nfive  ") in out and ("\033" in out) == coloured
