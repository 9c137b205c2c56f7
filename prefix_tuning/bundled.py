"""Names for what ships with the package: small models, and questions for them.

`bundled:mini-bloom` is the model of the demo, and `bundled:mini-qwen3` one of another family. Both know 3,203 facts.
`bundled:short` and `bundled:sentence` are training questions with brief answers or whole sentences; `bundled:short-eval` and
`bundled:sentence-eval` ask about other facts. demo/build.py makes all of them.

`bundled:mini-reader` knows nothing, but reads. `bundled:sheet` is a text of 40 made-up statements, `bundled:sheet-questions`
asks about them, and `bundled:sheet-questions-eval` in other words. demo/reader.py makes all of them.
"""

from pathlib import Path
from typing import Any

MODEL = "bundled:mini-bloom"
# They know the facts that DATASETS ask for.
MODELS = (MODEL, "bundled:mini-qwen3")
DATASETS = ("bundled:short", "bundled:sentence")
READER, SHEET_QUESTIONS = "bundled:mini-reader", "bundled:sheet-questions"

_DEMO = Path(__file__).parent / "demo"
_PATHS = {
    MODEL: _DEMO / "mini-bloom",
    "bundled:mini-qwen3": _DEMO / "mini-qwen3",
    READER: _DEMO / "mini-reader",
    "bundled:short": _DEMO / "data" / "short.jsonl",
    "bundled:short-eval": _DEMO / "data" / "short-eval.jsonl",
    "bundled:sentence": _DEMO / "data" / "sentence.jsonl",
    "bundled:sentence-eval": _DEMO / "data" / "sentence-eval.jsonl",
    "bundled:sheet": _DEMO / "data" / "sheet.txt",
    SHEET_QUESTIONS: _DEMO / "data" / "sheet.jsonl",
    f"{SHEET_QUESTIONS}-eval": _DEMO / "data" / "sheet-eval.jsonl",
}

# The defaults of train.py for MODELS and DATASETS; tests/benchmarks/README.md shows how they were measured.
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 1,
    "num_train_epochs": 6.0,
    "learning_rate": 5e-3,
    "num_virtual_tokens": 16,
    "eval_exact_match": True,
}
# For READER and SHEET_QUESTIONS, 80 rows.
SHEET_SETTINGS = SETTINGS | {
    "per_device_train_batch_size": 16,
    "num_train_epochs": 60.0,
    "learning_rate": 1e-2,
    "eval_steps": 100,
}


def settings_for(model: str, dataset: str) -> dict[str, Any]:
    """The defaults of train.py that a bundled model has on a bundled dataset; none for any other."""
    if model in MODELS and dataset in DATASETS:
        return SETTINGS
    return SHEET_SETTINGS if (model, dataset) == (READER, SHEET_QUESTIONS) else {}


def resolve(name: str) -> str:
    """The path of a bundled model or dataset; any other name or path unchanged."""
    return str(_PATHS.get(name, name))


def name_of(path: Path) -> str | None:
    """The bundled name of a path, the inverse of `resolve`; None for any other path."""
    return next((name for name, bundled in _PATHS.items() if bundled.resolve() == path), None)
