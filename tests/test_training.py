import contextlib
import itertools
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import REAL_ROWS, examples_of, needs_real_rows, prefix_config, random_bloom
from peft import PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from test_bloom import plain_loss, relative
from transformers import BloomForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

from prefix_tuning import bundled
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.data.rows import load_rows, take, tokenize
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CARD_FILE,
    CONFIG_FILE,
    ENCODER_FILE,
    METRICS_FILE,
    PLOT_FILE,
)
from prefix_tuning.files.prefixes import load_encoder, load_prefix, save_encoder
from prefix_tuning.model.batch import IGNORED, count_labels, pack
from prefix_tuning.model.bloom import packed_hidden, prefix_cache
from prefix_tuning.model.encoder import PrefixEncoder
from prefix_tuning.training.loop import accumulate_gradients
from prefix_tuning.training.run import load_splits, train
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.start import make_encoder
from prefix_tuning.training.steps import step_rows

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def peft_model(model, encoder):
    """PEFT around `model`, with our encoder's weights."""
    config = encoder.config
    wrapped = get_peft_model(
        model,
        PrefixTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=config.num_virtual_tokens,
            prefix_projection=config.prefix_projection,
            encoder_hidden_size=config.encoder_hidden_size,
        ),
    )
    wrapped.prompt_encoder["default"].load_state_dict(encoder.state_dict())
    return wrapped


@pytest.fixture(scope="module")
def random_base(tmp_path_factory, tokenizer):
    """A folder with a small random Bloom and the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("random-base")
    random_bloom().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings(random_base, rows_file, tmp_path):
    """A quick run on the random base; `settings | {...}` changes it."""
    return {
        "model_name_or_path": random_base,
        "dataset": str(rows_file),
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    }


def metrics_of(folder):
    return [json.loads(line) for line in (Path(folder) / METRICS_FILE).read_text("utf-8").splitlines()]


def gradients(model, encoder, examples):
    """One step's gradients in the encoder, as the loop leaves them; returns the loss and the prefix that gave it."""
    prefix = encoder()
    leaf = prefix.detach().requires_grad_()
    loss = accumulate_gradients(model, leaf, examples, count_labels(examples), NO_SCALER, max_tokens=1000)
    prefix.backward(leaf.grad)
    return loss.item(), leaf.detach()


def initial_encoder(config, tokenizer):
    model = random_bloom()
    torch.manual_seed(config.seed)
    return make_encoder(config, model, tokenizer, {})


# Against PEFT and Trainer


def bundled_bloom():
    return BloomForCausalLM.from_pretrained(bundled.resolve(bundled.MODEL)).eval().requires_grad_(False)


@pytest.mark.parametrize("base", [random_bloom, bundled_bloom])
@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("lengths", [[9], [7, 12, 3, 30]], ids=["one row", "ragged rows"])
def test_logits_loss_and_encoder_gradients_equal_pefts(base, projection, lengths):
    model = base()
    torch.manual_seed(1)
    ours = PrefixEncoder(prefix_config(model, projection=projection))
    theirs = peft_model(base(), ours).eval()
    examples = examples_of(lengths)

    for example in examples:
        (batch,) = pack([example], 100)
        logits = theirs(input_ids=torch.tensor([example.input_ids])).logits[0]
        assert relative(model.lm_head(packed_hidden(model, batch, ours.bake())), logits[batch.label_positions]) < 1e-5

    loss, prefix = gradients(model, ours, examples)
    assert torch.equal(prefix, ours.bake())
    labels = sum(label != IGNORED for example in examples for label in example.labels[1:])
    expected = 0.0
    for example in examples:  # PEFT's encoder runs for every micro-batch; autograd adds up in its weights
        ids, wanted = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        part = theirs(input_ids=ids, labels=wanted).loss * sum(label != IGNORED for label in example.labels[1:]) / labels
        part.backward()
        expected += part.item()
    assert loss == pytest.approx(expected, rel=1e-5)
    expected = {name: parameter.grad for name, parameter in theirs.prompt_encoder["default"].named_parameters()}
    for name, parameter in ours.named_parameters():
        assert relative(parameter.grad, expected[name]) < 1e-5, name


class Record(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)


@pytest.mark.parametrize("scheduler, warmup", [("linear", 0), ("cosine", 5)])
def test_twenty_steps_equal_trainers(settings, tmp_path, tokenizer, random_base, scheduler, warmup):
    """40 rows, 6 a step: 7 steps an epoch, the last of them incomplete, so 20 steps cross two borders."""
    model = random_bloom()
    torch.manual_seed(1)
    encoder = PrefixEncoder(prefix_config(model, tokens=10))
    (tmp_path / "start").mkdir()
    save_encoder(tmp_path / "start", encoder, {"name_or_path": random_base})
    schedule = {"lr_scheduler_type": scheduler, "warmup_steps": warmup, "weight_decay": 0.1, "max_steps": 20}
    train(TrainConfig(**settings | schedule | {"shuffle": False, "prefix_from": str(tmp_path / "start")}))
    ours = [line for line in metrics_of(settings["output_dir"]) if "loss" in line]

    rows = tokenize(load_rows(settings["dataset"], ("train",)), tokenizer, 256)
    record = Record()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        learning_rate=settings["learning_rate"],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="sequential",
        **schedule,
    )
    Trainer(
        model=peft_model(model, encoder),
        args=arguments,
        train_dataset=rows,
        callbacks=[record],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True),
    ).train()
    theirs = [logs for logs in record.logs if "loss" in logs]
    assert len(ours) == len(theirs) == 20
    for our, their in zip(ours, theirs, strict=True):
        assert our["loss"] == pytest.approx(float(their["loss"]), rel=1e-4)
        assert our["grad_norm"] == pytest.approx(float(their["grad_norm"]), rel=1e-4)
        assert our["learning_rate"] == pytest.approx(float(their["learning_rate"]), rel=1e-6)
    assert ours[-1]["loss"] < ours[0]["loss"]


def test_peft_loads_the_output_and_answers_the_same(settings, tokenizer):
    train(TrainConfig(**settings))
    prefix, _ = load_prefix(settings["output_dir"])
    model = random_bloom()
    wrapped = PeftModel.from_pretrained(random_bloom(), settings["output_dir"])
    inputs = tokenizer("Human: 你好\n\nAssistant: ", return_tensors="pt")
    greedy = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 3}
    mask = torch.ones(1, prefix.shape[3] + inputs.input_ids.shape[1], dtype=torch.long)
    cache = prefix_cache([prefix.to(model.dtype)])[0]
    ours = model.generate(inputs.input_ids, attention_mask=mask, past_key_values=cache, **greedy)
    assert torch.equal(ours, wrapped.generate(**inputs, **greedy))


# The loop itself


def test_the_base_keeps_every_bit(settings, monkeypatch):
    """Over several optimizer steps, an evaluation and the answers to its questions."""
    bases = []

    def remember(*args):
        bases.append(load_base(*args))
        return bases[0]

    monkeypatch.setattr("prefix_tuning.training.run.load_base", remember)
    train(TrainConfig(**settings | {"eval_dataset": settings["dataset"], "eval_exact_match": True, "eval_steps": 2}))
    ((model, _),) = bases
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    fresh = random_bloom().state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items())


def test_the_loss_is_the_token_mean_over_the_step():
    model = random_bloom()
    encoder = PrefixEncoder(prefix_config(model))
    examples = examples_of([40, 6, 3])
    loss, prefix = gradients(model, encoder, examples)
    labels = sum(label != IGNORED for example in examples for label in example.labels[1:])
    assert loss == pytest.approx(plain_loss(model, examples, prefix).item() / labels, rel=1e-5)


def test_the_same_seed_gives_the_same_bits(settings, tmp_path):
    runs = []
    for number, seed in enumerate((7, 7, 8)):
        folder = str(tmp_path / str(number))
        train(TrainConfig(**settings | {"output_dir": folder, "seed": seed}))
        runs.append((load_file(f"{folder}/{ENCODER_FILE}"), [line["loss"] for line in metrics_of(folder) if "loss" in line]))
    (first, losses), (second, same_losses), (other, _) = runs
    assert losses == same_losses
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_metrics_and_files(settings, rows_file, tmp_path, random_base):
    config = TrainConfig(
        **settings
        | {"max_steps": -1, "num_train_epochs": 1.5, "logging_steps": 4, "eval_steps": 5, "eval_dataset": str(rows_file)}
        | {"eval_exact_match": True}
    )
    summary = train(config)
    folder = Path(settings["output_dir"])
    lines = metrics_of(folder)
    steps = math.ceil(1.5 * math.ceil(40 / 6))
    assert [line["step"] for line in lines if "loss" in line] == [4, 8, steps]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 5, 10, steps]
    keys = {"step", "epoch", "loss", "learning_rate", "grad_norm", "tokens_per_second"}
    assert all(line.keys() == keys for line in lines if "loss" in line)
    for line in lines:
        if "eval_loss" in line:
            assert line["eval_perplexity"] == pytest.approx(math.exp(line["eval_loss"]))
            assert 0 <= line["eval_exact_match"] <= 1
    assert lines[-1] == summary
    assert summary["summary"] is True and summary["steps"] == steps
    assert summary["trainable_parameters"] == sum(p.numel() for p in load_encoder(str(folder))[0].parameters())
    assert {"train_seconds", "tokens", "tokens_per_second", "peak_memory_mb"} <= summary.keys()
    # Nothing in the folder tells where on this machine it was made.
    files = {path.name for path in folder.iterdir()}
    assert files - {PLOT_FILE} == {CARD_FILE, METRICS_FILE, ADAPTER_FILE, ADAPTER_CONFIG_FILE, ENCODER_FILE, CONFIG_FILE}
    for path in folder.iterdir():
        content = path.read_bytes()
        for place in (random_base, str(rows_file), str(tmp_path), str(Path.home())):
            assert place.encode() not in content, (path.name, place)
    described = json.loads((folder / "training_config.json").read_text("utf-8"))
    assert described["learning_rate"] == 1e-2 and described["dataset"] == f"local:{rows_file.name}"


def test_a_line_of_metrics_is_the_mean_of_its_steps(settings, tmp_path):
    """Also of the last ones, which are fewer."""
    losses = {}
    for steps in (1, 4):
        run = settings | {"max_steps": 10, "logging_steps": steps, "output_dir": str(tmp_path / str(steps))}
        train(TrainConfig(**run))
        losses[steps] = [line["loss"] for line in metrics_of(run["output_dir"]) if "loss" in line]
    parts = losses[1][:4], losses[1][4:8], losses[1][8:]
    assert losses[4] == pytest.approx([sum(part) / len(part) for part in parts], rel=1e-6)


def test_evaluation_agrees_with_the_plain_forward(settings, tokenizer):
    train(TrainConfig(**settings | {"eval_dataset": settings["dataset"]}))
    first, *_, last = [line for line in metrics_of(settings["output_dir"]) if "eval_loss" in line]
    tokenized = tokenize(load_rows(settings["dataset"], ("train",)), tokenizer, 256)
    examples = take(tokenized, list(range(len(tokenized))))
    labels = sum(label != IGNORED for example in examples for label in example.labels[1:])
    prefix, _ = load_prefix(settings["output_dir"])
    for line, used in ((first, None), (last, prefix)):
        expected = plain_loss(random_bloom(), examples, used).item() / labels
        assert line["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_max_steps_0_saves_the_initial_prefix(settings, tokenizer):
    config = TrainConfig(**settings | {"max_steps": 0})
    assert train(config)["steps"] == 0
    initial = initial_encoder(config, tokenizer)
    assert torch.equal(load_prefix(settings["output_dir"])[0], initial.bake())


@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("init", ["random", "zero", "text"])
def test_every_start_trains_and_goes_on_from_its_file(settings, tmp_path, init, projection):
    start = {"prefix_init": init, "prefix_projection": projection, "init_text": "请回答。" if init == "text" else None}
    train(TrainConfig(**settings | start | {"eval_dataset": settings["dataset"], "eval_steps": 1, "max_steps": 10}))
    _, first, *_, last = [line["eval_loss"] for line in metrics_of(settings["output_dir"]) if "eval_loss" in line]
    assert last < first
    again = str(tmp_path / "again")
    train(TrainConfig(**settings | {"prefix_from": settings["output_dir"], "output_dir": again, "max_steps": 0}))
    assert torch.equal(load_prefix(again)[0], load_prefix(settings["output_dir"])[0])


def test_prefix_from_another_shape_is_refused(settings, tmp_path, tokenizer):
    train(TrainConfig(**settings | {"max_steps": 0}))
    random_bloom(n_layer=2).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    changed = {"model_name_or_path": str(tmp_path / "other"), "prefix_from": settings["output_dir"]}
    with pytest.raises(UserError, match="a prefix for 3 layers"):
        train(TrainConfig(**settings | changed | {"output_dir": str(tmp_path / "new")}))


def test_a_finished_run_is_not_overwritten_silently(settings):
    train(TrainConfig(**settings))
    folder = Path(settings["output_dir"])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="--overwrite_output_dir"):
        train(TrainConfig(**settings | {"seed": 1}))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    train(TrainConfig(**settings | {"seed": 1, "overwrite_output_dir": True}))
    assert before[ADAPTER_FILE] != (folder / ADAPTER_FILE).read_bytes()


@pytest.mark.parametrize("max_steps, logging_steps", [(1, 1), (3, 1), (9, 4)])
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_prefix(settings, tokenizer, max_steps, logging_steps):
    """Also where the update of the very last step is the bad one, and where several steps pass before anyone looks."""
    # Beyond what float32 can hold: the first update makes every weight infinite or NaN, however the sums are rounded.
    changed = {"learning_rate": 1e39, "max_steps": max_steps, "logging_steps": logging_steps}
    config = TrainConfig(**settings | changed)
    with pytest.raises(UserError, match="no longer finite at step 2; the last good prefix is saved"):
        train(config)
    initial = initial_encoder(config, tokenizer)  # step 1 was the last good one, its update the bad one
    assert torch.equal(load_prefix(settings["output_dir"])[0], initial.bake())
    assert not (Path(settings["output_dir"]) / ENCODER_FILE).exists()
    lines = (Path(settings["output_dir"]) / METRICS_FILE).read_text("utf-8").splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["step"] for line in lines]  # NaN and Infinity are no JSON


def test_an_earlier_prefix_survives_a_run_that_fails(settings):
    train(TrainConfig(**settings))
    folder = Path(settings["output_dir"])
    kept = {name: (folder / name).read_bytes() for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE, ENCODER_FILE)}
    again = settings | {"prefix_from": settings["output_dir"], "overwrite_output_dir": True}
    with pytest.raises(UserError):
        train(TrainConfig(**again | {"logging_steps": 1, "max_length": 3}))
    assert kept == {name: (folder / name).read_bytes() for name in kept}


def test_how_rows_share_forward_passes_does_not_change_the_losses(settings, tmp_path):
    train(TrainConfig(**settings))
    for number, changed in enumerate(
        (
            {"max_tokens_per_batch": 1},
            {"max_tokens_per_batch": 70},
            {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1},
        )
    ):
        train(TrainConfig(**settings | changed | {"output_dir": str(tmp_path / str(number))}))
        for ours, other in zip(metrics_of(settings["output_dir"]), metrics_of(tmp_path / str(number)), strict=True):
            assert "loss" not in ours or ours["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_every_row_comes_once_an_epoch_and_the_last_step_takes_the_rest(settings):
    for shuffle, rest in itertools.product((True, False), (4, 1)):
        config = TrainConfig(**settings | {"shuffle": shuffle})
        steps = list(step_rows(config, rows=36 + rest, rows_per_step=6, total_steps=14))
        assert [len(step) for step in steps] == [6, 6, 6, 6, 6, 6, rest] * 2
        epochs = [list(itertools.chain(*steps[:7])), list(itertools.chain(*steps[7:]))]
        assert all(sorted(epoch) == list(range(36 + rest)) for epoch in epochs)
        assert (epochs[0] != epochs[1]) == shuffle


def test_an_epoch_ends_with_its_last_row(settings, tmp_path, tokenizer):
    """Seven rows in steps of six: the second step of each epoch has one."""
    rows = Path(settings["dataset"]).read_text("utf-8").splitlines(True)[:7]
    (tmp_path / "seven.jsonl").write_text("".join(rows), "utf-8")
    seven = str(tmp_path / "seven.jsonl")
    summary = train(TrainConfig(**settings | {"dataset": seven, "eval_dataset": seven, "max_steps": 4}))
    lines = metrics_of(settings["output_dir"])
    assert [line["epoch"] for line in lines if "loss" in line] == [0.5, 1, 1.5, 2]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4]
    tokenized = tokenize(load_rows(seven, ("train",)), tokenizer, 256)
    assert summary["tokens"] == 2 * sum(map(len, tokenized["input_ids"]))


def test_max_grad_norm_0_does_not_clip(settings, tmp_path):
    settings |= {"model_name_or_path": bundled.MODEL}  # its gradients are longer than 1
    weights = {}
    for norm in (0, 1e9, 1.0):
        train(TrainConfig(**settings | {"max_grad_norm": norm, "output_dir": str(tmp_path / str(norm))}))
        weights[norm] = load_file(tmp_path / str(norm) / ENCODER_FILE)
    assert all(torch.equal(weights[0][name], weights[1e9][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[1.0][name]) for name in weights[0])  # it would have clipped


def test_eval_fraction_holds_rows_out(settings):
    train_rows, held_out = load_splits(TrainConfig(**settings | {"eval_fraction": 0.25}))
    assert (len(train_rows), len(held_out)) == (30, 10)
    everything = load_rows(settings["dataset"], ("train",)).to_list()
    assert sorted(train_rows.to_list() + held_out.to_list(), key=str) == sorted(everything, key=str)
    again, _ = load_splits(TrainConfig(**settings | {"eval_fraction": 0.25}))
    assert again.to_list() == train_rows.to_list()
    with pytest.raises(UserError, match="leaves one side empty"):
        load_splits(TrainConfig(**settings | {"eval_fraction": 0.001}))


def test_rows_without_labels_are_counted_and_all_of_them_are_an_error(settings, capsys):
    train(TrainConfig(**settings | {"max_length": 26}))
    assert "of 40 rows, whose prompts alone fill --max_length 26" in capsys.readouterr().out
    with pytest.raises(UserError, match="no row has a label left"):
        train(TrainConfig(**settings | {"max_length": 5, "overwrite_output_dir": True}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_learns_as_the_cpu_does(settings, tmp_path, precision):
    train(TrainConfig(**settings))
    train(TrainConfig(**settings | {"device": "cuda", "precision": precision, "output_dir": str(tmp_path / "cuda")}))
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for ours, theirs in zip(metrics_of(settings["output_dir"]), metrics_of(tmp_path / "cuda"), strict=True):
        if "loss" in ours:
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=tolerance)


@needs_real_rows
def test_real_rows_on_the_bundled_base(tmp_path):
    with contextlib.redirect_stdout(None):
        train(
            TrainConfig(
                model_name_or_path=bundled.MODEL,
                dataset=str(REAL_ROWS / "train.jsonl"),
                eval_dataset=str(REAL_ROWS / "test.jsonl"),
                output_dir=str(tmp_path / "out"),
                device="cpu",
                prefix_init="zero",
                learning_rate=5e-3,
                max_steps=40,
            )
        )
    base, *_, last = [line["eval_loss"] for line in metrics_of(tmp_path / "out") if "eval_loss" in line]
    assert last < 0.8 * base


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_give_the_same_losses(settings, tmp_path, checkpointing):
    train(TrainConfig(**settings))
    changed = {"torch_compile": True, "gradient_checkpointing": checkpointing, "output_dir": str(tmp_path / "compiled")}
    train(TrainConfig(**settings | changed))
    *plain, plain_summary = metrics_of(settings["output_dir"])
    *compiled, summary = metrics_of(tmp_path / "compiled")
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in plain], rel=1e-5)
    assert plain_summary["compile_seconds"] == 0 < summary["compile_seconds"]


def test_rows_not_yet_seen_come_in_the_same_order_in_steps_of_another_size():
    config = TrainConfig(seed=3)

    def flat(*arguments):
        return [row for step in step_rows(config, 30, *arguments) for row in step]

    whole = flat(4, 24)  # three epochs of 7 steps of 4 rows and one of 2
    assert sorted(whole[:30]) == sorted(whole[30:60]) == list(range(30)) and whole[:30] != whole[30:60]
    for epoch, row in ((0, 8), (1, 0), (1, 12)):
        rest = whole[30 * epoch + row :]
        for rows_per_step in (2, 4, 6):
            assert flat(rows_per_step, 100, epoch, row)[: len(rest)] == rest
