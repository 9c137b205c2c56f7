"""What is put on the layers of the base from outside: compiling, gradient checkpointing, gathering of sharded weights."""

import functools
import time
from collections.abc import Callable, Iterable

import torch
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint

from prefix_tuning.errors import UserError
from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import Bloom


def wrap_layers(model: Bloom, gradient_checkpointing: bool, torch_compile: bool) -> None:
    """Wraps the `forward_packed` of every layer, in place. Call it once, and for a sharded model in any case.

    gradient_checkpointing keeps only a layer's input for the backward pass and computes the layer again there: the same
    bits, less memory, a third more work. torch_compile fuses what lies between the matmuls.
    """
    blocks: Iterable = model.transformer.h  # PackedBlocks, whose method is replaced on the instance
    for block in blocks:
        # From the inside out: a layer is compiled; it is run again by checkpointing; while its weights are gathered.
        if torch_compile:
            block.forward_packed = _compiled_for_training(block.forward_packed)
        if gradient_checkpointing:
            block.forward_packed = functools.partial(
                checkpoint, block.forward_packed, use_reentrant=False, preserve_rng_state=False
            )
        register_fsdp_forward_method(block, "forward_packed")  # a no-op unless the layer is sharded


def _compiled_for_training(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`forward`, compiled once for all lengths. Evaluation would compile it anew, as it needs no gradient: it stays
    plain.
    """
    compiled = torch.compile(forward, dynamic=True)
    return lambda *inputs, **options: (compiled if torch.is_grad_enabled() else forward)(*inputs, **options)


def compile_now(model: Bloom, batches: Iterable[Batch], prefix: torch.Tensor) -> float:
    """Lets layers that are to be compiled do so, by computing gradients that are thrown away. Returns the seconds it took.

    prefix: (layers, 2, heads, tokens, head_dim). Raises UserError where torch has no compiler to work with.
    """
    started = time.perf_counter()
    leaf = prefix.clone().requires_grad_()
    try:
        for batch in batches:
            model.label_losses(batch.to(model.device), leaf).sum().backward()
    except torch._dynamo.exc.BackendCompilerFailed as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"--torch_compile does not work here: {reason}; leave the flag out") from error
    return time.perf_counter() - started
