"""Work is never lost: runs that are killed, stopped or refused by the disk go on as if nothing had happened.

`tests/benchmarks/faults.py` runs `kill_until_done` for hours instead of seconds.
"""

import contextlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, prefix_config, random_bloom, start_process
from safetensors.torch import load_file

from prefix_tuning import bundled
from prefix_tuning.errors import UserError
from prefix_tuning.files.checkpoint_format import find_checkpoints
from prefix_tuning.files.names import ADAPTER_CONFIG_FILE, ADAPTER_FILE, ENCODER_FILE, METRICS_FILE
from prefix_tuning.files.prefixes import load_prefix
from prefix_tuning.model.encoder import PrefixEncoder
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.state import TrainingState

TIMINGS = {"tokens_per_second", "train_seconds", "compile_seconds", "peak_memory_mb"}
UNEVALUATED = {"eval_dataset": None, "eval_steps": None, "save_best": False}


def metrics_of(folder) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = (Path(folder) / METRICS_FILE).read_text("utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def assert_same_run(folder, other) -> None:
    """Bit for bit the same prefix, weights and figures; no line missing or doubled; nothing half-written."""
    for name in (ENCODER_FILE, ADAPTER_FILE):
        ours, theirs = load_file(Path(folder) / name), load_file(Path(other) / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert metrics_of(folder) == metrics_of(other)
    left = [path.name for path in Path(folder).glob(".*")]
    assert not left, left


def run_quietly(settings: dict) -> None:
    """What a child process does: one run, its output thrown away."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        train(TrainConfig(**settings))


def start(settings: dict) -> multiprocessing.Process:
    """A process that runs a training; forked from one that has the imports behind it."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["prefix_tuning.training.run"])
    process = processes.Process(target=run_quietly, args=(settings,))
    process.start()
    return process


def kill_until_done(settings: dict, chance: random.Random, lifetime: float) -> int:
    """Runs a training in processes that are killed (SIGKILL) at random moments of their `lifetime` in seconds, each going on
    from the last, until one has come to its end before it was to be killed. Returns the number of kills."""
    kills, settings = 0, settings | {"resume_from_checkpoint": "latest"}
    while True:
        process = start(settings)
        process.join(chance.uniform(0, lifetime))
        if process.exitcode is not None:
            assert process.exitcode == 0
            return kills
        process.kill()
        process.join()
        kills += 1
        lifetime *= 1.1  # the machine may be busier than when it was measured: in the end there is time for a step


def seconds_of_a_run(settings: dict) -> float:
    """How long `start(settings)` lives if nobody kills it."""
    started = time.perf_counter()
    process = start(settings)
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - started


def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(settings, tmp_path):
    settings["num_train_epochs"] = 6
    seconds_of_a_run(settings | {"max_steps": 1, "output_dir": str(tmp_path / "first")})  # imports, caches
    lifetime = seconds_of_a_run(settings)
    chance, kills = random.Random(0), 0
    while kills < 5:
        killed = settings | {"output_dir": str(tmp_path / f"after-{kills}-kills")}
        kills += kill_until_done(killed, chance, lifetime)
        assert_same_run(killed["output_dir"], settings["output_dir"])
        shutil.rmtree(killed["output_dir"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 5,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 3,
        },
        {"prefix_projection": False, "shuffle": False, "max_tokens_per_batch": 50, "save_best": False},
    ],
    ids=["shuffled", "odd steps, cosine", "no projection"],
)
def test_going_on_from_any_step_gives_the_same_bits(settings, tmp_path, changes):
    settings |= changes | {"save_total_limit": None}
    train(TrainConfig(**settings))
    whole = find_checkpoints(Path(settings["output_dir"]))
    assert len(whole) >= 11
    for checkpoint in whole[::2]:
        again = tmp_path / checkpoint.stem
        train(TrainConfig(**settings | {"output_dir": str(again), "resume_from_checkpoint": str(checkpoint)}))
        assert_same_run(again, settings["output_dir"])


def test_the_loss_scale_goes_on(settings):
    """fp16 alone has one, and only CUDA has fp16; what keeps it is the same everywhere."""
    states = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        encoder = PrefixEncoder(prefix_config(random_bloom(), projection=False))
        states.append(TrainingState(TrainConfig(**settings), encoder, 10, torch.float16))
    old, new = states
    old.scaler.scale(old.encoder().sum()).backward()
    old.scaler.step(old.optimizer)
    old.scaler.update(2.0**7)
    new.restore(old.tensors(), json.loads(json.dumps(old.numbers())))
    assert new.scaler.is_enabled() and new.scaler.get_scale() == 2.0**7


def test_latest_without_a_checkpoint_starts_from_the_beginning(settings, tmp_path, capsys):
    train(TrainConfig(**settings))
    fresh = settings | {"output_dir": str(tmp_path / "fresh"), "resume_from_checkpoint": "latest"}
    draft = tmp_path / "fresh" / ".checkpoint-1.safetensors.draft"
    draft.mkdir(parents=True)
    (draft / ".tmpQyq52s").write_bytes(b"half")  # safetensors' own name for a file that is not whole yet
    train(TrainConfig(**fresh))
    assert "holds no checkpoint to resume from: starting from the beginning" in capsys.readouterr().out
    assert_same_run(fresh["output_dir"], settings["output_dir"])


def test_a_folder_that_cannot_be_made_is_named(settings, tmp_path):
    with pytest.raises(UserError, match=r"--output_dir .*: File name too long; name another folder"):
        train(TrainConfig(**settings | {"output_dir": str(tmp_path / ("x" * 300))}))


def test_latest_does_not_overwrite_a_finished_run_that_has_no_checkpoint(settings):
    train(TrainConfig(**settings | {"save_steps": 0}))
    with pytest.raises(UserError, match="holds a prefix already"):
        train(TrainConfig(**settings | {"save_steps": 0, "resume_from_checkpoint": "latest"}))


def test_saving_the_best_of_no_steps_saves_the_start(settings):
    assert train(TrainConfig(**settings | {"max_steps": 0}))["steps"] == 0
    assert load_prefix(settings["output_dir"])[0].shape == (3, 2, 6, 10, 8)


def test_a_run_that_went_on_shows_no_answers_of_the_base_that_it_did_not_ask(settings, capsys):
    settings |= {"eval_exact_match": True}
    train(TrainConfig(**settings))
    assert capsys.readouterr().out.count("\n  frozen base") == 5
    train(TrainConfig(**settings | {"resume_from_checkpoint": "latest", "num_train_epochs": 2}))
    out = capsys.readouterr().out
    assert out.count("\n  with prefix") == 5 and "\n  frozen base" not in out


def test_a_damaged_checkpoint_is_named_and_passed_over(settings, tmp_path, capsys):
    train(TrainConfig(**settings))
    broken = tmp_path / "broken"
    shutil.copytree(settings["output_dir"], broken)
    newest = find_checkpoints(broken)[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    train(TrainConfig(**settings | {"output_dir": str(broken), "resume_from_checkpoint": "latest"}))
    assert newest.name in capsys.readouterr().err
    assert_same_run(broken, settings["output_dir"])


def test_metrics_that_lost_lines_do_not_stop_a_run(settings, tmp_path, capsys):
    train(TrainConfig(**settings))
    whole = metrics_of(settings["output_dir"])
    file = Path(settings["output_dir"]) / METRICS_FILE
    for kept, lines in ((file.read_bytes()[:150], 1), (b"", 0), (None, 0)):
        file.unlink()
        if kept is not None:
            file.write_bytes(kept)
        train(TrainConfig(**settings | {"resume_from_checkpoint": "latest"}))
        assert "is shorter than at the checkpoint" in capsys.readouterr().err
        assert metrics_of(settings["output_dir"]) == whole[:lines] + whole[-2:]


def test_more_epochs_go_on_where_the_run_ended(settings, tmp_path):
    settings |= UNEVALUATED | {"lr_scheduler_type": "constant_with_warmup"}
    train(TrainConfig(**settings | {"num_train_epochs": 2, "logging_steps": 1}))
    shorter = settings | {"num_train_epochs": 1, "output_dir": str(tmp_path / "shorter"), "logging_steps": 1}
    train(TrainConfig(**shorter))
    train(TrainConfig(**shorter | {"num_train_epochs": 2, "resume_from_checkpoint": "latest"}))
    assert_same_run(shorter["output_dir"], settings["output_dir"])


def test_going_on_as_another_run_is_refused_with_what_differs(settings, tmp_path, tokenizer):
    train(TrainConfig(**settings | {"max_steps": 1}))
    resumed = settings | {"resume_from_checkpoint": "latest"}
    before = {path.name: path.read_bytes() for path in Path(settings["output_dir"]).iterdir()}
    rows = Path(settings["dataset"]).read_text("utf-8").splitlines(True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:-1]), "utf-8")
    random_bloom(seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    for changes, said in (
        ({"learning_rate": 1e-3}, "--learning_rate 0.01, not 0.001"),
        ({"seed": 1, "num_virtual_tokens": 4}, "--num_virtual_tokens 10, not 4; --seed 42, not 1"),
        ({"gradient_accumulation_steps": 4}, "--gradient_accumulation_steps 3, not 4"),
        ({"precision": "bf16"}, "--precision fp32, not bf16"),
        ({"dataset": str(tmp_path / "rows.jsonl")}, "another --dataset"),
        ({"model_name_or_path": str(tmp_path / "other")}, r"another --model_name_or_path \(weights\)"),
    ):
        with pytest.raises(UserError, match=said):
            train(TrainConfig(**resumed | changes))
    assert before == {path.name: path.read_bytes() for path in Path(settings["output_dir"]).iterdir()}


def test_an_unfinished_run_is_not_forgotten_by_accident(settings):
    train(TrainConfig(**settings | {"max_steps": 2}))
    folder = Path(settings["output_dir"])
    for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE, ENCODER_FILE):
        (folder / name).unlink()
    with pytest.raises(UserError, match="did not finish; resume it with --resume_from_checkpoint latest"):
        train(TrainConfig(**settings))
    train(TrainConfig(**settings | {"overwrite_output_dir": True, "save_steps": 0}))
    assert not find_checkpoints(folder)


def test_the_best_prefix_is_kept_and_a_run_that_gets_no_better_stops(settings, tmp_path):
    # Trained on the held-out answer first and on another one then: its loss falls, and then rises.
    rows = [{"instruction": "？", "output": answer} for answer in ["是"] * 24 + ["否"] * 72]
    for name, part in (("train", rows), ("eval", rows[:6])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    settings |= {"dataset": str(tmp_path / "train.jsonl"), "eval_dataset": str(tmp_path / "eval.jsonl"), "shuffle": False}
    settings |= {"model_name_or_path": bundled.MODEL, "num_train_epochs": 1, "eval_steps": 2, "early_stopping_patience": 3}
    summary = train(TrainConfig(**settings))
    losses = {line["step"]: line["eval_loss"] for line in metrics_of(settings["output_dir"]) if "eval_loss" in line}
    del losses[0]  # the frozen base
    best = min(losses, key=losses.get)
    assert summary["steps"] == max(losses) == best + 2 * 3 < 16
    path = next(p for p in find_checkpoints(Path(settings["output_dir"])) if p.stem.endswith(f"-{summary['steps']}"))
    saved, kept = load_file(Path(settings["output_dir"]) / ENCODER_FILE), load_file(path)
    assert all(torch.equal(saved[name], kept[f"best.{name}"]) for name in saved)
    assert not torch.equal(saved["embedding.weight"], kept["encoder.embedding.weight"])


# The processes below are real ones, started from the command line.


def command(settings: dict, **options) -> subprocess.Popen:
    flags = [f"--{name}={value}" for name, value in settings.items() if value is not None]
    arguments = [sys.executable, str(ROOT / "train.py"), *flags]
    return start_process(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def wait_for_step(process: subprocess.Popen, folder: Path, step: int) -> None:
    """Returns as soon as the process has logged `step`."""
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
            if json.loads((folder / METRICS_FILE).read_text("utf-8").splitlines()[-1])["step"] >= step:
                return


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_saves_and_says_how_to_go_on(settings, tmp_path, number):
    settings |= UNEVALUATED | {"logging_steps": 1, "save_steps": 0, "num_train_epochs": 30}
    stopped = settings | {"output_dir": str(tmp_path / "stopped")}
    process = command(stopped)
    wait_for_step(process, tmp_path / "stopped", 3)
    process.send_signal(number)
    _, errors = process.communicate()
    (checkpoint,) = find_checkpoints(tmp_path / "stopped")
    assert process.returncode == 128 + number
    step = checkpoint.stem.removeprefix("checkpoint-")
    last = errors.splitlines()[-1]
    assert last.startswith(f"{number.name}: stopped after step {step}; ") and "--resume_from_checkpoint latest" in last
    assert "Traceback" not in errors
    train(TrainConfig(**stopped | {"resume_from_checkpoint": "latest"}))
    train(TrainConfig(**settings))
    assert_same_run(stopped["output_dir"], settings["output_dir"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads from /proc which signals a process catches")
def test_a_second_signal_stops_at_once(settings, tmp_path):
    settings |= UNEVALUATED | {"logging_steps": 1, "num_train_epochs": 99, "save_steps": 0}
    process = command(settings | {"per_device_train_batch_size": 40, "max_tokens_per_batch": 1})  # a slow step
    wait_for_step(process, tmp_path / "out", 1)
    process.send_signal(signal.SIGINT)
    caught = True
    while caught and process.poll() is None:  # until the first one has arrived
        status = Path(f"/proc/{process.pid}/status").read_text()
        caught = int(status.split("SigCgt:")[1].split()[0], 16) >> (signal.SIGINT - 1) & 1
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == -signal.SIGINT and not find_checkpoints(tmp_path / "out")


def test_a_full_disk_leaves_the_last_checkpoint_and_one_line(settings, tmp_path):
    settings |= UNEVALUATED | {"lr_scheduler_type": "constant_with_warmup", "logging_steps": 1}
    train(TrainConfig(**settings))
    limited = settings | {"output_dir": str(tmp_path / "limited")}
    train(TrainConfig(**limited | {"num_train_epochs": 1}))
    kept = {path.name: path.read_bytes() for path in find_checkpoints(tmp_path / "limited")}

    def no_file_may_grow_beyond_20_kb():
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    process = command(limited | {"resume_from_checkpoint": "latest"}, preexec_fn=no_file_may_grow_beyond_20_kb)
    _, errors = process.communicate()
    assert process.returncode == 2 and "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: ") and "checkpoint-8.safetensors: cannot be written" in errors
    assert kept == {path.name: path.read_bytes() for path in find_checkpoints(tmp_path / "limited")}
    assert not list((tmp_path / "limited").glob(".*"))
    train(TrainConfig(**limited | {"resume_from_checkpoint": "latest"}))
    assert_same_run(limited["output_dir"], settings["output_dir"])


def test_a_finished_prefix_survives_a_disk_that_is_full_at_the_end(settings, monkeypatch):
    settings |= UNEVALUATED
    train(TrainConfig(**settings))
    prefix, _ = load_prefix(settings["output_dir"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot be written"):
            train(TrainConfig(**settings | {"overwrite_output_dir": True, "save_steps": 0, "seed": 1}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert torch.equal(load_prefix(settings["output_dir"])[0], prefix)
