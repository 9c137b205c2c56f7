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
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import get_checkpoint_shard_files

from prefix_tuning import distributed
from prefix_tuning.errors import UserError
from prefix_tuning.files.reading import find_file
from prefix_tuning.model.bloom import PackedModel
from prefix_tuning.model.decoder import as_packed, layers_of

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


def load_sharded(path: str, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device, parts: int) -> PackedModel:
    """Loads this process's part of a model from safetensors files; no process ever holds more of it.

    parts: number of processes, neighbours by rank, that share one copy of the base; it divides the number of all. All
    processes call this together. Returns the frozen model, whose weights are DTensors in `dtype` on `device`. Raises
    UserError if there are no such files, or if their weights are quantised, are converted by transformers as it loads them,
    or are not those that `config` describes.
    """
    if getattr(config, "quantization_config", None):
        raise UserError(f"--shard_base reads weights as they are, and those of {path} are quantised; leave the flag out")
    files = weight_files(path, getattr(config, "transformers_weights", None))
    model = _without_weights(config, dtype)
    if get_model_conversion_mapping(model, add_legacy=False):
        stored = f"and transformers converts those of a {config.model_type} model as it loads them"
        raise UserError(f"--shard_base reads weights as they are, {stored}; leave the flag out")
    if config.tie_word_embeddings and has_own_head(model, files):
        config = copy.copy(config)
        config.tie_word_embeddings = False
        model = _without_weights(config, dtype)
    if find_file(path, "generation_config.json"):
        model.generation_config = GenerationConfig.from_pretrained(path)
    else:
        # As transformers does: an old config.json may hold settings of `generate`, and `config` does not keep them.
        config_file = Path(find_file(path, "config.json") or "")
        model.generation_config = GenerationConfig.from_model_config(json.loads(config_file.read_text("utf-8")))
    shard(model, device, parts)
    fill(model, files)
    return model


def _without_weights(config: PreTrainedConfig, dtype: torch.dtype) -> PackedModel:
    """A frozen model on the meta device."""
    with torch.device("meta"):
        return as_packed(AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False).eval())


def weight_files(path: str, named: str | None = None) -> list[str]:
    """The safetensors files of a model by folder or hub name. Raises UserError if it has none.

    named: the file, or the index of several files, that its config.json gives as transformers_weights, if it gives one.
    """
    for name in [named] if named else [SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME]:
        if file := find_file(path, name):
            return get_checkpoint_shard_files(path, file)[0] if name.endswith(".index.json") else [file]
    hint = "save it as such once, where it fits: AutoModelForCausalLM.from_pretrained(NAME).save_pretrained(FOLDER)"
    raise UserError(f"--shard_base reads safetensors files, and {path} has none; {hint}")


def shard(model: PackedModel, device: torch.device, parts: int) -> None:
    """Splits a model on the meta device, and allocates this process's part without filling it."""
    if device.type == "cpu":
        return_freed_memory()
    copies = distributed.world_size() // parts
    shape, names = ((copies, parts), ("copy", "part")) if copies > 1 else ((parts,), ("part",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    groups: list[Any] = [*layers_of(model), [model.get_input_embeddings(), model.get_output_embeddings()], model]
    for group in groups:
        fully_shard(group, mesh=mesh)
    # fully_shard gathers a module's weights around its method `forward`. The packed forward calls others, so these are
    # registered: the model's `label_losses` and `label_scores`, and Bloom's for a layer (loading.py). `gathered` gathers the
    # embeddings and the head, which the packed forward does not call as modules.
    for name in ("label_losses", "label_scores"):
        register_fsdp_forward_method(model, name)
    model.gathered = gathered
    model.to_empty(device=device)
    # Computes the buffers, which no file holds, such as the frequencies of rotation. Weights with this mark are left alone.
    for parameter in model.parameters():
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
    model.initialize_weights()
    model.lockstep = lockstep = Lockstep()  # type: ignore[assignment]  # torch types attributes as Tensor or Module
    model.register_forward_pre_hook(lockstep.before_pass, prepend=True)


def return_freed_memory() -> None:
    """Makes glibc return the memory of freed weights to the system at once, by using mmap for 1 MB and more.

    Without it, each of 4 processes peaked at 1,791 MB instead of 904 MB on a CPU (tests/benchmarks/README.md): freed weights
    stayed in the heap, between small tensors that were still in use.
    """
    with suppress(OSError, AttributeError, TypeError):  # other systems have another malloc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def has_own_head(model: PackedModel, files: list[str]) -> bool:
    """Whether the files hold a head whose numbers, rounded to the model's dtype, differ from those of the embeddings.

    transformers then does not tie the two, whatever config.json says.
    """
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
        stored = {_short(model, name): file.get_slice(name) for file in opened for name in file.keys()}  # noqa: SIM118 (see `fill`)
        names = _head_and_embeddings(model)
        if not stored.keys() >= set(names):
            return False
        head, embeddings = (stored[name] for name in names)
        if head.get_shape() != embeddings.get_shape():
            return True
        # In pieces of 1,024 rows, because these may be the largest weights of all.
        pieces = (slice(start, start + 1024) for start in range(0, head.get_shape()[0], 1024))
        return any(not torch.equal(head[rows].to(model.dtype), embeddings[rows].to(model.dtype)) for rows in pieces)


def _short(model: PackedModel, name: str) -> str:
    """A weight's name without "transformer." or "model.", which names do not have where a model was saved headless."""
    return name.removeprefix(f"{model.base_model_prefix}.")


def _head_and_embeddings(model: PackedModel) -> tuple[str, str]:
    """The names, as `_short` gives them, of the two weights that may be tied."""
    names = {module: _short(model, f"{name}.weight") for name, module in model.named_modules()}
    return names[model.get_output_embeddings()], names[model.get_input_embeddings()]


def fill(model: PackedModel, files: list[str]) -> None:
    """Reads this process's rows of every weight, and the whole of every buffer that the files should hold.

    Raises UserError for what is missing or has another shape.
    """
    missing = {_short(model, name): tensor for name, tensor in model.state_dict(keep_vars=True).items()}
    head, embeddings = _head_and_embeddings(model)
    if tied := missing[head] is missing[embeddings]:
        del missing[head]
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (safe_open has no __iter__)
                short = _short(model, name)
                tensor = missing.pop(embeddings if tied and short == head else short, None)
                if tensor is None:
                    continue
                stored = file.get_slice(name)
                if tuple(stored.get_shape()) != tensor.shape:
                    shapes = f"{tuple(stored.get_shape())} where {tuple(tensor.shape)} is expected"
                    hint = "its config.json belongs to another model"
                    raise UserError(f"--model_name_or_path: {path}: {name} has the shape {shapes}; {hint}")
                if not isinstance(tensor, DTensor):
                    tensor.copy_(file.get_tensor(name))
                    continue
                local, first = tensor.to_local(), first_row(tensor)
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
