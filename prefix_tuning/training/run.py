"""A training run from its settings to its files. `_train` makes all calls in their order; loop.py is its heart."""

import dataclasses
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout, suppress
from pathlib import Path

import torch
from datasets import Dataset

from prefix_tuning import distributed, signals
from prefix_tuning.base_model.identity import fingerprint
from prefix_tuning.base_model.loading import add_end, compile_now, load_base
from prefix_tuning.base_model.sharding import is_sharded, parts_of_base
from prefix_tuning.data.rows import digest, encode, has_history, usable_rows
from prefix_tuning.data.splits import load_splits
from prefix_tuning.data.templates import choose_template, end_of, note_other_template
from prefix_tuning.devices import (
    activation_bytes_per_token,
    describe_dtype,
    out_of_memory_explained,
    reproducible,
    resolve_device,
    resolve_dtype,
    suggested_max_tokens,
)
from prefix_tuning.errors import Interrupted, UserError, reason_of
from prefix_tuning.evaluation import Evaluator
from prefix_tuning.files.names import CARD_FILE, METRICS_FILE, PLOT_FILE, SEARCH_FILE
from prefix_tuning.files.prefixes import recorded_history, recorded_template
from prefix_tuning.files.writing import locked
from prefix_tuning.model.bloom import Objective, PackedModel
from prefix_tuning.model.decoder import sliding_window
from prefix_tuning.model.distillation import Distillation
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder
from prefix_tuning.screen import Screen
from prefix_tuning.text import duration
from prefix_tuning.training.checkpoints import Checkpoints, check_same_run, find_resumed, identity, restore
from prefix_tuning.training.learning_rate import find_learning_rate
from prefix_tuning.training.loop import evaluate, fit
from prefix_tuning.training.metrics import Metrics, TrainingBar
from prefix_tuning.training.output import (
    create_repository,
    describe_run,
    plot_curves,
    plot_search,
    prepare_output,
    push_to_hub,
    read_metrics,
    save_good_prefix,
    save_output,
    summarise,
    what_was_learnt,
    write_card,
)
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.start import earlier_encoder, new_encoder
from prefix_tuning.training.state import NotFinite, Progress, TrainingState, make_optimizer, make_schedule
from prefix_tuning.training.steps import Steps
from prefix_tuning.training.teacher import Answers, answer_rows, find_teacher


def train(config: TrainConfig) -> dict:
    """Runs the training that `config` describes, writes its output folder and returns the summary of metrics.jsonl.

    Of several processes that torchrun has started, each trains on its share of every step's rows, and main writes. Raises
    UserError for a mistake in the settings or the data, for a disk or memory that is full, and for a loss that stops being
    finite; Interrupted after a signal.
    """
    device = resolve_device(config.device)
    dtype = resolve_dtype(config.precision, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    folder = Path(config.output_dir)
    with (
        # For programs that call this: they may write to a pipe whose reader Ctrl-C ends, as the commands may (command.py).
        # A program without a console has neither stream.
        redirect_stdout(sys.stdout and Screen(sys.stdout)),
        redirect_stderr(sys.stderr and Screen(sys.stderr)),
        distributed.processes(device),
        reproducible(device),
        locked(folder) if distributed.is_main() else nullcontext(),
    ):
        return _train(config, dtype, device, folder)


def _train(config: TrainConfig, dtype: torch.dtype, device: torch.device, folder: Path) -> dict:
    """Everything that happens in a run, in this order. All ranks call this together."""
    resumed = find_resumed(folder, config.resume_from_checkpoint, config.overwrite_output_dir)
    # Asked first, so that a name or token that the hub refuses is not noticed only after the training.
    repository = create_repository(config.push_to_hub) if config.push_to_hub and distributed.is_main() else None

    # The rows and the frozen base. One process per machine prepares the rows, and the others find them cached.
    parts = parts_of_base(config.shard_base, config.shard_degree)
    with distributed.local_main_first():
        train_rows, eval_rows = load_splits(
            config.dataset,
            config.eval_dataset,
            config.eval_fraction,
            config.columns,
            config.seed,
            needing=config.need_held_out(),
            # A teacher answers them.
            may_lack=bool(config.distill_text or config.distill_prefix),
        )
    if config.distill_alpha and (lacking := sum(not output for output in train_rows["output"])):
        mixed = f"--distill_alpha {config.distill_alpha} mixes in the cross-entropy of their outputs; leave that flag out"
        raise UserError(f"{config.dataset}: {lacking:,} of {len(train_rows):,} rows have no output, and {mixed}")
    base, tokenizer = load_base(
        config.model_name_or_path, dtype, device, parts, config.gradient_checkpointing, config.torch_compile
    )
    longest = config.num_virtual_tokens + config.max_length
    max_tokens = config.max_tokens_per_batch or suggested_max_tokens(base, parts is not None, longest)
    sets = [rows for rows in (train_rows, eval_rows) if rows]
    template = choose_template(config.template, config.model_name_or_path, tokenizer, sets)
    add_end(base.generation_config, end_of(tokenizer, template), "the chat template")
    record, base_fingerprint = template and template._asdict(), fingerprint(base, tokenizer)
    answers: Answers | None = None
    less_memory = f"lower --max_tokens_per_batch (it was {max_tokens}) or shorten the teacher"
    with out_of_memory_explained(device, lambda: less_memory):
        teacher = find_teacher(config, base, tokenizer, base_fingerprint, record, max_tokens)
        if teacher:
            kept = Answers.kept_in(resumed and resumed.path.parent)
            sets, answers = answer_rows(sets, teacher, base, tokenizer, template, config.max_length, max_tokens, kept)
            train_rows, eval_rows = sets[0], sets[1] if eval_rows else None
    with distributed.local_main_first():
        encoded = encode(train_rows, tokenizer, config.max_length, template, config.dataset)
        train_set, eval_set = usable_rows(config.dataset, encoded, config.max_length), None
        if eval_rows:
            held_out = config.eval_dataset or f"the rows held out of {config.dataset}"
            encoded_held_out = encode(eval_rows, tokenizer, config.max_length, template, held_out)
            eval_set = usable_rows(held_out, encoded_held_out, config.max_length)

    # What a resumed run must have in common with the one that wrote the checkpoint.
    contents = {
        "model_name_or_path": {key: value for key, value in base_fingerprint.items() if key != "name_or_path"},
        "dataset": digest(train_set),
        "eval_dataset": eval_set and digest(eval_set),
        "distill_text": teacher and config.distill_text and teacher.record["sha256"],
        "distill_prefix": teacher and config.distill_prefix and teacher.record["sha256"],
    }
    settings = dataclasses.asdict(config) | {"template": "chat" if template else "notebook"}
    run = identity(settings, dtype, contents)
    if resumed:
        check_same_run(resumed, run)
    checkpoints = Checkpoints(folder, run, resumed and resumed.path, config.save_steps, config.save_total_limit)

    def what_to_change() -> str:
        return memory_hint(config, base, max_tokens) + checkpoints.how_to_resume()

    with out_of_memory_explained(device, what_to_change):
        # Creates or restores the encoder, the steps to do, and the state of the training.
        torch.manual_seed(config.seed)
        earlier: bool | None = False  # whether rows that the weights saw before this run had history; None: not known
        if resumed:
            encoder, progress, earlier = resumed.encoder(), resumed.progress(), resumed.numbers.get("history")
        elif config.prefix_from:
            encoder, progress = earlier_encoder(config.prefix_from, base_fingerprint, config.force), Progress()
            earlier = recorded_history(config.prefix_from)
            note_other_template(config.prefix_from, recorded_template(config.prefix_from), record)
        else:
            shape = prefix_config_of(config, base)
            encoder = new_encoder(
                shape,
                base,
                tokenizer,
                config.prefix_init,
                config.init_text,
                init_from=config.init_from,
                freeze_first_token=config.freeze_first_token,
                distilled=teacher and teacher.text_ids,
                max_tokens=max_tokens,
            )
            progress = Progress()
        encoder.to(base.device)
        rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * distributed.world_size()
        steps = Steps(
            train_set,
            rows_per_step,
            count_steps(config, len(train_set), rows_per_step, progress),
            max_tokens,
            seed=config.seed if config.shuffle else None,
            equal_passes=is_sharded(base),
            done=progress.step,
            epoch=progress.epoch,
            row=progress.row,
        )
        state = TrainingState(
            encoder,
            make_optimizer(encoder, config.weight_decay),
            make_schedule(config.lr_scheduler_type, config.warmup_steps, steps.total),
            config.max_grad_norm,
            loss_scaling=base.dtype == torch.float16,
        )
        state.history = has_history(encoded) or earlier
        state.template, state.distilled = record, teacher and teacher.record
        state.progress.peak_learning_rate = config.learning_rate
        if resumed:
            restore(state, resumed)
            if state.progress.rows_per_step != rows_per_step:
                before, processes = state.progress.rows_per_step, distributed.world_size()
                print(f"rows per step changed from {before} to {rows_per_step} ({processes} processes)")
            if state.progress.step == steps.total:
                print(f"the run is over already: it is at step {state.progress.step}, and nothing is left to train")
        state.progress.rows_per_step = rows_per_step
        print(f"{size_of_run(encoder, steps, eval_set)}; {describe_dtype(dtype, config.precision, device)}")
        window = sliding_window(base.config)
        if window and (longest := encoder.config.num_virtual_tokens + config.max_length) > window:
            print(f"layers with a sliding window see {window} tokens; at the end of the longest rows, {longest}, no prefix")

        if config.torch_compile and (first := next(iter(steps), None)):
            print("compiling the layers, which may take minutes", flush=True)
            state.compile_seconds = compile_now(base, first.batches, encoder.bake())
            print(f"compiled in {state.compile_seconds:.1f} s, which train_seconds does not include")
        distillation = teacher and Distillation(base, teacher.pairs)
        objective = dataclasses.replace(distillation, alpha=config.distill_alpha) if distillation else base
        search = find_learning_rate(objective, state, steps)

        if distributed.is_main():
            settings |= {
                "learning_rate": state.progress.peak_learning_rate or 0.0,
                "train_rows": len(train_set),
                "eval_rows": len(eval_set or ()),
                "rows_per_step": rows_per_step,
            }
            description = describe_run(settings, encoder.config, dtype, device, state.distilled)
            prepare_output(folder, description, resumed, answers)
        del resumed  # else the tensors of the checkpoint would stay in memory for the whole run
        metrics = Metrics(folder, config.logging_steps, steps, config.report_to == "tensorboard")
        if search:
            metrics.write(search.record())
        evaluator = Evaluator(
            base,
            tokenizer,
            eval_set if config.max_steps != 0 else None,
            max_tokens,
            steps.total,
            template,
            every=config.eval_steps,
            wants_answers=config.eval_exact_match,
            patience=config.early_stopping_patience,
            keep_best=config.save_best,
            distillation=distillation,
            teacher_answered=bool(answers and answers.texts),
        )
        summary = fit_and_save(objective, base_fingerprint, state, steps, metrics, evaluator, checkpoints)

    print(f"{summary['steps']} steps in {duration(summary['train_seconds'])}; the prefix is saved in {folder}")
    if repository:
        push_to_hub(folder, repository)
        print(f"uploaded to the hub: {repository}")
    with excused("the closing answers"):
        evaluator.show_answers(encoder.bake())
    if distributed.is_main():
        with excused("what was learnt"):
            print(what_was_learnt(read_metrics(folder), config.save_best))
    return summary


def fit_and_save(
    objective: Objective,
    base_fingerprint: dict,
    state: TrainingState,
    steps: Steps,
    metrics: Metrics,
    evaluator: Evaluator,
    checkpoints: Checkpoints,
) -> dict:
    """The loop, and the files that follow it. Returns the summary.

    Raises UserError where the loss stops being finite or a file cannot be written, and Interrupted after a signal. Both say
    how to resume.
    """
    progress, folder, summary = state.progress, checkpoints.folder, None
    try:
        with signals.listening("the run stops once it is saved"):
            if evaluator.pending(state) and progress.step == 0:
                figures = evaluator(None, "frozen base") | evaluator.of_teacher()
                metrics.write({"step": 0, "frozen_base": True, **figures})
            if metrics.due(state):  # the run that is resumed could not write this line
                metrics.write_interval(state)
            if evaluator.due(state):  # the run that is resumed was stopped during this evaluation
                evaluate(state, evaluator, metrics, checkpoints)
            with TrainingBar(steps, state.clock) as metrics.bar:
                fit(objective, state, metrics.bar, metrics, evaluator, checkpoints)
            state.check_finite()
            # If a signal ended the steps, this saves and raises.
            with checkpoints.checkpoint_on_error(state, metrics):
                signals.stop_if_heard()
            if progress.step < steps.total:
                print(f"step {progress.step}: no lower eval loss since step {progress.best_step}; stopping early")
            summary = save_all(base_fingerprint, state, metrics, evaluator, checkpoints)
            signals.stop_if_heard()
    except NotFinite as error:
        kept = "there is no good prefix to keep"
        if error.good_prefix is not None:
            save_good_prefix(folder, error.good_prefix, state, base_fingerprint)
            kept = f"the last good prefix is saved in {folder} (for infer.py; it cannot be trained further)"
        hint = "try a lower --learning_rate, some --warmup_steps or --precision fp32"
        raise UserError(f"the loss is no longer finite at step {error.step}; {kept}; {hint}") from None
    except UserError as error:
        raise UserError(f"{error}{checkpoints.how_to_resume()}") from error
    except Interrupted as stop:
        what_now = checkpoints.how_to_resume() or "; there was nothing to save"
        if summary:
            what_now = f", which was the last one; the prefix is saved in {folder}"
        raise Interrupted(f"{stop} after step {progress.step}{what_now}", stop.signal) from None
    return summary


def save_all(
    base_fingerprint: dict, state: TrainingState, metrics: Metrics, evaluator: Evaluator, checkpoints: Checkpoints
) -> dict:
    """What follows the last step: saves the prefix, evaluates it, saves the best one instead if that is wanted, and writes
    the summary, which is returned, the curves and the model card.
    """
    progress, folder = state.progress, checkpoints.folder
    # First, so that nothing that happens after it can lose it.
    save_output(folder, state, base_fingerprint)
    try:
        with checkpoints.checkpoint_on_error(state, metrics):
            if progress.logged_step < progress.step:
                metrics.write_interval(state, ended=True)
        if evaluator.pending(state):
            evaluate(state, evaluator, metrics, checkpoints)
    except UserError as error:
        raise UserError(f"{error}; the prefix of step {progress.step} is saved in {folder}") from error
    if state.best_weights and progress.best_step != progress.step:
        state.encoder.load_state_dict(state.best_weights)
        save_output(folder, state, base_fingerprint)
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


@contextmanager
def excused(what: str) -> Iterator[None]:
    """Wraps what only shows something, once the prefix is saved. If it fails, a line says so, and the run goes on."""
    try:
        yield
    except Interrupted:
        raise
    except Exception as error:  # memory, the disk, matplotlib: each raises classes of its own
        print(f"{what}: left out ({type(error).__name__}: {reason_of(error)}); the prefix is saved", file=sys.stderr)


def prefix_config_of(config: TrainConfig, base: PackedModel) -> PrefixConfig:
    """The shape of a new prefix for this base."""
    return PrefixConfig.of(base.config, config.num_virtual_tokens, config.encoder_hidden_size, config.prefix_projection)


def count_steps(config: TrainConfig, rows: int, rows_per_step: int, progress: Progress) -> int:
    """Optimizer steps of the whole run, including those of `progress`; never fewer than these."""
    if config.max_steps >= 0:
        return max(config.max_steps, progress.step)
    # Steps that are done count as they were done; the others are counted with today's rows per step.
    per_epoch = math.ceil(rows / rows_per_step)
    passed = progress.epoch * per_epoch + math.ceil(progress.row / rows_per_step)
    return progress.step + max(0, math.ceil(config.num_train_epochs * per_epoch) - passed)


def size_of_run(encoder: PrefixEncoder, steps: Steps, eval_set: Dataset | None) -> str:
    """What is trained, and on how much."""
    held_out = f" and {len(eval_set):,} held out" if eval_set else ""
    trainable = sum(parameter.numel() for parameter in encoder.parameters())
    rows = f"{len(steps.train_set):,} rows{held_out}, {steps.total:,} steps of {steps.rows_per_step}"
    return f"{rows}; a prefix of {encoder.config.num_virtual_tokens} tokens by {trainable:,} trainable parameters"


def memory_hint(config: TrainConfig, base: PackedModel, max_tokens: int) -> str:
    """Suggests which flag to lower if a run does not fit in memory. The larger part decides: the encoder with its optimizer,
    or the activations of a forward pass of `max_tokens`.
    """
    shape = prefix_config_of(config, base)
    with torch.device("meta"):
        parameters = PrefixEncoder(shape).parameters()
    # Of each parameter: weight, gradient and AdamW's two moments.
    encoder_bytes = 16 * sum(parameter.numel() for parameter in parameters)
    # A row that is longer than max_tokens has a pass of its own.
    longest = config.num_virtual_tokens + config.max_length
    if encoder_bytes > max(max_tokens, config.max_length) * activation_bytes_per_token(base, longest):
        cause = f"the encoder and its optimizer take {encoder_bytes / 2**30:.1f} GiB"
        if not config.prefix_projection:
            return f"{cause}: lower --num_virtual_tokens (it was {config.num_virtual_tokens})"
        return f"{cause}: lower --encoder_hidden_size (it was {shape.encoder_hidden_size})"
    hints = []
    if max_tokens > config.max_length:
        hints.append(f"lower --max_tokens_per_batch (it was {max_tokens})")
    if not config.gradient_checkpointing:
        hints.append("add --gradient_checkpointing")
    return " or ".join(hints) or f"lower --max_length (it was {config.max_length})"
