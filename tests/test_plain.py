"""plain.py is the specification: the product gives its losses, its gradient norms, its prefix and its answers."""

import ast
import copy
import functools
import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from answers import complete
from datasets import Dataset
from forks import Fork
from models import deviation, examples_of, flat, random_bloom, relative
from rows import write_jsonl
from runs import metrics_of, weights_by_step
from safetensors.torch import load_file
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
        save_steps=1,
        save_total_limit=None,
    )


def new_encoder(base):
    torch.manual_seed(plain.SEED)
    return plain.new_encoder(base)


@pytest.fixture(scope="module")
def product(rows_file, tmp_path_factory):
    """train.py's training: its folder, and the encoder's weights after each step, by the number of steps."""
    folder = tmp_path_factory.mktemp("product") / "out"
    train(flags(rows_file, folder))
    return folder, weights_by_step(folder)


def retrace(base, examples, weights):
    """Trains as the page does, but begins each step with the weights that train.py had at that step.

    Otherwise a step would inherit the rounding errors of earlier ones, which Adam amplifies: it divides each gradient by its
    own size, so a gradient that is nothing but rounding error gets another sign on another CPU. Returns loss and gradient
    norm of each step, and the relative distance of each update from train.py's.
    """
    encoder, calls, distances = new_encoder(base), itertools.count(), []
    before = flat(encoder.state_dict())

    def begin_step(encoder, _):
        nonlocal before
        step, row = divmod(next(calls), plain.ACCUMULATION)
        if step and row == 0:
            own, theirs = flat(encoder.state_dict()), flat(weights[step])
            distances.append(deviation(own - before, theirs - before))
            encoder.load_state_dict(weights[step])
            before = theirs

    encoder.register_forward_pre_hook(begin_step)
    return plain.train(base, encoder, examples), distances


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
    assert plain.tokenize({"instruction": "很长" * 300, "output": "好"}, tokenizer)[0].shape == (1, 256)


def test_twenty_steps_of_train_py_are_those_of_the_page(product, base, examples):
    folder, weights = product
    ours = [(line["loss"], line["grad_norm"]) for line in metrics_of(folder) if "loss" in line]
    page, distances = retrace(base, examples, weights)
    assert len(page) == len(ours) == 20 and len(distances) == 19
    # Sums of float32 numbers, through four layers and back: their roundings of 6e-8 add up to a few 1e-6.
    for step, (theirs, own) in enumerate(zip(page, ours, strict=True), start=1):
        assert own == pytest.approx(theirs, rel=2e-5), step
    assert max(distances) < 1e-3


def test_the_product_answers_as_the_page_does(product, base, rows, tokenizer):
    prefix, _ = load_prefix(product[0])
    model = PrefixBloom(base)
    model.attach("own", prefix)
    prompts = [plain.prompt_of(row) for row in rows]
    ours = complete(model, tokenizer, prompts, prefix_name="own", max_new_tokens=32, do_sample=False)
    assert ours == [plain.answer(base, tokenizer, row, prefix) for row in rows]
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


def test_a_base_in_bfloat16_trains_nearly_as_in_float32(product, base, examples):
    folder, weights = product
    dtypes = []
    base.bfloat16().lm_head.register_forward_hook(lambda head, inputs, logits: dtypes.append(logits.dtype))
    history, _ = retrace(base, examples, weights)
    assert set(dtypes) == {torch.bfloat16} and {tensor.dtype for tensor in weights[20].values()} == {torch.float32}
    exact = [line["loss"] for line in metrics_of(folder) if "loss" in line]
    # bfloat16 has 8 bits: a logit of 16 to 32 is off by up to 1/16.
    assert [loss for loss, _ in history] == pytest.approx(exact, abs=1 / 16)


def test_in_float16_losses_are_scaled_and_a_step_that_overflows_is_left_out(monkeypatch):
    monkeypatch.setattr(plain, "ACCUMULATION", 4)
    monkeypatch.setattr(torch.amp, "GradScaler", functools.partial(torch.amp.GradScaler, init_scale=2.0**22))
    examples = [tuple(torch.tensor([x]) for x in vars(example).values()) for example in examples_of([7, 12, 30, 9])]
    norms, updates = [], []
    for dtype in (torch.float32, torch.float16):
        base, weights = random_bloom(dtype=dtype), []
        encoder = new_encoder(base)
        encoder.register_forward_pre_hook(lambda encoder, _, into=weights: into.append(flat(encoder.state_dict())))
        norms.append([norm for _, norm in plain.train(base, encoder, examples)])
        starts = [*weights[::4], flat(encoder.state_dict())]
        updates.append([(after - before).abs().max().item() for before, after in itertools.pairwise(starts)])
    left_out = sum(not math.isfinite(norm) for norm in norms[1])
    assert len(norms[1]) == 4 and 0 < left_out < 4 and not any(updates[1][:left_out])
    # The next step equals float32's first: its gradient is scaled back, its rate has not fallen yet. float16 has 11 bits.
    assert norms[1][left_out] == pytest.approx(norms[0][0], rel=1e-2)
    assert updates[1][left_out:] == pytest.approx(updates[0][: 4 - left_out], rel=1e-2)


def test_the_page_runs_and_prints_losses_and_three_answers(tmp_path, rows_file):
    program = Fork("prefix_tuning/plain.py", rows_file, bundled.resolve(bundled.MODEL), cwd=tmp_path)
    out, err = program.communicate()
    assert program.returncode == 0, err
    assert re.search(r"step 5 of 5: loss \d+\.\d+, gradient norm \d+\.\d+", out)
    assert out.count("frozen base  ") == out.count("with prefix  ") == 3
    assert (tmp_path / plain.OUTPUT).exists()


def test_the_page_says_what_it_trains_and_asks_the_rows_that_it_held_out(
    base, rows, tokenizer, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plain, "EPOCHS", 1)
    monkeypatch.setattr(plain, "ACCUMULATION", 1)
    trained, too_long = [], {"instruction": "很长" * plain.MAX_LENGTH, "output": "好"}
    real = plain.train
    monkeypatch.setattr(plain, "train", lambda base, *others: (real(base, *others), trained.append(base)))
    plain.main(write_jsonl(tmp_path / "rows.jsonl", too_long, *rows[:32]), bundled.resolve(bundled.MODEL))
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in trained[0].parameters())
    out = capsys.readouterr().out
    first, *steps = out.partition("\n\n")[0].splitlines()
    assert first == f"29 rows, {sum(p.numel() for p in new_encoder(base).parameters()):,} trainable parameters"
    assert [line.partition(":")[0] for line in steps] == ["step 25 of 29", "step 29 of 29"]
    prefix = load_file(plain.OUTPUT)["prefix"]
    for row in rows[29:32]:
        alone, with_prefix = plain.answer(base, tokenizer, row), plain.answer(base, tokenizer, row, prefix)
        assert f"\n{row['instruction']}\n  frozen base  {alone}\n  with prefix  {with_prefix}\n" in out


def test_three_rows_are_held_out_and_none_is_left_to_train_on(tmp_path, rows, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"three\.jsonl: no row is left to train on; the last three are held out"):
        plain.main(write_jsonl(tmp_path / "three.jsonl", *rows[:3]))
    assert not (tmp_path / plain.OUTPUT).exists()


def test_an_answer_that_does_not_end_is_cut_after_32_tokens(base, rows, tokenizer):
    endless, passes = copy.deepcopy(tokenizer), []
    endless.eos_token = "<unk>"
    base.lm_head.register_forward_hook(lambda *_: passes.append(1))
    assert plain.answer(base, endless, rows[0]) and len(passes) == 32
