"""What several test files, and the programs in benchmarks/, use: small models, rows, runs and their figures."""

import contextlib
import csv
import json
import multiprocessing
import os
import re
import resource
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from transformers import BloomConfig

from prefix_tuning import bundled, plain
from prefix_tuning.cli import parse_infer_config
from prefix_tuning.data.rows import prompt_of
from prefix_tuning.errors import Interrupted, UserError
from prefix_tuning.files import checkpoint_format
from prefix_tuning.files.checkpoint_format import find_checkpoints, load_checkpoint
from prefix_tuning.files.names import ADAPTER_FILE, ENCODER_FILE, METRICS_FILE
from prefix_tuning.generation import batches
from prefix_tuning.inference.run import infer
from prefix_tuning.model.batch import IGNORED, Example, count_labels, pack
from prefix_tuning.model.bloom import Bloom, empty_prefix, prefix_cache
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder
from prefix_tuning.training import evaluator, inputs
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.start import make_encoder
from prefix_tuning.training.state import TrainingState, make_optimizer, make_schedule
from prefix_tuning.training.steps import Step

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
REAL_ROWS = ROOT.parent / "shared" / "data" / "alpaca_zh"
needs_real_rows = pytest.mark.skipif(not REAL_ROWS.exists(), reason="the alpaca_zh rows are not on this machine")
at_end = contextlib.ExitStack()  # what ends the processes of a test


def start_process(command, **options) -> subprocess.Popen:
    """A process that ends with the test at the latest: by SIGTERM, which torchrun passes on to its workers."""
    process = at_end.enter_context(subprocess.Popen(command, **options))
    at_end.callback(process.terminate)
    return process


def random_bloom(seed=0, dtype=torch.float32, **options) -> Bloom:
    """A small Bloom whose biases and layer norms are random too, so that no term hides behind a zero or a one."""
    torch.manual_seed(seed)
    shape = {"vocab_size": 4096, "hidden_size": 48, "n_layer": 3, "n_head": 6, "pad_token_id": 3} | options
    model = Bloom(BloomConfig(**shape)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype)


def prefix_config(model, tokens=5, projection=True, width=None) -> PrefixConfig:
    return PrefixConfig.of(model.config, tokens, width, projection)


def examples_of(lengths, vocab_size=4096, seed=0, prompt_share=0.5) -> list[Example]:
    """Rows of random tokens with these lengths, the first part of each without labels."""
    generator = torch.Generator().manual_seed(seed)
    examples = []
    for length in lengths:
        ids = torch.randint(4, vocab_size, (length,), generator=generator).tolist()
        cut = max(1, int(length * prompt_share))
        examples.append(Example(ids, [IGNORED] * cut + ids[cut:]))
    return examples


def plain_loss(model, examples, prefix):
    """plain.py's loss, by transformers' own forward with the prefix as past_key_values: nats, summed over all rows."""
    prefix = empty_prefix(model.config) if prefix is None else prefix
    rows = [(torch.tensor([example.input_ids]), torch.tensor([example.labels])) for example in examples]
    return sum(plain.loss_of(model, prefix, *row) for row in rows)


def loss_and_gradient(loss_of, prefix):
    """loss_of(prefix), and its gradient in the prefix."""
    leaf = prefix.clone().requires_grad_()
    loss = loss_of(leaf)
    loss.backward()
    return loss.item(), leaf.grad


def training_state(encoder, learning_rate=0.1, loss_scaling=False, max_grad_norm=1.0) -> TrainingState:
    """A new state, with weight decay, warm-up and a rate that falls over 10 steps."""
    schedule = make_schedule("linear", warmup_steps=2, total_steps=10)
    state = TrainingState(encoder, make_optimizer(encoder, 0.5), schedule, max_grad_norm, loss_scaling)
    state.progress.peak_learning_rate = learning_rate
    return state


def step_of(examples, max_tokens=1000, number=1) -> Step:
    """These examples as one optimizer step of a process alone."""
    tokens = sum(len(example.input_ids) for example in examples)
    return Step(number, list(pack(examples, max_tokens)), count_labels(examples), tokens, 0, len(examples))


def flat(weights):
    """All numbers of a state_dict in one axis."""
    return torch.cat([tensor.flatten() for _, tensor in sorted(weights.items())])


def weights_by_step(folder) -> dict[int, dict[str, torch.Tensor]]:
    """The encoder's weights in each checkpoint of a run, by its step."""
    return {
        checkpoint_format.step_of(path): {
            name.removeprefix("encoder."): tensor
            for name, tensor in load_checkpoint(path)[0].items()
            if name.startswith("encoder.")
        }
        for path in find_checkpoints(Path(folder))
    }


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def deviation(ours, theirs):
    """The mean absolute difference, relative to the mean absolute value. For Adam's updates: a number whose gradient is all
    rounding may move the other way, and it counts as one number among thousands.
    """
    return ((ours - theirs).abs().mean() / theirs.abs().mean()).item()


# A learning rate that changes no figure: so every step begins with equal weights, and runs that round otherwise can be
# compared. With a real rate Adam amplifies roundings, on each CPU in another way.
STANDSTILL = 1e-12

RECORDED_BASE = {"name_or_path": bundled.MODEL, "weights": "abc"}


def run_script(script, *flags, cwd=ROOT):
    """Runs train.py or infer.py as a user does."""
    return subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=cwd, capture_output=True, text=True)


TRAIN = ("train",)
GOOD = {"instruction": "一加一等于几？", "input": "", "output": "二"}


def write_jsonl(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


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
    """What a child process does: one run, its output thrown away."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        train(TrainConfig(**settings))


def forks():
    """multiprocessing's functions, whose processes are forked from one that has the imports behind it."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["helpers", "forks", "matplotlib.figure"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(HERE)]), prepend=os.pathsep)
        forkserver.ensure_running()
    return processes


def start_run(settings: dict) -> multiprocessing.Process:
    """A process that runs a training."""
    process = forks().Process(target=run_quietly, args=(settings,))
    process.start()
    return process


def seconds_of_a_run(settings: dict) -> float:
    """How long `start(settings)` lives if nobody kills it."""
    started = time.perf_counter()
    process = start_run(settings)
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - started


def wait_until(done, process) -> None:
    """Returns once done() is true, or the process (Popen or Fork) has ended."""
    while process.poll() is None and not done():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.005)


def wait_for_step(process, folder: Path, step: int) -> None:
    """Returns as soon as the process has logged `step`."""

    def logged():
        with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
            return json.loads((folder / METRICS_FILE).read_text("utf-8").splitlines()[-1])["step"] >= step

    wait_until(logged, process)


QUESTIONS = ["法国的首都是哪里？", "3加5等于多少？", "请把“苹果”翻译成英文，谢谢！", "？"]
PROMPTS = [prompt_of(question) for question in QUESTIONS]
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def complete(model, tokenizer, prompts, *arguments, **options):
    """`batches.complete` of texts."""
    ids = tokenizer(list(prompts), split_special_tokens=True).input_ids if prompts else []
    return batches.complete(model, tokenizer, ids, *arguments, **options)


def random_prefix(model, tokens=5, seed=1):
    torch.manual_seed(seed)
    return 10 * PrefixEncoder(prefix_config(model, tokens)).bake()  # large enough to change the text


def logits_after(base, prefix, ids):
    mask = torch.ones(1, prefix.shape[3] + len(ids), dtype=torch.long)
    return base(torch.tensor([ids]), prefix_cache([prefix])[0], mask).logits[0, -1]


@torch.no_grad()
def decode(tokenizer, prompt, logits_of, max_new_tokens=GREEDY["max_new_tokens"]):
    """The greedy answer by forward passes over the whole text, each anew. logits_of: takes ids (1, T)."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    while ids.shape[1] < start + max_new_tokens and ids[0, -1] != tokenizer.eos_token_id:
        ids = torch.cat((ids, logits_of(ids)[:, -1:].argmax(-1)), dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


FRANCE = "法国的首都是哪里？"


def run_infer(*flags):
    infer(parse_infer_config([str(flag) for flag in flags]))


def refuses(message, *flags):
    with pytest.raises(UserError, match=re.escape(message)):
        run_infer(*flags)


def questions(count):
    lines = Path(bundled.resolve("bundled:short-eval")).read_text("utf-8").splitlines()[:count]
    names = [None, "sentence", "base", "short"]
    return [json.loads(line) | {"prefix": names[index % 4], "id": index} for index, line in enumerate(lines)]


def write_rows(path, rows):
    if path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), "utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


LATEST = {"resume_from_checkpoint": "latest"}


def checkpoint_names(folder) -> list[str]:
    return [path.stem for path in find_checkpoints(Path(folder))]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def interrupt(settings: dict, evaluations: int, call: int = 2, watched: tuple = (Bloom, "label_losses")) -> None:
    """Runs a training that gets SIGINT during its last of so many evaluations, at its second pass, or at another call
    of a function that is `watched`. There must be no call after that."""
    calls, evaluate_loss, real = [], evaluator.evaluate_loss, getattr(*watched)

    def begin(*arguments):
        calls.append(0)
        return evaluate_loss(*arguments)

    def count(*arguments, **options):
        if calls:  # not so in the steps before the first evaluation of a resumed run
            calls[-1] += 1
        if len(calls) == evaluations and calls[-1] == call:
            signal.raise_signal(signal.SIGINT)
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="SIGINT: stopped after step") as stop:
        patch.setattr(evaluator, "evaluate_loss", begin)
        patch.setattr(*watched, count)
        train(TrainConfig(**settings))
    assert stop.value.signal == signal.SIGINT and len(calls) == evaluations and calls[-1] == call


def train_with_little_memory(runs: list[dict], answer) -> None:
    """What a child process does: runs trainings with 600 MB of address space left, and reports how each ended."""
    load = inputs.load_base

    def load_then_limit(*arguments):
        loaded = load(*arguments)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20, resource.RLIM_INFINITY))
        return loaded

    inputs.load_base = load_then_limit
    for options in runs:
        try:
            train(TrainConfig(**options))
        except UserError as error:
            answer.send(str(error))
        else:
            answer.send("it went through")
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def peft_model(model, encoder):
    """PEFT around `model`, with our encoder's weights."""
    from peft import PrefixTuningConfig, get_peft_model  # here, as the processes that tests start import this module too

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


def metrics_of(folder):
    return [json.loads(line) for line in (Path(folder) / METRICS_FILE).read_text("utf-8").splitlines()]


def initial_encoder(config, tokenizer):
    model = random_bloom()
    torch.manual_seed(config.seed)
    return make_encoder(config, model, tokenizer, {})


def torchrun(processes, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--max_restarts={restarts}"]
    return [*command, "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]


def worker(job, rank):
    """The process of torchrun's that has this rank; None if there is none at the moment."""
    for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return int(pid)
    return None
