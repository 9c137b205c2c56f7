"""A study from its settings to its files: what is measured, in which order, and the page that is made of it."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from prefix_tuning import bundled
from prefix_tuning.base_model.identity import LOCAL, portable_name
from prefix_tuning.data.columns import parse_columns
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import tokenize
from prefix_tuning.demo.build import load_relations, quiz, quiz_questions
from prefix_tuning.devices import out_of_memory_explained, resolve_device, suggested_max_tokens
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import CONFIG_FILE
from prefix_tuning.files.writing import write_json
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.inference.run import open_model
from prefix_tuning.model.batch import Batch
from prefix_tuning.settings import MAX_LENGTH
from prefix_tuning.study.growth import growth
from prefix_tuning.study.mixing import mixtures
from prefix_tuning.study.page import write_page
from prefix_tuning.study.question import follow
from prefix_tuning.study.removal import removals
from prefix_tuning.study.scoring import batches_of
from prefix_tuning.study.sections import say, sections_of, summary
from prefix_tuning.study.settings import StudyConfig
from prefix_tuning.study.shares import attention_shares
from prefix_tuning.study.vectors import nearest_words, prefix_norms, text_norms

ROWS, ROWS_OF_LARGE, LARGE = 200, 20, 100_000_000  # rows that are used by default, of a base with more weights than this
GROWTH_ROWS = 64  # on which attention is measured at every checkpoint


class Rows(NamedTuple):
    """Rows that a prefix is studied on. question: that of the first row. there: how many the dataset has."""

    name: str
    batches: list[Batch]
    used: int
    there: int
    question: str

    def few(self, rows: int) -> list[Batch]:
        """The first batches, of at least so many rows if there are as many."""
        ends = itertools.accumulate(batch.rows for batch in self.batches)
        return [batch for batch, end in zip(self.batches, ends, strict=True) if end - batch.rows < rows]


def study(config: StudyConfig) -> None:
    """Measures what `config` asks for and writes the page and its numbers. Raises UserError for mistakes in the settings."""
    device, folders = resolve_device(config.device), config.named_prefixes()
    names = {name: config.dataset or trained_on(name, folder) for name, folder in folders.items()}
    model, tokenizer = open_model(folders, config, device)
    sets = {name: read_rows(name, config, model, tokenizer) for name in dict.fromkeys(names.values())}
    with out_of_memory_explained(device, lambda: "lower --rows"):
        numbers = measure(
            model, tokenizer, folders, {name: sets[dataset] for name, dataset in names.items()}, config.question
        )
    page = Path(config.output)
    write_json(page.with_suffix(".json"), numbers)
    write_page(page, say("title"), summary(numbers), sections_of(numbers))
    print(f"{page}: open it in a browser; the numbers are in {page.with_suffix('.json')}")


def trained_on(name: str, folder: str) -> str:
    """The dataset that a prefix's folder names: the held-out rows of its training, else the training rows. Raises UserError
    if it names none that can be found by its name.
    """
    path = Path(folder) / CONFIG_FILE
    try:
        settings = json.loads(path.read_text("utf-8"))
        found = [settings["eval_dataset"], settings["dataset"]]
    except (OSError, ValueError, KeyError, TypeError):
        found = []
    known = next((dataset for dataset in found if dataset and not dataset.startswith(LOCAL)), None)
    if known is None:
        raise UserError(f"--prefix {name}: does not say where its rows are; name rows with answers: --dataset ROWS")
    return known


def read_rows(name: str, config: StudyConfig, model: PrefixBloom, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Evenly spaced rows of a dataset. Raises UserError if none has a label left."""
    rows = load_rows(name, ("validation", "test", "train"), parse_columns(config.columns))
    wanted = min(len(rows), config.rows or (ROWS if model.num_parameters() <= LARGE else ROWS_OF_LARGE))
    chosen: Dataset = rows.select([place * len(rows) // wanted for place in range(wanted)])
    tokenized = tokenize(chosen, tokenizer, MAX_LENGTH)
    if not len(tokenized):
        raise UserError(f"{name}: no row has a label left; every prompt fills {MAX_LENGTH} tokens")
    batches = batches_of(tokenized, suggested_max_tokens(model, gathers=False))
    question = "\n".join([chosen[0]["instruction"], chosen[0]["input"]]).strip()
    return Rows(name, batches, len(tokenized), len(rows), question)


def measure(
    model: PrefixBloom,
    tokenizer: PreTrainedTokenizerBase,
    folders: dict[str, str],
    rows: dict[str, Rows],
    question: str | None,
) -> dict:
    """All numbers of the study, as study.json has them. folders, rows: of each prefix, by name. question: to be followed."""
    names = list(model.prefixes)
    pairs = [(names[0], other) for other in names[1:]]
    facts = _quiz_of(model)
    bar = tqdm(total=7 * len(names) + len(pairs) + (len(names) + 1) * bool(facts), unit="part")

    def step(title: str, function: Callable[..., Any], *arguments: Any) -> Any:
        bar.set_description(title)
        result = function(*arguments)
        bar.update()
        return result

    prefixes = {}
    for name, prefix in model.prefixes.items():
        own = rows[name]
        shares = step(f"{name}: attention", attention_shares, model, own.batches, prefix)
        prefixes[name] = {
            "dataset": own.name,
            "rows": own.used,
            "rows_there": own.there,
            "num_virtual_tokens": prefix.shape[3],
            "attention": shares,
            "question": step(f"{name}: question", follow, model, tokenizer, question or own.question, name, shares["share"]),
            "removal": step(f"{name}: removal", removals, model, own.batches, prefix, shares["share"]),
            "growth": step(f"{name}: training", growth, model, own.few(GROWTH_ROWS), Path(folders[name]), prefix),
            "norms": {
                "text": step(f"{name}: norms of text", text_norms, model, own.batches),
                "prefix": step(f"{name}: norms", prefix_norms, prefix),
            },
            "nearest_words": step(f"{name}: words", nearest_words, model, tokenizer, prefix),
        }
    found = []
    for first, second in pairs:
        sets = {rows[name].name: rows[name].batches for name in (first, second)}
        tensors = model.prefixes[first], model.prefixes[second]
        found.append({"first": first, "second": second, **step("two prefixes", mixtures, model, sets, *tensors)})
    right = {name: step(f"{name}: quiz", quiz, model, tokenizer, facts, name) for name in model.names if facts}
    bar.close()
    return {
        "base": portable_name(model.name_or_path or ""),
        "precision": str(model.dtype).removeprefix("torch."),
        "prefixes": prefixes,
        "pairs": found,
        "quiz": {"questions": len(facts), "right": right} if facts else None,
    }


def _quiz_of(model: PrefixBloom) -> list:
    """Questions about all that the bundled base learnt in its pre-training; none for another base."""
    if portable_name(model.name_or_path or "") != bundled.MODEL:
        return []
    return [question for relation in load_relations() for question in quiz_questions(relation)]
