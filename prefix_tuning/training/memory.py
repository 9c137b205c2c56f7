"""What to change if a run does not fit in memory."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from prefix_tuning.devices import held_per_token, is_out_of_memory
from prefix_tuning.errors import UserError
from prefix_tuning.model.bloom import Bloom
from prefix_tuning.model.encoder import PrefixEncoder
from prefix_tuning.training.checkpoints import Checkpoints
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.start import prefix_config_of


@contextmanager
def out_of_memory_explained(config: TrainConfig, base: Bloom, max_tokens: int, checkpoints: Checkpoints) -> Iterator[None]:
    """Turns running out of memory into a UserError that names what takes most of it, and what makes that smaller.

    max_tokens: of one forward pass.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        hint = memory_hint(config, base, max_tokens)
        raise UserError(f"{base.device} ran out of memory; {hint}{checkpoints.how_to_resume()}") from error


def memory_hint(config: TrainConfig, base: Bloom, max_tokens: int) -> str:
    """What makes a run smaller: whichever is larger, the encoder with its optimizer or what a forward pass keeps."""
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
