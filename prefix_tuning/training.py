"""The training loop.

The prefix is the same for all rows of an optimizer step, so the encoder runs once per step, not once per micro-batch:
gradients accumulate in the prefix (983,040 numbers for bloom-1b4-zh and 10 tokens) and go through the encoder (205.6 M) in
one backward at the end. It is the chain rule with the sum pulled out; the result is the same.
"""

import dataclasses
import functools
import itertools
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TextIO

import torch
import transformers
from datasets import Dataset
from tqdm import tqdm
from transformers import BloomForCausalLM, PreTrainedTokenizerBase

from prefix_tuning import distributed, signals
from prefix_tuning.bloom import (
    block_runner,
    fingerprint,
    held_per_token,
    is_out_of_memory,
    label_losses,
    load_base,
    max_tokens_per_batch,
    resolve_device,
    resolve_dtype,
    run_block,
    text_prefix,
)
from prefix_tuning.checkpoint import (
    ENCODER_FILE,
    check_base,
    load_encoder,
    portable_name,
    remove_drafts,
    replacing,
    save_adapter,
    save_checkpoint,
    save_encoder,
    write_json,
)
from prefix_tuning.config import Interrupted, PrefixConfig, TrainConfig, UserError
from prefix_tuning.data import NO_LABELS, Batch, Example, count_labels, digest, load_rows, pack, take, tokenize
from prefix_tuning.encoder import PrefixEncoder
from prefix_tuning.evaluation import answer_rows, evaluate_loss, exact_match
from prefix_tuning.files.writing import locked
from prefix_tuning.generation import PrefixBloom
from prefix_tuning.report import (
    CONFIG_FILE,
    METRICS_FILE,
    create_repository,
    open_board,
    plot_curves,
    push_to_hub,
    write_card,
)
from prefix_tuning.resume import (
    Resumed,
    check_same_run,
    clear_checkpoints,
    find_resumed,
    identity,
    metrics_so_far,
    restore,
)
from prefix_tuning.sharding import in_step, parts_of_base
from prefix_tuning.state import NotFinite, Progress, TrainingState
from prefix_tuning.text import shorten

try:
    import resource
except ImportError:  # Windows
    resource = None


def train(config: TrainConfig) -> dict:
    """Runs the training that `config` describes, writes its output folder and returns the summary of metrics.jsonl.

    Of several processes that torchrun has started, each trains on its part of every step's rows, and main writes. Raises
    UserError for a mistake in the settings or the data, for a disk or memory that is full, and for a loss that stops being
    finite; Interrupted after a signal.
    """
    device = resolve_device(config.device)
    with distributed.processes(device), locked(Path(config.output_dir)) if distributed.is_main() else nullcontext():
        return _train(config, device)


def _train(config: TrainConfig, device: torch.device) -> dict:
    output_dir = Path(config.output_dir)
    parts = parts_of_base(config.shard_base, config.shard_degree)
    resumed = find_resumed(config)
    # What the hub has against it should be known before the training.
    repository = create_repository(config.push_to_hub) if config.push_to_hub and distributed.is_main() else None
    dtype = resolve_dtype(config.precision, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        # The same seed gives the same bits; cuBLAS reads this variable before its first matmul.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    with distributed.first_on_each_machine():  # rows and tokens are prepared once, and found cached
        train_rows, eval_rows = load_splits(config)
    model, tokenizer = load_base(config.model_name_or_path, dtype, device, parts)
    base = fingerprint(model, tokenizer)
    with distributed.first_on_each_machine():
        train_set = tokenize_rows(config.dataset, train_rows, tokenizer, config.max_length)
        eval_set = eval_rows and tokenize_rows(
            config.eval_dataset or config.dataset, eval_rows, tokenizer, config.max_length
        )
    contents = {
        "model_name_or_path": {key: value for key, value in base.items() if key != "name_or_path"},
        "dataset": digest(train_set),
        "eval_dataset": eval_set and [digest(eval_rows), digest(eval_set)],  # answers are compared with the whole texts
    }
    run = identity(config, dtype, contents)
    if resumed:
        check_same_run(resumed, run)
    checkpoints = Checkpoints(config, run, resumed)
    evaluator = None
    if eval_set and config.max_steps != 0:
        evaluator = Evaluator(config, model, tokenizer, eval_rows, eval_set)
    with out_of_memory_explained(config, model, checkpoints):
        torch.manual_seed(config.seed)
        encoder = (resumed.encoder() if resumed else make_encoder(config, model, tokenizer, base)).to(device)
        total_steps = count_steps(config, len(train_set), resumed.progress() if resumed else Progress())
        state = TrainingState(config, encoder, total_steps, model.dtype)
        if resumed:
            restore(state, resumed)
        if distributed.is_main():
            prepare_output(output_dir, describe_run(config, encoder.config, device, dtype, len(train_set)), resumed)
        del resumed  # else the tensors of the checkpoint would stay in memory for the whole run

        board = None
        if config.report_to == "tensorboard" and distributed.is_main():
            board = open_board(output_dir, state.progress.step)
        with open(output_dir / METRICS_FILE if distributed.is_main() else os.devnull, "a", encoding="utf-8") as file:
            metrics, summary = MetricsFile(file, board), None
            try:
                with signals.listening("the run stops once it is saved"):
                    fit(config, model, state, train_set, total_steps, evaluator, metrics, checkpoints)
                    summary = finish(config, state, base, evaluator, metrics, checkpoints)
                    signals.stop_if_heard()
            except NotFinite as error:
                raise UserError(keep_good_prefix(config, error, encoder.config, base)) from None
            except Interrupted as stop:
                what_now = checkpoints.how_to_resume() or "; there was nothing to save"
                if summary:
                    what_now = f", which was the last one; the prefix is saved in {config.output_dir}"
                raise Interrupted(f"{stop} after step {state.progress.step}{what_now}", stop.signal) from None
    if evaluator:
        evaluator.show_answers()
    print(f"{summary['steps']} steps in {summary['train_seconds']:.1f} s; the prefix is saved in {config.output_dir}")
    if repository:
        push_to_hub(output_dir, repository)
        print(f"uploaded to the hub: {repository}")
    return summary


def finish(
    config: TrainConfig,
    state: TrainingState,
    base: dict,
    evaluator: "Evaluator | None",
    metrics: "MetricsFile",
    checkpoints: "Checkpoints",
) -> dict:
    """What follows the last step: saves the prefix, evaluates it, saves the best one instead if that is wanted, and writes
    the summary, which is returned, the curves and the model card."""
    output_dir, progress = Path(config.output_dir), state.progress
    save_output(output_dir, state.encoder, base)  # before the evaluation: nothing that happens there can lose it
    if evaluator and progress.evaluated_step != progress.step:
        evaluate(config, state, evaluator, metrics, checkpoints)
    if state.best_weights and progress.best_step != progress.step:
        state.encoder.load_state_dict(state.best_weights)
        save_output(output_dir, state.encoder, base)
        print(f"saved the prefix of step {progress.best_step}, whose eval loss is the lowest: {progress.best_loss:.4f}")
    summary = summarise(state)
    metrics.write(summary)
    if distributed.is_main():
        plot_curves(output_dir)
        write_card(output_dir)
    return summary


def keep_good_prefix(config: TrainConfig, error: "NotFinite", prefix_config: PrefixConfig, base: dict) -> str:
    """Saves the last prefix of a run whose loss is no longer finite, if there is one. Returns what to tell the user."""
    kept, output_dir = "there is no good prefix to keep", Path(config.output_dir)
    if error.good_prefix is not None:
        if distributed.is_main():
            save_adapter(output_dir, error.good_prefix, prefix_config, base)
            (output_dir / ENCODER_FILE).unlink(missing_ok=True)  # an earlier run's; this one's weights are not finite
        kept = f"the last good prefix is saved in {config.output_dir} (for infer.py; it cannot be trained further)"
    distributed.barrier()  # until it is saved: torchrun stops all processes when the first one ends
    hint = "try a lower --learning_rate, some --warmup_steps or --precision fp32"
    return f"the loss is no longer finite at step {error.step}; {kept}; {hint}"


@contextmanager
def out_of_memory_explained(config: TrainConfig, model: BloomForCausalLM, checkpoints: "Checkpoints") -> Iterator[None]:
    """Turns running out of memory into a UserError that names what takes most of it, and what makes that smaller."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        hint = memory_hint(config, model)
        raise UserError(f"{model.device} ran out of memory; {hint}{checkpoints.how_to_resume()}") from error


def memory_hint(config: TrainConfig, model: BloomForCausalLM) -> str:
    """What makes a run smaller: whichever is larger, the encoder with its optimizer or what a forward pass keeps."""
    with torch.device("meta"):
        parameters = PrefixEncoder(prefix_config_of(config, model)).parameters()
    encoder_bytes = 16 * sum(parameter.numel() for parameter in parameters)  # weight, gradient and AdamW's two moments
    max_tokens = max_tokens_per_batch(model, config.max_tokens_per_batch)
    if encoder_bytes > max(max_tokens, config.max_length) * held_per_token(model):  # a long row has a pass of its own
        cause = f"the encoder and its optimizer take {encoder_bytes / 2**30:.1f} GiB"
        if not config.prefix_projection:
            return f"{cause}: lower --num_virtual_tokens (it was {config.num_virtual_tokens})"
        return f"{cause}: lower --encoder_hidden_size (it was {config.encoder_hidden_size or model.config.hidden_size})"
    hints = []
    if max_tokens > config.max_length:
        hints.append(f"lower --max_tokens_per_batch (it was {max_tokens})")
    if not config.gradient_checkpointing:
        hints.append("add --gradient_checkpointing")
    return " or ".join(hints) or f"lower --max_length (it was {config.max_length})"


def prepare_output(output_dir: Path, description: dict, resumed: Resumed | None) -> None:
    """Clears the folder of what a killed or replaced run left, and writes what is known before the first step.

    An earlier prefix stays in place until the new one is whole.
    """
    remove_drafts(output_dir)
    clear_checkpoints(output_dir, resumed)
    write_json(output_dir / CONFIG_FILE, description)
    with replacing(output_dir / METRICS_FILE) as draft:
        draft.write_bytes(metrics_so_far(resumed))


def save_output(output_dir: Path, encoder: PrefixEncoder, base: dict) -> None:
    """What a run is for: the trainable weights and the baked prefix."""
    distributed.check_equal(list(encoder.parameters()), "weights")
    if distributed.is_main():
        save_encoder(output_dir, encoder, base)
        save_adapter(output_dir, encoder.bake(), encoder.config, base)


def summarise(state: TrainingState) -> dict:
    """The last line of metrics.jsonl."""
    progress = state.progress
    return {
        "summary": True,
        "steps": progress.step,
        "train_seconds": round(progress.seconds, 3),
        "tokens": progress.tokens,
        "tokens_per_second": round(progress.tokens / progress.seconds, 1) if progress.seconds else 0.0,
        "compile_seconds": round(state.compile_seconds, 3),
        "peak_memory_mb": peak_memory_mb(state.losses.device),
        "trainable_parameters": sum(parameter.numel() for parameter in state.encoder.parameters()),
    }


class Checkpoints:
    """Writes the checkpoints of a run. run: its `identity`; resumed: where it comes from, if it is resumed."""

    def __init__(self, config: TrainConfig, run: dict, resumed: Resumed | None):
        self.folder, self.run, self.save_total_limit = Path(config.output_dir), run, config.save_total_limit
        self.newest = resumed.path if resumed else None  # the one to resume from, should the run stop

    def save(self, state: TrainingState, metrics: "MetricsFile") -> None:
        """Writes a checkpoint. All processes call this together; main writes."""
        distributed.check_equal(list(state.encoder.parameters()), "weights")
        self._write(state, metrics)

    def _write(self, state: TrainingState, metrics: "MetricsFile") -> None:
        if distributed.is_main():
            numbers = {"run": self.run, "metrics_bytes": metrics.flushed_bytes(), **state.numbers()}
            step, keep = state.progress.step, self.save_total_limit
            self.newest = save_checkpoint(self.folder, step, state.tensors(), numbers, keep)

    @contextmanager
    def saved_if_left(self, state: TrainingState, metrics: "MetricsFile") -> Iterator[None]:
        """Around what changes no weights: writes a checkpoint if a signal or an error ends it early."""
        try:
            yield
        except BaseException as error:
            if state.progress.step:
                self._write(state, metrics)
            if isinstance(error, Interrupted):
                distributed.barrier()  # until it is written: torchrun stops all processes when the first one ends
            raise

    def how_to_resume(self) -> str:
        """Part of a message: the newest checkpoint and how to resume from it, if there is one."""
        if self.newest is None:
            return ""
        where = "latest" if self.newest.parent.samefile(self.folder) else self.newest
        return f"; {self.newest} is intact, resume with --resume_from_checkpoint {where}"


class MetricsFile:
    """metrics.jsonl: a JSON object per line, readable while the run goes on. Raises UserError where it cannot be written.

    board: a SummaryWriter that is shown the same figures, or None.
    """

    def __init__(self, file: TextIO, board=None):
        self.file, self.board = file, board

    def write(self, record: dict) -> None:
        # JSON has no infinity and no NaN.
        record = {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in record.items()}
        try:
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
        except OSError as error:
            raise UserError(f"{METRICS_FILE}: cannot be written: {error}") from error
        if self.board and "step" in record:
            for name, value in record.items():
                if isinstance(value, float):
                    self.board.add_scalar(name, value, record["step"])
            self.board.flush()

    def write_interval(self, state: TrainingState, steps_per_epoch: int) -> dict:
        """Writes the line of the steps since the last one, and starts a new interval. Waits for the device."""
        progress = state.progress
        steps, seconds = progress.step - progress.logged_step, progress.seconds - progress.logged_seconds
        loss, grad_norm = torch.stack((state.losses / steps, state.grad_norm)).tolist()
        epoch = progress.epoch + math.ceil(progress.row / progress.rows_per_step) / steps_per_epoch
        line = {
            "step": progress.step,
            "epoch": round(epoch, 4),
            "loss": loss,
            "learning_rate": progress.learning_rate,
            "grad_norm": grad_norm,
            "tokens_per_second": round((progress.tokens - progress.logged_tokens) / seconds, 1),
        }
        self.write(line)
        state.losses.zero_()
        progress.logged_step, progress.logged_seconds = progress.step, progress.seconds
        progress.logged_tokens = progress.tokens
        return line

    def flushed_bytes(self) -> int:
        """The length of the file, all of which is on the disk now."""
        os.fsync(self.file.fileno())
        return self.file.tell()


def fit(
    config: TrainConfig,
    model: BloomForCausalLM,
    state: TrainingState,
    train_set: Dataset,
    total_steps: int,
    evaluator: "Evaluator | None",
    metrics: MetricsFile,
    checkpoints: "Checkpoints",
) -> None:
    """The loop: trains `state.encoder` in place, from where `state` stands to `total_steps`, and writes as it goes.

    Raises NotFinite, and Interrupted where a signal asks to stop. Nothing here waits for the device but the reading of the
    figures, once per --logging_steps, and fp16's loss scale.
    """
    encoder, progress, scaler = state.encoder, state.progress, state.scaler
    processes, rows_per_step = distributed.world_size(), global_batch_size(config)
    steps_per_epoch = math.ceil(len(train_set) / rows_per_step)
    trainable = sum(parameter.numel() for parameter in encoder.parameters())
    size = f"{len(train_set):,} rows, {total_steps:,} steps, {trainable:,} trainable parameters"
    print(f"{size}, {model.dtype} on {model.device}")
    if progress.step and progress.rows_per_step != rows_per_step:
        before = progress.rows_per_step
        print(f"rows per step changed from {before} to {rows_per_step} ({processes} processes)")
    if progress.step and progress.step == total_steps:
        print(f"the run is over already: it stands at step {progress.step}, and nothing is left to train")
    progress.rows_per_step = rows_per_step
    max_tokens = max_tokens_per_batch(model, config.max_tokens_per_batch)
    run = block_runner(config.gradient_checkpointing, config.torch_compile)
    if config.torch_compile and progress.step < total_steps:
        first_rows = next(step_rows(config, len(train_set), rows_per_step, 1))
        examples = take(train_set, distributed.share(first_rows))
        state.compile_seconds = compile_for(model, encoder.bake(), examples, max_tokens, run)

    if evaluator and progress.step == 0:
        metrics.write({"step": 0, "frozen_base": True, **evaluator(None, "frozen base")})
    todo = step_rows(config, len(train_set), rows_per_step, total_steps - progress.step, progress.epoch, progress.row)
    started = time.perf_counter()
    with tqdm(
        total=total_steps, initial=progress.step, unit="step", desc="training", disable=not distributed.is_main()
    ) as bar:
        if evaluator and evaluation_due(config, progress, total_steps):  # a signal kept the checkpoint's run from it
            evaluate(config, state, evaluator, metrics, checkpoints)
        for step, indices in enumerate(todo, start=progress.step + 1):
            if stops_early(config, progress):
                tqdm.write(f"step {progress.step}: no lower eval loss since step {progress.best_step}; stopping early")
                break
            examples = take(train_set, distributed.share(indices))  # this process's rows
            labels, tokens = distributed.sum_of([count_labels(examples), sum(len(x.input_ids) for x in examples)])
            prefix = encoder()  # once per step: it is the same for all rows
            leaf = prefix.detach().requires_grad_()  # where the gradients of all rows meet
            loss = accumulate_gradients(model, leaf, examples, labels, scaler, max_tokens, run)
            if processes > 1:  # all that travels: the gradient of the prefix, and the loss
                summed = distributed.all_sum(torch.cat((leaf.grad.flatten(), loss.view(1))))
                leaf.grad, loss = summed[:-1].view_as(leaf), summed[-1]

            # An overflow of scaled fp16 gradients is the scaler's business: it skips the step and scales less.
            finite = loss.isfinite() & (leaf.grad.isfinite().all() | scaler.is_enabled())
            state.bad_step = torch.where(finite, state.bad_step, state.bad_step.clamp(max=step))
            state.good_prefix = torch.where(state.bad_step > step, leaf.detach(), state.good_prefix)
            prefix.backward(leaf.grad)  # once through the encoder

            scaler.unscale_(state.optimizer)
            state.grad_norm = torch.nn.utils.clip_grad_norm_(encoder.parameters(), config.max_grad_norm or math.inf)
            progress.learning_rate = state.scheduler.get_last_lr()[0]
            scale = scaler.get_scale()
            scaler.step(state.optimizer)
            scaler.update()
            if scaler.get_scale() >= scale:  # else fp16 gradients overflowed and the step was skipped
                state.scheduler.step()
            state.optimizer.zero_grad(set_to_none=True)
            state.losses += loss
            progress.step = step
            progress.tokens += int(tokens)
            progress.row += len(indices)
            if progress.row == len(train_set):
                progress.epoch, progress.row = progress.epoch + 1, 0
            bar.update()

            logging = step % config.logging_steps == 0 or step == total_steps
            evaluating = evaluator and evaluation_due(config, progress, total_steps)
            saving = config.save_steps > 0 and step % config.save_steps == 0
            if not (logging or evaluating or saving or distributed.most_of(signals.heard())):
                continue
            progress.seconds += time.perf_counter() - started
            if logging:
                line = metrics.write_interval(state, steps_per_epoch)
                loss, rate, speed = line["loss"], line["learning_rate"], line["tokens_per_second"]
                bar.set_postfix(loss=f"{loss:.4f}", lr=f"{rate:.2e}", tok_s=f"{speed:,.0f}", refresh=False)
            state.check_finite()
            with checkpoints.saved_if_left(state, metrics):
                signals.stop_if_heard()
            if evaluating:
                evaluate(config, state, evaluator, metrics, checkpoints)
            if saving:
                checkpoints.save(state, metrics)
            started = time.perf_counter()
    if progress.logged_step < progress.step:  # stopped early, between two lines
        metrics.write_interval(state, steps_per_epoch)


def count_steps(config: TrainConfig, rows: int, start: Progress) -> int:
    """Optimizer steps of the whole run, of which `start` has some behind it; never fewer than those."""
    if config.max_steps >= 0:
        return max(config.max_steps, start.step)
    # What is done counts as it was done; the rest is counted in steps of today's size.
    rows_per_step = global_batch_size(config)
    steps_per_epoch = math.ceil(rows / rows_per_step)
    passed = start.epoch * steps_per_epoch + math.ceil(start.row / rows_per_step)
    return start.step + max(0, math.ceil(config.num_train_epochs * steps_per_epoch) - passed)


def evaluation_due(config: TrainConfig, progress: Progress, total_steps: int) -> bool:
    """Whether the prefix is to be evaluated as it stands. That of the last step is, but once it is saved (`finish`)."""
    step = progress.step
    interval_ends = step % config.eval_steps == 0 if config.eval_steps else progress.row == 0
    return interval_ends and 0 < step < total_steps and progress.evaluated_step != step


def evaluate(
    config: TrainConfig, state: TrainingState, evaluator: "Evaluator", metrics: MetricsFile, checkpoints: "Checkpoints"
) -> None:
    """Evaluates the prefix as it stands. If that is cut short, a checkpoint is there, from which a run evaluates again."""
    step = state.progress.step
    with checkpoints.saved_if_left(state, metrics):
        figures = evaluator(state.encoder.bake(), f"step {step}")
    metrics.write({"step": step, **figures})
    state.note_evaluation(figures["eval_loss"], config.save_best)


def global_batch_size(config: TrainConfig) -> int:
    """Rows of an optimizer step, of all processes together."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * distributed.world_size()


def stops_early(config: TrainConfig, progress: Progress) -> bool:
    patience = config.early_stopping_patience
    return patience is not None and progress.evaluations_since_best >= patience


def accumulate_gradients(
    model: BloomForCausalLM,
    leaf: torch.Tensor,
    examples: list[Example],
    labels: float,
    scaler: torch.amp.GradScaler,
    max_tokens: int,
    run: Callable[..., torch.Tensor] = run_block,
) -> torch.Tensor:
    """Forward and backward for this process's rows of one optimizer step, of whose loss they are a part.

    leaf: the prefix (layers, 2, heads, tokens, head_dim); its .grad receives the (scaled) gradient. labels: how many there
    are in the whole step, over which the loss is the mean. Returns this part of it: a scalar on the model's device.
    max_tokens bounds the memory of one pass; run: a `block_runner`.
    """

    def add(batch: Batch) -> torch.Tensor:
        part = label_losses(model, batch.to(model.device), leaf, run).sum() / labels
        scaler.scale(part).backward()
        return part.detach()

    loss = torch.zeros((), device=model.device)
    leaf.grad = torch.zeros_like(leaf)
    with in_step(model, lambda: add(NO_LABELS)):
        for batch in pack(examples, max_tokens):
            loss += add(batch)
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
        leaf = prefix.clone().requires_grad_()
        accumulate_gradients(model, leaf, examples, 1, scaler, max_tokens, run)
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--torch_compile does not work here: {reason}; leave the flag out") from error
    seconds = time.perf_counter() - started
    print(f"compiled in {seconds:.1f} s, which no figure below includes")
    return seconds


def step_rows(
    config: TrainConfig, rows: int, rows_per_step: int, total_steps: int, first_epoch: int = 0, row: int = 0
) -> Iterator[list[int]]:
    """The places of the rows of each optimizer step, from one of an epoch on. An epoch's last step takes what is left."""
    steps = 0
    for epoch in itertools.count(first_epoch):
        order = torch.arange(rows)  # a tensor, because a list of ten million numbers takes 400 MB
        if config.shuffle:
            order = torch.randperm(rows, generator=torch.Generator().manual_seed(config.seed + epoch))
        for start in range(row, rows, rows_per_step):
            if steps == total_steps:
                return
            steps += 1
            yield order[start : start + rows_per_step].tolist()
        row = 0


class Evaluator:
    """Measures a prefix on the held-out rows, prints the figures, and keeps some answers to show before and after."""

    SHOWN = 5

    def __init__(
        self,
        config: TrainConfig,
        model: BloomForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        rows: Dataset,
        tokenized: Dataset,
    ):
        self.model, self.tokenizer, self.rows, self.tokenized = model, tokenizer, rows, tokenized
        self.answers_wanted = config.eval_exact_match
        self.max_tokens = max_tokens_per_batch(model, config.max_tokens_per_batch)
        self.answers: dict[str, list[str]] = {}

    def __call__(self, prefix: torch.Tensor | None, title: str) -> dict[str, float]:
        """Returns eval_loss, eval_perplexity and, if answers are wanted, eval_exact_match."""
        figures = evaluate_loss(self.model, self.tokenized, prefix, self.max_tokens)
        line = f"{title}: eval loss {figures['eval_loss']:.4f}, perplexity {figures['eval_perplexity']:.2f}"
        if self.answers_wanted:
            answers = answer_rows(self.prefixed, self.tokenizer, self.rows, prefix)
            self.answers["frozen base" if prefix is None else "with prefix"] = answers
            figures["eval_exact_match"] = exact_match(answers, self.rows)
            line += f", exact match {figures['eval_exact_match']:.1%} of {len(self.rows)} held-out questions"
        tqdm.write(line)
        return figures

    @functools.cached_property
    def prefixed(self) -> PrefixBloom:
        return PrefixBloom(self.model)

    def show_answers(self) -> None:
        """Prints a handful of questions with the answers of the frozen base, if this run asked it, and the last ones."""
        if not self.answers:
            return
        for index in range(min(self.SHOWN, len(self.rows))):
            row = self.rows[index]
            texts = {"question": f"{row['instruction']} {row['input']}"}
            texts |= {title: answers[index] for title, answers in self.answers.items()}
            for title, text in (texts | {"expected": row["output"]}).items():
                print(f"  {title:12s} {shorten(text, 80)}")
            print()


def describe_run(
    config: TrainConfig, prefix_config: PrefixConfig, device: torch.device, dtype: torch.dtype, rows: int
) -> dict:
    """All that is needed to repeat a run, without any path of this machine."""
    settings = dataclasses.asdict(config)
    for name in ("model_name_or_path", "dataset", "eval_dataset", "prefix_from", "output_dir", "resume_from_checkpoint"):
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
        "rows_per_step": global_batch_size(config),
        "ran_with": {
            "processes": distributed.world_size(),
            "job": distributed.job(),
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
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))
        chosen, others = (part.sort().values.numpy() for part in (order[:held_out], order[held_out:]))
        return rows.select(others), rows.select(chosen)
    return rows, None


def prefix_config_of(config: TrainConfig, model: BloomForCausalLM) -> PrefixConfig:
    """The shape of a new prefix for this base."""
    shape = model.config
    return PrefixConfig(
        num_virtual_tokens=config.num_virtual_tokens,
        num_layers=shape.n_layer,
        num_attention_heads=shape.n_head,
        token_dim=shape.hidden_size,
        encoder_hidden_size=config.encoder_hidden_size or shape.hidden_size,
        prefix_projection=config.prefix_projection,
    )


def make_encoder(
    config: TrainConfig, model: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, base: dict
) -> PrefixEncoder:
    """The encoder at its starting point: an earlier run's, or a new one for this base. On the CPU, float32.

    base: the `fingerprint` of the model, which an earlier run's must match.
    """
    if config.prefix_from:
        encoder, noted = load_encoder(config.prefix_from)
        check_base(encoder.bake().shape, noted, base, config.prefix_from, config.force)
        return encoder
    encoder = PrefixEncoder(prefix_config_of(config, model))
    text = None
    if config.prefix_init == "text":
        text = text_prefix(model, tokenizer, config.init_text, config.num_virtual_tokens).cpu()
    encoder.initialize(config.prefix_init, text)
    return encoder
