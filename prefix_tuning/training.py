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
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
import transformers
from datasets import Dataset
from tqdm import tqdm
from transformers import BloomForCausalLM, PreTrainedTokenizerBase

from prefix_tuning import distributed
from prefix_tuning.bloom import (
    block_runner,
    fingerprint,
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
    ADAPTER_CONFIG_FILE,
    ENCODER_FILE,
    check_base,
    find_checkpoints,
    load_checkpoint,
    load_encoder,
    newest_checkpoint,
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
from prefix_tuning.generation import PrefixBloom
from prefix_tuning.report import (
    CARD_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    create_repository,
    open_board,
    plot_curves,
    push_to_hub,
    write_card,
)
from prefix_tuning.sharding import in_step, parts_of_base
from prefix_tuning.state import Progress, TrainingState, check_same_run, identity
from prefix_tuning.text import shorten

try:
    import resource
except ImportError:  # Windows
    resource = None


def train(config: TrainConfig) -> dict:
    """Runs the training that `config` describes, writes its output folder and returns the summary of metrics.jsonl.

    Of several processes that torchrun has started, each trains on its part of every step's rows, and main writes. Raises
    UserError for a mistake in the settings or the data, for a disk that is full, and for a loss that stops being finite;
    Interrupted after a signal.
    """
    device = resolve_device(config.device)
    with distributed.processes(device):
        return _train(config, device)


def _train(config: TrainConfig, device: torch.device) -> dict:
    output_dir = Path(config.output_dir)
    parts = parts_of_base(config.shard_base, config.shard_degree)
    restarted = distributed.from_main(begun_by(distributed.job(), output_dir))
    resumed = find_resumed(config, restarted)
    if not (resumed or restarted or config.overwrite_output_dir):
        if (output_dir / ADAPTER_CONFIG_FILE).exists():
            hint = "add --overwrite_output_dir or name another --output_dir"
            raise UserError(f"{config.output_dir} holds a prefix already; {hint}")
        if find_checkpoints(output_dir) and not config.resume_from_checkpoint:
            hint = "go on with --resume_from_checkpoint latest, or start anew with --overwrite_output_dir"
            raise UserError(f"{config.output_dir} holds checkpoints of a run that did not finish; {hint}")
        if (output_dir / CARD_FILE).exists():
            raise UserError(
                f"{config.output_dir} holds a {CARD_FILE}, which a model card would replace; name another folder"
            )
    # What the hub has against it should be known before the training.
    repository = create_repository(config.push_to_hub) if config.push_to_hub and distributed.is_main() else None
    dtype = resolve_dtype(config.precision, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        # The same seed gives the same bits; cuBLAS wants its part said before its first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    with distributed.first_on_each_machine():  # rows and tokens are prepared once, and found cached
        train_rows, eval_rows = load_splits(config)
    model, tokenizer = load_base(config.model_name_or_path, dtype, device, parts)
    base = fingerprint(model, tokenizer)
    with distributed.first_on_each_machine():
        train_set = tokenize_rows(config.dataset, train_rows, tokenizer, config.max_length)
        evaluator = None
        if eval_rows is not None and config.max_steps != 0:
            evaluator = Evaluator(config, model, tokenizer, eval_rows)
    torch.manual_seed(config.seed)
    encoder = make_encoder(config, model, tokenizer, base).to(device)
    distributed.copy_from_main(tensor.detach() for tensor in encoder.state_dict().values())
    checkpoints = Checkpoints(config, identity(config, base, digest(train_set), dtype), resumed)
    del resumed  # else the tensors of the checkpoint would stay in memory for the whole run

    if distributed.is_main():
        description = describe_run(config, encoder.config, device, dtype, len(train_set))
        prepare_output(output_dir, description, checkpoints)
    # An earlier prefix stays in place until the new one is whole.
    board = None
    if config.report_to == "tensorboard" and distributed.is_main():
        board = open_board(output_dir, checkpoints.next_step())
    with open(output_dir / METRICS_FILE if distributed.is_main() else os.devnull, "a", encoding="utf-8") as file:
        metrics = MetricsFile(file, board)
        try:
            with checkpoints.listening():
                state = fit(config, model, encoder, train_set, evaluator, metrics, checkpoints)
        except NotFinite as error:
            kept = "there is no good prefix to keep"
            if error.good_prefix is not None:
                if distributed.is_main():
                    save_adapter(output_dir, error.good_prefix, encoder.config, base)
                    (output_dir / ENCODER_FILE).unlink(missing_ok=True)  # an earlier run's; this one's weights are past help
                kept = f"the last good prefix is saved in {config.output_dir} (for infer.py; it cannot be trained further)"
            distributed.barrier()  # until it is saved: torchrun stops all processes when the first one ends
            hint = "try a lower --learning_rate, some --warmup_steps or --precision fp32"
            raise UserError(f"the loss is no longer finite at step {error.step}; {kept}; {hint}") from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            budget = max_tokens_per_batch(model, config.max_tokens_per_batch)
            hint = f"lower --max_tokens_per_batch (it was {budget}) or add --gradient_checkpointing"
            raise UserError(f"{device} ran out of memory; {hint}{checkpoints.how_to_go_on()}") from error
        save_output(output_dir, encoder, base)
        progress = state.progress
        if evaluator and progress.evaluated_step != progress.step:
            # After the saving: nothing that happens here can lose the prefix.
            figures = evaluator(encoder.bake(), f"step {progress.step}")
            metrics.write({"step": progress.step, **figures})
            state.note_evaluation(figures["eval_loss"], config.save_best)
        if state.best_weights and progress.best_step != progress.step:
            encoder.load_state_dict(state.best_weights)
            save_output(output_dir, encoder, base)
            print(f"saved the prefix of step {progress.best_step}, whose eval loss is the lowest: {progress.best_loss:.4f}")
        summary = summarise(state)
        metrics.write(summary)
    if distributed.is_main():
        plot_curves(output_dir)
        write_card(output_dir)
    if evaluator:
        evaluator.show_answers()
    print(f"{summary['steps']} steps in {summary['train_seconds']:.1f} s; the prefix is saved in {config.output_dir}")
    if repository:
        push_to_hub(output_dir, repository)
        print(f"uploaded to the hub: {repository}")
    return summary


def begun_by(job: str | None, output_dir: Path) -> bool:
    """Whether the run in this folder is one that the same torchrun has begun, before a failure."""
    try:
        noted = json.loads((output_dir / CONFIG_FILE).read_text("utf-8"))["ran_with"]["job"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return job is not None and noted == job


def find_resumed(config: TrainConfig, restarted: bool) -> tuple[Path, dict, dict] | None:
    """The checkpoint to go on from, as main finds it: path, tensors and state. None if there is none, or none is wanted.

    restarted: by torchrun after a failure; then it is the newest one of this run, wherever the run had begun.
    """
    where, found = config.resume_from_checkpoint, None
    if distributed.is_main():
        if restarted and find_checkpoints(Path(config.output_dir)):
            where = "latest"
        found = newest_checkpoint(where, Path(config.output_dir)) if where else None
    path = distributed.from_main(found and str(found[0]))
    return found or (path and (Path(path), *load_checkpoint(Path(path))))


def prepare_output(output_dir: Path, description: dict, checkpoints: "Checkpoints") -> None:
    """Makes the folder, clears it of what a killed run left, and writes what is known before the first step.

    Raises UserError if it cannot be made.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir}: cannot be made: {error.strerror}; name another folder") from error
    remove_drafts(output_dir)
    if checkpoints.resumed is None:
        for old in find_checkpoints(output_dir):
            old.unlink()
    write_json(output_dir / CONFIG_FILE, description)
    with replacing(output_dir / METRICS_FILE) as draft:
        draft.write_bytes(checkpoints.metrics_so_far())


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
    """When a run is saved, and from where it goes on.

    resumed: path, tensors and state of the checkpoint to go on from, or None. Raises UserError if it is another run's.
    """

    def __init__(self, config: TrainConfig, run: dict, resumed: tuple[Path, dict, dict] | None):
        self.config, self.folder, self.run, self.resumed = config, Path(config.output_dir), run, resumed
        self.heard = 0  # the number of the signal that this process has got
        self.signal = 0  # ... that all have agreed to stop for
        if resumed:
            path, _, numbers = resumed
            if not (isinstance(numbers.get("run"), dict) and isinstance(numbers.get("metrics_bytes"), int)):
                raise UserError(f"{path}: is no checkpoint of this program")
            check_same_run(numbers["run"], run, str(path))
            try:
                self.start()
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path}: is no checkpoint of this program: {error!r}") from error

    def metrics_so_far(self) -> bytes:
        """What metrics.jsonl held when the checkpoint was written; later lines will be written again."""
        if not self.resumed:
            return b""
        path, _, numbers = self.resumed
        file, length = path.with_name(METRICS_FILE), numbers["metrics_bytes"]
        lines = file.read_bytes()[:length] if file.exists() else b""
        if len(lines) < length:
            print(f"{file}: has lost lines since the checkpoint was written; they stay lost", file=sys.stderr)
        return lines[: lines.rfind(b"\n") + 1]

    def start(self) -> Progress:
        """Where the run goes on, or begins."""
        return Progress(**self.resumed[2]["progress"]) if self.resumed else Progress()

    def next_step(self) -> int:
        """The first step whose figures are not in metrics.jsonl yet; 0 is the frozen base."""
        return self.start().step + 1 if self.resumed else 0

    def restore(self, state: TrainingState) -> bool:
        """Brings `state` to where the checkpoint was written. Returns False if there is none."""
        if not self.resumed:
            return False
        path, tensors, numbers = self.resumed
        try:
            state.restore(tensors, numbers)
        except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            raise UserError(f"{path}: is no checkpoint of this run: {error!r}") from error
        self.resumed = None  # its tensors are in the state now
        print(f"going on after step {state.progress.step}, from {path}")
        return True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """SIGINT and SIGTERM let the step end and be saved; a second one stops the process at once."""

        def note(number: int, frame) -> None:
            self.heard = number
            signal.signal(number, signal.SIG_DFL)

        heard = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        before = {number: signal.signal(number, note) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def due(self, step: int) -> bool:
        """Whether to save after this step; all processes agree on it."""
        self.signal = distributed.most_of(self.heard)
        save_steps = self.config.save_steps
        return self.signal > 0 or (save_steps > 0 and step % save_steps == 0)

    def save(self, state: TrainingState, metrics: "MetricsFile") -> None:
        """Writes a checkpoint. Raises Interrupted if a signal was the reason."""
        distributed.check_equal(list(state.encoder.parameters()), "weights")
        if distributed.is_main():
            numbers = {"run": self.run, "metrics_bytes": metrics.flushed_bytes(), **state.numbers()}
            save_checkpoint(self.folder, state.progress.step, state.tensors(), numbers, self.config.save_total_limit)
        if self.signal:
            distributed.barrier()  # until it is written
            name = signal.Signals(self.signal).name
            raise Interrupted(f"{name}: stopped after step {state.progress.step}{self.how_to_go_on()}", self.signal)

    def how_to_go_on(self) -> str:
        """The way back to work, if there is a checkpoint: part of a message."""
        found = find_checkpoints(self.folder)
        return f"; {found[-1]} is intact, go on with --resume_from_checkpoint latest" if found else ""


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

    def flushed_bytes(self) -> int:
        """The length of the file, all of which is on the disk now."""
        os.fsync(self.file.fileno())
        return self.file.tell()


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
    checkpoints: "Checkpoints | None" = None,
) -> TrainingState:
    """The loop: trains `encoder` in place, from where `checkpoints` says, and writes to `metrics` as it goes.

    Raises NotFinite, and Interrupted where a signal asks to stop. Nothing here waits for the device but the reading of the
    figures, once per --logging_steps, and fp16's loss scale.
    """
    processes, rows_per_step = distributed.world_size(), global_batch_size(config)
    steps_per_epoch = math.ceil(len(train_set) / rows_per_step)
    start = checkpoints.start() if checkpoints else Progress()
    total_steps = config.max_steps
    if total_steps < 0:
        # What is done counts as it was done; the rest is counted in steps of today's size.
        passed = start.epoch * steps_per_epoch + math.ceil(start.row / rows_per_step)
        total_steps = start.step + max(0, math.ceil(config.num_train_epochs * steps_per_epoch) - passed)
    if start.step and start.rows_per_step != rows_per_step:
        print(f"a step has {rows_per_step} rows now, of {processes} processes; before the checkpoint, {start.rows_per_step}")
    state = TrainingState(config, encoder, total_steps, model.dtype)
    scaler = state.scaler
    trainable = sum(parameter.numel() for parameter in encoder.parameters())
    size = f"{len(train_set):,} rows, {total_steps:,} steps, {trainable:,} trainable parameters"
    print(f"{size}, {model.dtype} on {model.device}")
    max_tokens = max_tokens_per_batch(model, config.max_tokens_per_batch)
    run = block_runner(config.gradient_checkpointing, config.torch_compile)
    if config.torch_compile:
        first_rows = next(step_rows(config, len(train_set), rows_per_step, 1))
        examples = take(train_set, distributed.share(first_rows))
        state.compile_seconds = compile_for(model, encoder.bake(), examples, max_tokens, run)

    if not (checkpoints and checkpoints.restore(state)) and evaluator:
        metrics.write({"step": 0, "frozen_base": True, **evaluator(None, "frozen base")})
    progress = state.progress
    progress.rows_per_step = rows_per_step
    todo = step_rows(config, len(train_set), rows_per_step, total_steps - progress.step, progress.epoch, progress.row)
    if stops_early(config, progress):
        todo = iter(())
    started = time.perf_counter()
    with tqdm(
        total=total_steps, initial=progress.step, unit="step", desc="training", disable=not distributed.is_main()
    ) as bar:
        for step, indices in enumerate(todo, start=progress.step + 1):
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
            prefix.backward(torch.where(finite, leaf.grad, 0))  # once through the encoder

            scaler.unscale_(state.optimizer)
            grad_norm = torch.nn.utils.clip_grad_norm_(encoder.parameters(), config.max_grad_norm or math.inf)
            learning_rate = state.scheduler.get_last_lr()[0]
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
            interval_ends = step % config.eval_steps == 0 if config.eval_steps else progress.row == 0
            evaluating = evaluator and interval_ends and step < total_steps
            saving = checkpoints and checkpoints.due(step)
            if not (logging or evaluating or saving):
                continue
            next_prefix = encoder.bake()
            bad_step = torch.where(next_prefix.isfinite().all(), state.bad_step, state.bad_step.clamp(max=step + 1))
            mean_loss = state.losses / max(1, step - progress.logged_step)
            mean_loss, norm, first_bad = torch.stack((mean_loss, grad_norm, bad_step)).tolist()
            progress.seconds += time.perf_counter() - started
            if logging:
                speed = (progress.tokens - progress.logged_tokens) / (progress.seconds - progress.logged_seconds)
                metrics.write(
                    {
                        "step": step,
                        "epoch": round(progress.epoch + math.ceil(progress.row / rows_per_step) / steps_per_epoch, 4),
                        "loss": mean_loss,
                        "learning_rate": learning_rate,
                        "grad_norm": norm,
                        "tokens_per_second": round(speed, 1),
                    }
                )
                bar.set_postfix(loss=f"{mean_loss:.4f}", lr=f"{learning_rate:.2e}", tok_s=f"{speed:,.0f}", refresh=False)
                state.losses.zero_()
                progress.logged_step, progress.logged_seconds = step, progress.seconds
                progress.logged_tokens = progress.tokens
            if first_bad < math.inf:
                raise NotFinite(int(first_bad), state.good_prefix if first_bad > 1 else None)
            if evaluating:
                figures = evaluator(next_prefix, f"step {step}")
                metrics.write({"step": step, **figures})
                state.note_evaluation(figures["eval_loss"], config.save_best)
            if saving:
                checkpoints.save(state, metrics)
            if evaluating and stops_early(config, progress):
                tqdm.write(f"step {step}: no lower eval loss since step {progress.best_step}; stopping early")
                break
            started = time.perf_counter()
    return state


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

    def __init__(self, config: TrainConfig, model: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: Dataset):
        self.model, self.tokenizer, self.rows = model, tokenizer, rows
        self.answers_wanted = config.eval_exact_match
        self.max_tokens = max_tokens_per_batch(model, config.max_tokens_per_batch)
        self.tokenized = tokenize_rows(config.eval_dataset or config.dataset, rows, tokenizer, config.max_length)
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


def make_encoder(
    config: TrainConfig, model: BloomForCausalLM, tokenizer: PreTrainedTokenizerBase, base: dict
) -> PrefixEncoder:
    """The encoder at its starting point: an earlier run's, or a new one for this base. On the CPU, float32.

    base: the `fingerprint` of the model, which an earlier run's must match.
    """
    shape = model.config
    if config.prefix_from:
        encoder, noted = load_encoder(config.prefix_from)
        check_base(encoder.bake().shape, noted, base, config.prefix_from, config.force)
        return encoder
    encoder = PrefixEncoder(
        PrefixConfig(
            num_virtual_tokens=config.num_virtual_tokens,
            num_layers=shape.n_layer,
            num_attention_heads=shape.n_head,
            token_dim=shape.hidden_size,
            encoder_hidden_size=config.encoder_hidden_size or shape.hidden_size,
            prefix_projection=config.prefix_projection,
        )
    )
    text = None
    if config.prefix_init == "text":
        text = text_prefix(model, tokenizer, config.init_text, config.num_virtual_tokens).cpu()
    encoder.initialize(config.prefix_init, text)
    return encoder
