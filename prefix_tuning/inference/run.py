"""A run of infer.py: it loads the model with its prefixes and does one of four tasks."""

from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from prefix_tuning import distributed
from prefix_tuning.base_model.identity import base_of
from prefix_tuning.base_model.loading import add_end, load_base
from prefix_tuning.base_model.sharding import parts_of_base
from prefix_tuning.data.columns import parse_columns
from prefix_tuning.data.templates import end_of
from prefix_tuning.devices import (
    avoid_cudnn_attention,
    describe_dtype,
    out_of_memory_explained,
    resolve_device,
    resolve_dtype,
)
from prefix_tuning.errors import UserError
from prefix_tuning.files.prefixes import load_prefix, recorded_history
from prefix_tuning.generation.prefix_bloom import BASE, PrefixBloom
from prefix_tuning.inference.answer_file import answer_file, check_output
from prefix_tuning.inference.ask import Answerer, ask, note_system_texts, templates_of
from prefix_tuning.inference.settings import InferConfig
from prefix_tuning.settings import MAX_LENGTH, BaseArguments


def infer(config: InferConfig) -> None:
    """Does the task that `config` asks for. If torchrun has started several processes, each answers its share of a file.

    Raises UserError for a mistake in the settings or the data.
    """
    device = resolve_device(config.device)
    avoid_cudnn_attention(device)
    with distributed.processes(device):
        parts = parts_of_base(config.shard_base, config.shard_degree)
        if distributed.world_size() > 1 and not (config.input or config.shard_base):
            raise UserError("several processes can share an --input or, by --shard_base, a base; else start infer.py alone")
        # The files are checked first: loading a model may take minutes.
        given = parse_columns(config.columns)
        systems = []
        if config.input:
            from prefix_tuning.data.rows import read_questions  # it imports `datasets`, half a second that only files need

            questions = partial(read_questions, config.input, [BASE, *config.named_prefixes()], given)
            systems = [talk.system for _, talk, _ in questions(say=distributed.note)]
        if config.output:
            check_output(config.output, config.input, config.resume)
        model, tokenizer = open_model(config.named_prefixes(), config, device, parts)
        if any(systems):
            note_system_texts(model, tokenizer)
        hint = f"lower --batch_size (it was {config.batch_size}), and --resume" if config.input else "ask for less"
        with out_of_memory_explained(model.device, lambda: hint):
            answerer = Answerer(model, tokenizer, decoding_options(config), config.seed)
            if config.chat:
                from prefix_tuning.inference.chat import Chat  # it imports readline, which only a chat needs

                Chat(answerer, config.max_length or MAX_LENGTH, config.compare, names_with_history(config)).run()
            elif config.input and config.output:
                answer_file(answerer, questions, Path(config.output), config.batch_size, len(systems))
            elif config.score:
                from prefix_tuning.inference.score import score  # it imports `datasets`, too

                score(model, tokenizer, config.score, given, config.output)
            elif config.question:
                ask(answerer, config.question, config.max_length, config.compare)


def open_model(
    folders: dict[str, str], config: BaseArguments, device: torch.device, parts: int | None = None
) -> tuple[PrefixBloom, PreTrainedTokenizerBase]:
    """The base with all prefixes attached, and its tokenizer.

    folders: name of each prefix -> its folder. If `config` names no base, the base of the first prefix is used. parts:
    number of processes that share one copy of the base.
    """
    prefixes = {name: load_prefix(folder) for name, folder in folders.items()}
    first = next(iter(prefixes))
    base_name = config.model_name_or_path or base_of(folders[first], prefixes[first].recorded_base["name_or_path"])
    dtype = resolve_dtype(config.precision, device)
    distributed.note(describe_dtype(dtype, config.precision, device))
    base, tokenizer = load_base(base_name, dtype, device, parts)
    model = PrefixBloom(base, tokenizer)
    for name, prefix in prefixes.items():
        model.attach(name, prefix, config.force)
        try:
            end = end_of(tokenizer, templates_of(model)[name])
        except UserError as error:
            raise UserError(f"{name}: {error}; use the base that it was trained on") from error
        add_end(model.generation_config, end, f"{name}: its template")
    return model, tokenizer


def names_with_history(config: InferConfig) -> set[str]:
    """The names that read the whole conversation in --chat: prefixes whose files record history in their training rows or,
    with --history, all prefixes. If there are any, the base is among them too: it can read any text.
    """
    names = {name for name, folder in config.named_prefixes().items() if config.history or recorded_history(folder)}
    return names | {BASE} if names else names


def decoding_options(config: InferConfig) -> dict:
    """The flags of the group "decoding", as options for transformers' `generate`."""
    names = ["do_sample", "repetition_penalty", "num_beams", "num_return_sequences"]
    if config.do_sample:
        names += ["temperature", "top_p", "top_k"]
    options = {name: getattr(config, name) for name in names}
    if config.cache == "static":
        options["cache_implementation"] = "static"
    # In a chat, an answer takes at most half of max_length, and the rest is for the conversation.
    longest = min(128, (config.max_length or MAX_LENGTH) // 2) if config.chat else 128
    return options | {"max_new_tokens": config.max_new_tokens or longest}
