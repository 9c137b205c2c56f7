"""A base larger than one device: PyTorch's fully_shard ("FSDP2"; Zhao et al. 2023) splits its weights over the processes.

Each process keeps its rows of every weight. A layer's are gathered when a pass reaches it, and freed behind it, forward and
backward; the embeddings, which are the head's weights too, where a pass starts and where the forward pass ends. Only prefix,
encoder and optimizer are whole in each process.

As the gathering takes all processes, all must go through the base equally often: one that is out of rows keeps `in_step`.
"""

import ctypes
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MethodType

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor
from transformers import BloomConfig, BloomForCausalLM, GenerationConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import get_checkpoint_shard_files

from prefix_tuning import distributed
from prefix_tuning.errors import UserError
from prefix_tuning.files.reading import find_file

_M_MMAP_THRESHOLD = -3  # of <malloc.h>


def is_sharded(model: BloomForCausalLM) -> bool:
    return isinstance(model.lm_head, FSDPModule)  # a PrefixBloom is none itself, but shares the modules of its base


def parts_of_base(shard_base: bool, shard_degree: int | None) -> int | None:
    """How many processes share one copy of the base; None: each has its own. Raises UserError if that cannot be."""
    if not shard_base:
        if shard_degree is not None:
            raise UserError("--shard_degree goes with --shard_base; add that flag")
        return None
    if not dist.is_initialized():
        raise UserError("--shard_base splits the base over processes; start them: torchrun --nproc_per_node N ...")
    processes = distributed.world_size()
    if shard_degree is not None and (shard_degree < 1 or processes % shard_degree):
        hint = "leave it out for one copy among all, or name a divisor"
        raise UserError(f"--shard_degree {shard_degree} does not divide the number of processes, {processes}; {hint}")
    return shard_degree or processes


def load_sharded(path: str, config: BloomConfig, dtype: torch.dtype, device: torch.device, parts: int) -> BloomForCausalLM:
    """Loads this process's part of a Bloom from safetensors files; no process ever holds more of it.

    parts: how many processes, neighbours by rank, share one copy of the base; it divides their number. All processes call
    this together. Returns the frozen model, whose weights are DTensors in `dtype` on `device`. Raises UserError if there are
    no such files, or if they hold other weights than `config` describes.
    """
    files = weight_files(path)
    with torch.device("meta"):
        model = BloomForCausalLM(config).to(dtype).requires_grad_(False).eval()
    if find_file(path, "generation_config.json"):
        model.generation_config = GenerationConfig.from_pretrained(path)
    shard(model, device, parts)
    fill(model, files)
    return model


def weight_files(path: str) -> list[str]:
    """The safetensors files of a model by folder or hub name. Raises UserError if it has none."""
    if file := find_file(path, SAFE_WEIGHTS_NAME):
        return [file]
    if index := find_file(path, SAFE_WEIGHTS_INDEX_NAME):
        return get_checkpoint_shard_files(path, index)[0]
    hint = "save it as such once, where it fits: BloomForCausalLM.from_pretrained(NAME).save_pretrained(FOLDER)"
    raise UserError(f"--shard_base reads safetensors files, and {path} has none; {hint}")


def shard(model: BloomForCausalLM, device: torch.device, parts: int) -> None:
    """Splits a model that lies on the meta device, and gives each process memory for its part, not yet filled."""
    if device.type == "cpu":
        return_freed_memory()
    copies = distributed.world_size() // parts
    shape, names = ((copies, parts), ("copy", "part")) if copies > 1 else ((parts,), ("part",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    body = model.transformer
    # Embeddings and head are a group for transformers' forward only, which takes them as they come; training takes `whole`.
    for group in (*body.h, [body.word_embeddings, model.lm_head], model):
        fully_shard(group, mesh=mesh)
    # fully_shard gathers around the method `forward`, and around what is registered here: training has a forward of its own.
    for module in (*body.h, model):
        module.gathered_call = MethodType(_call, module)
        register_fsdp_forward_method(module, "gathered_call")
    model.to_empty(device=device)
    model.pace = Lockstep()
    model.register_forward_pre_hook(model.pace.begin_pass, prepend=True)  # for transformers' forward


def _call(module: nn.Module, function: Callable, *args):
    return function(module, *args)


def return_freed_memory() -> None:
    """Has glibc hand freed weights back at once. It would keep them, in pieces between which small tensors come to lie, and
    take new memory for the next layer's: in the end, for the whole base."""
    with suppress(OSError, AttributeError, TypeError):  # other systems have another malloc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def fill(model: BloomForCausalLM, files: list[str]) -> None:
    """Reads this process's rows of every weight. Raises UserError for weights that are missing, or of another shape."""
    missing = dict(model.named_parameters())
    other_names = {name.removeprefix("transformer."): name for name in missing}  # the first Blooms were named so
    if model.lm_head.weight is model.transformer.word_embeddings.weight:
        other_names["lm_head.weight"] = "transformer.word_embeddings.weight"
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open has no __iter__)
                parameter = missing.pop(name if name in missing else other_names.get(name), None)
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
    """Where this process's rows begin in the whole tensor. fully_shard splits as torch.chunk does."""
    rows, mesh = tensor.shape[0], tensor.device_mesh
    return min(rows, mesh.get_local_rank("part") * math.ceil(rows / mesh["part"].size()))


def sum_of_parts(tensor: torch.Tensor, sharded: DTensor) -> torch.Tensor:
    """Sums a tensor over the processes that share one copy of the base, in place."""
    return distributed.all_sum(tensor, group=sharded.device_mesh.get_group("part"))


def call(function: Callable, module: nn.Module, *args):
    """function(module, *args), for which the module's weights are gathered if it is sharded, and for its backward pass."""
    # Not asked by its class: a PrefixBloom has this from the base whose modules it shares.
    return module.gathered_call(function, *args) if hasattr(module, "gathered_call") else function(module, *args)


def gathered(weight: torch.Tensor) -> torch.Tensor:
    """A weight that no backward pass needs: if it is sharded, gathered. As a sum, which needs no memory but the result's."""
    if not isinstance(weight, DTensor):
        return weight
    local, first = weight.to_local(), first_row(weight)
    gathered = local.new_zeros(weight.shape)
    gathered[first : first + len(local)] = local
    return sum_of_parts(gathered, weight)


class Lockstep:
    """Before each pass the processes vote: 1, I have one to make; 0, I have none left. While anyone has, all make one."""

    def __init__(self):
        self.idle = False

    def begin_pass(self, *_) -> None:
        if not self.idle:
            distributed.max_over_ranks(1)

    def go_idle(self, idle_pass: Callable[[], object]) -> None:
        self.idle = True
        while distributed.max_over_ranks(0):
            idle_pass()
        self.idle = False


def begin_pass(model: BloomForCausalLM) -> None:
    """Every pass through a base that may be sharded begins with this."""
    if is_sharded(model):
        model.pace.begin_pass()


@contextmanager
def in_step(model: BloomForCausalLM, idle_pass: Callable[[], object]) -> Iterator[None]:
    """Inside, a process may go through a sharded base as often as it has work; at the end, it joins the others' passes.

    idle_pass: gathers what their passes gather, and has no other effect.
    """
    yield
    if is_sharded(model):
        model.pace.go_idle(idle_pass)
