"""What infer.py does: answer one question, answer a file of them, score given answers. chat.py has the conversation.

Only answers go to stdout; all else goes to stderr.
"""

import itertools
import json
import math
import os
import signal
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, TextStreamer

from prefix_tuning import demo, distributed
from prefix_tuning.bloom import is_out_of_memory, load_base, max_tokens_per_batch, resolve_device, resolve_dtype
from prefix_tuning.checkpoint import base_of, load_prefix, write_json
from prefix_tuning.config import InferConfig, Interrupted, UserError
from prefix_tuning.data import load_rows, prompt_of, read_questions, tokenize
from prefix_tuning.evaluation import perplexity, row_losses
from prefix_tuning.generation import BASE, PrefixBloom, complete_batches
from prefix_tuning.sharding import parts_of_base
from prefix_tuning.text import display_width, pad, shorten

WINDOW = 8  # batches of a file that are sorted by length together


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
            from prefix_tuning.chat import Chat  # readline, which it imports, is for terminals only

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
    base_name = config.model_name_or_path or base_of(folders[first], prefixes[first].base["name_or_path"])
    base, tokenizer = load_base(base_name, resolve_dtype(config.precision, device), device, parts)
    model = PrefixBloom(base, tokenizer)
    for name, prefix in prefixes.items():
        model.attach(name, prefix, config.force)
    return model, tokenizer


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


def check_output(config: InferConfig) -> None:
    """Raises UserError if --output is there already and is not to be gone on with, or has no place."""
    output = Path(config.output)
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {config.output}: there is no such folder; make it, or name another file")
    if output.exists() and not output.is_file():
        raise UserError(f"--output {config.output} is no file; name another")
    if output.exists() and config.input and output.samefile(demo.resolve(config.input)):
        raise UserError(f"--output {config.output} is the --input; name another file")
    if output.exists() and not config.resume:
        hint = "go on with it by --resume, or name another" if config.input else "name another"
        raise UserError(f"--output {config.output} is there already; {hint}")


def answer_file(config: InferConfig, model: PrefixBloom, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Answers the `rows` questions of config.input; writes them with their responses, in their order, as they are done.

    A run that stops, for whatever reason, leaves whole lines but for the last, and config.resume goes on behind them.
    """
    output, options = Path(config.output), decoding_options(config)
    names, main, processes = model.names, distributed.is_main(), distributed.world_size()
    questions, window = read_questions(config.input, names), WINDOW * config.batch_size * processes
    done = 0
    try:
        done = distributed.from_main(rows_done(config, names) if main else 0)
        with (
            open(output if main else os.devnull, "a", encoding="utf-8", errors="backslashreplace", newline="\n") as file,
            tqdm(total=rows, initial=done, unit="row", disable=not main) as bar,
        ):
            for position in range(0, rows, window):
                part = list(itertools.islice(questions, window))
                if position + len(part) <= done:
                    continue
                own = distributed.share(part)
                batches = complete_batches(
                    model,
                    tokenizer,
                    [prompt for _, prompt, _ in own],
                    [prefix or model.active for _, _, prefix in own],
                    config.batch_size,
                    config.seed,
                    distributed.share(range(position, position + len(part))),
                    first=max(0, done - position) // processes,
                    **options,
                )
                answers: dict[int, list[str]] = {}
                # Every process takes as many turns, some of them empty: they meet after each.
                for _ in range(math.ceil(math.ceil(len(part) / processes) / config.batch_size)):
                    with model.in_step():
                        mine = next(batches, ([], []))
                    for process, (places, completions) in enumerate(distributed.gather(mine)):
                        answers.update(zip((place * processes + process for place in places), completions, strict=True))
                    while done - position in answers:
                        row, response = part[done - position][0], answers[done - position]
                        response = response if config.num_return_sequences > 1 else response[0]
                        file.write(_line(row | {"response": response}) + "\n")
                        done += 1
                        bar.update()
                    file.flush()
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}; mend that and go on with --resume") from error
    except KeyboardInterrupt:
        raise Interrupted(f"stopped after {done} of {rows} rows; go on with --resume", signal.SIGINT) from None
    if main:
        print(f"{rows} rows answered: {output}", file=sys.stderr)


def rows_done(config: InferConfig, names: list[str]) -> int:
    """How many rows of config.input have their line in config.output. What a kill left of a line is cut off.

    Raises UserError if the lines are not those of the input's rows.
    """
    output = Path(config.output)
    if not output.exists():
        return 0
    with open(output, "rb+") as file:
        kept = 0
        for number, (line, question) in enumerate(itertools.zip_longest(file, read_questions(config.input, names))):
            if line is None:
                return number
            # The line up to the response, which is for the model to say.
            start = _line(question[0] | {"response": ""})[:-3].encode(errors="backslashreplace") if question else b"?"
            if not line.endswith(b"\n") and (line.startswith(start) or start.startswith(line)):
                file.truncate(kept)
                return number
            if not line.startswith(start) or not line.endswith(b"}\n"):
                raise UserError(f"{output}, line {number + 1}: does not answer row {number + 1} of {config.input}")
            kept += len(line)
    return number + 1


def _line(row: dict) -> str:
    """A row as JSON, which has no dates (these become text), and no NaN or infinity (null)."""
    row = json.loads(json.dumps(row, default=str), parse_constant=lambda name: None)
    return json.dumps(row, ensure_ascii=False)


def score(config: InferConfig, model: PrefixBloom, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prints loss and perplexity of every row's answer, and over all labels, by the base and every prefix."""
    with distributed.first_on_each_machine():
        rows = load_rows(config.score, splits=("test", "validation", "train"))
        tokenized = tokenize(rows, tokenizer, max_length=sys.maxsize)
    names, max_tokens = model.names, max_tokens_per_batch(model)
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
