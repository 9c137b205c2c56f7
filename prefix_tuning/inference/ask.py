"""ASK"""

import os
import sys

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer

from prefix_tuning.data.rows import prompt_of
from prefix_tuning.errors import UserError
from prefix_tuning.generation.prefix_bloom import BASE, PrefixBloom
from prefix_tuning.inference.settings import InferConfig
from prefix_tuning.text import display_width, pad


def decoding_options(config: InferConfig) -> dict:
    """The settings of the dataclass DecodingArguments as options of transformers' `generate`."""
    names = ["do_sample", "repetition_penalty", "num_beams", "num_return_sequences"]
    if config.do_sample:
        names += ["temperature", "top_p", "top_k"]
    options = {name: getattr(config, name) for name in names}
    if config.cache == "static":
        options["cache_implementation"] = "static"
    return options | {"max_new_tokens": config.max_new_tokens or 128}


def ask(config: InferConfig, model: PrefixBloom, tokenizer: PreTrainedTokenizerBase) -> None:
    """Answers config.question, by the base and by every prefix if these are to be compared."""
    prompt, options = prompt_of(config.question), decoding_options(config)
    if config.max_length:
        taken = len(tokenizer(prompt, split_special_tokens=True).input_ids)
        if config.max_length <= taken:
            raise UserError(f"--max_length {config.max_length} leaves no room for an answer; the question takes {taken}")
        options["max_new_tokens"] = config.max_length - taken
    for name in model.names if config.compare else [model.active]:
        label = title(name, model) if config.compare else ""
        with model.in_step():  # several processes that share the base say the same; main is heard
            say(model, tokenizer, prompt, name, config.seed, options, label)


def say(
    model: PrefixBloom,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    prefix: str,
    seed: int,
    options: dict,
    label: str = "",
    said: list[str] | None = None,
) -> None:
    """Prints the answer to one prompt, as it comes, and a line for each answer where there are several.

    label: stands before each. said: gets the pieces that were printed; they remain if Ctrl-C ends the answer.
    """
    torch.manual_seed(seed)
    streamer = _Streamer(tokenizer, said if said is not None else [])
    streams = options["num_beams"] == options["num_return_sequences"] == 1
    inputs = tokenizer([prompt], return_tensors="pt", split_special_tokens=True).to(model.device)
    if streams:
        print(label, end="", flush=True)
    output = model.generate(
        **inputs,
        prefix_name=prefix,
        pad_token_id=tokenizer.pad_token_id,
        streamer=streamer if streams else None,
        tokenizer=tokenizer,  # for stop_strings, which the base may ask for
        return_dict_in_generate=False,
        **options,
    )
    if not streams:
        for text in tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True):
            print(label, end="")
            streamer.on_finalized_text(text, stream_end=True)


class _Streamer(TextStreamer):
    """Prints an answer piece by piece, and keeps the pieces."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, said: list[str]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.said = said

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.said.append(text)
        super().on_finalized_text(text, stream_end)


def title(name: str, model: PrefixBloom) -> str:
    """What stands before an answer that is compared with others: in colour on a terminal that has it."""
    text = pad(name, max(map(display_width, model.names))) + "  "
    if not sys.stdout.isatty() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb":
        return text
    return f"\033[{33 if name == BASE else 36}m{text}\033[0m"  # yellow, cyan
