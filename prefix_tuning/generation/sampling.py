"""Sampling that can be repeated: what is drawn for a row depends on the row's key, and on no other row of its batch."""

import hashlib
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig


def row_draws(settings: GenerationConfig, keys: list[tuple[int, int]], step: int = 0) -> AbstractContextManager[object]:
    """Inside, each row that `generate` samples has random numbers of its own. A no-op where nothing is drawn.

    keys: what the draws of each row depend on, a seed and a number. step: how many tokens of each row are drawn already.
    """
    return _RowDraws(keys, step) if settings.do_sample else nullcontext()


class _RowDraws(TorchFunctionMode):
    """Replaces torch.multinomial, with which `generate` samples: one generator for each row and step.

    Beams, or several sequences of a row, follow one another in the batch, and share the row's generator.
    """

    def __init__(self, keys: list[tuple[int, int]], step: int):
        super().__init__()
        self.keys, self.step = keys, step

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not torch.multinomial:
            return function(*args, **kwargs)
        probabilities, *others = args
        drawn = []
        for row, key in zip(probabilities.chunk(len(self.keys)), self.keys, strict=True):
            # Hashed: a CPU generator uses only the lower 32 bits of a seed, and similar seeds must not give similar draws.
            digest = hashlib.blake2b(repr((*key, self.step)).encode(), digest_size=8).digest()
            generator = torch.Generator(row.device).manual_seed(int.from_bytes(digest, "big"))
            drawn.append(function(row, *others, **kwargs, generator=generator))
        self.step += 1
        return torch.cat(drawn)
