"""Fixtures that several test files use. No network, seeds fixed.

The modules beside this file, and what their names stand for:

    models      random_bloom: 3 layers, random in all its weights. A prefix for it is random too. `flat`, `relative` and
                `deviation` compare tensors. `beginning`: all that train.py has before its first step
    runs        a training in the test's own process, and what it leaves: metrics, checkpoints, weights
    rows        files of rows; chats: chat templates of instruct models, and a tokenizer with their tokens
    answers     questions, and three ways to answer them: infer.py, `generate`, plain forwards
    launching   processes that tests start: programs, forks, torchrun
    forks       what a fork of an imported process runs; processes: what each process of torchrun runs
    pretended   a device that is no CPU, made in Python

Words of the tests: `tuned` are two prefixes of the demo, trained once per session (short answers; sentences). `plain` is the
slow twin that a fast path must agree with. A run is `quick` if it has few steps. A `row` is of a dataset, a `question` is a
row without its answer, and an `example` is a tokenised row.
"""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest

# This must come before these modules are imported.
pytest.register_assert_rewrite("answers", "launching", "models", "rows", "runs")
# This must come before transformers is imported. The processes that tests start inherit it.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Each process of pytest and each process that it starts has 1 thread. Where there are more threads than cores, they must not
# wait in busy loops.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# A shell ignores SIGINT for its background jobs, and nohup ignores SIGHUP. Processes that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

import torch
from launching import at_end
from models import random_bloom, random_prefix
from transformers import AutoTokenizer

from prefix_tuning import PrefixBloom, bundled, load_prefix
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.cli import parse_train_config
from prefix_tuning.data.templates import prompt_of
from prefix_tuning.training.run import train


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    """datasets caches under a folder of this test session, not in the user's home."""
    folder = tmp_path_factory.getbasetemp() / "datasets-cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder))


@pytest.fixture
def curves():
    """A test that asks for this fixture lets its runs draw their curves."""


@pytest.fixture(autouse=True)
def _few_curves(request, monkeypatch):
    """In all other tests matplotlib seems not to be installed: drawing takes as long as a short run itself."""
    if "curves" not in request.fixturenames:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test():
    with at_end:
        yield


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(bundled.resolve(bundled.MODEL))


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """40 rows in the notebook's columns, some with input, of different lengths."""
    lines = (bundled.resolve("bundled:short"), bundled.resolve("bundled:sentence"))
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join("".join(Path(p).read_text("utf-8").splitlines(True)[:20]) for p in lines), "utf-8")
    return path


@pytest.fixture(scope="session")
def tuned(tmp_path_factory):
    """Two prefixes of different lengths for the bundled model, trained until they answer most questions right."""
    folders = {}
    for style, tokens in (("short", 16), ("sentence", 10)):
        folders[style] = tmp_path_factory.mktemp("tuned") / style
        flags = f"--dataset bundled:{style} --eval_fraction 0 --max_steps 100 --num_virtual_tokens {tokens}"
        flags += " --per_device_train_batch_size 16 --precision fp32"
        flags += " --save_steps 50" if style == "short" else ""  # two checkpoints, for the study
        train(parse_train_config([*flags.split(), "--output_dir", str(folders[style])]))
    return folders


@pytest.fixture
def settings(random_base, tmp_path, rows_file):
    """11 steps, one and a half epochs, with evaluations and checkpoints at steps that do not coincide."""
    return {
        "model_name_or_path": random_base,
        "dataset": str(rows_file),
        "eval_dataset": str(rows_file),
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "precision": "fp32",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 1.5,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "eval_steps": 3,
        "save_steps": 1,
        "save_best": True,
    }


@pytest.fixture(scope="session")
def trained(tuned, tmp_path_factory):
    """A folder that is not the checkout, with a prefix where `python train.py` leaves it."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(tuned["short"], folder / "chatbot")
    return folder


@pytest.fixture(scope="module")
def base():
    return load_base(bundled.MODEL, torch.float32, torch.device("cpu"))[0]


@pytest.fixture(scope="module")
def random_model(base):
    model = PrefixBloom(base)
    model.attach("five", random_prefix(model))
    model.attach("nine", random_prefix(model, tokens=9, seed=2))
    return model


@pytest.fixture(scope="module")
def tuned_model(tuned, base, tokenizer):
    model = PrefixBloom(base, tokenizer)
    for name, folder in tuned.items():
        model.attach(name, load_prefix(str(folder)))
    return model


@pytest.fixture(scope="module")
def mixed():
    """90 held-out questions of the demo, each with one of two prefixes or none."""
    rng = random.Random(0)
    lines = rng.sample(Path(bundled.resolve("bundled:short-eval")).read_text("utf-8").splitlines(), 90)
    return [prompt_of(json.loads(line)["instruction"]) for line in lines], rng.choices(["short", "sentence", "base"], k=90)


@pytest.fixture(scope="module")
def prefixes(tuned):
    return [flag for name, folder in tuned.items() for flag in ("--prefix", f"{name}={folder}")]


@pytest.fixture
def small_pass_settings(settings):
    """Evaluations and steps of several passes."""
    return settings | {"max_tokens_per_batch": 100}


@pytest.fixture(scope="session")
def random_base(tmp_path_factory, tokenizer):
    """A folder with a small random Bloom and the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("random") / "base"
    random_bloom().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def quick_settings(random_base, rows_file, tmp_path):
    """A quick run on the random base; `settings | {...}` changes it."""
    return {
        "model_name_or_path": random_base,
        "dataset": str(rows_file),
        "eval_fraction": 0.0,
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "precision": "fp32",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    }
