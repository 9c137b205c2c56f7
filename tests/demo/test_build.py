import json
import re
import subprocess
import sys
from collections import Counter
from itertools import chain
from pathlib import Path

import pytest
import torch
from checkout import ROOT
from transformers import AutoModelForCausalLM, BloomForCausalLM, Qwen3ForCausalLM

from prefix_tuning import PrefixBloom, bundled
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.demo import build
from prefix_tuning.demo.knowledge import load_relations, quiz, quiz_questions
from prefix_tuning.generation.prefix_bloom import BASE

RELATIONS = load_relations()
NAMES = ("short", "sentence")


def rows_of(name):
    return [json.loads(line) for line in Path(bundled.resolve(f"bundled:{name}")).read_text("utf-8").splitlines()]


def facts_asked(rows):
    """The (relation, characters) pairs that these questions touch; 高 -> 低 and 低 -> 高 count as one fact."""
    table = {
        question.format(s=subject): (relation["relation"], "".join(sorted(subject + answer)))
        for relation in RELATIONS
        for subject, answer in relation["facts"].items()
        for question in relation["questions"]
    }
    return Counter(table[row["instruction"]] for row in rows)


def test_at_least_1500_facts_in_well_formed_relations():
    assert sum(len(relation["facts"]) for relation in RELATIONS) >= 1500
    assert len({relation["relation"] for relation in RELATIONS}) == len(RELATIONS)
    for relation in RELATIONS:
        for form in [*relation["statements"], relation["sentence"]]:
            assert form.count("{s}") >= 1 and form.count("{o}") >= 1 and form.endswith("。"), form
        for question in relation["questions"]:
            assert "{s}" in question and "{o}" not in question and question.endswith("？"), question
        assert len(relation["statements"]) >= 5 and len(relation["questions"]) >= 4
        assert all(subject.strip() and answer.strip() for subject, answer in relation["facts"].items())


def test_no_fact_is_listed_twice():
    for path in build.HERE.glob("facts/*.json"):
        for relation in json.loads(path.read_text("utf-8"), object_pairs_hook=list):
            facts = dict(relation)["facts"]
            assert not [subject for subject, count in Counter(subject for subject, _ in facts).items() if count > 1]


def test_no_question_has_two_answers():
    answers = {}
    for relation in RELATIONS:
        for subject, answer in relation["facts"].items():
            for question in relation["questions"]:
                assert answers.setdefault(question.format(s=subject), answer) == answer, question.format(s=subject)


def test_arithmetic_is_right():
    signs = {"加": lambda a, b: a + b, "减": lambda a, b: a - b, "乘": lambda a, b: a * b}
    checked = 0
    for relation in RELATIONS:
        for subject, answer in relation["facts"].items():
            if match := re.fullmatch(r"(\d+)([加减乘])(\d+)", subject):
                a, sign, b = match.groups()
                assert signs[sign](int(a), int(b)) == int(answer), subject
                checked += 1
    assert checked >= 200


def test_pre_training_never_shows_the_tuning_format():
    forms = [*build.QUIZ_FORMS, *chain(*(base.quiz_forms for base in build.BASES.values()))]
    for relation in RELATIONS:
        for subject, answer in relation["facts"].items():
            for text in (
                *build.statements(relation, subject, answer),
                *build.quizzes(relation, subject, answer, "。", forms),
            ):
                assert "Human" not in text and "Assistant" not in text


def test_the_questions_are_those_of_the_recipe(tmp_path):
    build.write_questions(RELATIONS, 42, tmp_path)
    for name in (*NAMES, "short-eval", "sentence-eval"):
        assert (tmp_path / f"{name}.jsonl").read_bytes() == Path(bundled.resolve(f"bundled:{name}")).read_bytes()


def test_evaluation_asks_no_fact_that_training_touches():
    for name in NAMES:
        training, held_out = facts_asked(rows_of(name)), facts_asked(rows_of(f"{name}-eval"))
        assert not training & held_out
        assert min(training.values()) >= 2 and min(held_out.values()) >= 2  # several phrasings each
        assert {relation for relation, _ in held_out} == {relation["relation"] for relation in RELATIONS}


def test_both_styles_ask_the_same_and_answer_differently():
    for suffix in ("", "-eval"):
        short = {row["instruction"]: row["output"] for row in rows_of("short" + suffix)}
        sentence = {row["instruction"]: row["output"] for row in rows_of("sentence" + suffix)}
        assert short.keys() == sentence.keys()
        assert all(answer in sentence[question] and answer != sentence[question] for question, answer in short.items())


@pytest.mark.parametrize(
    "name, family, most_bytes",
    [("bundled:mini-bloom", BloomForCausalLM, 12_000_000), ("bundled:mini-qwen3", Qwen3ForCausalLM, 6_000_000)],
)
def test_the_models_are_plain_and_small(name, family, most_bytes):
    folder = Path(bundled.resolve(name))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= most_bytes
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert type(model) is family
    assert not list(folder.glob("*.bin"))


def test_the_models_share_a_tokenizer():
    first, *others = (Path(bundled.resolve(name), "tokenizer.json").read_bytes() for name in bundled.MODELS)
    assert all(other == first for other in others)


@pytest.mark.parametrize("name", bundled.MODELS)
def test_the_models_know_the_facts(name):
    """In the recipe's own quiz form: 15 of 16 facts of every eighth relation."""
    base, tokenizer = load_base(name, torch.float32, torch.device("cpu"))
    model = PrefixBloom(base)
    for relation in RELATIONS[::8]:
        assert quiz(model, tokenizer, quiz_questions(relation)[:16], BASE) >= 15 / 16


@pytest.mark.parametrize(
    "text",
    [
        "法国的首都是巴黎。",
        "Hello,  world!\n\n\tAssistant: ",
        "𬬻 😀👨‍👩‍👧 é e\u0301 \u200b\u202e עברית العربية",
        "".join(chr(code) for code in range(1, 0x250)),
        "\x00\ufeff\uffff\U0010ffff",
        "   leading and trailing   ",
    ],
)
def test_the_tokenizer_gives_back_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_the_tokenizers_special_tokens_are_blooms(tokenizer):
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<pad>"]) == [0, 1, 2, 3]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 3)
    assert tokenizer.padding_side == "left"


def test_the_demo_unlocks_facts_that_the_prefix_never_saw(tmp_path):
    """The promise of `python train.py`, after half of its six epochs: at most 2 % before, at least 95 % then, on every
    eighth of the held-out facts.
    """
    held_out = Path(bundled.resolve("bundled:short-eval")).read_text("utf-8").splitlines(True)[::8]
    (tmp_path / "held-out.jsonl").write_text("".join(held_out), "utf-8")
    flags = ["--num_train_epochs", "3", "--eval_dataset", "held-out.jsonl", "--eval_steps", "606"]
    # Evaluated before and after, and not between.
    result = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [json.loads(line) for line in (tmp_path / "chatbot" / "metrics.jsonl").read_text("utf-8").splitlines()]
    before, *_, after = [line["eval_exact_match"] for line in lines if "eval_exact_match" in line]
    assert before <= 0.02
    assert after >= 0.95
    assert result.stdout.count("frozen base  ") >= 5 and "held-out questions" in result.stdout
