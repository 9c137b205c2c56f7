"""What a run writes to its output folder before and after the loop (files/names.py lists all files)."""

import dataclasses
import platform
from pathlib import Path

import torch
import transformers

from prefix_tuning import distributed
from prefix_tuning.base_model.identity import portable_name
from prefix_tuning.devices import peak_memory_mb
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import CONFIG_FILE, ENCODER_FILE, METRICS_FILE
from prefix_tuning.files.prefixes import save_adapter, save_encoder
from prefix_tuning.files.writing import atomic_write, remove_drafts, write_json
from prefix_tuning.model.encoder import PrefixConfig
from prefix_tuning.training.resume import Resumed, clear_checkpoints, metrics_so_far
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.state import NotFinite, TrainingState

PATH_SETTINGS = tuple(field.name for field in dataclasses.fields(TrainConfig) if field.metadata["rules"].is_path)


def describe_run(settings: dict, prefix_config: PrefixConfig, dtype: torch.dtype, device: torch.device) -> dict:
    """All that is needed to repeat a run, without any path of this machine. settings: by name, those of the command and
    what the run made of them.
    """
    settings = settings | {name: portable_name(settings[name]) for name in PATH_SETTINGS if settings[name] is not None}
    if settings["prefix_from"]:  # the shape is that of the earlier run
        shape = dataclasses.asdict(prefix_config)
        settings |= {"prefix_init": None, **{name: shape[name] for name in settings if name in shape}}
    return {
        **settings,
        "prefix_config": dataclasses.asdict(prefix_config),
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


def prepare_output(output_dir: Path, description: dict, resumed: Resumed | None) -> None:
    """Removes from the folder what a killed or replaced run left, and writes what is known before the first step.

    An earlier prefix stays in place until the new one is whole.
    """
    remove_drafts(output_dir)
    clear_checkpoints(output_dir, resumed)
    write_json(output_dir / CONFIG_FILE, description)
    with atomic_write(output_dir / METRICS_FILE) as draft:
        draft.write_bytes(metrics_so_far(resumed))


def save_output(output_dir: Path, state: TrainingState, fingerprint: dict) -> None:
    """Writes what a run is for: the trainable weights and the baked prefix. All ranks call this together."""
    encoder = state.encoder
    distributed.check_equal(list(encoder.parameters()), "weights")
    if distributed.is_main():
        adapter = encoder.bake(), encoder.config, fingerprint, state.history
        try:
            save_encoder(output_dir, encoder, fingerprint)
        except UserError as error:
            # The prefix has a two-hundredth of its encoder's size at bloom-1b4-zh's shape, and may fit where that does not.
            if (output_dir / ENCODER_FILE).exists():
                raise
            save_adapter(output_dir, *adapter)
            raise UserError(f"{error}; the prefix is saved in {output_dir}, without its trainable weights") from error
        save_adapter(output_dir, *adapter)


def save_good_prefix(output_dir: Path, error: NotFinite, state: TrainingState, fingerprint: dict) -> str:
    """Saves the last good prefix of a run whose loss is no longer finite, if there is one.

    All ranks call this together. Returns what to tell the user.
    """
    kept = "there is no good prefix to keep"
    if error.good_prefix is not None:
        if distributed.is_main():
            save_adapter(output_dir, error.good_prefix, state.encoder.config, fingerprint, state.history)
            (output_dir / ENCODER_FILE).unlink(missing_ok=True)  # an earlier run's: the weights of this one are not finite
        kept = f"the last good prefix is saved in {output_dir} (for infer.py; it cannot be trained further)"
    distributed.barrier()  # until it is saved: torchrun stops all processes when the first one ends
    hint = "try a lower --learning_rate, some --warmup_steps or --precision fp32"
    return f"the loss is no longer finite at step {error.step}; {kept}; {hint}"


def summarise(state: TrainingState) -> dict:
    """The last line of metrics.jsonl."""
    progress, seconds = state.progress, state.clock.seconds()
    return {
        "summary": True,
        "steps": progress.step,
        "train_seconds": round(seconds, 3),
        "tokens": progress.tokens,
        "tokens_per_second": round(progress.tokens / seconds, 1) if seconds else 0.0,
        "compile_seconds": round(state.compile_seconds, 3),
        "peak_memory_mb": peak_memory_mb(state.losses.device),
        "trainable_parameters": sum(parameter.numel() for parameter in state.encoder.parameters()),
    }
