"""Parts of gpu.py: how fast training and answers are at real shapes, how large a pass can be, and a profile."""

from collections import Counter
from collections.abc import Callable
from functools import partial, wraps

import models
import torch
import torch.nn.functional as F
from datasets import Dataset
from gpu_job import Checks, Job, one_line
from speed import (
    SHAPES,
    VIRTUAL_TOKENS,
    counted,
    make_encoder,
    make_model,
    make_rows,
    peft_model,
    peft_trainer,
    train_ours,
)
from torch.profiler import ProfilerActivity
from transformers import AutoTokenizer

from prefix_tuning import PrefixBloom, bundled
from prefix_tuning.base_model.loading import wrap_layers
from prefix_tuning.devices import PRECISIONS, is_out_of_memory, reproducible
from prefix_tuning.model.attention import attention_bias
from prefix_tuning.model.batch import Example, pack
from prefix_tuning.training.loop import optimizer_step

SHAPES["toy"] = {"n_layer": 2, "hidden_size": 32, "n_head": 2, "vocab_size": 1024}
SHAPES["toy-qwen3"] = {
    "model_type": "qwen3", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 1024,
}  # fmt: skip


def fast(job: Job, full_shape: str) -> Checks:
    """Training, ours and PEFT's, against what the device's matmuls could do."""
    with reproducible(torch.device(job.device)):
        pass  # sets how cuBLAS works, which holds from its first matmul on
    shape, rate = job.shape(full_shape), matmul_rate(job)
    yield "bf16 matmul of the device", lambda: {"TFLOP/s": rate / 1e12}
    rows = make_rows(16 if job.toy else 320, SHAPES[shape]["vocab_size"])
    few, large_batch = rows[: 16 if job.toy else 64], 4 if job.toy else 32
    runs = (("bf16", 8, 1, rows), ("bf16", 1, 8, few), ("bf16", large_batch, 1, rows), ("fp32", 1, 8, few))
    for precision, batch, accumulation, own_rows in runs:
        rows_per_step = batch * accumulation
        given = dict(job=job, shape=shape, rate=rate, precision=precision, rows=own_rows)
        if (precision, batch) != ("bf16", 1):  # for ours the same as 8 x 1
            yield f"ours, {precision}, {rows_per_step} rows a step", partial(ours, **given, rows_per_step=rows_per_step)
        what = f"PEFT + Trainer, {precision}, {batch} x {accumulation} rows a step"
        yield what, partial(peft, **given, batch=batch, accumulation=accumulation)
    yield "parts of a step, bf16, 8 rows", partial(parts_of_step, job, shape)
    if job.on_cuda:
        yield "ours, bf16, 8 rows a step, torch_compile", partial(ours, job, shape, rate, "bf16", rows, 8, compiled=True)


def reproducibly(check: Callable) -> Callable:
    """A check that runs with deterministic kernels, as train.py does."""

    @wraps(check)
    def inside(job: Job, *inputs, **options):
        with reproducible(torch.device(job.device)):
            return check(job, *inputs, **options)

    return inside


def matmul_rate(job: Job) -> float:
    """Operations per second of a large bf16 matmul."""
    size, repeats = (64, 2) if job.toy else (8192, 30)
    left, right = torch.randn(2, size, size, device=job.device, dtype=torch.bfloat16)
    for count in (3, repeats):  # the first is a warm-up
        started = job.finish()
        for _ in range(count):
            left @ right
        seconds = job.finish() - started
    return 2 * size**3 * repeats / seconds


def timed(job: Job, shape: str, rate: float, rows: list[dict], rows_per_step: int, train_steps: Callable) -> dict:
    """The speed of training on these rows. train_steps(steps) is called twice, first for a warm-up.

    The share: how long the operations that no way of training can leave out would take at the matmul's rate, as a part of
    the seconds that training took.
    """
    train_steps(2)
    job.reset_peak()
    started = job.finish()
    train_steps(len(rows) // rows_per_step)
    seconds = job.finish() - started
    tokens, _, operations = counted(shape, rows)
    share = operations / seconds / rate
    return {"tokens/s": tokens / seconds, "peak MiB": job.peak(), "share of the bf16 matmul": share}


def frozen(job: Job, shape: str, precision: str = "bf16"):
    """A base for training."""
    return make_model(shape, job.device, PRECISIONS[precision]).requires_grad_(False).eval()


@reproducibly
def ours(
    job: Job, shape: str, rate: float, precision: str, rows: list[dict], rows_per_step: int, compiled: bool = False
) -> dict:
    model = frozen(job, shape, precision)
    if compiled:
        wrap_layers(model, gradient_checkpointing=False, torch_compile=True)
    train_steps = partial(train_ours, model, make_encoder(model), Dataset.from_list(rows), rows_per_step)
    return timed(job, shape, rate, rows, rows_per_step, train_steps)


def peft(job: Job, shape: str, rate: float, precision: str, rows: list[dict], batch: int, accumulation: int) -> dict:
    """As the notebook trains: an fp32 base, bf16 by autocast, whatever kernels are fastest."""
    tokenizer = AutoTokenizer.from_pretrained(bundled.resolve(bundled.MODEL))
    given = peft_model(shape, job.device), tokenizer, Dataset.from_list(rows)
    arguments = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}

    def train_steps(steps: int) -> None:
        peft_trainer(*given, max_steps=steps, bf16=precision == "bf16", **arguments).train()

    return timed(job, shape, rate, rows, batch * accumulation, train_steps)


@reproducibly
def parts_of_step(job: Job, shape: str) -> dict:
    """The shares of an optimizer step's time. It waits for the device after each part, which makes the whole slower."""
    model = frozen(job, shape)
    state, seconds = models.training_state(make_encoder(model)), Counter()
    (batch,) = pack([Example(row["input_ids"], row["labels"]) for row in make_rows(8, SHAPES[shape]["vocab_size"])], 10**4)
    batch = batch.to(torch.device(job.device))

    def note(part: str, started: float) -> float:
        seconds[part] += job.finish() - started
        return job.finish()

    for repeat in range(2 if job.toy else 12):
        if repeat < 2:  # warm-up
            seconds.clear()
        started = job.finish()
        prefix = state.encoder()
        leaf = prefix.detach().requires_grad_()
        started = note("encoder", started)
        loss = model.label_losses(batch, leaf).sum() / len(batch.labels)
        started = note("forward", started)
        loss.backward()
        started = note("backward", started)
        prefix.backward(leaf.grad)
        started = note("encoder", started)
        torch.nn.utils.clip_grad_norm_(state.encoder.parameters(), 1.0)
        state.optimizer.step()
        state.optimizer.zero_grad(set_to_none=True)
        note("optimizer", started)
    return {part: f"{value / seconds.total():.0%}" for part, value in seconds.items()}


def answers(job: Job) -> Checks:
    """Greedy answers, all of one length, in one batch."""
    model = make_model(job.shape("1b4"), job.device, torch.bfloat16).requires_grad_(False).eval()
    encoder, tokens = make_encoder(model), 4 if job.toy else 64
    torch.manual_seed(0)
    ids = torch.randint(4, model.config.vocab_size, (4 if job.toy else 64, 32), device=job.device)
    our = PrefixBloom(model)
    our.attach("random", encoder.bake())
    yield "ours, dynamic cache", partial(answer_speed, job, our, ids, tokens)
    yield "PEFT", partial(answer_speed, job, models.peft_model(model, encoder).to(job.device).eval(), ids, tokens)
    static = {"cache_implementation": "static"}
    yield "ours, static cache", partial(answer_speed, job, our, ids, tokens, **static)


def answer_speed(job: Job, model, ids, tokens: int, **options) -> dict:
    """The first call is a warm-up."""
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": 3, "do_sample": False}
    for _ in range(2):
        started = job.finish()
        model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, **options)
        seconds = job.finish() - started
    return {"answers/s": len(ids) / seconds, "tokens/s": ids.shape[0] * tokens / seconds}


def large(job: Job) -> Checks:
    """How many tokens one forward and backward pass can have."""
    for checkpointing in (False, True):
        suffix = ", --gradient_checkpointing" if checkpointing else ""
        yield f"longest row{suffix}", partial(largest_pass, job, checkpointing, row_length=None)
        yield f"most rows of 256 tokens{suffix}", partial(largest_pass, job, checkpointing, row_length=256)


@reproducibly
def largest_pass(job: Job, checkpointing: bool, row_length: int | None) -> dict:
    """Doubles the tokens of a pass until memory runs out or a pass takes 5 seconds."""
    model = frozen(job, job.shape("1b4"))
    wrap_layers(model, gradient_checkpointing=checkpointing, torch_compile=False)
    prefix, result = make_encoder(model).bake(), {}
    for tokens in [256 * 2**power for power in range(2 if job.toy else 14)]:
        length = row_length or tokens
        try:
            (batch,) = pack(models.examples_of([length] * (tokens // length), model.config.vocab_size), tokens)
            job.reset_peak()
            started = job.finish()
            model.label_losses(batch.to(torch.device(job.device)), prefix.requires_grad_()).sum().backward()
            result = {"tokens": tokens, "peak MiB": job.peak(), "seconds": job.finish() - started}
        except RuntimeError as error:
            return result | {"the double": "out of memory" if is_out_of_memory(error) else one_line(error)}
        if result["seconds"] > 5:
            break
    return result


def profile(job: Job) -> Checks:
    """Where the time of a step goes."""
    yield "training steps: kernels by their time", partial(profile_steps, job)
    yield "SDPA with an additive bias, forward and backward", partial(profile_attention, job)


def recorder(job: Job):
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * job.on_cuda
    return torch.profiler.profile(activities=activities)


def longest(job: Job, recorded, count: int) -> dict:
    """The kernels (on a CPU, operators) that took longest, with their share of the time of all."""
    kind = torch.autograd.DeviceType.CUDA if job.on_cuda else torch.autograd.DeviceType.CPU
    time_of = (lambda event: event.self_device_time_total) if job.on_cuda else (lambda event: event.self_cpu_time_total)
    events = [event for event in recorded.key_averages() if event.device_type == kind]
    total = sum(map(time_of, events))
    return {e.key[:90]: f"{time_of(e) / total:.0%}" for e in sorted(events, key=time_of, reverse=True)[:count]}


@reproducibly
def profile_steps(job: Job) -> dict:
    shape = job.shape("1b4")
    model = frozen(job, shape)
    rows = [Example(row["input_ids"], row["labels"]) for row in make_rows(8, SHAPES[shape]["vocab_size"])]
    state, step = models.training_state(make_encoder(model)), models.step_of(rows, max_tokens=10**4)
    optimizer_step(model, state, step)
    with recorder(job) as recorded:
        for _ in range(1 if job.toy else 3):
            optimizer_step(model, state, step)
        job.finish()
    order = "self_device_time_total" if job.on_cuda else "self_cpu_time_total"
    table = recorded.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=90)
    (job.folder / "profile.txt").write_text(table, "utf-8")
    return longest(job, recorded, 5)


def profile_attention(job: Job) -> dict:
    rows, heads, text, head_dim = (2, 2, 16, 16) if job.toy else (8, 16, 256, 128)
    options = {"device": job.device, "dtype": torch.bfloat16}
    query = torch.randn(rows, heads, text, head_dim, **options, requires_grad=True)
    key, value = torch.randn(2, rows, heads, VIRTUAL_TOKENS + text, head_dim, **options, requires_grad=True)
    bias = attention_bias(heads, VIRTUAL_TOKENS, text, query)
    with recorder(job) as recorded:
        F.scaled_dot_product_attention(query, key, value, attn_mask=bias).sum().backward()
        job.finish()
    return longest(job, recorded, 4)
