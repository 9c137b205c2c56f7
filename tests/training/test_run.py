import contextlib
import copy
import errno
import fcntl
import json
import math
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from answers import decode
from checkout import REAL_ROWS, needs_real_rows
from launching import forks
from models import STANDSTILL, deviation, flat, initial_encoder, peft_model, prefix_config, random_bloom, save_decoder
from peft import PeftModel
from runs import LATEST, contents, metrics_of, train_with_little_memory, weights_by_step
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from prefix_tuning import bundled
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import tokenize
from prefix_tuning.errors import Interrupted, UserError
from prefix_tuning.files import writing
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
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.model.bloom import prefix_cache
from prefix_tuning.model.encoder import PrefixEncoder
from prefix_tuning.training import run
from prefix_tuning.training.metrics import Metrics
from prefix_tuning.training.output import read_metrics, what_was_learnt
from prefix_tuning.training.run import memory_hint, train
from prefix_tuning.training.settings import TrainConfig


class Retrace(TrainerCallback):
    """Begins each of Trainer's steps with the weights that our run had at that step, and keeps its figures and its updates.

    Otherwise a step would inherit the rounding errors of earlier ones, which Adam amplifies, and differently on each CPU.
    """

    def __init__(self, encoder, weights):
        self.encoder, self.weights, self.logs, self.distances = encoder, weights, [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.encoder.load_state_dict(self.weights[state.global_step])

    def on_step_end(self, args, state, control, **kwargs):
        before, ours = (flat(self.weights[step]) for step in (state.global_step - 1, state.global_step))
        self.distances.append(deviation(ours - before, flat(self.encoder.state_dict()) - before))

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(logs)


@pytest.mark.parametrize(
    "family, scheduler, warmup",
    [
        ("bloom", "linear", 0),
        ("bloom", "cosine", 5),
        ("llama", "linear", 0),
        ("qwen3", "linear", 0),
        ("gemma", "linear", 0),
    ],
)
def test_twenty_steps_equal_trainers(quick_settings, tmp_path, tokenizer, family, scheduler, warmup):
    """40 rows, 6 a step: 7 steps an epoch, the last of them incomplete, so 20 steps cross the end of two epochs."""
    if family != "bloom":
        quick_settings["model_name_or_path"] = save_decoder(tmp_path / "base", tokenizer, family)
    model = AutoModelForCausalLM.from_pretrained(quick_settings["model_name_or_path"])
    torch.manual_seed(1)
    encoder = PrefixEncoder(prefix_config(model, tokens=10))
    (tmp_path / "start").mkdir()
    save_encoder(tmp_path / "start", encoder, {"name_or_path": quick_settings["model_name_or_path"]})
    schedule = {"lr_scheduler_type": scheduler, "warmup_steps": warmup, "weight_decay": 0.1, "max_steps": 20}
    saving = {"save_steps": 1, "save_total_limit": None}
    train(TrainConfig(**quick_settings | schedule | saving | {"shuffle": False, "prefix_from": str(tmp_path / "start")}))
    ours = [line for line in metrics_of(quick_settings["output_dir"]) if "loss" in line]

    rows = tokenize(load_rows(quick_settings["dataset"], ("train",)), tokenizer, 256)
    wrapped = peft_model(model, encoder)
    retrace = Retrace(
        wrapped.prompt_encoder["default"],
        {0: copy.deepcopy(encoder.state_dict())} | weights_by_step(quick_settings["output_dir"]),
    )
    # On the left, PEFT would count padding between prefix and text as positions, which rotation shows.
    pads_right = AutoTokenizer.from_pretrained(quick_settings["model_name_or_path"], padding_side="right")
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
        learning_rate=quick_settings["learning_rate"],
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="sequential",
        **schedule,
    )
    Trainer(
        model=wrapped,
        args=arguments,
        train_dataset=rows,
        callbacks=[retrace],
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer=pads_right, padding=True),
    ).train()
    theirs = [logs for logs in retrace.logs if "loss" in logs]
    assert len(ours) == len(theirs) == len(retrace.distances) == 20
    # Roundings of 6e-8, added up over the sums of a few layers.
    for our, their in zip(ours, theirs, strict=True):
        assert our["loss"] == pytest.approx(float(their["loss"]), rel=2e-5)
        assert our["grad_norm"] == pytest.approx(float(their["grad_norm"]), rel=2e-5)
        assert our["learning_rate"] == pytest.approx(float(their["learning_rate"]), rel=1e-6)
    moved = retrace.distances[1:] if warmup else retrace.distances  # the warm-up begins with the rate 0
    assert max(moved) < 1e-3
    assert ours[-1]["loss"] < ours[0]["loss"]


def test_peft_loads_the_output_and_answers_the_same(quick_settings, tokenizer):
    train(TrainConfig(**quick_settings))
    prefix, _ = load_prefix(quick_settings["output_dir"])
    model = random_bloom()
    wrapped = PeftModel.from_pretrained(random_bloom(), quick_settings["output_dir"]).eval()
    prompt = "Human: 你好\n\nAssistant: "
    ours = decode(tokenizer, prompt, lambda ids: model(ids, prefix_cache([prefix])[0]).logits)
    assert ours == decode(tokenizer, prompt, lambda ids: wrapped(input_ids=ids).logits)


def test_the_base_keeps_every_bit(quick_settings, monkeypatch):
    """Over several optimizer steps, an evaluation and the answers to its questions."""
    bases = []

    def remember(*args):
        bases.append(load_base(*args))
        return bases[0]

    monkeypatch.setattr("prefix_tuning.training.run.load_base", remember)
    train(
        TrainConfig(
            **quick_settings | {"eval_dataset": quick_settings["dataset"], "eval_exact_match": True, "eval_steps": 2}
        )
    )
    ((model, _),) = bases
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    fresh = random_bloom().state_dict()
    assert all(torch.equal(tensor, fresh[name]) for name, tensor in model.state_dict().items())


def test_the_same_seed_gives_the_same_bits(quick_settings, tmp_path):
    runs = []
    for number, seed in enumerate((7, 7, 8)):
        folder = str(tmp_path / str(number))
        train(TrainConfig(**quick_settings | {"output_dir": folder, "seed": seed}))
        runs.append((load_file(f"{folder}/{ENCODER_FILE}"), [line["loss"] for line in metrics_of(folder) if "loss" in line]))
    (first, losses), (second, same_losses), (other, _) = runs
    assert losses == same_losses
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.usefixtures("curves")
def test_metrics_and_files(quick_settings, rows_file, tmp_path, random_base):
    config = TrainConfig(
        **quick_settings
        | {"max_steps": -1, "num_train_epochs": 1.5, "logging_steps": 4, "eval_steps": 5, "eval_dataset": str(rows_file)}
        | {"eval_exact_match": True}
    )
    summary = train(config)
    folder = Path(quick_settings["output_dir"])
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
        for location in (random_base, str(rows_file), str(tmp_path), str(Path.home())):
            assert location.encode() not in content, (path.name, location)
    described = json.loads((folder / "training_config.json").read_text("utf-8"))
    assert described["learning_rate"] == 1e-2 and described["dataset"] == f"local:{rows_file.name}"


def test_a_run_says_what_it_trains_and_what_was_learnt(quick_settings, capsys):
    train(TrainConfig(**quick_settings | {"eval_fraction": 0.1, "logging_steps": 2}))
    folder = Path(quick_settings["output_dir"])
    lines = capsys.readouterr().out.splitlines()
    trained = sum(parameter.numel() for parameter in load_encoder(str(folder))[0].parameters())
    size = "36 rows and 4 held out, 3 steps of 6; a prefix of 10 tokens by"
    assert f"{size} {trained:,} trainable parameters; torch.float32 on cpu" in lines
    assert f"3 steps in 0 s; the prefix is saved in {folder}" in [re.sub(r"in \d+ s", "in 0 s", line) for line in lines]
    assert lines[-1] == what_was_learnt(read_metrics(folder), save_best=False)


@pytest.mark.parametrize("max_steps, logging_steps", [(1, 1), (3, 1), (9, 4)])
def test_a_loss_that_is_no_number_ends_the_run_and_keeps_the_last_good_prefix(
    quick_settings, tokenizer, max_steps, logging_steps
):
    """Also where the update of the very last step is the bad one, and where several steps pass before anyone looks."""
    # Beyond what float32 can hold: the first update makes every weight infinite or NaN, however the sums are rounded.
    changed = {"learning_rate": 1e39, "max_steps": max_steps, "logging_steps": logging_steps}
    config = TrainConfig(**quick_settings | changed)
    with pytest.raises(UserError, match="no longer finite at step 2; the last good prefix is saved"):
        train(config)
    initial = initial_encoder(config, tokenizer)  # step 1 was the last good one, its update the bad one
    assert torch.equal(load_prefix(quick_settings["output_dir"])[0], initial.bake())
    assert not (Path(quick_settings["output_dir"]) / ENCODER_FILE).exists()
    lines = (Path(quick_settings["output_dir"]) / METRICS_FILE).read_text("utf-8").splitlines()
    assert [json.loads(line, parse_constant=pytest.fail)["step"] for line in lines]  # NaN and Infinity are no JSON


def test_an_earlier_prefix_survives_a_run_that_fails(quick_settings):
    train(TrainConfig(**quick_settings))
    folder = Path(quick_settings["output_dir"])
    kept = {name: (folder / name).read_bytes() for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE, ENCODER_FILE)}
    again = quick_settings | {"prefix_from": quick_settings["output_dir"], "overwrite_output_dir": True}
    with pytest.raises(UserError):
        train(TrainConfig(**again | {"logging_steps": 1, "max_length": 3}))
    assert kept == {name: (folder / name).read_bytes() for name in kept}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_cuda_computes_what_the_cpu_does(quick_settings, tmp_path, precision):
    quick_settings |= {"learning_rate": STANDSTILL}
    train(TrainConfig(**quick_settings))
    train(TrainConfig(**quick_settings | {"device": "cuda", "precision": precision, "output_dir": str(tmp_path / "cuda")}))
    tolerance = 1e-4 if precision == "fp32" else 2e-2
    for ours, theirs in zip(metrics_of(quick_settings["output_dir"]), metrics_of(tmp_path / "cuda"), strict=True):
        if "loss" in ours:
            assert theirs["loss"] == pytest.approx(ours["loss"], rel=tolerance)
            assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=tolerance)


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
                max_steps=12,
            )
        )
    base, *_, last = [line["eval_loss"] for line in metrics_of(tmp_path / "out") if "eval_loss" in line]
    assert last < 0.8 * base


def test_a_folder_that_cannot_be_made_is_named(settings, tmp_path):
    with pytest.raises(UserError, match=r"--output_dir .*: File name too long; name another"):
        train(TrainConfig(**settings | {"output_dir": str(tmp_path / ("x" * 300))}))


def test_saving_the_best_of_no_steps_saves_the_start(settings):
    assert train(TrainConfig(**settings | {"max_steps": 0}))["steps"] == 0
    assert load_prefix(settings["output_dir"])[0].shape == (3, 2, 6, 10, 8)


def test_a_folder_has_one_run_at_a_time(small_pass_settings, monkeypatch, capsys):
    folder = Path(small_pass_settings["output_dir"])
    with writing.locked(folder):
        before = contents(folder)
        with pytest.raises(UserError, match="another run is writing to it; wait until it ends, or name another folder"):
            train(TrainConfig(**small_pass_settings))
        assert contents(folder) == before == {}
    assert not folder.exists()  # nothing was written to it
    train(TrainConfig(**small_pass_settings | {"max_steps": 1}))

    class NoLocks:
        """What fcntl does on some network folders."""

        LOCK_EX, LOCK_NB = fcntl.LOCK_EX, fcntl.LOCK_NB

        @staticmethod
        def flock(*arguments):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(writing, "fcntl", NoLocks)
    train(TrainConfig(**small_pass_settings | {"max_steps": 2} | LATEST))
    assert "cannot be locked (No locks available): start no second run into it" in capsys.readouterr().err


def test_a_signal_during_the_last_files_lets_them_be_written(small_pass_settings, monkeypatch):
    def write_card(folder):
        real(folder)
        signal.raise_signal(signal.SIGTERM)

    real = run.write_card
    monkeypatch.setattr(run, "write_card", write_card)
    with pytest.raises(Interrupted, match="SIGTERM: stopped after step 11, which was the last one; the prefix is saved"):
        train(TrainConfig(**small_pass_settings))
    assert (Path(small_pass_settings["output_dir"]) / CARD_FILE).exists()


def test_what_is_only_shown_may_fail_once_the_prefix_is_saved(settings, monkeypatch, capsys):
    """Here a folder is where the card should go, and no answer fits into memory."""
    folder = Path(settings["output_dir"])
    (folder / CARD_FILE / "notes").mkdir(parents=True)

    def no_memory(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr(PrefixBloom, "generate", no_memory)
    summary = train(TrainConfig(**settings | {"overwrite_output_dir": True}))
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "left out" in line]
    assert [line.split(":")[0] for line in lines] == [CARD_FILE, "the closing answers"]
    assert "cannot be written" in lines[0] and "MemoryError" in lines[1]
    assert all(line.endswith("; the prefix is saved") for line in lines)
    assert "learnt" in said.out.splitlines()[-1] and metrics_of(folder)[-1] == summary
    assert load_prefix(folder)[0].isfinite().all()


def refuse_lines_with(key, monkeypatch):
    """A full disk, for the line of metrics.jsonl that has this key."""
    append = Metrics._append

    def refuse(metrics, line):
        if key in json.loads(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        append(metrics, line)

    monkeypatch.setattr(Metrics, "_append", refuse)


def test_a_line_that_is_refused_after_an_early_stop_loses_no_best_prefix(settings, monkeypatch, capsys):
    settings |= {"model_name_or_path": bundled.MODEL, "learning_rate": 0.3, "eval_steps": 1, "early_stopping_patience": 1}
    settings |= {"logging_steps": 1000, "save_steps": 0}
    whole = Path(settings["output_dir"] + "-whole")
    stopped = train(TrainConfig(**settings | {"output_dir": str(whole)}))["steps"]
    assert (
        stopped < 11 and f"saved the prefix of step {stopped - 1}, whose eval loss is the lowest" in capsys.readouterr().out
    )
    with monkeypatch.context() as patch:
        refuse_lines_with("epoch", patch)
        said = rf"No space left.*; the prefix of step {stopped} is saved in .*checkpoint-{stopped}\.safetensors is intact"
        with pytest.raises(UserError, match=said):
            train(TrainConfig(**settings))
    train(TrainConfig(**settings | LATEST))
    assert torch.equal(load_prefix(settings["output_dir"])[0], load_prefix(whole)[0])


def test_a_summary_that_is_refused_fails_no_run(quick_settings, monkeypatch, capsys):
    refuse_lines_with("summary", monkeypatch)
    assert train(TrainConfig(**quick_settings))["steps"] == 3
    assert f"{METRICS_FILE}: left out (UserError: " in capsys.readouterr().err


def test_a_prefix_is_saved_also_where_its_encoder_does_not_fit(quick_settings, monkeypatch):
    def no_space(*arguments):
        raise UserError("prefix_encoder.safetensors: cannot be written: No space left on device")

    monkeypatch.setattr("prefix_tuning.training.output.save_encoder", no_space)
    with pytest.raises(UserError, match=r"No space left.*; the prefix is saved in .*, without its trainable weights"):
        train(TrainConfig(**quick_settings))
    assert load_prefix(quick_settings["output_dir"])[0].isfinite().all()


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs to know its own size")
def test_a_cpu_without_memory_says_what_to_change(tmp_path):
    processes = forks()
    ours, theirs = processes.Pipe()
    options = {"dataset": "bundled:sentence", "output_dir": str(tmp_path / "out"), "device": "cpu", "max_steps": 4}
    rows = {"per_device_train_batch_size": 3000, "gradient_accumulation_steps": 1, "max_tokens_per_batch": 10**6}
    runs = [options | rows, options | {"encoder_hidden_size": 100_000}]
    process = processes.Process(target=train_with_little_memory, args=(runs, theirs))
    process.start()
    theirs.close()
    tokens, width = ours.recv(), ours.recv()
    process.join()
    assert "cpu ran out of memory; lower --max_tokens_per_batch (it was 1000000) or add --gradient_checkpointing" in tokens
    assert "the encoder and its optimizer take 2.6 GiB: lower --encoder_hidden_size (it was 100000)" in width


def test_what_takes_most_memory_decides_what_to_change():
    model = random_bloom(hidden_size=48)

    def hint(**options):
        return memory_hint(TrainConfig(**options), model, options.get("max_tokens_per_batch", 640))

    assert hint() == "lower --max_tokens_per_batch (it was 640) or add --gradient_checkpointing"
    assert hint(max_tokens_per_batch=1) == "add --gradient_checkpointing"
    assert hint(gradient_checkpointing=True) == "lower --max_tokens_per_batch (it was 640)"
    assert hint(gradient_checkpointing=True, max_tokens_per_batch=1) == "lower --max_length (it was 256)"
    assert hint(encoder_hidden_size=600_000).endswith("take 3.0 GiB: lower --encoder_hidden_size (it was 600000)")
    assert hint(prefix_projection=False, num_virtual_tokens=10**6).endswith("lower --num_virtual_tokens (it was 1000000)")
