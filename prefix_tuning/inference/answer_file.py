"""AF"""

import itertools
import json
import math
import os
import signal
import sys
from pathlib import Path

from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from prefix_tuning import bundled, distributed
from prefix_tuning.data.rows import read_questions
from prefix_tuning.errors import Interrupted, UserError
from prefix_tuning.generation.batches import complete_batches
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.inference.ask import decoding_options
from prefix_tuning.inference.settings import InferConfig

WINDOW = 8  # batches of a file that are sorted by length together


def check_output(config: InferConfig) -> None:
    """Raises UserError if --output is there already and is not to be gone on with, or has no place."""
    output = Path(config.output)
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {config.output}: there is no such folder; make it, or name another file")
    if output.exists() and not output.is_file():
        raise UserError(f"--output {config.output} is no file; name another")
    if output.exists() and config.input and output.samefile(bundled.resolve(config.input)):
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
        done = distributed.broadcast_object(rows_done(config, names) if main else 0)
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
