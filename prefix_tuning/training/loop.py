"""LOOP"""

import math
import time
from collections.abc import Callable

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import BloomForCausalLM

from prefix_tuning import distributed, signals
from prefix_tuning.base_model.sharding import in_step, is_sharded
from prefix_tuning.data.rows import take
from prefix_tuning.devices import suggested_max_tokens
from prefix_tuning.errors import UserError
from prefix_tuning.model.batch import EMPTY_BATCH, Batch, Example, count_labels, pack
from prefix_tuning.model.bloom import block_runner, label_losses, run_block
from prefix_tuning.training.checkpoints import Checkpoints
from prefix_tuning.training.evaluator import Evaluator, evaluate, evaluation_due
from prefix_tuning.training.metrics import MetricsFile
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.state import TrainingState
from prefix_tuning.training.steps import global_batch_size, step_rows, stops_early


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
    max_tokens = config.max_tokens_per_batch or suggested_max_tokens(model, is_sharded(model))
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
            labels, tokens = distributed.sum_over_ranks([count_labels(examples), sum(len(x.input_ids) for x in examples)])
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
            if not (logging or evaluating or saving or distributed.max_over_ranks(signals.heard())):
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
    with in_step(model, lambda: add(EMPTY_BATCH)):
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
