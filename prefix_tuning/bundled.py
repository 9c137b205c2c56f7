"""Names for what ships with the package: two small models that know 3,203 facts, and questions about them.

`bundled:mini-bloom` is the model of the demo, and `bundled:mini-qwen3` one of another family. `bundled:short` and
`bundled:sentence` are training questions with brief answers or whole sentences; `bundled:short-eval` and
`bundled:sentence-eval` ask about other facts. demo/build.py makes all of them.
"""

from pathlib import Path

MODEL = "bundled:mini-bloom"
MODELS = (MODEL, "bundled:mini-qwen3")
DATASETS = ("bundled:short", "bundled:sentence")

_DEMO = Path(__file__).parent / "demo"
_PATHS = {
    MODEL: _DEMO / "mini-bloom",
    "bundled:mini-qwen3": _DEMO / "mini-qwen3",
    "bundled:short": _DEMO / "data" / "short.jsonl",
    "bundled:short-eval": _DEMO / "data" / "short-eval.jsonl",
    "bundled:sentence": _DEMO / "data" / "sentence.jsonl",
    "bundled:sentence-eval": _DEMO / "data" / "sentence-eval.jsonl",
}

# The defaults of train.py where model and dataset are bundled; tests/benchmarks/README.md shows how they were measured.
SETTINGS = {
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 6.0,
    "learning_rate": 5e-3,
    "num_virtual_tokens": 16,
    "eval_exact_match": True,
}


def resolve(name: str) -> str:
    """The path of a bundled model or dataset; any other name or path unchanged."""
    return str(_PATHS.get(name, name))


def name_of(path: Path) -> str | None:
    """The bundled name of a path, the inverse of `resolve`; None for any other path."""
    return next((name for name, bundled in _PATHS.items() if bundled.resolve() == path), None)
