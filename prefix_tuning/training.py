"""The training loop.

The prefix is the same for all rows of an optimizer step, so the encoder runs once per step, not once per micro-batch:
gradients accumulate in the prefix (983,040 numbers for bloom-1b4-zh and 10 tokens) and go through the encoder (205.6 M) in
one backward at the end. It is the chain rule with the sum pulled out; the result is the same.
"""

import dataclasses
import itertools
import json
import math
import os
import platform
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import torch
import transformers
from datasets import Dataset
from tqdm import tqdm
from transformers import BloomForCausalLM, PreTrainedTokenizerBase, get_scheduler

from prefix_tuning.bloom import block_runner, load_base, loss_sum, resolve_device, resolve_dtype, run_block, text_prefix
from prefix_tuning.checkpoint import (
    ADAPTER_CONFIG_FILE,
    ENCODER_FILE,
    check_fits,
    load_encoder,
    portable_name,
    save_adapter,
    save_encoder,
    write_json,
)
from prefix_tuning.config import PrefixConfig, TrainConfig, UserError
from prefix_tuning.data import Example, load_rows, pack, take, tokenize
from prefix_tuning.encoder import PrefixEncoder
from prefix_tuning.evaluation import answer_rows, evaluate_loss, exact_match

try:
    import resource
except ImportError:  # Windows
    resource = None

METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "training_config.json"


def train(config: TrainConfig) -> dict:
    """Runs the training that `config` describes, writes its output folder and returns the summary of metrics.jsonl.

    Raises UserError for a mistake in the settings or the data, and for a loss that stops being finite.
    """
    output_dir = Path(config.output_dir)
    if (output_dir / ADAPTER_CONFIG_FILE).exists() and not config.overwrite_output_dir:
        raise UserError(
            f"{config.output_dir} holds a prefix already; add --overwrite_output_dir or name another --output_dir"
        )
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.precision, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        # The same seed gives the same bits; cuBLAS wants its part said before its first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    train_rows, eval_rows = load_splits(config)
    model, tokenizer = load_base(config.model_name_or_path, dtype, device)
    train_set = tokenize_rows(config.dataset, train_rows, tokenizer, config.max_length)
    evaluator = None
    if eval_rows is not None and config.max_steps != 0:
        evaluator = Evaluator(config, model, tokenizer, eval_rows)
    torch.manual_seed(config.seed)
    encoder = make_encoder(config, model, tokenizer).to(device)

    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / CONFIG_FILE, describe_run(config, encoder.config, device, dtype, len(train_set)))
    # An earlier prefix stays in place until the new one is whole.
    with open(output_dir / METRICS_FILE, "w", encoding="utf-8") as file:
        metrics = MetricsFile(file)
        try:
            summary = fit(config, model, encoder, train_set, evaluator, metrics)
        except NotFinite as error:
            kept = "there is no good prefix to keep"
            if error.good_prefix is not None:
                save_adapter(output_dir, error.good_prefix, encoder.config, config.model_name_or_path)
                (output_dir / ENCODER_FILE).unlink(missing_ok=True)  # of an earlier run; this one's weights are past help
                kept = f"the last good prefix is saved in {config.output_dir} (for infer.py; it cannot be trained further)"
            hint = "try a lower --learning_rate, some --warmup_steps or --precision fp32"
            raise UserError(f"the loss is no longer finite at step {error.step}; {kept}; {hint}") from None
        except torch.OutOfMemoryError as error:
            budget = max_tokens_per_batch(config, model)
            hint = f"lower --max_tokens_per_batch (it was {budget}) or add --gradient_checkpointing"
            raise UserError(f"{device} ran out of memory; {hint}") from error
        save_encoder(output_dir, encoder, config.model_name_or_path, model.config)
        save_adapter(output_dir, encoder.bake(), encoder.config, config.model_name_or_path)
        if evaluator:  # after the saving: nothing that happens here can lose the prefix
            metrics.write({"step": summary["steps"], **evaluator(encoder.bake(), f"step {summary['steps']}")})
        metrics.write(summary)
    if evaluator:
        evaluator.show_answers()
    print(f"{summary['steps']} steps in {summary['train_seconds']:.1f} s; the prefix is saved in {config.output_dir}")
    return summary


def max_tokens_per_batch(config: TrainConfig, model: BloomForCausalLM) -> int:
    """Tokens of one forward pass: the flag, or what the device and the model suggest (tests/benchmarks/NOTES.md).

    A layer holds about ten numbers per token and hidden unit for the backward pass: four before the GELU, query, key and
    value, what attention returns, and what each of the two layer norms is given. On a CPU these stay within half a GiB, and
    more than 640 tokens gain little; elsewhere they stay within two GiB.
    """
    shape, on_cpu = model.config, model.device.type == "cpu"
    held_per_token = 10 * shape.hidden_size * shape.n_layer * model.dtype.itemsize
    fitting = max(1, 2 ** (29 if on_cpu else 31) // held_per_token)
    return config.max_tokens_per_batch or (min(640, fitting) if on_cpu else fitting)


class MetricsFile:
    """metrics.jsonl: a JSON object per line, readable while the run goes on."""

    def __init__(self, file: TextIO):
        self.file = file

    def write(self, record: dict) -> None:
        # JSON has no infinity and no NaN.
        record = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in record.items()}
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()


class NotFinite(Exception):
    """The loss or the gradient of `step` was not finite; `good_prefix` is the last prefix for which both were, if any."""

    def __init__(self, step: int, good_prefix: torch.Tensor | None):
        self.step, self.good_prefix = step, good_prefix


def fit(
    config: TrainConfig,
    model: BloomForCausalLM,
    encoder: PrefixEncoder,
    train_set: Dataset,
    evaluator: "Evaluator | None",
    metrics: MetricsFile,
) -> dict:
    """The loop: trains `encoder` in place, writes to `metrics` as it goes and returns the summary. Raises NotFinite.

    Nothing here waits for the device but the reading of the figures, once per --logging_steps, and fp16's loss scale.
    """
    device = model.device
    optimizer = make_optimizer(encoder, config)
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(train_set) / rows_per_step)
    total_steps = config.max_steps if config.max_steps >= 0 else math.ceil(config.num_train_epochs * steps_per_epoch)
    scheduler = get_scheduler(config.lr_scheduler_type, optimizer, config.warmup_steps, total_steps)
    # Only fp16 needs its loss scaled; where it is off, the scaler passes everything through.
    scaler = torch.amp.GradScaler(device.type, enabled=model.dtype == torch.float16)
    trainable = sum(parameter.numel() for parameter in encoder.parameters())
    print(f"{len(train_set):,} rows, {total_steps:,} steps, {trainable:,} trainable parameters, {model.dtype} on {device}")
    max_tokens, run = max_tokens_per_batch(config, model), block_runner(config.gradient_checkpointing, config.torch_compile)
    compile_seconds = 0.0
    if config.torch_compile:
        first_rows = next(step_rows(config, len(train_set), rows_per_step, 1))
        compile_seconds = compile_for(model, encoder.bake(), take(train_set, first_rows), max_tokens, run)

    if evaluator:
        metrics.write({"step": 0, "frozen_base": True, **evaluator(None, "frozen base")})
    # Kept on the device, so that the loop need not wait for it: the sum of the losses since the last line of metrics, the
    # first step whose loss or gradient was not finite, and the prefix of the last step before that.
    losses = torch.zeros((), device=device)
    bad_step = torch.full((), math.inf, device=device)
    good_prefix = encoder.bake()
    seconds, tokens, logged_step, logged_seconds, logged_tokens = 0.0, 0, 0, 0.0, 0
    started = time.perf_counter()
    with tqdm(total=total_steps, unit="step", desc="training") as bar:
        for step, indices in enumerate(step_rows(config, len(train_set), rows_per_step, total_steps), start=1):
            examples = take(train_set, indices)
            prefix = encoder()  # once per step: it is the same for all rows
            leaf = prefix.detach().requires_grad_()  # where the gradients of all rows meet
            loss = accumulate_gradients(model, leaf, examples, scaler, max_tokens, run)

            # An overflow of scaled fp16 gradients is the scaler's business: it skips the step and scales less.
            finite = loss.isfinite() & (leaf.grad.isfinite().all() | scaler.is_enabled())
            bad_step = torch.where(finite, bad_step, bad_step.clamp(max=step))
            good_prefix = torch.where(bad_step > step, leaf.detach(), good_prefix)
            prefix.backward(torch.where(finite, leaf.grad, 0))  # once through the encoder

            scaler.unscale_(optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(encoder.parameters(), config.max_grad_norm or math.inf)
            learning_rate = scheduler.get_last_lr()[0]
            scale = scaler.get_scale()
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= scale:  # else fp16 gradients overflowed and the step was skipped
                scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            losses += loss
            tokens += sum(len(example.input_ids) for example in examples)
            bar.update()

            logging = step % config.logging_steps == 0 or step == total_steps
            evaluating = evaluator and step % (config.eval_steps or steps_per_epoch) == 0 and step < total_steps
            if not (logging or evaluating):
                continue
            next_prefix = encoder.bake()
            bad_step = torch.where(next_prefix.isfinite().all(), bad_step, bad_step.clamp(max=step + 1))
            mean_loss, norm, first_bad = torch.stack((losses / (step - logged_step), grad_norm, bad_step)).tolist()
            seconds += time.perf_counter() - started
            if logging:
                speed = (tokens - logged_tokens) / (seconds - logged_seconds)
                metrics.write(
                    {
                        "step": step,
                        "epoch": round(step / steps_per_epoch, 4),
                        "loss": mean_loss,
                        "learning_rate": learning_rate,
                        "grad_norm": norm,
                        "tokens_per_second": round(speed, 1),
                    }
                )
                bar.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{learning_rate:.2e}", tok_s=f"{speed:,.0f}", refresh=False)
                losses.zero_()
                logged_step, logged_seconds, logged_tokens = step, seconds, tokens
            if first_bad < math.inf:
                raise NotFinite(int(first_bad), good_prefix if first_bad > 1 else None)
            if evaluating:
                metrics.write({"step": step, **evaluator(next_prefix, f"step {step}")})
            started = time.perf_counter()
    return {
        "summary": True,
        "steps": total_steps,
        "train_seconds": round(seconds, 3),
        "tokens": tokens,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else 0.0,
        "compile_seconds": round(compile_seconds, 3),
        "peak_memory_mb": peak_memory_mb(device),
        "trainable_parameters": trainable,
    }


def accumulate_gradients(
    model: BloomForCausalLM,
    leaf: torch.Tensor,
    examples: list[Example],
    scaler: torch.amp.GradScaler,
    max_tokens: int,
    run: Callable[..., torch.Tensor] = run_block,
) -> torch.Tensor:
    """Forward and backward for all rows of one optimizer step.

    leaf: the prefix (layers, 2, heads, tokens, head_dim); its .grad receives the (scaled) gradient of the loss. Returns the
    loss, the mean over all labels of the step: a scalar on the model's device. max_tokens bounds the memory of one pass;
    run: a `block_runner`.
    """
    batches = list(pack(examples, max_tokens))
    labels = sum(len(batch.labels) for batch in batches)
    loss = torch.zeros((), device=model.device)
    for batch in batches:
        part = loss_sum(model, batch.to(model.device), leaf, run) / labels
        scaler.scale(part).backward()
        loss += part.detach()
    return loss


def compile_for(
    model: BloomForCausalLM, prefix: torch.Tensor, examples: list[Example], max_tokens: int, run: Callable[..., torch.Tensor]
) -> float:
    """Lets a compiling `run` compile, by computing gradients that are thrown away. Returns the seconds this took.

    Raises UserError where torch has no compiler to work with.
    """
    started = time.perf_counter()
    try:
        scaler = torch.amp.GradScaler(model.device.type, enabled=False)
        accumulate_gradients(model, prefix.clone().requires_grad_(), examples, scaler, max_tokens, run)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--torch_compile does not work here: {reason}; leave the flag out") from error
    seconds = time.perf_counter() - started
    print(f"compiled in {seconds:.1f} s, which no figure below includes")
    return seconds


def step_rows(config: TrainConfig, rows: int, rows_per_step: int, total_steps: int) -> Iterator[list[int]]:
    """The places of the rows of each optimizer step. An epoch's last step takes what is left of the epoch."""
    steps = 0
    for epoch in itertools.count():
        order = range(rows)
        if config.shuffle:
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(config.seed + epoch)).tolist()
        for start in range(0, rows, rows_per_step):
            if steps == total_steps:
                return
            steps += 1
            yield list(order[start : start + rows_per_step])


def make_optimizer(encoder: PrefixEncoder, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW as transformers' Trainer sets it up: its betas and eps, no decay for biases."""
    parameters = list(encoder.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    fused = parameters[0].device.type in ("cpu", "cuda")  # one kernel for all parameters
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.999), eps=1e-8, fused=fused)


class Evaluator:
    """Measures a prefix on the held-out rows, prints the figures, and keeps some answers to show before and after."""

    SHOWN = 5

    def __init__(self, config: TrainConfig, model: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: Dataset):
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.answers_wanted, self.max_tokens = config.eval_exact_match, max_tokens_per_batch(config, model)
        self.tokenized = tokenize_rows(config.eval_dataset or config.dataset, rows, tokenizer, config.max_length)
        self.answers: list[list[str]] = []

    def __call__(self, prefix: torch.Tensor | None, title: str) -> dict[str, float]:
        """Returns eval_loss, eval_perplexity and, if answers are wanted, eval_exact_match."""
        figures = evaluate_loss(self.model, self.tokenized, prefix, self.max_tokens)
        line = f"{title}: eval loss {figures['eval_loss']:.4f}, perplexity {figures['eval_perplexity']:.2f}"
        if self.answers_wanted:
            answers = answer_rows(self.model, self.tokenizer, self.rows, prefix)
            self.answers.append(answers)
            figures["eval_exact_match"] = exact_match(answers, self.rows)
            line += f", exact match {figures['eval_exact_match']:.1%} of {len(self.rows)} held-out questions"
        tqdm.write(line)
        return figures

    def show_answers(self) -> None:
        """Prints a handful of questions with the answers of the first and of the last evaluation."""
        if not self.answers:
            return
        answers = zip(self.rows, self.answers[0], self.answers[-1], strict=True)
        for row, before, after in itertools.islice(answers, self.SHOWN):
            for title, text in (
                ("question", f"{row['instruction']} {row['input']}"),
                ("frozen base", before),
                ("with prefix", after),
                ("expected", row["output"]),
            ):
                print(f"  {title:12s} {textwrap.shorten(text, 80, placeholder=' ...')}")
            print()


def describe_run(
    config: TrainConfig, prefix_config: PrefixConfig, device: torch.device, dtype: torch.dtype, rows: int
) -> dict:
    """All that is needed to repeat a run, without any path of this machine."""
    settings = dataclasses.asdict(config)
    for name in ("model_name_or_path", "dataset", "eval_dataset", "prefix_from", "output_dir"):
        if settings[name] is not None:
            settings[name] = portable_name(settings[name])
    if config.prefix_from:
        settings |= {
            "prefix_init": None,
            **{name: getattr(prefix_config, name) for name in settings if hasattr(prefix_config, name)},
        }
    return {
        **settings,
        "prefix_config": dataclasses.asdict(prefix_config),
        "train_rows": rows,
        "ran_with": {
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def peak_memory_mb(device: torch.device) -> int | None:
    """Peak of the allocated device memory on CUDA, of the process's memory elsewhere; None where the system hides it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kilobytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20


def tokenize_rows(name: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """`tokenize`, and a line about the rows that lost all their labels to truncation. Raises UserError if none is left."""
    tokenized = tokenize(rows, tokenizer, max_length)
    if not len(tokenized):
        raise UserError(f"{name}: no row has a label left; every prompt fills --max_length {max_length}")
    if dropped := len(rows) - len(tokenized):
        print(f"{name}: left out {dropped} of {len(rows)} rows, whose prompts alone fill --max_length {max_length}")
    return tokenized


def load_splits(config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    """The training rows, and the held-out rows if there are to be any."""
    rows = load_rows(config.dataset, splits=("train",))
    if config.eval_dataset:
        return rows, load_rows(config.eval_dataset, splits=("validation", "test", "train"))
    if config.eval_fraction:
        held_out = round(len(rows) * config.eval_fraction)
        if not 0 < held_out < len(rows):
            raise UserError(f"--eval_fraction {config.eval_fraction} of {len(rows)} rows leaves one side empty")
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed)).tolist()
        return rows.select(sorted(order[held_out:])), rows.select(sorted(order[:held_out]))
    return rows, None


def make_encoder(config: TrainConfig, model: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase) -> PrefixEncoder:
    """The encoder at its starting point: an earlier run's, or a new one for this base. On the CPU, float32."""
    base = model.config
    if config.prefix_from:
        encoder = load_encoder(config.prefix_from)
        check_fits(encoder.bake().shape, base, config.prefix_from, config.model_name_or_path)
        return encoder
    encoder = PrefixEncoder(
        PrefixConfig(
            num_virtual_tokens=config.num_virtual_tokens,
            num_layers=base.n_layer,
            num_attention_heads=base.n_head,
            token_dim=base.hidden_size,
            encoder_hidden_size=config.encoder_hidden_size or base.hidden_size,
            prefix_projection=config.prefix_projection,
        )
    )
    text = None
    if config.prefix_init == "text":
        text = text_prefix(model, tokenizer, config.init_text, config.num_virtual_tokens).cpu()
    encoder.initialize(config.prefix_init, text)
    return encoder
