"""A study from its settings to its files: what is measured, in which order, and the page that shows it."""

import json
import math
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
from prefix_tuning.data.rows import ASKED, tokenize
from prefix_tuning.data.templates import Talk, Template, end_of, prompt_ids, talk_of
from prefix_tuning.demo.knowledge import load_relations, quiz, quiz_questions
from prefix_tuning.devices import out_of_memory_explained, resolve_device, suggested_max_tokens
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import CONFIG_FILE
from prefix_tuning.files.reading import locate
from prefix_tuning.files.writing import atomic_write
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.inference.ask import common_template
from prefix_tuning.inference.run import open_model
from prefix_tuning.model.batch import Batch
from prefix_tuning.settings import MAX_LENGTH
from prefix_tuning.study.growth import growth, some_checkpoints
from prefix_tuning.study.mixing import mixtures, passes_of_mixtures
from prefix_tuning.study.page import write_page
from prefix_tuning.study.question import follow
from prefix_tuning.study.removal import passes_of_removals, removals
from prefix_tuning.study.scoring import pack_rows, spaced, spaced_indices
from prefix_tuning.study.sections import sections_of, summary
from prefix_tuning.study.settings import StudyConfig
from prefix_tuning.study.shares import attention_shares
from prefix_tuning.study.texts import say
from prefix_tuning.study.vectors import nearest_words, prefix_norms, score_base
from prefix_tuning.training.checkpoints import find_checkpoints

# Rows that are used by default: ROWS, or ROWS_OF_LARGE for a base of more than LARGE weights.
ROWS, ROWS_OF_LARGE, LARGE = 200, 20, 100_000_000
GROWTH_ROWS = 64  # rows on which attention is measured at every checkpoint
QUIZ_QUESTIONS = 4  # for each row of a dataset
# Quiz questions are answered QUESTIONS_AT_ONCE; one takes as long as QUIZ_COST rows in a forward pass.
QUESTIONS_AT_ONCE, QUIZ_COST = 320, 2
BAR = "{desc}{percentage:.0f} %|{bar}| about {remaining} left"


class Rows(NamedTuple):
    """The rows of a dataset that a prefix is studied on.

    there: number of rows in the dataset. used: number of rows in `batches`, evenly spaced and with labels. cut: how many of
    these were cut. few_used: number of rows in `few`, a part of the used ones. prompt: the token ids of the question that is
    followed.
    """

    name: str
    batches: list[Batch]
    few: list[Batch]
    few_used: int
    used: int
    cut: int
    there: int
    prompt: list[int]


def study(config: StudyConfig) -> None:
    """Measures what `config` asks for and writes the page and its numbers. Raises UserError for mistakes in the settings."""
    device, folders = resolve_device(config.device), config.named_prefixes()
    names = {name: config.dataset or trained_on(name, folder) for name, folder in folders.items()}
    given, splits = parse_columns(config.columns), ("validation", "test", "train")
    # Rows are read before the base, which may take minutes to load.
    sets = {name: load_rows(name, splits, given) for name in dict.fromkeys(names.values())}
    model, tokenizer = open_model(folders, config, device)
    with out_of_memory_explained(device, lambda: "try --precision auto, or a shorter --question"):
        rows = {name: prepare(name, one, config, model, tokenizer) for name, one in sets.items()}
        numbers = measure_prefixes(model, tokenizer, folders, {name: rows[dataset] for name, dataset in names.items()})
    page, numbers = Path(config.output), rounded(numbers, math.nan)
    with atomic_write(page.with_suffix(".json")) as draft:
        draft.write_text(json.dumps(rounded(numbers, None), ensure_ascii=False), "utf-8")
    write_page(page, say("title"), summary(numbers), sections_of(numbers))
    print(f"{page}: open it in a browser; the numbers are in {page.with_suffix('.json')}")


def rounded(value: Any, not_finite: float | None) -> Any:
    """Dicts and lists of numbers and texts, with floats rounded to 6 digits. not_finite: replaces infinity and NaN, which
    JSON does not have.
    """
    if isinstance(value, dict):
        return {name: rounded(one, not_finite) for name, one in value.items()}
    if isinstance(value, list):
        return [rounded(one, not_finite) for one in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else not_finite
    return value


def trained_on(name: str, folder: str) -> str:
    """The dataset that a prefix's folder names: the held-out rows of its training, else the training rows.

    Raises UserError if the folder names none, or only a local file, whose path it does not record.
    """
    path = locate(folder, CONFIG_FILE)
    try:
        settings = json.loads(path.read_text("utf-8")) if path else {}
        found = [settings["eval_dataset"], settings["dataset"]]
    except (OSError, ValueError, KeyError, TypeError):
        found = []
    known = next((dataset for dataset in found if dataset and not dataset.startswith(LOCAL)), None)
    if known is None:
        raise UserError(f"--prefix {name}: does not say where its rows are; name rows with answers: --dataset ROWS")
    return known


def prepare(name: str, rows: Dataset, config: StudyConfig, model: PrefixBloom, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Some of the rows of a dataset, tokenised. Raises UserError if none has a label left, or the question is too long."""
    wanted = config.rows or (ROWS if model.num_parameters() <= LARGE else ROWS_OF_LARGE)
    chosen = spaced(rows, wanted)
    template = common_template(model)
    tokenized = tokenize(chosen, tokenizer, MAX_LENGTH, template)
    if not len(tokenized):
        raise UserError(f"{name}: no row has a label left; every prompt fills {MAX_LENGTH} tokens")
    max_tokens = suggested_max_tokens(model, gathers=False)
    few = spaced(tokenized, GROWTH_ROWS)
    return Rows(
        portable_name(name).removeprefix(LOCAL),
        pack_rows(tokenized, max_tokens),
        pack_rows(few, max_tokens),
        few_used=len(few),
        used=len(tokenized),
        cut=sum(ids[-1] != end_of(tokenizer, template) for ids in tokenized["input_ids"]),
        there=len(rows),
        prompt=_prompt(config.question, chosen, tokenizer, template),
    )


def _prompt(question: str | None, rows: Dataset, tokenizer: PreTrainedTokenizerBase, template: Template) -> list[int]:
    """The question to follow as token ids: the given one, else the first row's that fits, a talk's turns included."""
    if question:
        (ids,) = prompt_ids(tokenizer, [talk_of(question)], template)
        if len(ids) > MAX_LENGTH:
            raise UserError(f"--question takes {len(ids)} tokens; it must fit into {MAX_LENGTH}")
        return ids
    talks = [talk_of(*(row[name] for name in ASKED)) for row in rows]
    # If all talks are too long, the first turn of one fits: a row has a label.
    talks += [Talk(talk.texts[:1], talk.system) for talk in talks]
    return next(ids for ids in prompt_ids(tokenizer, talks, template) if len(ids) <= MAX_LENGTH)


def measure_prefixes(
    model: PrefixBloom, tokenizer: PreTrainedTokenizerBase, folders: dict[str, str], rows: dict[str, Rows]
) -> dict:
    """All numbers of the study, as study.json holds them. folders, rows: of each prefix, by name."""
    names, tensors = list(model.prefixes), model.prefixes
    pairs = [(names[0], other) for other in names[1:]]
    used = max(one.used for one in rows.values())
    every = _quiz_of(model)
    facts = [every[index] for index in spaced_indices(len(every), QUIZ_QUESTIONS * used)]
    sets = {one.name: one for one in rows.values()}
    total = sum(one.used for one in sets.values()) + QUIZ_COST * len(facts) * len(model.names)
    growing = {
        name: rows[name].few_used * (len(some_checkpoints(find_checkpoints(Path(folders[name])))) + 1) for name in names
    }
    total += sum(growing[name] + rows[name].used * (1 + passes_of_removals(model, tensors[name])) for name in names)
    for pair in pairs:
        passes = passes_of_mixtures(*(tensors[name] for name in pair))
        total += passes * sum({rows[name].name: rows[name].used for name in pair}.values())
    print(
        f"{total:,} rows pass through the base: the same {used} for each part of a prefix that is removed; "
        f"--rows {max(1, used // 4)} takes a quarter of the time"
    )

    with tqdm(total=total, bar_format=BAR) as bar:
        # One pass of the base alone serves all prefixes that are studied on the same rows.
        alone = {}
        for name, one in sets.items():
            bar.set_description("base")
            alone[name] = score_base(model, one.batches)
            bar.update(one.used)
        prefixes = {}
        for name, prefix in tensors.items():
            own = rows[name]
            scored, norms = alone[own.name]
            bar.set_description(f"{name}: attention")
            shares = attention_shares(model, own.batches, prefix)
            bar.update(own.used)
            bar.set_description(f"{name}: without a part")
            removed = removals(model, own.batches, prefix, shares["share"], scored, bar.update)
            bar.set_description(f"{name}: checkpoints")
            grown = growth(model, own.few, Path(folders[name]), prefix)
            bar.update(growing[name])
            prefixes[name] = {
                "dataset": own.name,
                "rows": own.used,
                "rows_cut": own.cut,
                "rows_there": own.there,
                "num_virtual_tokens": prefix.shape[3],
                "key_value_heads": prefix.shape[2],
                "attention": shares,
                "question": follow(model, tokenizer, own.prompt, name, shares["share"]),
                "removal": removed,
                "growth": grown,
                "norms": {"text": norms, "prefix": prefix_norms(prefix)},
                "nearest_words": nearest_words(model, tokenizer, prefix),
            }
        found = []
        for first, second in pairs:
            bar.set_description(f"{first} and {second}")
            both = {rows[name].name: rows[name].batches for name in (first, second)}
            mixed = mixtures(model, both, tensors[first], tensors[second], bar.update)
            found.append({"first": first, "second": second, **mixed})
        right = {}
        for name in model.names if facts else ():
            bar.set_description(f"{name}: quiz")
            right[name] = _quizzed(model, tokenizer, facts, name, bar.update)
    return {
        "base": portable_name(model.name_or_path or ""),
        "precision": str(model.dtype).removeprefix("torch."),
        "prefixes": prefixes,
        "pairs": found,
        "quiz": {"questions": len(facts), "there": len(every), "right": right} if facts else None,
    }


def _quizzed(
    model: PrefixBloom, tokenizer: PreTrainedTokenizerBase, facts: list, name: str, advance: Callable[[int], object]
) -> float:
    """The share of the questions that the prefix `name` answers right."""
    right = 0.0
    for start in range(0, len(facts), QUESTIONS_AT_ONCE):
        some = facts[start : start + QUESTIONS_AT_ONCE]
        right += len(some) * quiz(model, tokenizer, some, name)
        advance(QUIZ_COST * len(some))
    return right / len(facts)


def _quiz_of(model: PrefixBloom) -> list:
    """Questions about everything that a bundled base learnt in pre-training. Bases that know no facts have none."""
    if portable_name(model.name_or_path or "") not in bundled.MODELS:
        return []
    return [question for relation in load_relations() for question in quiz_questions(relation)]
