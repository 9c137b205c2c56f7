"""Where a run starts: the encoder, what trains it, and the steps to do, anew or from a checkpoint."""

import math

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from prefix_tuning import distributed
from prefix_tuning.base_model.identity import check_base
from prefix_tuning.base_model.sharding import is_sharded
from prefix_tuning.devices import held_per_token
from prefix_tuning.errors import UserError
from prefix_tuning.files.prefixes import load_encoder, recorded_history
from prefix_tuning.model.bloom import Bloom, cached_pairs
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder
from prefix_tuning.training.inputs import Inputs
from prefix_tuning.training.resume import Resumed, restore
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.state import Progress, TrainingState, make_optimizer, make_schedule
from prefix_tuning.training.steps import Steps


def begin(config: TrainConfig, inputs: Inputs, resumed: Resumed | None) -> tuple[TrainingState, Steps]:
    """The state that a run starts or resumes with, on the base's device, and the steps from there on."""
    torch.manual_seed(config.seed)
    encoder = resumed.encoder() if resumed else make_encoder(config, inputs.base, inputs.tokenizer, inputs.fingerprint)
    encoder.to(inputs.base.device)
    progress = resumed.progress() if resumed else Progress()
    rows_per_step = config.per_device_train_batch_size * config.gradient_accumulation_steps * distributed.world_size()
    steps = Steps(
        inputs.train_set,
        rows_per_step,
        count_steps(config, len(inputs.train_set), rows_per_step, progress),
        inputs.max_tokens,
        seed=config.seed if config.shuffle else None,
        equal_passes=is_sharded(inputs.base),
        done=progress.step,
        epoch=progress.epoch,
        row=progress.row,
    )
    state = TrainingState(
        encoder,
        make_optimizer(encoder, config.weight_decay),
        make_schedule(config.lr_scheduler_type, config.warmup_steps, steps.total),
        config.max_grad_norm,
        loss_scaling=inputs.base.dtype == torch.float16,
    )
    state.progress.peak_learning_rate = config.learning_rate
    earlier: bool | None = False  # what the weights have seen before this run's rows
    if resumed:
        earlier = resumed.numbers.get("history")  # checkpoints of earlier versions do not know
    elif config.prefix_from:
        earlier = recorded_history(config.prefix_from)
    state.history = inputs.has_history or earlier
    if resumed:
        restore(state, resumed)
        if progress.rows_per_step != rows_per_step:
            before, processes = progress.rows_per_step, distributed.world_size()
            print(f"rows per step changed from {before} to {rows_per_step} ({processes} processes)")
        if progress.step == steps.total:
            print(f"the run is over already: it is at step {progress.step}, and nothing is left to train")
    state.progress.rows_per_step = rows_per_step
    return state, steps


def count_steps(config: TrainConfig, rows: int, rows_per_step: int, progress: Progress) -> int:
    """Optimizer steps of the whole run, including those of `progress`; never fewer than these."""
    if config.max_steps >= 0:
        return max(config.max_steps, progress.step)
    # Steps that are done count as they were done; the others are counted with today's rows per step.
    per_epoch = math.ceil(rows / rows_per_step)
    passed = progress.epoch * per_epoch + math.ceil(progress.row / rows_per_step)
    return progress.step + max(0, math.ceil(config.num_train_epochs * per_epoch) - passed)


def prefix_config_of(config: TrainConfig, base: Bloom) -> PrefixConfig:
    """The shape of a new prefix for this base."""
    return PrefixConfig.of(base.config, config.num_virtual_tokens, config.encoder_hidden_size, config.prefix_projection)


def memory_hint(config: TrainConfig, base: Bloom, max_tokens: int) -> str:
    """What to change if a run does not fit in memory: what makes the larger part smaller, which is either the encoder
    with its optimizer or what a forward pass of up to `max_tokens` keeps.
    """
    with torch.device("meta"):
        parameters = PrefixEncoder(prefix_config_of(config, base)).parameters()
    encoder_bytes = 16 * sum(parameter.numel() for parameter in parameters)  # weight, gradient and AdamW's two moments
    if encoder_bytes > max(max_tokens, config.max_length) * held_per_token(base):  # a long row has a pass of its own
        cause = f"the encoder and its optimizer take {encoder_bytes / 2**30:.1f} GiB"
        if not config.prefix_projection:
            return f"{cause}: lower --num_virtual_tokens (it was {config.num_virtual_tokens})"
        return f"{cause}: lower --encoder_hidden_size (it was {config.encoder_hidden_size or base.config.hidden_size})"
    hints = []
    if max_tokens > config.max_length:
        hints.append(f"lower --max_tokens_per_batch (it was {max_tokens})")
    if not config.gradient_checkpointing:
        hints.append("add --gradient_checkpointing")
    return " or ".join(hints) or f"lower --max_length (it was {config.max_length})"


def make_encoder(config: TrainConfig, base: Bloom, tokenizer: PreTrainedTokenizerBase, fingerprint: dict) -> PrefixEncoder:
    """The encoder at its starting point: an earlier run's, or a new one for this base. On the CPU, float32.

    fingerprint: that of the base, which an earlier run's must match.
    """
    if config.prefix_from:
        encoder, recorded = load_encoder(config.prefix_from)
        check_base(encoder.bake().shape, recorded, fingerprint, config.prefix_from, config.force)
        return encoder
    encoder = PrefixEncoder(prefix_config_of(config, base))
    text = None
    if config.init_text:
        text = text_prefix(base, tokenizer, config.init_text, config.num_virtual_tokens).cpu()
    encoder.initialize(config.prefix_init, text)
    return encoder


@torch.no_grad()
def text_prefix(base: Bloom, tokenizer: PreTrainedTokenizerBase, text: str, num_virtual_tokens: int) -> torch.Tensor:
    """The keys and values that the frozen model computes for `text`: (layers, 2, heads, num_virtual_tokens, head_dim).

    A text of fewer tokens is repeated, a longer one cut. Raises UserError if the text has no token at all.
    """
    ids = tokenizer(text, split_special_tokens=True).input_ids
    if not ids:
        raise UserError("--init_text is empty; --prefix_init text needs a text of at least one token")
    ids = (ids * -(-num_virtual_tokens // len(ids)))[:num_virtual_tokens]
    cache = DynamicCache()
    base(torch.tensor([ids], device=base.device), cache, use_cache=True)
    return cached_pairs(cache).float()
