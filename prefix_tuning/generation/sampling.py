"""Sampling that can be repeated: the draws for a row depend on the row's key, and on no other row of its batch.

With torch's one generator, `infer.py --do_sample` would give other answers after --resume, in another batch size or with
another number of processes.
"""

import hashlib
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.overrides import TorchFunctionMode
from transformers import GenerationConfig


def row_draws(settings: GenerationConfig, keys: list[tuple[int, int]], step: int = 0) -> AbstractContextManager[object]:
    """A context in which `generate` samples by per-row random generators. A no-op without do_sample.

    keys: for each row, the seed and the number on which its draws depend. step: number of tokens that are already drawn.
    """
    return _RowDraws(keys, step) if settings.do_sample else nullcontext()


class _RowDraws(TorchFunctionMode):
    """Replaces torch.multinomial, with which `generate` samples: it gets one generator for each row and step.

    `generate` takes no generator, so this is the only way to give it one. Beams, or several sequences of a row, are
    neighbours in the batch, and share the row's generator.
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
