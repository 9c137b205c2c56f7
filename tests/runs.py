"""Training runs inside the test's own process, and what they leave in their folders."""

import contextlib
import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from prefix_tuning import bundled, evaluation
from prefix_tuning.errors import Interrupted, UserError
from prefix_tuning.files.names import ADAPTER_FILE, ENCODER_FILE, METRICS_FILE
from prefix_tuning.model.bloom import Bloom
from prefix_tuning.training import run
from prefix_tuning.training.checkpoints import find_checkpoints, load_checkpoint
from prefix_tuning.training.checkpoints import step_of as step_of_checkpoint
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig


def weights_by_step(folder) -> dict[int, dict[str, torch.Tensor]]:
    """The encoder's weights in each checkpoint of a run, by its step."""
    return {
        step_of_checkpoint(path): {
            name.removeprefix("encoder."): tensor
            for name, tensor in load_checkpoint(path)[0].items()
            if name.startswith("encoder.")
        }
        for path in find_checkpoints(Path(folder))
    }


RECORDED_BASE = {"name_or_path": bundled.MODEL, "weights": "abc"}
TIMINGS = {"search_seconds", "tokens_per_second", "train_seconds", "compile_seconds", "peak_memory_mb"}
UNEVALUATED = {"eval_dataset": None, "eval_fraction": 0.0, "eval_steps": None, "save_best": False}


def metrics_without_timings(folder) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    lines = (Path(folder) / METRICS_FILE).read_text("utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMINGS} for line in lines]


def assert_same_run(folder, other) -> None:
    """Bit for bit the same prefix, weights and figures; no line missing or doubled; nothing half-written."""
    for name in (ENCODER_FILE, ADAPTER_FILE):
        ours, theirs = load_file(Path(folder) / name), load_file(Path(other) / name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert metrics_without_timings(folder) == metrics_without_timings(other)
    left = [path.name for path in Path(folder).glob(".*")]
    assert not left, left


def run_quietly(settings: dict) -> None:
    """The work of a child process: one run, whose output is thrown away."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        train(TrainConfig(**settings))


LATEST = {"resume_from_checkpoint": "latest"}


def checkpoint_names(folder) -> list[str]:
    return [path.stem for path in find_checkpoints(Path(folder))]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def interrupt(settings: dict, evaluations: int, call: int = 2, watched: tuple = (Bloom, "label_scores")) -> None:
    """Runs a training that gets SIGINT in the second forward pass of an evaluation, and must make no pass after that.

    evaluations: in which evaluation, counted from 1. call, watched: sends the signal at this call of another function.
    """
    calls, evaluate_rows, real = [], evaluation.evaluate_rows, getattr(*watched)

    def begin(*arguments):
        calls.append(0)
        return evaluate_rows(*arguments)

    def count(*arguments, **options):
        # The steps before the first evaluation of a resumed run do not count.
        if calls:
            calls[-1] += 1
        if len(calls) == evaluations and calls[-1] == call:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="SIGINT: stopped after step") as stop:
        patch.setattr(evaluation, "evaluate_rows", begin)
        patch.setattr(*watched, count)
        train(TrainConfig(**settings))
    assert stop.value.signal == signal.SIGINT and len(calls) == evaluations and calls[-1] == call


def train_with_little_memory(runs: list[dict], answer) -> None:
    """The work of a child process: runs trainings with 600 MB of address space left, and reports how each ended."""
    load = run.load_base

    def load_then_limit(*arguments):
        loaded = load(*arguments)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20, resource.RLIM_INFINITY))
        return loaded

    run.load_base = load_then_limit
    for options in runs:
        try:
            train(TrainConfig(**options))
        except UserError as error:
            answer.send(str(error))
        else:
            answer.send("it went through")
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def metrics_of(folder):
    return [json.loads(line) for line in (Path(folder) / METRICS_FILE).read_text("utf-8").splitlines()]
