"""How a talk becomes tokens: the notebook's template, and the chat templates that instruct models bring along.

    the notebook's      Human: What is the capital of France?

                        Assistant: Paris.</s>

    a chat template,    <|im_start|>user
    Qwen's here         What is the capital of France?<|im_end|>
                        <|im_start|>assistant
                        Paris.<|im_end|>

A `Template` is chosen for the rows of a training, recorded in the file of the prefix, and taken from there by infer.py. All
code outside this file only passes it on.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, NamedTuple

import pyarrow
import pyarrow.compute
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from prefix_tuning.errors import UserError, reason_of
from prefix_tuning.text import shorten

# Unicode keeps these characters for programs, so they stand in hardly any text.
_MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


class ChatTemplate(NamedTuple):
    """A tokenizer's chat template, a text in Jinja, and the enable_thinking that it is rendered with.

    Qwen3's template, for example, reads enable_thinking; templates of models that do not think ignore it.
    """

    chat_template: str
    enable_thinking: bool


Template = ChatTemplate | None  # None: the notebook's


class Talk(NamedTuple):
    """The texts of user and assistant in turn, beginning with the user; and the system's text, "" if there is none."""

    texts: list[str]
    system: str = ""


def talk_of(instruction: str, input: str = "", history: Sequence[str] = (), system: str = "") -> Talk:
    """The talk of a row up to its question. Instruction and input become one text of the user."""
    return Talk([*history, f"{instruction}\n{input}" if input else instruction], system)


# --- which template ---


def choose_template(flag: str, base: str, tokenizer: PreTrainedTokenizerBase, sets: Sequence[Dataset]) -> Template:
    """The template for the rows of a training. Prints what a chat template does with them.

    flag: --template. base: its name, for messages. sets: rows of `load_rows`; if any of them has a thinking block, the
    template is rendered with enable_thinking=True, else with False. Raises UserError if there is no chat template although
    it is asked for, or if it cannot be used.
    """
    if flag == "notebook" or (flag == "auto" and not tokenizer.chat_template):
        return None
    if not tokenizer.chat_template:
        raise UserError(f"--template chat: the tokenizer of {base} has no chat template; leave the flag out")
    try:
        template = ChatTemplate(tokenizer.get_chat_template(), any(map(_has_thinking, sets)))
        end_of(tokenizer, template)
        _chat_parts(tokenizer, Talk(["1", "2"]), template)
    except (UserError, ValueError) as error:  # ValueError: there are several templates, and none is the default
        raise UserError(f"{base}: {reason_of(error)}; add --template notebook") from error
    print(f"rows are written in the chat template of {base}; --template notebook would write Human: ... Assistant: ...")
    if "enable_thinking" in template.chat_template:
        line = "no row has a thinking block: none is learned or asked for (enable_thinking=False)"
        if template.enable_thinking:
            line = "rows have thinking blocks: asked for, and learned as the template keeps them (enable_thinking=True)"
        print(line)
    if any(map(has_system, sets)) and (line := system_line(tokenizer, template)):
        print(line)
    return template


def template_from(prefix_name: str, record: Any) -> Template:
    """The template that the file of a prefix records, as a dict of `ChatTemplate`; None is the notebook's, which older files
    and PEFT's mean too. Raises UserError for any other record.
    """
    if record is None:
        return None
    kinds = {"chat_template": str, "enable_thinking": bool}
    if not isinstance(record, Mapping) or {key: type(value) for key, value in record.items()} != kinds:
        raise UserError(f"{prefix_name}: its file holds no valid template: {shorten(str(record), 80)}")
    return ChatTemplate(**record)


def end_of(tokenizer: PreTrainedTokenizerBase, template: Template) -> int:
    """The token that ends an answer: EOS, or the one that a chat template writes there, such as <|im_end|>.

    Raises UserError if that is no special token: no answer would stop.
    """
    if template is None:
        return tokenizer.eos_token_id
    end = _chat_ends(tokenizer, template)[1]
    if end is None:
        raise UserError("the chat template writes no special token after an answer, so no answer would stop")
    return end


def has_system(rows: Dataset) -> bool:
    """Whether any row of `load_rows` has a system text."""
    return pyarrow.compute.any(pyarrow.compute.not_equal(rows.data.column("system"), "")).as_py()


def system_line(tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
    """What is done with system texts, if the chat template has no turn for them; else ""."""
    if template is None or _has_system_turn(tokenizer, template):
        return ""
    return "the chat template has no turn for a system text: it is put in front of the user's first text, with an empty line"


def _has_thinking(rows: Dataset) -> bool:
    """Whether any answer in the rows of `load_rows` has a thinking block."""
    columns = (rows.data.column("output"), pyarrow.compute.list_flatten(rows.data.column("history")))
    found = (pyarrow.compute.any(pyarrow.compute.match_substring(column, "</think>")).as_py() for column in columns)
    return any(found)  # None, of an empty column, is no


# --- talks as tokens ---


def part_ids(tokenizer: PreTrainedTokenizerBase, talks: Sequence[Talk], template: Template = None) -> list[list[list[int]]]:
    """The token ids of every part of talks that end with an answer: prompt, answer, prompt, answer, ...

    All parts of a talk, one after the other, are what the model reads. An answer includes the token that ends it.

    Text that looks like a special token, "</s>" say, is tokenised as text. Raises UserError for a talk that the chat
    template refuses, or whose prompts are not the beginning of the whole talk.
    """
    if template is None:
        return _notebook_parts(tokenizer, talks)
    found = []
    for talk in talks:
        with _named(talk):
            found.append(_chat_parts(tokenizer, talk, template))
    return found


def prompt_ids(tokenizer: PreTrainedTokenizerBase, talks: Sequence[Talk], template: Template = None) -> list[list[int]]:
    """The token ids of talks that end with a question: everything that the model reads before its answer.

    They are the beginning of the same talk with its answer (`part_ids`). Raises UserError for a talk that the chat template
    refuses.
    """
    if template is None:
        return [list(chain.from_iterable(parts)) for parts in _notebook_parts(tokenizer, talks)]
    found = []
    for talk in talks:
        with _named(talk):
            found.append(_chat_ids(tokenizer, talk, template))
    return found


def question_of(tokenizer: PreTrainedTokenizerBase, prompt: list[int], template: Template = None) -> str:
    """The text of a prompt without what the template writes around a first question."""
    before, after = "Human: ", "\n\nAssistant: "
    if template is not None:
        before, _, after = _render(tokenizer, Talk([_MARKS[0]]), template).partition(_MARKS[0])
    text: Any = tokenizer.decode(prompt)
    return text.removeprefix(before).removesuffix(after)


# --- the notebook's ---


def prompt_of(instruction: str, input: str = "") -> str:
    """The notebook's template: everything that the model reads before the answer.

    Human: INSTRUCTION
    INPUT                  (no such line where there is no input)

    Assistant:             (and a space; the answer follows it)
    """
    return "\n".join(["Human: " + instruction, input]).strip() + "\n\nAssistant: "


def _notebook_parts(tokenizer: PreTrainedTokenizerBase, talks: Sequence[Talk]) -> list[list[list[int]]]:
    """The token ids of the prompts and answers of talks, each tokenised by itself. A talk begins with the tokenizer's BOS if
    it adds one, as Llama's and Gemma's do and Bloom's and Qwen's do not; each answer ends with EOS. A system text is a line
    of its own before the user's first text.
    """
    texts = [_with_system_in_front(talk, "\n").texts for talk in talks]
    parts = [text if index % 2 else prompt_of(text) for talk in texts for index, text in enumerate(talk)]
    ids = iter(tokenizer(parts, split_special_tokens=True, add_special_tokens=False).input_ids if parts else [])
    bos, eos = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    start = bos if tokenizer("").input_ids[:1] == bos else []
    return [[start * (index == 0) + next(ids) + eos * (index % 2) for index in range(len(talk))] for talk in texts]


def _with_system_in_front(talk: Talk, separator: str) -> Talk:
    """The talk, with the system text in front of the user's first text."""
    return Talk([f"{talk.system}{separator}{talk.texts[0]}", *talk.texts[1:]]) if talk.system else talk


# --- chat templates ---


def _chat_parts(tokenizer: PreTrainedTokenizerBase, talk: Talk, template: ChatTemplate) -> list[list[int]]:
    """The parts of one talk.

    Each answer begins where the prompt of its turn ends, and stops with the end of its turn; what the template writes after
    that belongs to the next prompt. After the last answer, it is left out: nothing could be learned from it.

    With enable_thinking=False, Qwen3's template writes an empty thinking block at the end of a prompt, and keeps it before
    the last answer only. An earlier answer then stands behind the prompt as it is with thinking on, which has no such block.
    """
    whole, ends = _chat_ids(tokenizer, talk, template), _chat_ends(tokenizer, template)
    parts: list[list[int]] = []
    start = 0
    for turn in range(1, len(talk.texts), 2):
        is_last = turn == len(talk.texts) - 1
        asked, end = talk._replace(texts=talk.texts[:turn]), ends[is_last]
        forms = [template] if is_last else [template, template._replace(enable_thinking=True)]
        prompts = (_chat_ids(tokenizer, asked, form) for form in forms)
        length = next((len(prompt) for prompt in prompts if whole[: len(prompt)] == prompt), None)
        if length is None:
            raise UserError(
                f"the chat template writes the prompt of answer {turn // 2 + 1} otherwise once the answer follows"
            )
        if end is None or end not in whole[length:]:
            raise UserError(f"the chat template writes no special token after answer {turn // 2 + 1}")
        stop = whole.index(end, length) + 1
        parts += [whole[start:length], whole[length:stop]]
        start = stop
    return parts


def _chat_ids(tokenizer: PreTrainedTokenizerBase, talk: Talk, template: ChatTemplate) -> list[int]:
    """The token ids of a talk, which are those of `apply_chat_template`, but for what looks like a special token in a text:
    that is tokenised as text.

    To know it again among the special tokens of the template, a mark is put behind its first character before rendering.
    """
    special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    pattern = "|".join(re.escape(text) for text in sorted(special, key=len, reverse=True))
    mark = next(mark for mark in _MARKS if not any(mark in text for text in (talk.system, *talk.texts)))

    def marked(text: str) -> str:
        return re.sub(pattern, lambda match: match[0][0] + mark + match[0][1:], text) if special else text

    pieces = _render(tokenizer, Talk([*map(marked, talk.texts)], marked(talk.system)), template).split(mark)
    text, marks = "".join(pieces), list(accumulate(map(len, pieces[:-1])))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(marks))
    if not marks:
        return encoded.input_ids
    ids = []
    for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
        if token in special.values() and any(start < position <= end for position in marks):
            ids += tokenizer(text[start:end], add_special_tokens=False, split_special_tokens=True).input_ids
        else:
            ids.append(token)
    return ids


def _render(tokenizer: PreTrainedTokenizerBase, talk: Talk, template: ChatTemplate) -> str:
    """The text of a talk. If it ends with a question, the beginning of the answer's turn follows."""
    if talk.system and not _has_system_turn(tokenizer, template):
        talk = _with_system_in_front(talk, "\n\n")
    messages = [{"role": "system", "content": talk.system}] if talk.system else []
    messages += [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(talk.texts)]
    asks = len(talk.texts) % 2 == 1
    try:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asks, **template._asdict())
        return text
    except Exception as error:  # the template is a program: it may raise anything, and refuses a talk by TemplateError
        raise UserError(f"the chat template fails: {reason_of(error)}") from error


def _has_system_turn(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> bool:
    """Whether the template writes a system text. Gemma's refuses it, and others leave it out."""
    messages = [{"role": "system", "content": _MARKS[0]}, {"role": "user", "content": _MARKS[1]}]
    with contextlib.suppress(Exception):  # as in `_render`
        return _MARKS[0] in tokenizer.apply_chat_template(messages, tokenize=False, **template._asdict())
    return False


def _chat_ends(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> tuple[int | None, int | None]:
    """The special tokens that end an answer before a next question, and the last answer of a talk. They are the same in most
    templates. None: there is no special token.
    """
    question, answer = _MARKS[:2]
    earlier = _render(tokenizer, Talk([question, answer, question]), template).partition(answer)[2].partition(question)[0]
    last = _render(tokenizer, Talk([question, answer]), template).partition(answer)[2]
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = (tokenizer(text, add_special_tokens=False).input_ids for text in (earlier, last))
    first, second = (next((token for token in tokens if token in special), None) for tokens in ids)
    return first, second


@contextlib.contextmanager
def _named(talk: Talk) -> Iterator[None]:
    """Names the talk, by its last question, in a UserError."""
    try:
        yield
    except UserError as error:
        question = talk.texts[(len(talk.texts) - 1) // 2 * 2]
        hint = "leave it out, or train with --template notebook"
        raise UserError(f"the question {shorten(question, 60)!r}: {error}; {hint}") from error
