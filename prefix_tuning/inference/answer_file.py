"""Answers a file of questions: rows are written with their responses, in order, while later rows are being answered."""

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
from prefix_tuning.data.templates import Question
from prefix_tuning.errors import Interrupted, UserError
from prefix_tuning.generation.batches import Prompt, batches_of, complete_batch, tokens_at_once
from prefix_tuning.inference.ask import Answerer

Questions = Callable[[], Iterator[Question]]  # reads the --input once more
WINDOW = 8  # number of batches per process whose rows are sorted by length together


# The beginning of a response, which is a string or a list of strings, up to any byte before the end of its line.
_STRING = rb'"(?:[^"\\]|\\.)*"'
_CUT = re.compile(rb'(?:\[(?:%s, ?)*)?(?:"(?:[^"\\]|\\.)*\\?|%s\]?)?' % (_STRING, _STRING))


def check_output(output: str, source: str | None, resume: bool) -> None:
    """Raises UserError if --output is there already and not to be continued, or if its folder is missing.

    source: the file of --input, which must not be the --output; None without --input.
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
    """Answers the questions and appends the answers that `output` lacks, as JSON lines. rows: the number of questions.

    A line is written as soon as all lines before it are, so a run that is stopped or killed leaves a file that can be
    continued. Processes share the work, and main writes. Raises UserError if `output` cannot be written or belongs to other
    rows, and Interrupted for Ctrl-C.
    """
    main, done = distributed.is_main(), 0
    path = output if main else os.devnull
    try:
        done = distributed.broadcast_object(rows_done(output, questions()) if main else 0)
        with open(path, "ab") as file, tqdm(total=rows, initial=done, unit="row", disable=not main) as bar:
            for row, responses in _answered_rows(answerer, questions(), batch_size, done):
                response = responses if len(responses) > 1 else responses[0]
                file.write(_line(row | {"response": response}) + b"\n")
                file.flush()
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
    """Yields the rows from index `done` on, in order, each with its completions.

    Each process answers its share and yields all rows, because the processes gather their completions after each batch.
    """
    model, tokenizer, processes = answerer.model, answerer.tokenizer, distributed.world_size()
    numbered = ((number, *question) for number, question in enumerate(questions))
    while window := list(itertools.islice(numbered, WINDOW * batch_size * processes)):
        first, last = window[0][0], window[-1][0]
        if last < done:
            continue
        own = distributed.share(window)
        names = [prefix or model.active for _, _, _, prefix in own]
        prompts = [answerer.prompt(talk, name) for (_, _, talk, _), name in zip(own, names, strict=True)]
        batches = batches_of(map(Prompt, prompts, names, [number for number, *_ in own]), batch_size, tokens_at_once(model))
        unanswered = [batch for batch in batches if max(prompt.number for prompt in batch) >= done]
        answers: dict[int, list[str]] = {}
        # All processes must gather the same number of times: as often as the one with the most batches.
        for index in range(distributed.max_over_ranks(len(unanswered))):
            batch = unanswered[index] if index < len(unanswered) else []
            with model.equal_passes():
                completions = complete_batch(model, tokenizer, batch, answerer.seed, **answerer.options) if batch else []
            mine = [(prompt.number, texts) for prompt, texts in zip(batch, completions, strict=True)]
            for part in distributed.gather(mine):
                answers.update(part)
            while done in answers:
                yield window[done - first][1], answers[done]
                done += 1


def rows_done(output: Path, questions: Iterator[Question]) -> int:
    """Number of rows that have their line in `output`. After this call, a new line can be appended.

    A line answers its row if it holds the row and a response as JSON, in any form: a person may have edited it. An
    incomplete last line, which a killed run leaves, is cut off. Raises UserError for any other line.
    """
    if not output.exists():
        return 0
    done = end = 0  # number of lines that answer their rows, and the byte at which the last of them ends
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
    """Whether this is the line of `row` up to some byte before its end, as a killed run leaves it.

    A line that a person has edited and broken is none: it must not be deleted.
    """
    before = _line(row | {"response": ""})[: -len('""}')]
    return before.startswith(line) or (line.startswith(before) and _CUT.fullmatch(line, len(before)) is not None)


def _as_json(row: dict) -> dict:
    """A row as JSON can hold it: dates become texts, NaN and infinity become null."""
    return json.loads(json.dumps(row, default=str), parse_constant=lambda name: None)


def _line(row: dict) -> bytes:
    # A column that is only passed on may hold half an emoji, as in a post cut after 140 characters. UTF-8 cannot encode it,
    # but backslashreplace makes it \ud83d, which JSON reads as the same half.
    return json.dumps(_as_json(row), ensure_ascii=False).encode(errors="backslashreplace")
