"""Work is never lost: runs that are killed, stopped or refused by the disk go on as if nothing had happened.

`tests/benchmarks/faults.py` runs `kill_until_done` for hours instead of seconds.
"""

import random
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch
from forks import Fork
from helpers import UNEVALUATED, assert_same_run, seconds_of_a_run, start_run, wait_for_step

from prefix_tuning.errors import UserError
from prefix_tuning.files.checkpoint_format import find_checkpoints
from prefix_tuning.files.prefixes import load_prefix
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig


def kill_until_done(settings: dict, chance: random.Random, lifetime: float) -> int:
    """Runs a training in processes that are killed (SIGKILL) at random moments of their `lifetime` in seconds, each going on
    from the last, until one has come to its end before it was to be killed. Returns the number of kills."""
    kills, settings = 0, settings | {"resume_from_checkpoint": "latest"}
    while True:
        process = start_run(settings)
        process.join(chance.uniform(0, lifetime))
        if process.exitcode is not None:
            assert process.exitcode == 0
            return kills
        process.kill()
        process.join()
        kills += 1
        lifetime *= 1.1  # the machine may be busier than when it was measured: in the end there is time for a step


def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(settings, tmp_path):
    settings["num_train_epochs"] = 3
    seconds_of_a_run(settings | {"max_steps": 1, "output_dir": str(tmp_path / "first")})  # imports, caches
    lifetime = seconds_of_a_run(settings)
    chance, kills = random.Random(0), 0
    while kills < 5:
        killed = settings | {"output_dir": str(tmp_path / f"after-{kills}-kills")}
        kills += kill_until_done(killed, chance, lifetime)
        assert_same_run(killed["output_dir"], settings["output_dir"])
        shutil.rmtree(killed["output_dir"])


def train_py(settings: dict, **options) -> Fork:
    return Fork("train.py", *(f"--{name}={value}" for name, value in settings.items() if value is not None), **options)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_saves_and_says_how_to_go_on(settings, tmp_path, number):
    settings |= UNEVALUATED | {"logging_steps": 1, "save_steps": 0, "lr_scheduler_type": "constant_with_warmup"}
    stopped_in = {"output_dir": str(tmp_path / "stopped")}
    process = train_py(settings | stopped_in | {"num_train_epochs": 1000})  # it does not end before the signal
    wait_for_step(process, tmp_path / "stopped", 3)
    process.send_signal(number)
    _, errors = process.communicate()
    (checkpoint,) = find_checkpoints(tmp_path / "stopped")
    assert process.returncode == 128 + number
    step = int(checkpoint.stem.removeprefix("checkpoint-"))
    last = errors.splitlines()[-1]
    assert last.startswith(f"{number.name}: stopped after step {step}; ") and "--resume_from_checkpoint latest" in last
    assert "Traceback" not in errors
    settings["max_steps"] = step + 5
    train(TrainConfig(**settings | stopped_in | {"resume_from_checkpoint": "latest"}))
    train(TrainConfig(**settings))
    assert_same_run(tmp_path / "stopped", settings["output_dir"])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads from /proc which signals a process catches")
def test_a_second_signal_stops_at_once(settings, tmp_path):
    settings |= UNEVALUATED | {"logging_steps": 1, "num_train_epochs": 99, "save_steps": 0}
    process = train_py(settings | {"per_device_train_batch_size": 40, "max_tokens_per_batch": 1})  # a slow step
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
    process = train_py(limited | {"resume_from_checkpoint": "latest"}, limit=20_000)
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
