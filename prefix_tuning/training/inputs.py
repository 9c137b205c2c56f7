"""What a run reads before anything is trained: the frozen base and the rows."""

from typing import NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from prefix_tuning import distributed
from prefix_tuning.base_model.identity import fingerprint
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.base_model.sharding import parts_of_base
from prefix_tuning.data.columns import parse_columns
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import cut_answers, digest, encode, has_history, with_labels
from prefix_tuning.devices import suggested_max_tokens
from prefix_tuning.errors import UserError
from prefix_tuning.model.bloom import Bloom
from prefix_tuning.training.settings import DEFAULT_HELD_OUT, FEWEST_TO_SPLIT, MOST_HELD_OUT, TrainConfig


class Inputs(NamedTuple):
    """The frozen base, its tokenizer and its `fingerprint`, and the rows.

    train_set, eval_set: the tokenised training rows and, if there are any, held-out rows. has_history: whether any training
    row has history. max_tokens: of one forward pass. contents: for each setting whose name may change in a resume but not
    its data, a hash of that data.
    """

    base: Bloom
    tokenizer: PreTrainedTokenizerBase
    fingerprint: dict
    train_set: Dataset
    eval_set: Dataset | None
    has_history: bool
    max_tokens: int
    contents: dict[str, object]


def read_inputs(config: TrainConfig, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Reads rows and base. All ranks call this together. Raises UserError for what cannot be read or used."""
    parts = parts_of_base(config.shard_base, config.shard_degree)
    with distributed.local_main_first():  # one process per machine prepares the rows, the others find them cached
        train_rows, eval_rows = load_splits(config)
    base, tokenizer = load_base(
        config.model_name_or_path, dtype, device, parts, config.gradient_checkpointing, config.torch_compile
    )
    base_fingerprint = fingerprint(base, tokenizer)
    max_tokens = config.max_tokens_per_batch or suggested_max_tokens(base, gathers=parts is not None)
    with distributed.local_main_first():
        train_set = tokenize_rows(config.dataset, train_rows, tokenizer, config.max_length)
        held_out = config.eval_dataset or f"the rows held out of {config.dataset}"
        eval_set = eval_rows and tokenize_rows(held_out, eval_rows, tokenizer, config.max_length)
    contents = {
        "model_name_or_path": {key: value for key, value in base_fingerprint.items() if key != "name_or_path"},
        "dataset": digest(train_set),
        "eval_dataset": eval_set and digest(eval_set),
    }
    history = has_history(encode(train_rows, tokenizer, config.max_length))  # from the cache
    return Inputs(base, tokenizer, base_fingerprint, train_set, eval_set, history, max_tokens, contents)


def load_splits(config: TrainConfig) -> tuple[Dataset, Dataset | None]:
    """The training rows, and the held-out rows if there are to be any."""
    given = parse_columns(config.columns)
    rows = load_rows(config.dataset, ("train",), given)
    if config.eval_dataset:
        return rows, load_rows(config.eval_dataset, ("validation", "test", "train"), given)
    held_out = number_held_out(config, len(rows))
    if not held_out:
        return rows, None
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(config.seed))
    chosen, others = (part.sort().values.numpy() for part in (order[:held_out], order[held_out:]))
    return rows.select(others), rows.select(chosen)


def number_held_out(config: TrainConfig, rows: int) -> int:
    """How many of so many rows are held out, without --eval_dataset. Raises UserError if a flag needs some and there are
    none, or if none is left to train on.
    """
    if config.eval_fraction is None:
        if rows >= FEWEST_TO_SPLIT:
            return min(round(DEFAULT_HELD_OUT * rows), MOST_HELD_OUT)
        if flags := config.need_held_out():
            reason = f"{rows} rows are too few to hold some out by default"
            raise UserError(f"{config.dataset}: {reason}; give --eval_dataset or --eval_fraction, or leave out {flags}")
        return 0
    held_out = round(rows * config.eval_fraction)
    if config.eval_fraction and not 0 < held_out < rows:
        raise UserError(f"--eval_fraction {config.eval_fraction} of {rows} rows leaves one side empty")
    return held_out


def tokenize_rows(name: str, rows: Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Dataset:
    """The tokens of the rows, and a line each about the rows that lost all their labels to truncation, and about the answers
    that were cut. Raises UserError if no row is left.
    """
    encoded = encode(rows, tokenizer, max_length)
    tokenized = with_labels(encoded)
    if not len(tokenized):
        raise UserError(f"{name}: no row has a label left; every prompt fills --max_length {max_length}")
    if dropped := len(rows) - len(tokenized):
        print(f"{name}: left out {dropped} of {len(rows)} rows, whose prompts alone fill --max_length {max_length}")
    cut, answers, longest = cut_answers(encoded)
    if cut:
        print(f"{name}: {cut} of {answers} answers are cut or left out; --max_length {longest} would keep them all")
    return tokenized
