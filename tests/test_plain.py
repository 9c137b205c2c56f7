"""plain.py is the specification: the product gives its losses, its gradient norms, its prefix and its answers."""

import ast
import copy
import json
import re
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from forks import Fork
from helpers import complete, metrics_of, relative, write_jsonl
from transformers.models.bloom import modeling_bloom

from prefix_tuning import bundled, plain
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import take, tokenize
from prefix_tuning.files.prefixes import load_prefix
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.model.bloom import Bloom
from prefix_tuning.training.loop import optimizer_step
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.state import TrainingState, make_optimizer, make_schedule
from prefix_tuning.training.steps import Steps

PAGE = Path(plain.__file__)


@pytest.fixture(autouse=True, scope="module")
def _page():
    """Four epochs over 40 rows in steps of 8: 20 steps, on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "EPOCHS", 4)
        patch.setattr(plain, "DEVICE", "cpu")
        yield


@pytest.fixture
def base():
    return Bloom.from_pretrained(bundled.resolve(bundled.MODEL)).requires_grad_(False).eval()


@pytest.fixture(scope="module")
def rows(rows_file):
    return [json.loads(line) for line in rows_file.read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def examples(rows, tokenizer):
    return [plain.tokenize(row, tokenizer) for row in rows]


def flags(rows_file, output_dir):
    """train.py's settings that stand for the page's constants."""
    return TrainConfig(
        dataset=str(rows_file),
        output_dir=str(output_dir),
        device="cpu",
        precision="fp32",
        num_virtual_tokens=plain.NUM_VIRTUAL_TOKENS,
        max_length=plain.MAX_LENGTH,
        num_train_epochs=plain.EPOCHS,
        gradient_accumulation_steps=plain.ACCUMULATION,
        learning_rate=plain.LEARNING_RATE,
        max_grad_norm=plain.MAX_GRAD_NORM,
        seed=plain.SEED,
        eval_fraction=0.0,
        logging_steps=1,
    )


def new_encoder(base):
    torch.manual_seed(plain.SEED)
    return plain.new_encoder(base)


@pytest.fixture(scope="module")
def tuned_page(examples):
    """The page's training: its encoder, and the loss and the gradient norm of each step."""
    base = Bloom.from_pretrained(bundled.resolve(bundled.MODEL)).requires_grad_(False).eval()
    encoder = new_encoder(base)
    return encoder, plain.train(base, encoder, examples)


def test_it_is_a_page():
    """150 lines at most, no class, and nothing of this program but the encoder."""
    text = PAGE.read_text("utf-8")
    tree = ast.parse(text)
    assert len(text.splitlines()) <= 150
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    modules = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    assert [name for name in modules if name.startswith("prefix_tuning")] == ["prefix_tuning.model.encoder"]


def test_tokens_and_labels_are_the_products(rows, rows_file, tokenizer):
    tokenized = tokenize(load_rows(str(rows_file), ("train",)), tokenizer, plain.MAX_LENGTH)
    for row, example in zip(rows, take(tokenized, list(range(40))), strict=True):
        ids, labels = plain.tokenize(row, tokenizer)
        assert (ids[0].tolist(), labels[0].tolist()) == (example.input_ids, example.labels)


def test_twenty_steps_of_train_py_are_those_of_the_page(tuned_page, base, rows, rows_file, tokenizer, tmp_path):
    encoder, page = tuned_page
    train(flags(rows_file, tmp_path / "out"))
    product = [(line["loss"], line["grad_norm"]) for line in metrics_of(tmp_path / "out") if "loss" in line]
    assert len(page) == len(product) == 20
    for step, ((loss, norm), (our_loss, our_norm)) in enumerate(zip(page, product, strict=True), start=1):
        assert our_loss == pytest.approx(loss, rel=2e-5), step
        assert our_norm == pytest.approx(norm, rel=2e-5), step
    prefix, _ = load_prefix(tmp_path / "out")
    assert relative(prefix, encoder.bake()) < 1e-4
    # And it answers the same with its prefix as the page does with its own.
    model = PrefixBloom(base)
    model.attach("own", prefix)
    prompts = [plain.prompt_of(row) for row in rows]
    ours = complete(model, tokenizer, prompts, prefix_name="own", max_new_tokens=32, do_sample=False)
    assert ours == [plain.answer(base, tokenizer, row, encoder.bake()) for row in rows]
    alone = complete(model, tokenizer, prompts, prefix_name="base", max_new_tokens=32, do_sample=False)
    assert alone[:5] == [plain.answer(base, tokenizer, row) for row in rows[:5]] and alone != ours


def test_in_float64_the_final_prefix_is_the_same(base, examples, monkeypatch):
    # transformers computes this softmax in float32, whatever the model's type is.
    monkeypatch.setattr(modeling_bloom.F, "softmax", lambda scores, dim, dtype: scores.softmax(dim))
    base, page = base.double(), new_encoder(base).double()
    product = copy.deepcopy(page)
    history = plain.train(base, page, examples)

    columns = {
        "input_ids": [ids[0].tolist() for ids, _ in examples],
        "labels": [labels[0].tolist() for _, labels in examples],
    }
    steps = Steps(Dataset.from_dict(columns), plain.ACCUMULATION, total=20, max_tokens=100, seed=plain.SEED)
    optimizer = make_optimizer(product, weight_decay=0.0)
    schedule = make_schedule("linear", warmup_steps=0, total_steps=20)
    state = TrainingState(product, optimizer, schedule, plain.MAX_GRAD_NORM, loss_scaling=False)
    state.progress.peak_learning_rate = plain.LEARNING_RATE
    for step, (loss, grad_norm) in zip(steps, history, strict=True):
        _, our_loss, our_norm = optimizer_step(base, state, step)
        # transformers' GELU has the constant sqrt(2 / pi) with 8 digits.
        assert our_loss.item() == pytest.approx(loss, rel=1e-8) and our_norm.item() == pytest.approx(grad_norm, rel=1e-7)
    assert relative(product.bake(), page.bake()) < 1e-7


def test_a_base_in_bfloat16_trains_nearly_as_in_float32(tuned_page, base, examples):
    encoder = new_encoder(base)
    history = plain.train(base.bfloat16(), encoder, examples)
    assert all(parameter.dtype == torch.float32 for parameter in encoder.parameters())
    for (loss, _), (other, _) in zip(tuned_page[1], history, strict=True):
        assert other == pytest.approx(loss, rel=0.05)


def test_the_page_runs_and_prints_losses_and_three_answers(tmp_path, rows_file):
    program = Fork("prefix_tuning/plain.py", rows_file, bundled.resolve(bundled.MODEL), cwd=tmp_path)
    out, err = program.communicate()
    assert program.returncode == 0, err
    assert re.search(r"step 5 of 5: loss \d+\.\d+, gradient norm \d+\.\d+", out)
    assert out.count("frozen base  ") == out.count("with prefix  ") == 3
    assert (tmp_path / plain.OUTPUT).exists()


def test_three_rows_are_held_out_and_none_is_left_to_train_on(tmp_path, rows, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"three\.jsonl: no row is left to train on; the last three are held out"):
        plain.main(write_jsonl(tmp_path / "three.jsonl", *rows[:3]))
    assert not (tmp_path / plain.OUTPUT).exists()
