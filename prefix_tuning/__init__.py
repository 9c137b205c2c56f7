"""Prefix tuning for Bloom and other decoders, by hand. Start reading in plain.py, then model/, then training/run.py.

As a library: `load_prefix` reads what train.py or PEFT has saved, `PrefixBloom` uses it on a base that you have loaded.
"""

import importlib

_HOME = {
    "load_prefix": "prefix_tuning.files.prefixes",
    "PrefixBloom": "prefix_tuning.generation.prefix_bloom",
    "UserError": "prefix_tuning.errors",
}
__all__ = ["PrefixBloom", "UserError", "load_prefix"]


def __getattr__(name: str):
    """Imports a name when it is first used, so that `--help` need not wait for torch."""
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
