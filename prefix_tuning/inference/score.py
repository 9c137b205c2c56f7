"""Computes loss and perplexity of given answers, with the base alone and with every prefix."""

import sys
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from prefix_tuning import distributed
from prefix_tuning.base_model.sharding import is_sharded
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import tokenize
from prefix_tuning.data.templates import has_system
from prefix_tuning.devices import suggested_max_tokens
from prefix_tuning.evaluation import perplexity, score_rows
from prefix_tuning.files.writing import write_json
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.inference.ask import common_template, note_system_texts
from prefix_tuning.text import display_width, shorten


def score(
    model: PrefixBloom,
    tokenizer: PreTrainedTokenizerBase,
    dataset: str,
    given: Mapping[str, str],
    output: str | None,
) -> None:
    """Prints a table with a line for each row of the dataset, and one over the labels of all rows.

    given: the parsed --columns. output: a file that also gets the table, as JSON. Raises UserError for prefixes of different
    templates: their losses are of different tokens.
    """
    template = common_template(model)
    with distributed.local_main_first():
        rows = load_rows(dataset, splits=("test", "validation", "train"), given=given, say=distributed.note)
        if has_system(rows):
            note_system_texts(model, tokenizer)
        tokenized = tokenize(rows, tokenizer, sys.maxsize, template, dataset)
    names, max_tokens = model.names, suggested_max_tokens(model, is_sharded(model))
    columns = []  # one per name: (summed loss in nats, number of labels) of each row, and then of all rows
    for name in names:
        scores = score_rows(model, tokenized, model.prefixes.get(name), max_tokens)
        shown = tqdm(scores, total=len(rows), unit="row", desc=name, disable=not distributed.is_main())
        column = [(score.loss, score.labels) for score in shown]
        columns.append([*column, tuple(map(sum, zip(*column, strict=True)))])
    figures = []
    for pairs in zip(*columns, strict=True):
        means = {name: loss / labels for name, (loss, labels) in zip(names, pairs, strict=True)}
        perplexities = {name: perplexity(mean) for name, mean in means.items()}
        figures.append({"labels": pairs[0][1], "loss": means, "perplexity": perplexities})
    _print_table(names, list(rows["instruction"]), figures)
    if output and distributed.is_main():
        *each, mean = figures
        write_json(Path(output), {"rows": [row | line for row, line in zip(rows, each, strict=True)], "all": mean})


def _print_table(names: list[str], questions: list[str], figures: list[dict]) -> None:
    """figures: a dict for each question, and then one for all."""
    columns = "".join(f"    {name} loss{'perplexity':>12}" for name in names)
    print(f"{'row':>6}{'labels':>8}{columns}  question")
    labels = [*((str(number), question) for number, question in enumerate(questions, start=1)), ("all", "")]
    for (number, question), line in zip(labels, figures, strict=True):
        cells = (f"{line['loss'][name]:>{display_width(name) + 9}.4f}{line['perplexity'][name]:>12.5g}" for name in names)
        print(f"{number:>6}{line['labels']:>8}{''.join(cells)}  {shorten(question, 60)}".rstrip())
