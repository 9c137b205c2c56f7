"""The output folder: what describes a run, and that the same run writes the same bytes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from checkout import ROOT
from models import training_state
from runs import TIMINGS
from safetensors import safe_open

from prefix_tuning.files.names import CARD_FILE, CONFIG_FILE, METRICS_FILE
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder
from prefix_tuning.training.output import summarise
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.state import Clock


def bytes_without_timings(path: Path) -> bytes:
    """A file's bytes, in which every figure that depends on the clock or the memory is a zero."""
    content = path.read_bytes()
    if path.name == CARD_FILE:
        return re.sub(rb"rows, \d+ s,", b"rows, 0 s,", content)
    if path.name == METRICS_FILE:
        lines = [json.loads(line) for line in content.splitlines()]
        return json.dumps([line | {name: 0 for name in TIMINGS & line.keys()} for line in lines]).encode()
    return content


def without_seconds(path: Path) -> tuple[dict, dict]:
    """What a checkpoint holds, without its seconds and its checksum, which covers them."""
    with safe_open(path, framework="np") as file:
        tensors = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
        state = json.loads(file.metadata()["state"])
    state["progress"] |= {"seconds": 0, "logged_seconds": 0}
    del state["metrics_bytes"]  # the digits of its rates vary
    return tensors, state


@pytest.mark.usefixtures("curves")
def test_the_same_run_writes_the_same_bytes(settings, tmp_path):
    """Once here, and once by the command, in a process that orders sets and hashes in its own way."""
    settings |= {
        "eval_exact_match": True,
        "save_steps": 5,
        "prefix_init": "text",
        "init_text": "请回答。",
    }
    folders = [tmp_path / name / "out" for name in ("here", "command")]
    train(TrainConfig(**settings | {"output_dir": str(folders[0])}))
    flags = [
        part
        for name, value in settings.items()
        for part in (f"--{name}", str(value))
        if name != "output_dir" and value is not None
    ]
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    command = [sys.executable, str(ROOT / "train.py"), *flags, "--output_dir", str(folders[1])]
    subprocess.run(command, env=environment, check=True, capture_output=True)
    here, there = ({path.name: path for path in folder.iterdir()} for folder in folders)
    assert here.keys() == there.keys() and {"checkpoint-5.safetensors", METRICS_FILE, CARD_FILE} <= here.keys()
    for name, path in here.items():
        if name.startswith("checkpoint-"):
            assert without_seconds(path) == without_seconds(there[name])
        else:
            assert bytes_without_timings(path) == bytes_without_timings(there[name]), name


@pytest.mark.parametrize("resumed", [False, True])
def test_a_description_repeats_the_run_and_names_no_path(settings, tmp_path, resumed):
    train(TrainConfig(**settings | {"max_steps": 2}))
    if resumed:
        train(TrainConfig(**settings | {"max_steps": 3, "resume_from_checkpoint": "latest"}))
    described = json.loads((Path(settings["output_dir"]) / CONFIG_FILE).read_text("utf-8"))
    assert str(tmp_path) not in json.dumps(described)
    assert described["train_rows"] == 40 and described["rows_per_step"] == 6
    assert described["ran_with"]["dtype"] == "float32" and described["ran_with"]["processes"] == 1
    names = {name: described[name] for name in ("model_name_or_path", "dataset", "output_dir", "resume_from_checkpoint")}
    assert names == {
        "model_name_or_path": "local:base",
        "dataset": "local:rows.jsonl",
        "output_dir": "local:out",
        "resume_from_checkpoint": "latest" if resumed else None,
    }


def test_the_summary_is_of_the_whole_run():
    state = training_state(PrefixEncoder(PrefixConfig(5, 2, 2, 8, 6, prefix_projection=True)))
    state.progress.step, state.progress.tokens, state.compile_seconds = 3, 100, 1.5
    for seconds, speed in ((8.0, 12.5), (0.0, 0.0)):
        state.clock = Clock(seconds)
        summary = summarise(state)
        assert summary.pop("peak_memory_mb") > 0
        assert summary == {
            "summary": True,
            "steps": 3,
            "train_seconds": seconds,
            "tokens": 100,
            "tokens_per_second": speed,
            "compile_seconds": 1.5,
            "trainable_parameters": 5 * 8 + 8 * 6 + 6 + 6 * 32 + 32,
        }
