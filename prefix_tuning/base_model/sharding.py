"""A base larger than one device: PyTorch's fully_shard ("FSDP2"; Zhao et al. 2023) splits its weights over processes.

Each process keeps its rows of every weight. In the forward and in the backward pass, a layer's weights are gathered when the
pass reaches it and freed when it has left it. The embeddings, which are also the head's weights, are gathered twice: where
the forward pass begins, and for the loss at its end. Only prefix, encoder and optimizer are whole in each process.

Gathering is collective, so all ranks must run the same number of passes. Training and evaluation know that number in advance
and fill up with empty batches (training/steps.py, evaluation.py). `generate` does not, so it runs inside `equal_passes`.
"""

import copy
import ctypes
import json
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import BloomConfig, BloomForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import get_checkpoint_shard_files

from prefix_tuning import distributed
from prefix_tuning.errors import UserError
from prefix_tuning.files.reading import find_file
from prefix_tuning.model.bloom import Bloom

# The names, as `_short` gives them, of the two weights that may be tied.
HEAD, EMBEDDINGS = "lm_head.weight", "word_embeddings.weight"
_M_MMAP_THRESHOLD = -3  # of <malloc.h>


def is_sharded(model: PreTrainedModel) -> bool:
    # Asked of a module, because a PrefixBloom shares the modules of a sharded base without being an FSDPModule itself.
    return isinstance(model.get_output_embeddings(), FSDPModule)


def parts_of_base(shard_base: bool, shard_degree: int | None) -> int | None:
    """Number of processes that share one copy of the base; None: each has its own copy.

    Raises UserError if there is only one process, or if shard_degree does not divide their number.
    """
    if not shard_base:
        return None
    if not dist.is_initialized():
        raise UserError("--shard_base splits the base over processes; start them: torchrun --nproc_per_node N ...")
    processes = distributed.world_size()
    if shard_degree is not None and (shard_degree < 1 or processes % shard_degree):
        hint = "leave it out for one copy among all, or name a divisor"
        raise UserError(f"--shard_degree {shard_degree} does not divide the number of processes, {processes}; {hint}")
    return shard_degree or processes


def load_sharded(path: str, config: BloomConfig, dtype: torch.dtype, device: torch.device, parts: int) -> Bloom:
    """Loads this process's part of a Bloom from safetensors files; no process ever holds more of it.

    parts: number of processes, neighbours by rank, that share one copy of the base; it divides the number of all. All
    processes call this together. Returns the frozen model, whose weights are DTensors in `dtype` on `device`. Raises
    UserError if there are no such files, or if their weights are quantised or not those that `config` describes.
    """
    if getattr(config, "quantization_config", None):
        raise UserError(f"--shard_base reads weights as they are, and those of {path} are quantised; leave the flag out")
    files = weight_files(path, getattr(config, "transformers_weights", None))
    if config.tie_word_embeddings and has_own_head(files, dtype):
        config = copy.copy(config)
        config.tie_word_embeddings = False
    with torch.device("meta"):
        model = Bloom(config).to(dtype).requires_grad_(False).eval()  # type: ignore[arg-type]  # transformers declares `to` without self
    if find_file(path, "generation_config.json"):
        model.generation_config = GenerationConfig.from_pretrained(path)
    else:
        # As transformers does: an old config.json may hold settings of `generate`, and `config` does not keep them.
        config_file = Path(find_file(path, "config.json") or "")
        model.generation_config = GenerationConfig.from_model_config(json.loads(config_file.read_text("utf-8")))
    shard(model, device, parts)
    fill(model, files)
    return model


def weight_files(path: str, named: str | None = None) -> list[str]:
    """The safetensors files of a model by folder or hub name. Raises UserError if it has none.

    named: the file, or the index of several files, that its config.json gives as transformers_weights, if it gives one.
    """
    for name in [named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]:
        if file := find_file(path, name):
            return get_checkpoint_shard_files(path, file)[0] if name.endswith(".index.json") else [file]
    hint = "save it as such once, where it fits: BloomForCausalLM.from_pretrained(NAME).save_pretrained(FOLDER)"
    raise UserError(f"--shard_base reads safetensors files, and {path} has none; {hint}")


def shard(model: Bloom, device: torch.device, parts: int) -> None:
    """Splits a model on the meta device, and allocates this process's part without filling it."""
    if device.type == "cpu":
        return_freed_memory()
    copies = distributed.world_size() // parts
    shape, names = ((copies, parts), ("copy", "part")) if copies > 1 else ((parts,), ("part",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    body = model.transformer
    for group in (*body.h, [body.word_embeddings, model.lm_head], model):
        fully_shard(group, mesh=mesh)
    # fully_shard gathers a module's weights around its method `forward`, which only transformers' own forward calls. For the
    # packed forward, loading.py registers the layers' method and this function `label_losses`; `gathered` gathers the
    # embeddings and the head, which the packed forward does not call as modules.
    register_fsdp_forward_method(model, "label_losses")
    model.gathered = gathered
    model.to_empty(device=device)
    model.lockstep = lockstep = Lockstep()  # type: ignore[assignment]  # torch types attributes as Tensor or Module
    model.register_forward_pre_hook(lockstep.before_pass, prepend=True)


def return_freed_memory() -> None:
    """Makes glibc return the memory of freed weights to the system at once, by using mmap for 1 MB and more.

    Without it, each of 4 processes peaked at 1,791 MB instead of 904 MB on a CPU (tests/benchmarks/README.md): freed weights
    stayed in the heap, between small tensors that were still in use.
    """
    with suppress(OSError, AttributeError, TypeError):  # other systems have another malloc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def has_own_head(files: list[str], dtype: torch.dtype) -> bool:
    """Whether the files hold a head whose numbers, rounded to `dtype`, differ from those of the embeddings.

    transformers then does not tie the two, whatever config.json says.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
        stored = {_short(name): file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118 (see `fill`)
        if not {HEAD, EMBEDDINGS} <= stored.keys():
            return False
        head, embeddings = stored[HEAD], stored[EMBEDDINGS]
        if head.get_shape() != embeddings.get_shape():
            return True
        # In pieces of 1,024 rows, because these may be the largest weights of all.
        pieces = (slice(start, start + 1024) for start in range(0, head.get_shape()[0], 1024))
        return any(not torch.equal(head[rows].to(dtype), embeddings[rows].to(dtype)) for rows in pieces)


def _short(name: str) -> str:
    """A weight's name without "transformer.", which names in the first Blooms, saved without their head, do not have."""
    return name.removeprefix("transformer.")


def fill(model: BloomForCausalLM, files: list[str]) -> None:
    """Reads this process's rows of every weight. Raises UserError for weights that are missing or have another shape."""
    # Typed as Any, because torch types them as Parameters, and they are DTensors.
    missing: dict[str, Any] = {_short(name): parameter for name, parameter in model.named_parameters()}
    tied = HEAD not in missing
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open has no __iter__)
                short = _short(name)
                parameter = missing.pop(EMBEDDINGS if tied and short == HEAD else short, None)
                if parameter is None:
                    continue
                stored, local = file.get_slice(name), parameter.to_local()
                if tuple(stored.get_shape()) != parameter.shape:
                    shapes = f"{tuple(stored.get_shape())} where {tuple(parameter.shape)} is expected"
                    hint = "its config.json belongs to another model"
                    raise UserError(f"--model_name_or_path: {path}: {name} has the shape {shapes}; {hint}")
                first = first_row(parameter)
                local.copy_(stored[first : first + len(local)])
    if missing:
        folder = Path(files[0]).parent
        raise UserError(f"--model_name_or_path {folder} lacks {len(missing)} of its weights, such as {next(iter(missing))}")


def first_row(tensor: DTensor) -> int:
    """Index of this process's first row in the whole tensor. fully_shard splits as torch.chunk does."""
    rows, mesh = tensor.shape[0], tensor.device_mesh
    return min(rows, mesh.get_local_rank("part") * math.ceil(rows / mesh["part"].size()))


def sum_of_parts(tensor: torch.Tensor, sharded: DTensor) -> torch.Tensor:
    """Sums a tensor over the processes that share one copy of the base, in place."""
    dist.all_reduce(tensor, group=sharded.device_mesh.get_group("part"))
    return tensor


def gathered(weight: torch.Tensor) -> torch.Tensor:
    """The whole of a sharded weight, for uses without a backward pass. All ranks that share the copy call this together.

    Each rank fills in its rows and leaves zeros elsewhere, and the sum is the weight: it needs no memory beside the result.
    """
    assert isinstance(weight, DTensor)
    local, first = weight.to_local(), first_row(weight)
    whole = local.new_zeros(weight.shape)
    whole[first : first + len(local)] = local
    return sum_of_parts(whole, weight)


class Lockstep:
    """Makes all ranks run the same number of passes of transformers' forward, each of which gathers weights.

    Before each pass, the ranks all-reduce whether any of them still has work. Ranks without work then run an empty pass.
    """

    def __init__(self):
        self.idle = False

    def before_pass(self, *_) -> None:
        if not self.idle:
            distributed.max_over_ranks(1)

    def follow(self, idle_pass: Callable[[], object]) -> None:
        """Runs empty passes until no rank has work left."""
        self.idle = True
        while distributed.max_over_ranks(0):
            idle_pass()
        self.idle = False


@contextmanager
def equal_passes(model: PreTrainedModel, idle_pass: Callable[[], object]) -> Iterator[None]:
    """Inside, each rank runs as many passes of transformers' forward as it has work for. At the end, it joins the passes of
    the other ranks with empty ones of its own. A no-op unless the model is sharded.

    idle_pass: gathers the same weights as a pass, and has no other effect.
    """
    yield
    if is_sharded(model):
        cast(Lockstep, model.lockstep).follow(idle_pass)
