"""Where and how the base runs: device, dtype, and the memory of a forward pass."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel

from prefix_tuning.errors import UserError
from prefix_tuning.model.attention import attention_dtype, row_dtype
from prefix_tuning.model.cpu import bf16_units
from prefix_tuning.model.encoder import key_value_shape

if sys.platform != "win32":
    import resource


def resolve_device(name: str) -> torch.device:
    """The device for a --device flag. Raises UserError if this machine has no such device.

    auto: CUDA; else mps, for a single process; else the CPU. Each process of a machine takes its own CUDA device.
    """
    several = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > 1
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() and not several else "cpu"
    if several and name not in ("cuda", "cpu"):
        raise UserError(f"--device {name} cannot be shared by several processes; use cuda or cpu")
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not available here: {str(error).splitlines()[0]}") from error
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name} is not supported; use cpu, cuda or mps")
    return device


PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The base's dtype for a --precision flag. Raises UserError for fp16 off CUDA.

    auto: bfloat16 where the device multiplies it in hardware; else float16 on CUDA, float32 elsewhere.
    """
    if precision == "auto":
        if has_bf16_units(device):
            return torch.bfloat16
        return torch.float16 if device.type == "cuda" else torch.float32
    if precision == "fp16" and device.type != "cuda":
        raise UserError("--precision fp16 needs CUDA; use fp32 (or auto) here")
    return PRECISIONS[precision]


def has_bf16_units(device: torch.device) -> bool:
    """Whether torch multiplies bfloat16 matrices in hardware, and so faster than float32. Known for CUDA and x86 CPUs."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).major >= 8  # Ampere or later
    return device.type == "cpu" and bf16_units() is not None


def describe_dtype(dtype: torch.dtype, precision: str, device: torch.device) -> str:
    """The dtype and device of a run as text, with the reason if --precision auto has chosen the dtype."""
    reason = ", which has bfloat16 units" if dtype == torch.bfloat16 else ", where torch uses no bfloat16 units"
    return f"{dtype} on {device}{reason if precision == 'auto' and device.type != 'mps' else ''}"


@contextmanager
def reproducible(device: torch.device) -> Iterator[None]:
    """Inside, the same seed gives the same bits on CUDA."""
    if device.type != "cuda":
        yield
        return
    # cuBLAS reads it before its first matmul.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic
    mode, fill = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    # With warn_only=True, torch would take kernels of attention that give other bits in every run.
    torch.use_deterministic_algorithms(True)
    # Otherwise torch would fill each new tensor with NaN.
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fill


def avoid_cudnn_attention(device: torch.device) -> None:
    """Makes torch take another kernel of attention on CUDA. cuDNN's prepares a plan for each new shape, about 200 ms long;
    while a text grows token by token, each pass has a new shape.
    """
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)


def activation_bytes_per_token(model: PreTrainedModel, longest: int = 0) -> int:
    """Bytes per token that a forward pass keeps for its backward pass.

    A layer of Bloom keeps about 10 numbers per token and hidden unit: 4 for the input of the GELU, 2 for the inputs of the
    layer norms, and in the dtype of attention 4 for query, key, value and result (fewer where heads share keys and values).
    A gated MLP of another family keeps its gate, its input and their product, and so does each expert that a token goes to.
    Its heads together may be wider than its hidden size. Where scores have a soft cap or a sink, attention keeps them twice
    (model/decoder.py): for each head and token, as many as there are tokens in front of it. Not counted: the bias and a
    slice of logits, once per pass.

    longest: tokens of prefix and row, for the longest row.
    """
    config, (layers, _, head_dim) = model.config, key_value_shape(model.config)
    gated = getattr(config, "moe_intermediate_size", None) or getattr(config, "intermediate_size", None)
    inner = 3 * gated * getattr(config, "num_experts_per_tok", 1) if gated else 4 * config.hidden_size
    heads = config.num_attention_heads
    keeps_scores = getattr(config, "attn_logit_softcapping", None) or config.model_type == "gpt_oss"
    attended = heads * (4 * head_dim + (2 * longest if keeps_scores else 0))
    in_attention = attention_dtype(model.dtype, model.device)
    if model.device.type == "cpu" and not keeps_scores:
        in_attention = row_dtype(model.dtype, head_dim)
    return layers * ((inner + 2 * config.hidden_size) * model.dtype.itemsize + attended * in_attention.itemsize)


def suggested_max_tokens(model: PreTrainedModel, gathers: bool, longest: int = 0) -> int:
    """Number of tokens per forward pass that suits device and model (tests/benchmarks/README.md).

    The activations that a pass keeps stay within 512 MiB on a CPU, where more than 640 tokens gain little. A small model,
    of which more fit into 32 MiB, gets up to 1024, so that a step of the demo is one pass and not two. Elsewhere, within
    2 GiB, or 8 GiB if every pass `gathers` the weights of the base from other processes, or a sixteenth of a large GPU's
    memory: launching the kernels of a small pass takes such a GPU longer than running them. longest: see
    `activation_bytes_per_token`; 0 where there is no backward pass.
    """
    on_cpu = model.device.type == "cpu"
    budget = 2**29 if on_cpu else 2**33 if gathers else 2**31
    if model.device.type == "cuda":
        budget = max(budget, torch.cuda.get_device_properties(model.device).total_memory // 16)
    per_token = activation_bytes_per_token(model, longest)
    fitting = max(1, budget // per_token)
    return min(fitting, max(640, min(1024, 2**25 // per_token))) if on_cpu else fitting


def prompt_tokens(max_tokens: int) -> int:
    """Number of prompt tokens that take about as much memory as `max_tokens` in training: of the 10 numbers that
    `activation_bytes_per_token` counts, generation keeps 2, the key and the value.
    """
    return 5 * max_tokens


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device or the machine ran out of memory."""
    # For a CPU, torch raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


@contextmanager
def out_of_memory_explained(device: torch.device, hint: Callable[[], str]) -> Iterator[None]:
    """Turns running out of memory into a UserError, which ends with a hint at what to change."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"{device} ran out of memory; {hint()}") from error


def peak_memory_mb(device: torch.device) -> int | None:
    """Peak in MiB of the allocated memory on CUDA, and of the process's memory elsewhere; None on Windows."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 2**20
    if sys.platform == "win32":
        return None
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 2**20
