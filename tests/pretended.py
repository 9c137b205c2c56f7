"""A second device in Python alone: its tensors wrap tensors of the CPU, where every operation runs.

It refuses what CUDA refuses: an operation on a tensor of this device and a tensor of the CPU, unless that has no axes. So a
`device=` that is left out, or a batch that is not moved, is an error here too. The code takes the same branches as on a GPU.
This device cannot show kernels and their dtypes, strides, streams, pinned memory, random numbers, or several devices.

`device()` sets it up, once per process, or skips the test where this torch has no such interface.
"""

import functools

import pytest
import torch
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
# The operations that may get tensors of two devices.
MIXED = {aten._to_copy.default, aten.copy_.default}


class Pretended(torch.Tensor):
    """A tensor of the pretended device. raw: the same on the CPU."""

    @staticmethod
    def __new__(cls, raw):
        return torch.Tensor._make_wrapper_subclass(
            cls, raw.shape, raw.stride(), raw.storage_offset(), dtype=raw.dtype, device=torch.device("pretended", 0)
        )

    def __init__(self, raw):
        self.raw = raw

    def __repr__(self):
        return f"pretended({self.raw})"

    def tolist(self):
        """torch's own refuses subclasses."""
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return run(operation, args, kwargs or {})


def run(operation, args, kwargs):
    """Runs an operation on the CPU. Raises RuntimeError, as CUDA does, if tensors of two devices meet."""
    tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, torch.Tensor)]
    ours = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    others = [tuple(tensor.shape) for tensor in tensors if not isinstance(tensor, Pretended) and tensor.dim()]
    if operation == aten.index.Tensor and isinstance(args[0], Pretended):
        others = []  # CUDA moves indices from the CPU itself
    if ours and others and operation not in MIXED:
        raise RuntimeError(f"{operation}: all tensors must be on the same device, but these are on the CPU: {others}")
    device = kwargs.get("device") and torch.device(kwargs["device"])
    goes_there = device.type == "pretended" if device else bool(ours)
    if device:
        kwargs = kwargs | {"device": "cpu"}
    if "pin_memory" in kwargs:
        kwargs = kwargs | {"pin_memory": False}
    result = operation(*tree_map(raw, args), **tree_map(raw, kwargs))
    # An in-place operation returns the tensor that it was given.
    known = {id(tensor.raw): tensor for tensor in ours}

    def wrapped(value):
        if not isinstance(value, torch.Tensor):
            return value
        return known[id(value)] if id(value) in known else Pretended(value) if goes_there else value

    return tree_map(wrapped, result)


def raw(value):
    return value.raw if isinstance(value, Pretended) else value


def fallback(operation, *args, **kwargs):
    return run(operation, args, kwargs)


def to_copy(tensor, **kwargs):
    return run(aten._to_copy.default, (tensor,), kwargs)


@functools.cache
def libraries():
    """Registers the device, which stays registered while somebody holds the libraries that this returns."""
    backend_registration._setup_privateuseone_for_python_backend("pretended")
    # Operations that get no tensor, such as arange, and copies from the CPU to the device.
    creating, copying = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    creating.fallback(fallback, "PrivateUse1")
    copying.impl("_to_copy", to_copy, "PrivateUse1")
    return creating, copying


def device() -> torch.device:
    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch cannot make a device in Python")
    libraries()
    return torch.device("pretended", 0)
