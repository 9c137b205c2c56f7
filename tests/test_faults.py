"""Work is never lost: runs that are killed, stopped or refused by the disk go on as if nothing had happened.

`tests/benchmarks/faults.py` runs `kill_until_done` for hours instead of seconds.
"""

import os
import random
import resource
import shutil
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from forks import Fork
from launching import seconds_of_a_run, start_process, start_run, wait_for_step, wait_until
from runs import UNEVALUATED, assert_same_run, metrics_of

from prefix_tuning.errors import UserError
from prefix_tuning.files.names import BOARD_FOLDER, METRICS_FILE
from prefix_tuning.files.prefixes import load_prefix
from prefix_tuning.training.checkpoints import find_checkpoints
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig


def kill_until_done(settings: dict, chance: random.Random, lifetime: float) -> int:
    """Runs a training in one process after another, and kills each (SIGKILL) at a random moment of `lifetime` seconds.

    Each process resumes what the one before it left. Returns the number of kills once a process has come to its end.
    """
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
        # The machine may be busier than when the lifetime was measured. With more time, some process makes a step.
        lifetime *= 1.1


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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
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


@contextmanager
def pipe(folder: Path):
    """The path of a pipe whose reader is gone after the block."""
    path = folder / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    yield path
    os.close(reader)


@contextmanager
def terminal(folder: Path):
    """The path of a terminal that is closed after the block."""
    ends = os.openpty()
    yield os.ttyname(ends[1])
    for end in ends:
        os.close(end)


@contextmanager
def full_disk(folder: Path):
    yield "/dev/full"


@pytest.mark.parametrize("screen", [pipe, terminal, full_disk])
def test_a_screen_that_cannot_be_written_ends_no_run(settings, tmp_path, screen):
    """The search, the steps, the evaluations and checkpoints, the best prefix and the answers at the end all print."""
    settings |= {"eval_dataset": None, "eval_fraction": 0.1, "eval_steps": 2, "eval_exact_match": True, "max_steps": 3}
    settings |= {"learning_rate": None, "logging_steps": 1}
    with screen(tmp_path) as path:
        process = train_py(settings, screen=path)
        wait_until((tmp_path / "out" / METRICS_FILE).exists, process)
    process.communicate()
    assert process.returncode == 0
    *_, last = metrics_of(tmp_path / "out")
    assert last["summary"] and last["steps"] == 3
    load_prefix(settings["output_dir"])


def test_ctrl_c_saves_the_run_although_it_ends_tee_too(settings, tmp_path):
    settings |= UNEVALUATED | {"logging_steps": 1, "save_steps": 0, "num_train_epochs": 1000}
    os.mkfifo(tmp_path / "pipe")
    tee = start_process("exec tee log < pipe > /dev/null", shell=True, cwd=tmp_path)
    process = train_py(settings, screen=tmp_path / "pipe")
    wait_for_step(process, tmp_path / "out", 1)
    tee.send_signal(signal.SIGINT)
    tee.wait()
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert len(find_checkpoints(tmp_path / "out")) == 1
    assert "a prefix of 10 tokens" in (tmp_path / "log").read_text("utf-8")


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
    assert "checkpoint-7.safetensors is intact, resume with --resume_from_checkpoint latest" in errors.splitlines()[-1]
    assert kept == {path.name: path.read_bytes() for path in find_checkpoints(tmp_path / "limited")}
    assert not list((tmp_path / "limited").glob(".*"))
    train(TrainConfig(**limited | {"resume_from_checkpoint": "latest"}))
    assert_same_run(limited["output_dir"], settings["output_dir"])


@contextmanager
def files_limited(size: int):
    """Within the block, no file may grow beyond `size` bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
@pytest.mark.parametrize("report_to, name", [("none", METRICS_FILE), ("tensorboard", BOARD_FOLDER)])
def test_a_line_of_metrics_that_cannot_be_written_saves_the_run(settings, tmp_path, report_to, name):
    settings |= UNEVALUATED | {"num_virtual_tokens": 1, "prefix_projection": False, "logging_steps": 1, "save_steps": 0}
    settings |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "num_train_epochs": 2}
    train(TrainConfig(**settings))
    metrics = (tmp_path / "out" / METRICS_FILE).read_bytes()  # larger than a checkpoint of so small a prefix
    limited = settings | {"output_dir": str(tmp_path / "limited"), "report_to": report_to}
    with files_limited(len(metrics) - 1000), pytest.raises(UserError) as stop:
        train(TrainConfig(**limited))
    assert str(stop.value).startswith(f"{name}: cannot be written: ")
    (checkpoint,) = find_checkpoints(tmp_path / "limited")
    assert f"; {checkpoint} is intact, resume with --resume_from_checkpoint latest" in str(stop.value)
    assert metrics_of(tmp_path / "limited")[-1]["step"] == int(checkpoint.stem.removeprefix("checkpoint-")) - 1
    train(TrainConfig(**limited | {"resume_from_checkpoint": "latest"}))
    assert_same_run(limited["output_dir"], settings["output_dir"])


def test_a_finished_prefix_survives_a_disk_that_is_full_at_the_end(settings):
    settings |= UNEVALUATED
    train(TrainConfig(**settings))
    prefix, _ = load_prefix(settings["output_dir"])
    with files_limited(3_000), pytest.raises(UserError, match="cannot be written"):
        train(TrainConfig(**settings | {"overwrite_output_dir": True, "save_steps": 0, "seed": 1}))
    assert torch.equal(load_prefix(settings["output_dir"])[0], prefix)
