"""The bundled demo: a mini Bloom that knows 3,203 facts, and questions about them. `build.py` is the recipe of both.

Bundled things go by names that hold on any machine: `bundled:mini-bloom` is the model; `bundled:short` and
`bundled:sentence` are training questions, answered by a bare answer or by a full sentence; with `-eval` behind, questions
about facts that no training question touches.
"""

from pathlib import Path

_HERE = Path(__file__).parent / "demo"


MODEL = "bundled:mini-bloom"


DATASETS = ("bundled:short", "bundled:sentence")


_PATHS = {
    MODEL: _HERE / "model",
    "bundled:short": _HERE / "data" / "short.jsonl",
    "bundled:short-eval": _HERE / "data" / "short-eval.jsonl",
    "bundled:sentence": _HERE / "data" / "sentence.jsonl",
    "bundled:sentence-eval": _HERE / "data" / "sentence-eval.jsonl",
}


# What `python train.py` does where only bundled things are named. tests/benchmarks/NOTES.md has the measurements.
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
    """The bundled name of what lies at this path; `resolve` undone. None if it is nothing bundled."""
    return next((name for name, place in _PATHS.items() if place.resolve() == path), None)
