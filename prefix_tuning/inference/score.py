"""SCORE"""

import sys
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from prefix_tuning import distributed
from prefix_tuning.base_model.sharding import is_sharded
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import tokenize
from prefix_tuning.devices import suggested_max_tokens
from prefix_tuning.evaluation import perplexity, row_losses
from prefix_tuning.files.writing import write_json
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.inference.settings import InferConfig
from prefix_tuning.text import display_width, shorten


def score(config: InferConfig, model: PrefixBloom, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prints loss and perplexity of every row's answer, and over all labels, by the base and every prefix."""
    with distributed.local_main_first():
        rows = load_rows(config.score, splits=("test", "validation", "train"))
        tokenized = tokenize(rows, tokenizer, max_length=sys.maxsize)
    names, max_tokens = model.names, suggested_max_tokens(model, is_sharded(model))
    figures = []
    for name in names:
        losses = row_losses(model, tokenized, model.prefixes.get(name), max_tokens)
        figures.append(list(tqdm(losses, total=len(rows), unit="row", desc=name, disable=not distributed.is_main())))
    sums = [tuple(map(sum, zip(*column, strict=True))) for column in figures]
    lines = []
    for pairs in [*zip(*figures, strict=True), sums]:
        means = {name: loss / labels for name, (loss, labels) in zip(names, pairs, strict=True)}
        perplexities = {name: perplexity(mean) for name, mean in means.items()}
        lines.append({"labels": pairs[0][1], "loss": means, "perplexity": perplexities})
    columns = "".join(f"    {name} loss{'perplexity':>12}" for name in names)
    print(f"{'row':>6}{'labels':>8}{columns}  question")
    labels = [*((str(number), row["instruction"]) for number, row in enumerate(rows, start=1)), ("all", "")]
    for (number, question), line in zip(labels, lines, strict=True):
        columns = (f"{line['loss'][name]:>{display_width(name) + 9}.4f}{line['perplexity'][name]:>12.5g}" for name in names)
        print(f"{number:>6}{line['labels']:>8}{''.join(columns)}  {shorten(question, 60)}".rstrip())
    if config.output and distributed.is_main():
        *each, mean = lines
        write_json(Path(config.output), {"rows": [row | line for row, line in zip(rows, each, strict=True)], "all": mean})
