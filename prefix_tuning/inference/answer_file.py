"""A file of questions: each row is written with its response, in the order of the rows, while others are being answered."""

import codecs
import itertools
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prefix_tuning import bundled, distributed
from prefix_tuning.data.rows import Question, prompt_ids
from prefix_tuning.errors import Interrupted, UserError
from prefix_tuning.generation.batches import Prompt, batches_of, complete_batch, tokens_at_once
from prefix_tuning.inference.ask import Answerer

Questions = Callable[[], Iterator[Question]]  # reads the --input once more
WINDOW = 8  # batches per process whose rows are sorted by length together

# A response, which is a string or a list of strings, up to some byte before the end of its line.
_STRING = rb'"(?:[^"\\]|\\.)*"'
_CUT = re.compile(rb'(?:\[(?:%s, ?)*)?(?:"(?:[^"\\]|\\.)*\\?|%s\]?)?' % (_STRING, _STRING))


def check_output(output: str, source: str | None, resume: bool) -> None:
    """Raises UserError if --output cannot be written: it is there and not to be continued, or its folder is missing.

    source: the file of --input, if there is one.
    """
    path = Path(output)
    if not path.absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no such folder; make it, or name another file")
    if path.exists() and not path.is_file():
        raise UserError(f"--output {output} is no file; name another")
    if path.exists() and source and path.samefile(bundled.resolve(source)):
        raise UserError(f"--output {output} is the --input; name another file")
    if path.exists() and not resume:
        hint = "continue it with --resume, or name another" if source else "name another"
        raise UserError(f"--output {output} is there already; {hint}")


def answer_file(answerer: Answerer, questions: Questions, output: Path, batch_size: int, rows: int) -> None:
    """Answers the questions, which are so many rows, and appends the answers that `output` lacks, as JSON lines.

    A line is written as soon as all before it are: a run that is stopped or killed leaves a file that can be continued.
    Processes share the work, and main writes. Raises UserError if `output` cannot be written or belongs to other rows, and
    Interrupted for Ctrl-C.
    """
    main, done = distributed.is_main(), 0
    path = output if main else os.devnull
    try:
        done = distributed.broadcast_object(rows_done(output, questions()) if main else 0)
        with (
            # buffering=1: each line is written at once
            open(path, "a", buffering=1, encoding="utf-8", errors="backslashreplace", newline="\n") as file,
            tqdm(total=rows, initial=done, unit="row", disable=not main) as bar,
        ):
            for row, responses in _answered_rows(answerer, questions(), batch_size, done):
                response = responses if len(responses) > 1 else responses[0]
                file.write(_line(row | {"response": response}) + "\n")
                done += 1
                bar.update()
    except OSError as error:
        raise UserError(f"{output}: cannot be written: {error.strerror}; mend that and continue with --resume") from error
    except KeyboardInterrupt:
        raise Interrupted(f"stopped after {done} of {rows} rows; continue with --resume", signal.SIGINT) from None
    distributed.note(f"{rows} rows answered: {output}")


def _answered_rows(
    answerer: Answerer, questions: Iterator[Question], batch_size: int, done: int
) -> Iterator[tuple[dict, list[str]]]:
    """The rows from number `done` on, in order, each with its completions.

    Each process answers its share, and yields the rows of all: they gather the completions after each batch.
    """
    model, tokenizer, processes = answerer.model, answerer.tokenizer, distributed.world_size()
    numbered = ((number, *question) for number, question in enumerate(questions))
    while window := list(itertools.islice(numbered, WINDOW * batch_size * processes)):
        first, last = window[0][0], window[-1][0]
        if last < done:
            continue
        own = distributed.share(window)
        prompts = prompt_ids(tokenizer, [parts for _, _, parts, _ in own])
        names = [prefix or model.active for _, _, _, prefix in own]
        batches = batches_of(map(Prompt, prompts, names, [number for number, *_ in own]), batch_size, tokens_at_once(model))
        unanswered = [batch for batch in batches if max(prompt.number for prompt in batch) >= done]
        answers: dict[int, list[str]] = {}
        # Gathering takes all processes, so each goes as often through this loop as the one with the most batches.
        for place in range(distributed.max_over_ranks(len(unanswered))):
            batch = unanswered[place] if place < len(unanswered) else []
            with model.equal_passes():
                completions = complete_batch(model, tokenizer, batch, answerer.seed, **answerer.options) if batch else []
            mine = [(prompt.number, texts) for prompt, texts in zip(batch, completions, strict=True)]
            for part in distributed.gather(mine):
                answers.update(part)
            while done in answers:
                yield window[done - first][1], answers[done]
                done += 1


def rows_done(output: Path, questions: Iterator[Question]) -> int:
    """How many rows have their line in `output`, after which a new line can be appended.

    A line answers its row if it is the row and a response as JSON, however it is written: a person may have edited it. An
    incomplete last line, which a run that was killed has left, is cut off. Raises UserError for any other line.
    """
    if not output.exists():
        return 0
    done = end = 0  # the lines that answer their rows, and the end of the last of them in bytes
    line = b"\n"
    with open(output, "rb+") as file:
        for number, line in enumerate(file, start=1):
            text = line.removeprefix(codecs.BOM_UTF8).strip()
            if not text:
                continue
            row = next((_as_json(row) for row, *_ in questions), None)
            try:
                found = json.loads(text)
            except (ValueError, RecursionError):
                if row is not None and _is_cut(text, row) and not file.read().strip():
                    file.truncate(end)
                    return done
                hint = "mend it, or remove it and all lines below"
                raise UserError(f"{output}, line {number}: is not JSON; {hint}") from None
            if row is None or not _answers(found, row):
                hint = "give the --input that it was made from, or name another --output"
                raise UserError(f"{output}, line {number}: does not answer row {done + 1} of --input; {hint}")
            done, end = done + 1, file.tell()
        if not line.endswith(b"\n"):
            file.write(b"\n")
    return done


def _answers(found: Any, row: dict) -> bool:
    return isinstance(found, dict) and "response" in found and found == row | {"response": found["response"]}


def _is_cut(line: bytes, row: dict) -> bool:
    """Whether this is the line of `row` up to some byte before its end. How its response begins only the model can tell."""
    before = _line(row | {"response": ""})[:-3].encode(errors="backslashreplace")
    return before.startswith(line) or (line.startswith(before) and _CUT.fullmatch(line, len(before)) is not None)


def _as_json(row: dict) -> dict:
    """A row as JSON knows it. What has no form there becomes text (dates) or null (NaN, infinity)."""
    return json.loads(json.dumps(row, default=str), parse_constant=lambda name: None)


def _line(row: dict) -> str:
    return json.dumps(_as_json(row), ensure_ascii=False)
