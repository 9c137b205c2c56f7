"""Shared pieces: small random Blooms, a tokenizer, ragged rows. No network, seeds fixed."""

import contextlib
import os
import subprocess
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import AutoTokenizer, BloomConfig, BloomForCausalLM

from prefix_tuning import bundled
from prefix_tuning.cli import parse_train_config
from prefix_tuning.model.batch import IGNORED, Example
from prefix_tuning.model.encoder import PrefixConfig
from prefix_tuning.training.run import train

ROOT = Path(__file__).resolve().parent.parent
REAL_ROWS = ROOT.parent / "shared" / "data" / "alpaca_zh"
needs_real_rows = pytest.mark.skipif(not REAL_ROWS.exists(), reason="the alpaca_zh rows are not on this machine")


@pytest.fixture(autouse=True)
def _private_cache(tmp_path_factory, monkeypatch):
    """datasets caches under a folder of this test session, not in the user's home."""
    folder = tmp_path_factory.getbasetemp() / "datasets-cache"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder))


at_end = contextlib.ExitStack()  # what ends the processes of a test


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test():
    with at_end:
        yield


def start_process(command, **options) -> subprocess.Popen:
    """A process that ends with the test at the latest: by SIGTERM, which torchrun passes on to its workers."""
    process = at_end.enter_context(subprocess.Popen(command, **options))
    at_end.callback(process.terminate)
    return process


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
        flags = f"--dataset bundled:{style} --eval_fraction 0 --max_steps 60 --num_virtual_tokens {tokens}"
        train(parse_train_config([*flags.split(), "--output_dir", str(folders[style])]))
    return folders


@pytest.fixture
def settings(tmp_path, tokenizer, rows_file):
    """11 steps, one and a half epochs, with evaluations and checkpoints at steps that do not coincide."""
    random_bloom().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return {
        "model_name_or_path": str(tmp_path / "base"),
        "dataset": str(rows_file),
        "eval_dataset": str(rows_file),
        "output_dir": str(tmp_path / "out"),
        "device": "cpu",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 1.5,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "eval_steps": 3,
        "save_steps": 1,
        "save_best": True,
    }


def random_bloom(seed=0, dtype=torch.float32, **options) -> BloomForCausalLM:
    """A small Bloom whose biases and layer norms are random too, so that no term hides behind a zero or a one."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 4096, "hidden_size": 48, "n_layer": 3, "n_head": 6, "pad_token_id": 3} | options
    model = BloomForCausalLM(BloomConfig(**shape)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype)


def prefix_config(model, tokens=5, projection=True, width=None) -> PrefixConfig:
    shape = model.config
    return PrefixConfig(tokens, shape.n_layer, shape.n_head, shape.hidden_size, width or shape.hidden_size, projection)


def examples_of(lengths, vocab_size=4096, seed=0, prompt_share=0.5) -> list[Example]:
    """Rows of random tokens with these lengths, the first part of each without labels."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(4, vocab_size, (length,), generator=generator).tolist()
        cut = max(1, int(length * prompt_share))
        examples.append(Example(ids, [IGNORED] * cut + ids[cut:]))
    return examples
