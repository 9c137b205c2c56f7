"""RUN"""

import torch
from transformers import PreTrainedTokenizerBase

from prefix_tuning import distributed
from prefix_tuning.base_model.identity import base_of
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.base_model.sharding import parts_of_base
from prefix_tuning.data.rows import read_questions
from prefix_tuning.devices import is_out_of_memory, resolve_device, resolve_dtype
from prefix_tuning.errors import UserError
from prefix_tuning.files.prefixes import load_prefix
from prefix_tuning.generation.prefix_bloom import BASE, PrefixBloom
from prefix_tuning.inference.answer_file import answer_file, check_output
from prefix_tuning.inference.ask import ask
from prefix_tuning.inference.score import score
from prefix_tuning.inference.settings import InferConfig


def infer(config: InferConfig) -> None:
    """Does what `config` asks for. Of several processes that torchrun has started, each answers its part of a file.

    Raises UserError for a mistake in the settings or the data.
    """
    device = resolve_device(config.device)
    with distributed.processes(device):
        _infer(config, device)


def _infer(config: InferConfig, device: torch.device) -> None:
    parts = parts_of_base(config.shard_base, config.shard_degree)
    if distributed.world_size() > 1 and not (config.input or config.shard_base):
        raise UserError("several processes can share an --input or, by --shard_base, a base; else start infer.py alone")
    names = [BASE, *config.named_prefixes()]
    rows = sum(1 for _ in read_questions(config.input, names)) if config.input else 0  # no mistake waits for the model
    if config.output:
        check_output(config)
    model, tokenizer = open_model(config, device, parts)
    try:
        if config.chat:
            from prefix_tuning.inference.chat import Chat  # readline, which it imports, is for terminals only

            Chat(config, model, tokenizer).run()
        elif config.input:
            answer_file(config, model, tokenizer, rows)
        elif config.score:
            score(config, model, tokenizer)
        else:
            ask(config, model, tokenizer)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        hint = f"lower --batch_size (it was {config.batch_size}), and --resume" if config.input else "ask for less"
        raise UserError(f"{model.device} ran out of memory; {hint}") from error


def open_model(config: InferConfig, device: torch.device, parts: int | None) -> tuple[PrefixBloom, PreTrainedTokenizerBase]:
    """The base, of which so many processes may share a copy, with all prefixes attached; and its tokenizer."""
    folders = config.named_prefixes()
    prefixes = {name: load_prefix(folder) for name, folder in folders.items()}
    first = next(iter(prefixes))
    base_name = config.model_name_or_path or base_of(folders[first], prefixes[first].recorded_base["name_or_path"])
    base, tokenizer = load_base(base_name, resolve_dtype(config.precision, device), device, parts)
    model = PrefixBloom(base, tokenizer)
    for name, prefix in prefixes.items():
        model.attach(name, prefix, config.force)
    return model, tokenizer
