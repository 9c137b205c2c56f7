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
import functools
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain, takewhile
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from prefix_tuning.errors import UserError, reason_of
from prefix_tuning.text import shorten

if TYPE_CHECKING:
    from datasets import Dataset

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


# A row of a file of questions with all its columns; its `talk_of`; and the prefix that its column prefix names, or None.
Question = tuple[dict[str, Any], Talk, str | None]


def talk_of(instruction: str, input: str = "", history: Sequence[str] = (), system: str = "") -> Talk:
    """The talk of a row up to its question. Instruction and input become one text of the user."""
    return Talk([*history, f"{instruction}\n{input}" if input else instruction], system)


# --- which template ---


def choose_template(flag: str, base: str, tokenizer: PreTrainedTokenizerBase, sets: "Sequence[Dataset]") -> Template:
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
        _chat(tokenizer, template).parts(Talk(["1", "2"]))
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


def note_other_template(prefix_name: str, recorded: dict[str, Any] | None, used: dict[str, Any] | None) -> None:
    """Says so if a prefix was trained in another template than the run that uses it. As dicts; None: the notebook's."""
    if recorded != used:
        print(f"{prefix_name} was trained in another template than this run, which --template decides")


def end_of(tokenizer: PreTrainedTokenizerBase, template: Template) -> int:
    """The token that ends an answer: EOS, or the one that a chat template writes there, such as <|im_end|>.

    Raises UserError if that is no special token: no answer would stop.
    """
    if template is None:
        return tokenizer.eos_token_id
    end = _chat(tokenizer, template).ends[1]
    if end is None:
        raise UserError("the chat template writes no special token after an answer, so no answer would stop")
    return end


def has_system(rows: "Dataset") -> bool:
    """Whether any row of `load_rows` has a system text."""
    # Not at the top, because infer.py imports this file, and a single question has no rows but would wait for pyarrow.
    import pyarrow.compute

    return pyarrow.compute.any(pyarrow.compute.not_equal(rows.data.column("system"), "")).as_py()


def system_line(tokenizer: PreTrainedTokenizerBase, template: Template) -> str:
    """What is done with system texts, if the chat template has no turn for them; else ""."""
    if template is None or _chat(tokenizer, template).takes_system:
        return ""
    return "the chat template has no turn for a system text: it is put in front of the user's first text, with an empty line"


def _has_thinking(rows: "Dataset") -> bool:
    """Whether any answer in the rows of `load_rows` has a thinking block."""
    import pyarrow.compute  # see `has_system`

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
            found.append(_chat(tokenizer, template).parts(talk))
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
            found.append(_chat(tokenizer, template).ids(talk))
    return found


def question_of(tokenizer: PreTrainedTokenizerBase, prompt: list[int], template: Template = None) -> str:
    """The text of the last question in a prompt, to be shown."""
    text: Any = tokenizer.decode(prompt)
    if template is None:
        return text.removeprefix("Human: ").removesuffix("\n\nAssistant: ")
    # What stands before a first question and before a later one in the same way: not BOS, nor the end of an answer.
    before, after = _chat(tokenizer, template).around_questions
    first = _chat(tokenizer, template).render(Talk([_MARKS[0]])).partition(_MARKS[0])[0]
    pairs = zip(*(reversed(tokenizer(text, add_special_tokens=False).input_ids) for text in (before, first)), strict=False)
    opening: Any = tokenizer.decode([token for token, other in takewhile(lambda pair: pair[0] == pair[1], pairs)][::-1])
    return text.removesuffix(after).rpartition(opening)[2] if opening else text


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
    start, eos = beginning_of_text(tokenizer), [tokenizer.eos_token_id]
    return [[start * (index == 0) + next(ids) + eos * (index % 2) for index in range(len(talk))] for talk in texts]


def beginning_of_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The BOS with which the tokenizer begins every text, as Llama's and Gemma's do; empty for Bloom's and Qwen's."""
    bos = [tokenizer.bos_token_id]
    return bos if tokenizer("").input_ids[:1] == bos else []


def _with_system_in_front(talk: Talk, separator: str) -> Talk:
    """The talk, with the system text in front of the user's first text."""
    return Talk([f"{talk.system}{separator}{talk.texts[0]}", *talk.texts[1:]]) if talk.system else talk


# --- chat templates ---


class _Chat:
    """A chat template with the tokenizer that reads it, and what is known about both.

    special: the tokenizer's special tokens, text -> id. takes_system: whether the template writes a system text; Gemma's
    refuses one, and others leave it out.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: ChatTemplate):
        self.tokenizer, self.template = tokenizer, template
        self.special = {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.takes_system = True  # `render` reads it
        try:
            self.takes_system = _MARKS[0] in self.render(Talk([_MARKS[1]], system=_MARKS[0]))
        except UserError:
            self.takes_system = False

    def parts(self, talk: Talk) -> list[list[int]]:
        """The token ids of the prompts and answers of a talk that ends with an answer.

        Each answer begins where the prompt of its turn ends, and stops with the end of its turn; what the template writes
        after that belongs to the next prompt. After the last answer it is left out: nothing could be learned from it.

        With enable_thinking=False, Qwen3's template writes an empty thinking block at the end of a prompt, but keeps it
        before the last answer only. An earlier answer follows the prompt as it is with thinking on, which has no such block.
        """
        whole = self.ids(talk)
        parts: list[list[int]] = []
        start = 0
        for turn in range(1, len(talk.texts), 2):
            is_last = turn == len(talk.texts) - 1
            asked, end = talk._replace(texts=talk.texts[:turn]), self.ends[is_last]
            forms = [None] if is_last else [None, True]
            prompts = (self.ids(asked, thinking) for thinking in forms)
            length = next((len(prompt) for prompt in prompts if whole[: len(prompt)] == prompt), None)
            if length is None:
                number = turn // 2 + 1
                if any(self.render(talk).startswith(self.render(asked, thinking)) for thinking in forms):
                    raise UserError(
                        f"answer {number} begins within a token of its prompt, as a line break may; strip its text"
                    )
                raise UserError(f"the chat template writes the prompt of answer {number} otherwise once the answer follows")
            if end is None or end not in whole[length:]:
                raise UserError(f"the chat template writes no special token after answer {turn // 2 + 1}")
            stop = whole.index(end, length) + 1
            parts += [whole[start:length], whole[length:stop]]
            start = stop
        return parts

    def ids(self, talk: Talk, enable_thinking: bool | None = None) -> list[int]:
        """The token ids of a talk, which are those of `apply_chat_template`, but for what looks like a special token in a
        text: that is tokenised as text.

        To know it again among the special tokens of the template, a mark is put behind its first character before rendering.
        """
        mark = next(mark for mark in _MARKS if not any(mark in text for text in (talk.system, *talk.texts)))

        def marked(text: str) -> str:
            for special in self.special:
                text = text.replace(special, special[0] + mark + special[1:])
            return text

        marked_talk = Talk([*map(marked, talk.texts)], marked(talk.system))
        pieces = self.render(marked_talk, enable_thinking).split(mark)
        text, marks = "".join(pieces), list(accumulate(map(len, pieces[:-1])))
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=bool(marks))
        if not marks:
            return encoded.input_ids
        ids = []
        for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping, strict=True):
            if token in self.special.values() and any(start < position <= end for position in marks):
                ids += self.tokenizer(text[start:end], add_special_tokens=False, split_special_tokens=True).input_ids
            else:
                ids.append(token)
        return ids

    def render(self, talk: Talk, enable_thinking: bool | None = None) -> str:
        """The text of a talk. If it ends with a question, the beginning of the answer's turn follows.

        enable_thinking: None is the template's own. Raises UserError where the template fails.
        """
        if not self.takes_system:
            talk = _with_system_in_front(talk, "\n\n")
        messages = [{"role": "system", "content": talk.system}] if talk.system else []
        messages += [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(talk.texts)]
        try:
            text: Any = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template.chat_template,
                tokenize=False,
                add_generation_prompt=len(talk.texts) % 2 == 1,
                enable_thinking=self.template.enable_thinking if enable_thinking is None else enable_thinking,
            )
        except Exception as error:  # the template is a program: it may raise anything, and refuses a talk by TemplateError
            raise UserError(f"the chat template fails: {reason_of(error)}") from error
        return text

    @functools.cached_property
    def ends(self) -> tuple[int | None, int | None]:
        """The special tokens that end an earlier answer and the last answer of a talk; in most templates they are the same.
        None: there is no special token.
        """
        question, answer = _MARKS[:2]
        earlier = self.around_questions[0]
        last = self.render(Talk([question, answer])).partition(answer)[2]
        ids = (self.tokenizer(text, add_special_tokens=False).input_ids for text in (earlier, last))
        first, second = (next((token for token in tokens if token in self.special.values()), None) for tokens in ids)
        return first, second

    @functools.cached_property
    def around_questions(self) -> tuple[str, str]:
        """What the template writes between an earlier answer and a question, and after the question."""
        question, answer = _MARKS[:2]
        before, _, after = self.render(Talk([question, answer, question])).partition(answer)[2].partition(question)
        return before, after


# Prompts come one by one, and what is known about a template takes longer than one prompt.
@functools.lru_cache(4)
def _chat(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> _Chat:
    return _Chat(tokenizer, template)


@contextlib.contextmanager
def _named(talk: Talk) -> Iterator[None]:
    """Names the talk, by its last question, in a UserError."""
    try:
        yield
    except UserError as error:
        question = talk.texts[(len(talk.texts) - 1) // 2 * 2]
        hint = "leave it out, or train with --template notebook"
        raise UserError(f"the question {shorten(question, 60)!r}: {error}; {hint}") from error
