"""The training loop.

plain.py is the same loop in its simplest form. This one gives the same numbers but for rounding, and departs from it so: the
encoder runs once per step; packed rows go through the base (model/bloom.py); several processes share the rows of a step
(steps.py); and the device is waited for only where a line of metrics, an evaluation or a checkpoint is due, and in fp16 at
every step for the loss scale.

Why the encoder may run once per step: its output, the prefix p = encoder(w), is the same for all rows, and the loss of a
step is a sum over rows, so by the chain rule

    dloss/dw  =  sum_rows dloss_row/dp . dp/dw  =  (sum_rows dloss_row/dp) . dp/dw

dp/dw is a common factor: the gradients of all rows, batches and processes are first summed in dloss/dp, 983,040 numbers for
bloom-1b4-zh and 10 virtual tokens, and go through the encoder's 205.6 M weights in one backward pass.

The loss is the mean over all labels of the step, not a mean of the rows' means. So every label has the same weight, and the
result does not depend on how rows are split into batches and processes. Trainer does the same.
"""

import math

import torch
from tqdm import tqdm

from prefix_tuning import distributed
from prefix_tuning.evaluation import Evaluator
from prefix_tuning.model.bloom import Objective
from prefix_tuning.training.checkpoints import Checkpoints
from prefix_tuning.training.metrics import Metrics
from prefix_tuning.training.state import TrainingState
from prefix_tuning.training.steps import Step, Steps


def fit(
    objective: Objective,
    state: TrainingState,
    steps: "Steps | tqdm[Step]",
    metrics: Metrics,
    evaluator: Evaluator,
    checkpoints: Checkpoints,
) -> None:
    """Trains `state.encoder` by `objective` in place until `steps` end, from where `state` is. All ranks call this together.

    Raises NotFinite if a loss, a gradient or a weight is not finite, Interrupted if a signal ends an evaluation.
    """
    with state.clock.running():
        # `steps` ends early once the ranks have agreed to stop for a signal.
        for step in steps:
            if evaluator.out_of_patience(state):
                break
            prefix, loss, grad_norm = optimizer_step(objective, state, step)
            state.advance(step, prefix, loss, grad_norm)
            if not any(task.due(state) for task in (metrics, evaluator, checkpoints)):
                continue
            if metrics.due(state):
                with checkpoints.checkpoint_on_error(state, metrics):
                    metrics.write_interval(state)
            state.check_finite()
            # Evaluating and saving are not training time.
            with state.clock.stopped():
                if evaluator.due(state):
                    evaluate(state, evaluator, metrics, checkpoints)
                if checkpoints.due(state):
                    checkpoints.save(state, metrics)


def optimizer_step(
    objective: Objective, state: TrainingState, step: Step
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One update of the encoder, at the rate that `state` has for it. All ranks call this together.

    Returns, on the device: the prefix (layers, 2, heads, tokens, head_dim) that the step began with, the mean loss in nats
    over the labels of all ranks, and the norm of the encoder's gradient before clipping.
    """
    encoder, optimizer, scaler = state.encoder, state.optimizer, state.scaler
    # The encoder runs once per step (plain.py: once per row). The gradients of all rows add up in `leaf`.
    prefix = encoder()
    leaf = prefix.detach().requires_grad_()
    leaf.grad, loss = torch.zeros_like(leaf), leaf.new_zeros(())
    for batch in step.batches:
        part = objective.label_losses(batch.to(leaf.device), leaf).sum() / step.labels
        # fp16: times the loss scale, so that small gradients do not become zero.
        scaler.scale(part).backward()
        loss += part.detach()
    # All that ranks exchange of a step, in one all-reduce; then one backward pass through the encoder.
    distributed.all_sum(leaf.grad, loss)
    prefix.backward(leaf.grad)

    # fp16: divides the gradients by the loss scale, before they are clipped.
    scaler.unscale_(optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(encoder.parameters(), state.max_grad_norm or math.inf)
    for group in optimizer.param_groups:
        group["lr"] = state.learning_rate()
    # fp16: if a gradient overflowed, the scaler skips this update and lowers the scale.
    scale = scaler.get_scale()
    scaler.step(optimizer)
    scaler.update()
    if scaler.get_scale() >= scale:
        state.progress.updates += 1
    optimizer.zero_grad(set_to_none=True)
    return leaf.detach(), loss, grad_norm


def evaluate(state: TrainingState, evaluator: Evaluator, metrics: Metrics, checkpoints: Checkpoints) -> None:
    """Evaluates the current prefix. All ranks call this together.

    If it is cut short, it leaves a checkpoint from which a resumed run evaluates again.
    """
    step = state.progress.step
    with checkpoints.checkpoint_on_error(state, metrics):
        figures = evaluator(state.encoder.bake(), f"step {step}")
        metrics.write({"step": step, **figures})
    state.note_evaluation(figures["eval_loss"], evaluator.keep_best)
