"""Caches that begin with prefixes.

Prefixes of different lengths are padded to one length, so a mask says which of the first tokens in a cache are real.
transformers changes the rows of a cache in place, for example for beams, and the mask has to follow.
"""

import inspect
from typing import Any, TypeGuard

import torch
from transformers import BloomForCausalLM, Cache, DynamicCache, StaticCache

# transformers' name for the argument with past keys and values: "cache" since 5.24, "past_key_values" before.
CACHE = "cache" if "cache" in inspect.signature(BloomForCausalLM.forward).parameters else "past_key_values"


class PrefixedCache(Cache):
    """A cache whose first tokens are prefixes.

    prefix_mask: (R, P), int64, 0 where a prefix is padded; None once the cache has been emptied.
    """

    prefix_mask: Any = None

    def reorder_cache(self, beam_idx):
        super().reorder_cache(beam_idx)
        self._select(beam_idx)

    def batch_select_indices(self, indices):
        super().batch_select_indices(indices)
        self._select(indices)

    def _select(self, rows: torch.Tensor) -> None:
        if self.prefix_mask is not None:
            self.prefix_mask = self.prefix_mask[rows]

    def batch_repeat_interleave(self, repeats):
        super().batch_repeat_interleave(repeats)
        if self.prefix_mask is not None:
            self.prefix_mask = self.prefix_mask.repeat_interleave(repeats, dim=0)

    def crop(self, *arguments, **options):
        """transformers' `crop`. Raises ValueError if it has removed a part of the prefixes."""
        super().crop(*arguments, **options)
        if self.prefix_mask is not None and self.get_seq_length() < self.prefix_mask.shape[1]:
            raise ValueError("`crop` has cut into the prefix; `reset` empties a cache, and the next call fills it anew")

    def reset(self):
        super().reset()
        self.prefix_mask = None
        # Earlier releases of transformers only set the keys and values of a DynamicCache to zero.
        if length := self.get_seq_length():
            self.crop(-length)


class PrefixedDynamicCache(PrefixedCache, DynamicCache):
    pass


class PrefixedStaticCache(PrefixedCache, StaticCache):
    pass


_KINDS = {DynamicCache: PrefixedDynamicCache, StaticCache: PrefixedStaticCache}


def is_supported(cache: Cache) -> bool:
    """Whether a cache can begin with prefixes."""
    return type(cache) in (*_KINDS, *_KINDS.values())


def set_prefix_mask(cache: Cache, prefix_mask: torch.Tensor) -> None:
    """Makes a cache that `is_supported` a PrefixedCache: in place, because its owner goes on with this object."""
    cache.__class__ = _KINDS.get(type(cache), type(cache))
    cache.prefix_mask = prefix_mask  # type: ignore[attr-defined]


def has_prefixes(cache: Cache) -> TypeGuard[PrefixedCache]:
    """Whether a cache begins with prefixes. Without a token, as for the base alone, they count too."""
    return isinstance(cache, PrefixedCache) and cache.prefix_mask is not None
