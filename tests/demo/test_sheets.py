import argparse
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from prefix_tuning import bundled
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.demo import reader, sheets
from prefix_tuning.model.batch import IGNORED

READER = bundled.READER


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled.resolve(READER))


def answers_of(tokenizer, example):
    """The runs of labels, decoded."""
    ids = [
        token if label != IGNORED else tokenizer.pad_token_id for token, label in zip(*vars(example).values(), strict=True)
    ]
    return [part for part in tokenizer.decode(ids).replace("<pad>", "|").replace("</s>", "").split("|") if part]


def subject_of(question, statements):
    """The name and the column that a question asks for, and the only statement about them."""
    (name,) = (name for name in sheets.NAMES if name in question)
    (column,) = (column for column in sheets.COLUMNS if column in question)
    (statement,) = (line for line in statements if name in line and column in line)
    return name, column, statement


def test_every_name_column_and_value_is_one_token(tokenizer):
    assert all(len(ids) == 1 for ids in tokenizer(reader.WORDS).input_ids)
    assert len(set(reader.WORDS)) == len(reader.WORDS) and {len(values) for values in sheets.COLUMNS.values()} == {24}
    assert reader.train_tokenizer().get_vocab() == tokenizer.get_vocab()


def test_the_base_reads_sheets_that_it_has_never_seen(tokenizer):
    """And guesses without them: a column has 24 values."""
    base, _ = load_base(READER, torch.float32, torch.device("cpu"))
    assert reader.share_right(base, tokenizer, with_sheet=True, sheets_read=20) >= 0.95
    assert reader.share_right(base, tokenizer, with_sheet=False, sheets_read=20) < 0.15


def test_its_files_are_small():
    assert sum(path.stat().st_size for path in Path(bundled.resolve(READER)).iterdir()) < 6e6


def test_the_recipe_writes_the_bundled_sheet_and_its_questions(tmp_path, tokenizer):
    sheets.write_sheet(reader.SEED, tmp_path)
    text, *files = (
        Path(bundled.resolve(f"bundled:{name}")) for name in ("sheet", "sheet-questions", "sheet-questions-eval")
    )
    for path in (text, *files):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()
    assert len(tokenizer(text.read_text("utf-8")).input_ids) >= 400
    asked, held_out = ([json.loads(line) for line in path.read_text("utf-8").splitlines()] for path in files)
    assert len(asked) == 80 and len(held_out) == 40 and not {str(row) for row in asked} & {str(row) for row in held_out}
    # Each fact of the sheet is asked in all three forms, with the value that the sheet says.
    statements, forms = text.read_text("utf-8").splitlines(), Counter()
    for row in asked + held_out:
        name, column, statement = subject_of(row["instruction"], statements)
        assert row["output"] in statement
        forms[name, column] += 1
    assert len(forms) == len(statements) == sheets.MOST and set(forms.values()) == {3}


def test_the_texts_of_each_stage(tokenizer):
    rng = random.Random(0)
    for example in reader.repeats(tokenizer, rng):
        half = len(example.input_ids) // 2
        assert example.input_ids[:half] == example.input_ids[half:] == example.labels[half:]
        assert set(example.labels[:half]) == {IGNORED}
    forms = set()
    for example in reader.growing_sheets(tokenizer, rng, 4) + reader.growing_sheets(tokenizer, rng, 12):
        text = tokenizer.decode(example.input_ids)
        statements = [line for line in text.split("Human")[0].splitlines() if line.endswith("。")]
        answers, asked = answers_of(tokenizer, example), text[len("\n".join(statements)) + 1 :].split("</s>")[:-1]
        assert 2 <= len(statements) <= 12 and len(asked) == len(answers) == 2 * len(statements)
        for question, answer in zip(asked, answers, strict=True):
            assert question.endswith(answer) and any(answer in statement for statement in statements)
        bare = statements[0].startswith(tuple(column + name for column in sheets.COLUMNS for name in sheets.NAMES))
        forms.add((bare, "Human" in text))
    assert len(forms) == 4


def test_every_answer_is_what_the_sheet_says_of_the_name_and_the_column_that_are_asked_for(tokenizer):
    for example in reader.growing_sheets(tokenizer, random.Random(1), 40):
        sheet, *asked = tokenizer.decode(example.input_ids).split("Human: ")
        for turn, answer in zip(asked, answers_of(tokenizer, example), strict=True):
            assert answer in subject_of(turn, sheet.splitlines())[2] and turn.endswith(f"\n\nAssistant: {answer}</s>")


def test_bare_forms_become_rare_as_sheets_grow(tokenizer):
    def share(most):
        texts = [
            tokenizer.decode(example.input_ids) for _ in range(20) for example in reader.growing_sheets(tokenizer, rng, most)
        ]
        return sum("Human" not in text for text in texts) / len(texts)

    rng = random.Random(0)
    assert share(4) > 0.4 and share(40) < 0.2


def test_repeats_come_first_and_sheets_grow_as_reading_gets_better(tokenizer):
    progress, repeating = reader.Progress(tokenizer, seed=0), []
    for right in [0.0] * 50 + [1.0] * 200:
        progress.note(right)
        repeating.append(progress.repeating)
    assert all(repeating[:51]) and repeating == sorted(repeating, reverse=True) and not repeating[-1]
    assert 4 < progress.statements < sheets.MOST
    for _ in range(1000):
        progress.note(1.0)
    assert progress.statements == sheets.MOST


def test_a_short_run_of_the_recipe_trains_every_weight():
    args = argparse.Namespace(steps=2, learning_rate=1e-3, seed=3)
    tokenizer = reader.train_tokenizer()
    model, other = reader.pretrain(tokenizer, args), reader.pretrain(tokenizer, args)
    before = reader.pretrain(tokenizer, argparse.Namespace(steps=1, learning_rate=0.0, seed=3))
    for own, again, start in zip(model.parameters(), other.parameters(), before.parameters(), strict=True):
        assert torch.equal(own, again) and not torch.equal(own, start)
