"""The training loop.

plain.py is the same loop in its simplest form; this one departs from it in four ways, none of which changes a number
beyond rounding. It runs the encoder once per step; it runs packed rows through the base (model/bloom.py); several
processes share the rows of a step (steps.py); and it never waits for the device but to write figures, and for fp16's loss
scale.

Why the encoder may run once per step: its output, the prefix p = encoder(w), is the same for all rows, and the loss of a
step is a sum over rows, so by the chain rule

    dloss/dw  =  sum_rows dloss_row/dp . dp/dw  =  (sum_rows dloss_row/dp) . dp/dw

The sum is pulled out: gradients of all rows, batches and processes add up in p, 983,040 numbers for bloom-1b4-zh and 10
virtual tokens, and go through the encoder's 205.6 M weights in one backward pass.
"""

import math

import torch
from tqdm import tqdm

from prefix_tuning import distributed
from prefix_tuning.model.bloom import Bloom
from prefix_tuning.training.checkpoints import Checkpoints
from prefix_tuning.training.evaluator import Evaluator
from prefix_tuning.training.metrics import Metrics
from prefix_tuning.training.state import TrainingState
from prefix_tuning.training.steps import Step, Steps


def fit(
    base: Bloom,
    state: TrainingState,
    steps: "Steps | tqdm[Step]",
    metrics: Metrics,
    evaluator: Evaluator,
    checkpoints: Checkpoints,
) -> None:
    """Trains `state.encoder` in place until `steps` end, from where `state` is. All ranks call this together.

    Raises NotFinite if a loss, a gradient or a weight is not finite, Interrupted if a signal ends an evaluation.
    """
    with state.clock.running():
        for step in steps:  # ends early once the ranks have agreed to stop for a signal
            if evaluator.out_of_patience(state):
                break
            state.advance(step, *optimizer_step(base, state, step))
            if not any(task.due(state) for task in (metrics, evaluator, checkpoints)):
                continue
            if metrics.due(state):
                metrics.write_interval(state)
            state.check_finite()  # like the line above it waits for the device; nothing else here does
            with state.clock.stopped():  # evaluating and saving are not training time
                if evaluator.due(state):
                    evaluate(state, evaluator, metrics, checkpoints)
                if checkpoints.due(state):
                    checkpoints.save(state, metrics)


def optimizer_step(base: Bloom, state: TrainingState, step: Step) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One update of the encoder. All ranks call this together.

    Returns, on the device: the prefix (layers, 2, heads, tokens, head_dim) that the step began with, the mean loss in nats
    over the labels of all ranks, and the norm of the encoder's gradient before clipping.
    """
    encoder, optimizer, scaler = state.encoder, state.optimizer, state.scaler
    prefix = encoder()  # once per step (plain.py: once per row)
    leaf = prefix.detach().requires_grad_()  # the gradients of all rows add up here
    leaf.grad, loss = torch.zeros_like(leaf), leaf.new_zeros(())
    for batch in step.batches:
        part = base.label_losses(batch.to(leaf.device), leaf).sum() / step.labels
        scaler.scale(part).backward()  # fp16: times the loss scale, so that small gradients do not become zero
        loss += part.detach()
    distributed.all_sum(leaf.grad, loss)  # the only tensors that ranks exchange in a step
    prefix.backward(leaf.grad)  # once through the encoder: the sum of the chain rule pulled out

    scaler.unscale_(optimizer)  # fp16: gradients divided by the loss scale, before they are clipped
    grad_norm = torch.nn.utils.clip_grad_norm_(encoder.parameters(), state.max_grad_norm or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = state.schedule(state.progress.updates)
    scale = scaler.get_scale()
    scaler.step(optimizer)  # fp16: skipped if a gradient overflowed,
    scaler.update()  # which lowers the scale
    state.progress.updates += scaler.get_scale() >= scale
    optimizer.zero_grad(set_to_none=True)
    return leaf.detach(), loss, grad_norm


def evaluate(state: TrainingState, evaluator: Evaluator, metrics: Metrics, checkpoints: Checkpoints) -> None:
    """Evaluates the current prefix. If that is cut short, it leaves a checkpoint from which a resumed run evaluates
    again.
    """
    step = state.progress.step
    with checkpoints.saved_if_left(state, metrics):
        figures = evaluator(state.encoder.bake(), f"step {step}")
    metrics.write({"step": step, **figures})
    state.note_evaluation(figures["eval_loss"], evaluator.keep_best)
