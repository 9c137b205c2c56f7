import itertools

import pytest
import torch
from answers import FRANCE, complete
from datasets import Dataset
from models import plain_loss, random_bloom, random_prefix, training_state
from rows import write_jsonl
from runs import metrics_of

from prefix_tuning import PrefixBloom, evaluation
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import take, tokenize
from prefix_tuning.data.templates import prompt_of
from prefix_tuning.evaluation import (
    SPARE_TOKENS,
    Evaluator,
    Turn,
    answer_turns,
    evaluate_rows,
    expected_answers,
    foreseen_match,
    last_turn,
    matching,
)
from prefix_tuning.files.prefixes import load_prefix
from prefix_tuning.model.batch import IGNORED
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder
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
            "system": "",
            "history": [],
            "weights": [],
        }

    rows = Dataset.from_list([row(prompt) for prompt in mixed[0][:4]])
    turns = turns_of(rows, tokenizer)
    answers = answer_turns(PrefixBloom(tuned_model), tokenizer, turns, tuned_model.prefixes["sentence"], 1000)
    assert answers == expected_answers(tokenizer, turns) == rows["output"] and matching(answers, rows["output"]) == 4


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


@pytest.mark.parametrize("name", ["short", "sentence", None])
def test_exact_match_is_that_of_generated_answers_although_few_are_generated(tuned_model, tokenizer, name, monkeypatch):
    tokenized = tokenize(load_rows("bundled:short-eval", ("train",)).select(range(60)), tokenizer, 256)
    turns = [last_turn(example) for example in take(tokenized, range(60))]
    prefix = tuned_model.prefixes[name] if name else None
    answers = answer_turns(PrefixBloom(tuned_model), tokenizer, turns, prefix, 1000)
    equal = [ours == theirs for ours, theirs in zip(answers, expected_answers(tokenizer, turns), strict=True)]

    asked, real = [], evaluation.answer_turns
    monkeypatch.setattr(evaluation, "answer_turns", lambda *x: asked.extend(x[2]) or real(*x))
    evaluator = Evaluator(tuned_model, tokenizer, tokenized, 300, total_steps=1, wants_answers=True)
    assert evaluator(prefix, "")["eval_exact_match"] == sum(equal) / 60
    assert len(asked) < 10
    _, likeliest = evaluate_rows(tuned_model, tokenized, prefix, 300, lambda row, tokens: tokens)
    foreseen = [foreseen_match(tokenizer, turn, tokens) for turn, tokens in zip(turns, likeliest, strict=True)]
    assert [turn for turn, match in zip(turns, foreseen, strict=True) if match is None] == asked
    assert all(match in (None, right) for match, right in zip(foreseen, equal, strict=True))


def test_no_number_is_no_likeliest_token(tuned_model):
    """Of logits that are not finite, no label is the likeliest; of equal ones, the first is, as in generation."""
    hidden, labels = torch.full((3, tuned_model.config.hidden_size), torch.nan), torch.tensor([4, 5, 6])
    losses, likeliest = tuned_model.head_scores(hidden, labels)
    assert losses.isnan().all() and not (likeliest == labels).any()
    losses, likeliest = tuned_model.head_scores(torch.zeros_like(hidden), labels)
    assert losses.isfinite().all() and likeliest.tolist() == [0, 0, 0]


def test_the_first_other_token_tells_whether_an_answer_can_still_be_right(tokenizer):
    def foreseen(answer, other):
        """The tokens of `other` are the likeliest, up to the first that differs; after it, anything may be."""
        tokens = [*tokenizer(answer).input_ids, tokenizer.eos_token_id]
        likeliest = [4, *tokenizer(other).input_ids]  # 4: of an earlier label
        likeliest += [tokenizer.eos_token_id] * (1 + len(tokens) - len(likeliest))
        return foreseen_match(tokenizer, Turn([], [9], tokens), likeliest[: 1 + len(tokens)])

    assert foreseen("巴黎", "巴黎") is True and foreseen("巴黎", "北京") is False and foreseen("上海市", "上海滩") is False
    # It ends early, or goes on after a space, or with the first byte of the right character: that is generated.
    assert foreseen("上海市", "上海") is None and foreseen("8", " 8") is None
    byte = tokenizer.convert_tokens_to_ids("é")  # 0xE9, with which 黎 begins
    assert foreseen_match(tokenizer, Turn([], [9], [*tokenizer("黎").input_ids, 2]), [byte, 2]) is None


def test_an_answer_of_the_same_text_in_other_tokens_is_right(tuned_model, tokenizer):
    """So a row with an unlikely label is asked all the same."""
    prompt = tokenizer(prompt_of(FRANCE)).input_ids
    (answer,) = complete(tuned_model, tokenizer, [prompt_of(FRANCE)], prefix_name="short", max_new_tokens=9, do_sample=False)
    ids = [*itertools.chain(*(tokenizer(letter).input_ids for letter in answer + " ")), tokenizer.eos_token_id]
    labels = [IGNORED] * len(prompt) + ids
    tokenized = Dataset.from_list([{"input_ids": prompt + ids, "labels": labels}])
    prefix = tuned_model.prefixes["short"]
    assert evaluate_rows(tuned_model, tokenized, prefix, 300, lambda row, tokens: tokens)[1] != [ids]
    evaluator = Evaluator(tuned_model, tokenizer, tokenized, 300, total_steps=1, wants_answers=True)
    assert evaluator(prefix, "")["eval_exact_match"] == 1


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


def test_loss_and_exact_match_are_of_the_same_rows_cut_in_the_same_way(quick_settings, tmp_path, tokenizer, capsys):
    """One prompt fills --max_length. No figure counts its row, and nobody answers it."""
    held_out = [
        {"instruction": FRANCE, "output": "巴黎"},
        {"instruction": "很长" * 60, "output": "好"},
        {"instruction": FRANCE, "output": "长" * 90},
    ]
    settings = quick_settings | {"eval_dataset": write_jsonl(tmp_path / "held-out.jsonl", *held_out), "max_length": 60}
    asked, real = [], PrefixBloom.generate

    def generate(model, **options):
        asked.append(options["input_ids"].shape)
        return real(model, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrefixBloom, "generate", generate)
        train(TrainConfig(**settings | {"eval_exact_match": True}))
    out = capsys.readouterr().out
    assert "left out 1 of 3 rows" in out and "40 rows and 2 held out" in out and "of 2 held-out questions" in out
    # By the base and by the prefix, in two evaluations and at the end.
    assert asked == [(2, len(tokenizer(prompt_of(FRANCE)).input_ids))] * 2 + asked[2:] and len(asked) == 4
    assert all(tokens < 60 for _, tokens in asked)


def test_a_cut_answer_is_right_if_it_is_right_as_far_as_it_was_kept(tuned_model, tokenizer):
    prompt = prompt_of(FRANCE)
    (answer,) = complete(tuned_model, tokenizer, [prompt], prefix_name="sentence", max_new_tokens=64, do_sample=False)
    tokens = len(tokenizer(answer).input_ids)
    rows = Dataset.from_list(
        [
            {"instruction": FRANCE, "input": "", "output": answer + more, "system": "", "history": [], "weights": []}
            for more in ("", "还有很多很多")
        ]
    )
    for kept, matches in ((tokens + 1, [True, False]), (tokens, [True, True]), (tokens - 2, [True, True])):
        turns = turns_of(rows, tokenizer, len(tokenizer(prompt).input_ids) + kept)
        answers = answer_turns(PrefixBloom(tuned_model), tokenizer, turns, tuned_model.prefixes["sentence"], 1000)
        expected = expected_answers(tokenizer, turns)
        assert [ours == theirs for ours, theirs in zip(answers, expected, strict=True)] == matches
        assert matching(answers, expected) == sum(matches)


def test_one_long_answer_does_not_make_the_others_long(tokenizer):
    """A random base hardly ever ends an answer by itself."""
    model = PrefixBloom(random_bloom())
    rows = [
        {"instruction": f"{number}?", "input": "", "output": "好", "system": "", "history": [], "weights": []}
        for number in range(40)
    ]
    rows[7]["output"] = "长" * 150
    turns = turns_of(Dataset.from_list(rows), tokenizer)
    computed = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: computed.append(len(output)))
    answers = answer_turns(model, tokenizer, turns, None, 1000)
    assert computed[0] == 40 and len(computed) > 140 and sum(computed) < 40 * (2 + SPARE_TOKENS) + 200
    assert len(tokenizer(answers[7]).input_ids) > 100


def test_greedy_is_greedy_whatever_the_bases_own_settings_are(tokenizer, capsys):
    rows = [
        {"instruction": f"{number}?", "input": "", "output": "好" * 30, "system": "", "history": [], "weights": []}
        for number in range(3)
    ]
    tokenized = tokenize(Dataset.from_list(rows), tokenizer, 256)
    shown, answers = [], []
    for options in ({}, {"repetition_penalty": 5.0, "do_sample": True, "temperature": 3.0, "min_new_tokens": 3}):
        base = random_bloom()
        base.generation_config.update(**options)
        capsys.readouterr()
        Evaluator(base, tokenizer, tokenized, 640, total_steps=1).show_answers(random_prefix(base))
        shown.append(capsys.readouterr().out)
        answers.append(complete(PrefixBloom(base), tokenizer, [prompt_of("0?")], max_new_tokens=30))
        assert base.generation_config.repetition_penalty == options.get("repetition_penalty")
    assert shown[0] == shown[1] and shown[0].count("with prefix") == 3
    assert answers[0] != answers[1]  # by itself the base would obey them


def test_turns_are_answered_greedily_on_a_base_that_samples(tokenizer):
    base = random_bloom()
    rows = [{"instruction": "1?", "input": "", "output": "好" * 9, "system": "", "history": [], "weights": []}]
    turns = turns_of(Dataset.from_list(rows), tokenizer)
    expected = answer_turns(PrefixBloom(base), tokenizer, turns, None, 1000)
    base.generation_config.update(do_sample=True, temperature=3.0)
    assert answer_turns(PrefixBloom(base), tokenizer, turns, None, 1000) == expected


@pytest.mark.parametrize("every, due", [(1, [1, 2, 3, 4, 5]), (2, [2, 4]), (None, [3])])
def test_evaluations_are_due_by_steps_or_at_the_end_of_an_epoch(every, due):
    """A run of 6 steps, whose epochs have 3. The last step is evaluated after its prefix is saved."""
    state = training_state(PrefixEncoder(PrefixConfig(5, 2, 2, 8, 6, prefix_projection=True)))
    evaluator = Evaluator(None, None, Dataset.from_list([{"input_ids": [5]}]), 640, total_steps=6, every=every)
    found = []
    for step in range(7):
        state.progress.step, state.progress.row = step, step % 3
        found += [step] if evaluator.due(state) else []
        state.progress.evaluated_step = step
        assert not evaluator.due(state)
    assert found == due
    state.progress.evaluations_since_best = 2
    assert [Evaluator(None, None, None, 640, 6, patience=patience).out_of_patience(state) for patience in (None, 2, 3)] == [
        False,
        True,
        False,
    ]
