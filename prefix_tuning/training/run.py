"""A training run from its settings to its files: what comes before and after the loop (loop.py)."""

import dataclasses
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch

from prefix_tuning import distributed, signals
from prefix_tuning.base_model.layers import compile_now
from prefix_tuning.devices import described, make_reproducible, out_of_memory_explained, resolve_device, resolve_dtype
from prefix_tuning.errors import Interrupted, UserError, reason_of
from prefix_tuning.files.names import CARD_FILE, METRICS_FILE, PLOT_FILE, SEARCH_FILE
from prefix_tuning.files.writing import locked
from prefix_tuning.screen import Screen
from prefix_tuning.text import duration
from prefix_tuning.training.checkpoints import Checkpoints
from prefix_tuning.training.evaluator import Evaluator
from prefix_tuning.training.inputs import Inputs, read_inputs
from prefix_tuning.training.learning_rate import find_learning_rate
from prefix_tuning.training.loop import evaluate, fit
from prefix_tuning.training.metrics import Metrics, TrainingBar
from prefix_tuning.training.output import describe_run, prepare_output, save_good_prefix, save_output, summarise
from prefix_tuning.training.report import (
    create_repository,
    plot_curves,
    plot_search,
    push_to_hub,
    read_metrics,
    what_was_learnt,
    write_card,
)
from prefix_tuning.training.resume import check_same_run, find_resumed, identity
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.start import begin, memory_hint
from prefix_tuning.training.state import NotFinite, TrainingState
from prefix_tuning.training.steps import Steps


def train(config: TrainConfig) -> dict:
    """Runs the training that `config` describes, writes its output folder and returns the summary of metrics.jsonl.

    Of several processes that torchrun has started, each trains on its share of every step's rows, and main writes. Raises
    UserError for a mistake in the settings or the data, for a disk or memory that is full, and for a loss that stops being
    finite; Interrupted after a signal.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.precision, device)
    make_reproducible(device)
    output_dir = Path(config.output_dir)
    with (
        # As cli.py has it, for programs that call this: they may write to a pipe whose reader Ctrl-C ends.
        # A program without a console has none of the two.
        redirect_stdout(sys.stdout and Screen(sys.stdout)),
        redirect_stderr(sys.stderr and Screen(sys.stderr)),
        distributed.processes(device),
        locked(output_dir) if distributed.is_main() else nullcontext(),
    ):
        return _train(config, dtype, device, output_dir)


def _train(config: TrainConfig, dtype: torch.dtype, device: torch.device, output_dir: Path) -> dict:
    resumed = find_resumed(output_dir, config.resume_from_checkpoint, config.overwrite_output_dir)
    # Asked first, so that a name or token that the hub refuses is not noticed only after the training.
    repository = create_repository(config.push_to_hub) if config.push_to_hub and distributed.is_main() else None
    inputs = read_inputs(config, dtype, device)
    run = identity(config, dtype, inputs.contents)
    if resumed:
        check_same_run(resumed, run)
    checkpoints = Checkpoints(output_dir, run, resumed and resumed.path, config.save_steps, config.save_total_limit)

    def what_to_change() -> str:
        return memory_hint(config, inputs.base, inputs.max_tokens) + checkpoints.how_to_resume()

    with out_of_memory_explained(device, what_to_change):
        state, steps = begin(config, inputs, resumed)
        print(f"{size_of_run(inputs, state, steps)}; {described(dtype, config.precision, device)}")
        if config.torch_compile and (first := next(iter(steps), None)):
            print("compiling the layers, which may take minutes", flush=True)
            state.compile_seconds = compile_now(inputs.base, first.batches, state.encoder.bake())
            print(f"compiled in {state.compile_seconds:.1f} s, which train_seconds does not include")
        search = find_learning_rate(inputs.base, state, steps)
        if distributed.is_main():
            settings = settings_of(config, inputs, state, steps)
            prepare_output(output_dir, describe_run(settings, state.encoder.config, dtype, device), resumed)
        del resumed  # else the tensors of the checkpoint would stay in memory for the whole run
        evaluator = Evaluator(
            inputs.base,
            inputs.tokenizer,
            inputs.eval_set if config.max_steps != 0 else None,
            inputs.max_tokens,
            steps.total,
            every=config.eval_steps,
            wants_answers=config.eval_exact_match,
            patience=config.early_stopping_patience,
            keep_best=config.save_best,
        )
        metrics = Metrics(output_dir, config.logging_steps, steps, config.report_to == "tensorboard")
        if search:
            metrics.write(search.record())
        summary = _run(inputs, state, steps, metrics, evaluator, checkpoints)
    print(f"{summary['steps']} steps in {duration(summary['train_seconds'])}; the prefix is saved in {output_dir}")
    if repository:
        push_to_hub(output_dir, repository)
        print(f"uploaded to the hub: {repository}")
    with excused("the closing answers"):
        evaluator.show_answers(state.encoder.bake())
    if distributed.is_main():
        with excused("what was learnt"):
            print(what_was_learnt(read_metrics(output_dir), config.save_best))
    return summary


@contextmanager
def excused(what: str) -> Iterator[None]:
    """Around what a run shows to people once its prefix is saved. If it fails, a line says so, and the run goes on."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:  # memory, the disk, matplotlib: each raises classes of its own
        print(f"{what}: left out ({type(error).__name__}: {reason_of(error)}); the prefix is saved", file=sys.stderr)


def settings_of(config: TrainConfig, inputs: Inputs, state: TrainingState, steps: Steps) -> dict:
    """The settings of the command by name, and what the run made of them."""
    return dataclasses.asdict(config) | {
        "learning_rate": state.progress.peak_learning_rate or 0.0,
        "train_rows": len(steps.train_set),
        "eval_rows": len(inputs.eval_set or ()),
        "rows_per_step": steps.rows_per_step,
    }


def size_of_run(inputs: Inputs, state: TrainingState, steps: Steps) -> str:
    """What is trained, and on how much."""
    held_out = f" and {len(inputs.eval_set):,} held out" if inputs.eval_set else ""
    tokens = state.encoder.config.num_virtual_tokens
    trainable = sum(parameter.numel() for parameter in state.encoder.parameters())
    rows = f"{len(steps.train_set):,} rows{held_out}, {steps.total:,} steps of {steps.rows_per_step}"
    return f"{rows}; a prefix of {tokens} tokens by {trainable:,} trainable parameters"


def _run(
    inputs: Inputs, state: TrainingState, steps: Steps, metrics: Metrics, evaluator: Evaluator, checkpoints: Checkpoints
) -> dict:
    """The loop, and what follows it. Returns the summary.

    Raises UserError where the loss stops being finite or a file cannot be written, and Interrupted after a signal. Both say
    how to resume.
    """
    base, progress, folder, summary = inputs.base, state.progress, checkpoints.folder, None
    try:
        with signals.listening("the run stops once it is saved"):
            if evaluator.pending(state) and progress.step == 0:
                metrics.write({"step": 0, "frozen_base": True, **evaluator(None, "frozen base")})
            if metrics.due(state):  # the run that is resumed could not write this line
                metrics.write_interval(state)
            if evaluator.due(state):  # the run that is resumed was stopped during this evaluation
                evaluate(state, evaluator, metrics, checkpoints)
            with TrainingBar(steps, state.clock) as metrics.bar:
                fit(base, state, metrics.bar, metrics, evaluator, checkpoints)
            state.check_finite()
            with checkpoints.saved_if_left(state, metrics):  # if a signal ended the steps, this saves and raises
                signals.stop_if_heard()
            if progress.step < steps.total:
                print(f"step {progress.step}: no lower eval loss since step {progress.best_step}; stopping early")
            summary = finish(inputs.fingerprint, state, metrics, evaluator, checkpoints)
            signals.stop_if_heard()
    except NotFinite as error:
        raise UserError(save_good_prefix(folder, error, state, inputs.fingerprint)) from None
    except UserError as error:
        raise UserError(f"{error}{checkpoints.how_to_resume()}") from error
    except Interrupted as stop:
        what_now = checkpoints.how_to_resume() or "; there was nothing to save"
        if summary:
            what_now = f", which was the last one; the prefix is saved in {folder}"
        raise Interrupted(f"{stop} after step {progress.step}{what_now}", stop.signal) from None
    return summary


def finish(
    fingerprint: dict, state: TrainingState, metrics: Metrics, evaluator: Evaluator, checkpoints: Checkpoints
) -> dict:
    """What follows the last step: saves the prefix, evaluates it, saves the best one instead if that is wanted, and writes
    the summary, which is returned, the curves and the model card. fingerprint: that of the base."""
    progress, folder = state.progress, checkpoints.folder
    save_output(folder, state, fingerprint)  # first, so that nothing that happens after it can lose it
    try:
        with checkpoints.saved_if_left(state, metrics):
            if progress.logged_step < progress.step:
                metrics.write_interval(state, ended=True)
        if evaluator.pending(state):
            evaluate(state, evaluator, metrics, checkpoints)
    except UserError as error:
        raise UserError(f"{error}; the prefix of step {progress.step} is saved in {folder}") from error
    if state.best_weights and progress.best_step != progress.step:
        state.encoder.load_state_dict(state.best_weights)
        save_output(folder, state, fingerprint)
        print(f"saved the prefix of step {progress.best_step}, whose eval loss is the lowest: {progress.best_loss:.4f}")
    summary = summarise(state)
    with excused(METRICS_FILE):
        metrics.write(summary)
    if distributed.is_main():
        for name, write in ((PLOT_FILE, plot_curves), (SEARCH_FILE, plot_search), (CARD_FILE, write_card)):
            with excused(name):
                # The file of a replaced run goes first: it would stay if the new one cannot be written.
                with suppress(OSError):
                    (folder / name).unlink()
                write(folder)
    return summary
