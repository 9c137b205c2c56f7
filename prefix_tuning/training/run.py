"""Before and after the loop."""

import dataclasses
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from transformers import BloomForCausalLM, PreTrainedTokenizerBase

from prefix_tuning import distributed, signals
from prefix_tuning.base_model.identity import fingerprint, portable_name
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.base_model.sharding import is_sharded, parts_of_base
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import digest, tokenize
from prefix_tuning.devices import (
    held_per_token,
    is_out_of_memory,
    peak_memory_mb,
    resolve_device,
    resolve_dtype,
    suggested_max_tokens,
)
from prefix_tuning.errors import Interrupted, UserError
from prefix_tuning.files.names import CONFIG_FILE, ENCODER_FILE, METRICS_FILE
from prefix_tuning.files.prefixes import save_adapter, save_encoder
from prefix_tuning.files.writing import atomic_write, locked, remove_drafts, write_json
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder
from prefix_tuning.training.checkpoints import Checkpoints
from prefix_tuning.training.evaluator import Evaluator, evaluate
from prefix_tuning.training.loop import fit
from prefix_tuning.training.metrics import MetricsFile
from prefix_tuning.training.report import create_repository, open_board, plot_curves, push_to_hub, write_card
from prefix_tuning.training.resume import (
    Resumed,
    check_same_run,
    clear_checkpoints,
    find_resumed,
    identity,
    metrics_so_far,
    restore,
)
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.start import make_encoder, prefix_config_of
from prefix_tuning.training.state import NotFinite, Progress, TrainingState
from prefix_tuning.training.steps import count_steps, global_batch_size


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
    with distributed.local_main_first():  # rows and tokens are prepared once, and found cached
        train_rows, eval_rows = load_splits(config)
    model, tokenizer = load_base(config.model_name_or_path, dtype, device, parts)
    base = fingerprint(model, tokenizer)
    with distributed.local_main_first():
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
    max_tokens = config.max_tokens_per_batch or suggested_max_tokens(model, is_sharded(model))
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
    with atomic_write(output_dir / METRICS_FILE) as draft:
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
            "job": distributed.torchrun_job(),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(dtype).removeprefix("torch."),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


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
