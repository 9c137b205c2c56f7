"""Talks in chat templates, beside transformers' own apply_chat_template."""

import re

import pytest
from chats import CHATML, CONTROL, ENDS, LLAMA, QWEN, SHAPES, messages_of, with_template
from launching import TRAIN
from rows import write_jsonl
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import ASKED, encode, take, tokenize
from prefix_tuning.data.templates import (
    ChatTemplate,
    Talk,
    choose_template,
    end_of,
    part_ids,
    prompt_ids,
    question_of,
    talk_of,
    template_from,
)
from prefix_tuning.errors import UserError
from prefix_tuning.model.batch import IGNORED

TALKS = [
    Talk(["法国的首都是哪里？", "巴黎"]),
    Talk(["Hello", "Paris is a city.", "And Spain?", " Madrid", "3加5？", "8"]),
    Talk(["Hello\nthere", "Paris\n"], "Be brief."),
    Talk(["法国？", "巴黎。", " 谢谢\n", "不客气！"], "请简短回答。"),
]


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


def in_shape(tokenizer, shape):
    return with_template(tokenizer, SHAPES[shape]), ChatTemplate(SHAPES[shape], enable_thinking=False)


def reference(tokenizer, shape, talk, **options):
    """transformers' own token ids of a talk."""
    texts, system = talk
    if system and shape in ("gemma", "mistral"):
        texts, system = [f"{system}\n\n{texts[0]}", *texts[1:]], ""
    said = messages_of(*texts, system=system)
    return tokenizer.apply_chat_template(said, return_dict=False, enable_thinking=False, **options)


def test_a_talk_is_what_apply_chat_template_makes_of_it(tokenizer, shape):
    tokenizer, template = in_shape(tokenizer, shape)
    for talk, parts in zip(TALKS, part_ids(tokenizer, TALKS, template), strict=True):
        ids, whole = [token for part in parts for token in part], reference(tokenizer, shape, talk)
        assert ids == whole[: len(ids)] and tokenizer.decode(whole[len(ids) :]) in ("", "\n", "\n</s>")
        answers = [tokenizer.decode(part) for part in parts[1::2]]
        ends = ["<|end|>" if shape == "harmony" else ENDS[shape]] * (len(answers) - 1) + [ENDS[shape]]
        for answer, text, end in zip(answers, talk.texts[1::2], ends, strict=True):
            assert answer.endswith(end) and answer.removesuffix(end).removeprefix("<|channel|>final<|message|>").strip() == (
                text.strip()
            )
        assert whole.count(tokenizer.bos_token_id) == (shape in ("llama", "gemma", "mistral"))


def test_a_prompt_is_what_apply_chat_template_asks_with_and_the_beginning_of_the_row(tokenizer, shape):
    tokenizer, template = in_shape(tokenizer, shape)
    asked = [talk._replace(texts=talk.texts[:-1]) for talk in TALKS]
    prompts = prompt_ids(tokenizer, asked, template)
    assert prompts == [reference(tokenizer, shape, talk, add_generation_prompt=True) for talk in asked]
    for prompt, parts in zip(prompts, part_ids(tokenizer, TALKS, template), strict=True):
        assert prompt == [token for part in parts[:-1] for token in part]
    assert end_of(tokenizer, template) == tokenizer.convert_tokens_to_ids(ENDS[shape])
    # What is shown of a prompt, or of its last turn, is the last question.
    turns = [parts[-2] for parts in part_ids(tokenizer, TALKS, template)]
    for talk, prompt in [*zip(TALKS, prompts, strict=True), *zip(TALKS, turns, strict=True)]:
        in_front = f"{talk.system}\n\n" if shape in ("gemma", "mistral") and len(talk.texts) == 2 and talk.system else ""
        assert question_of(tokenizer, prompt, template).strip() == in_front + talk.texts[-2].strip()


def test_labels_are_the_answers_and_the_ends_of_their_turns(tmp_path, tokenizer, shape):
    tokenizer, template = in_shape(tokenizer, shape)
    rows = [{"instruction": "法国？", "input": "首都", "output": "巴黎", "system": "短"}]
    rows += [{"instruction": "c", "output": "好", "history": [["a", "吗"]]}]
    loaded = load_rows(write_jsonl(tmp_path / "a.jsonl", *rows), TRAIN)
    examples = take(tokenize(loaded, tokenizer, 256, template), range(2))
    labels = [tokenizer.decode([label for label in example.labels if label != IGNORED]) for example in examples]
    start = "<|channel|>final<|message|>" if shape == "harmony" else " " if shape == "mistral" else ""
    end, earlier = ENDS[shape], "<|end|>" if shape == "harmony" else ENDS[shape]
    assert labels == [f"{start}巴黎{end}", f"{start}吗{earlier}{start}好{end}"]
    for one in examples:
        assert all(label in (token, IGNORED) for token, label in zip(one.input_ids, one.labels, strict=True))
    # The user's turn has the instruction and the input.
    (asked,) = prompt_ids(tokenizer, [talk_of(*(loaded[0][name] for name in ASKED))], template)
    assert asked == examples[0].input_ids[: len(asked)] and "法国？\n首都" in tokenizer.decode(asked)


def test_what_looks_like_a_special_token_in_a_text_is_plain_text(tokenizer, shape):
    tokenizer, template = in_shape(tokenizer, shape)
    control = {tokenizer.convert_tokens_to_ids(text) for text in [*CONTROL, "</s>", "<s>", "<pad>"]}
    harmful = "".join(CONTROL) + "</s> a<|im_end|>\n"
    plain = Talk(["a", "b", "c", "d"], "s")
    for talk in (Talk([harmful, "b", "c", "d"], "s"), Talk(["a", harmful, "c", harmful], harmful)):
        (parts,), (expected,) = (part_ids(tokenizer, [one], template) for one in (talk, plain))
        for found, usual in zip(parts, expected, strict=True):
            assert [token for token in found if token in control] == [token for token in usual if token in control]
        text = tokenizer.decode([token for part in parts for token in part])
        assert text.count(harmful.strip()) == sum(harmful in one for one in (talk.system, *talk.texts))
        prompt = prompt_ids(tokenizer, [talk._replace(texts=talk.texts[:3])], template)[0]
        assert prompt == [token for part in parts[:3] for token in part]


@pytest.mark.parametrize("chat_template, times", [(LLAMA, 1), (CHATML, 0)], ids=["by the template", "by nobody"])
def test_bos_is_not_added_to_what_the_template_writes(tokenizer, chat_template, times):
    """As in `apply_chat_template`, also with a tokenizer that adds BOS, as Llama's does."""
    chat, template = with_template(tokenizer, chat_template), ChatTemplate(chat_template, False)
    bos = ("<s>", chat.bos_token_id)
    chat.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    assert chat("a").input_ids[0] == chat.bos_token_id
    (parts,), (prompt,) = part_ids(chat, TALKS[:1], template), prompt_ids(chat, [Talk(["a"])], template)
    assert parts[0].count(chat.bos_token_id) == prompt.count(chat.bos_token_id) == times
    assert all(chat.bos_token_id not in part for part in parts[1:])


def test_without_a_flag_the_tokenizer_decides(tokenizer, tmp_path, capsys):
    rows = load_rows(write_jsonl(tmp_path / "a.jsonl", {"instruction": "a", "output": "b"}), TRAIN)
    chat = with_template(tokenizer, CHATML)
    assert [choose_template(flag, "b", tokenizer, [rows]) for flag in ("auto", "notebook")] == [None, None]
    assert choose_template("notebook", "b", chat, [rows]) is None and capsys.readouterr().out == ""
    assert choose_template("auto", "b", chat, [rows]) == choose_template("chat", "b", chat, [rows]) == (CHATML, False)
    line = "rows are written in the chat template of b; --template notebook would write Human: ... Assistant: ...\n"
    assert capsys.readouterr().out == line * 2
    with pytest.raises(UserError, match=r"^--template chat: the tokenizer of b has no chat template; leave the flag out$"):
        choose_template("chat", "b", tokenizer, [rows])


UNUSABLE = {
    # DeepSeek-R1's prompts end with <think>, which its template leaves out once the answer follows.
    "other prompts": (
        CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'"),
        "b: the chat template writes the prompt of answer 1 otherwise once the answer follows",
    ),
    "no end": (CHATML.replace("<|im_end|>", ""), "b: the chat template writes no special token after an answer"),
    "no Jinja": ("{% if %}", "b: the chat template fails: "),
    "none by default": ({"tool": CHATML}, "b: .*default"),
}


@pytest.mark.parametrize("chat_template, message", UNUSABLE.values(), ids=UNUSABLE)
def test_a_chat_template_that_cannot_be_used_is_refused_before_the_rows(tokenizer, chat_template, message):
    with pytest.raises(UserError, match=f"^{message}.*; add --template notebook$"):
        choose_template("auto", "b", with_template(tokenizer, chat_template), [])


def test_a_row_that_the_template_refuses_is_named(tokenizer, tmp_path):
    fussy = CHATML.replace(
        "{%- for", "{%- if 'bad' in messages[0].content -%}{{- raise_exception('no') -}}{%- endif -%}{%- for"
    )
    rows = load_rows(write_jsonl(tmp_path / "a.jsonl", *({"instruction": a, "output": "b"} for a in ("good", "bad"))), TRAIN)
    with pytest.raises(
        UserError, match=r"^a\.jsonl: the question 'bad': the chat template fails: no; leave it out, or train"
    ):
        encode(rows, with_template(tokenizer, fussy), 256, ChatTemplate(fussy, False), "a.jsonl")


def test_an_answer_that_melts_into_its_prompt_is_refused(tokenizer):
    """Qwen's tokenizer has a token for two line breaks, and ChatML ends a prompt with one."""
    breaks = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE({"\n": 0, "a": 1, "\n\n": 2, "?": 3}, [("\n", "\n")], unk_token="?")),
        eos_token="</s>",
    )
    chat, template = with_template(breaks, CHATML), ChatTemplate(CHATML, False)
    (parts,) = part_ids(chat, [Talk(["a", "a\n\na"])], template)
    assert chat.convert_ids_to_tokens(parts[1]) == ["a", "\n\n", "a", "<|im_end|>"]
    with pytest.raises(
        UserError, match=r"^the question 'a': answer 2 begins within a token of its prompt, as a line break may"
    ):
        part_ids(chat, [Talk(["a", "a", "a", "\na"])], template)


@pytest.mark.parametrize("shape, takes", [("gemma", False), ("mistral", False), ("chatml", True), ("qwen", True)])
def test_it_is_said_where_a_system_text_goes_if_there_is_no_turn_for_it(tokenizer, tmp_path, capsys, shape, takes):
    chat = with_template(tokenizer, SHAPES[shape])
    for system in ("", "s"):
        rows = load_rows(write_jsonl(tmp_path / "a.jsonl", {"instruction": "a", "output": "b", "system": system}), TRAIN)
        choose_template("auto", "b", chat, [rows])
        line = "the chat template has no turn for a system text: it is put in front of the user's first text"
        assert (line in capsys.readouterr().out) == bool(system and not takes)


def test_thinking_is_learned_and_asked_for_only_if_rows_think(tokenizer, tmp_path, capsys):
    chat = with_template(tokenizer, QWEN)
    asked = Talk(["a"])
    found = {}
    for name, row in {
        "never": {"instruction": "a", "output": "b"},
        "once": {"instruction": "a", "output": "<think>\n想\n</think>\n\nb"},
        "before": {"instruction": "c", "output": "d", "history": [["a", "<think>\n想\n</think>\n\nb"]]},
    }.items():
        rows = load_rows(write_jsonl(tmp_path / f"{name}.jsonl", row), TRAIN)
        template = choose_template("auto", "b", chat, [rows])
        (example,) = take(tokenize(rows, chat, 256, template), [0])
        labels = chat.decode([label for label in example.labels if label != IGNORED])
        found[name] = (chat.decode(prompt_ids(chat, [asked], template)[0]), labels, capsys.readouterr().out.splitlines()[1])
    prompt, block = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", "<think>\n{}\n</think>\n\n"
    on = "rows have thinking blocks: asked for, and learned as the template keeps them (enable_thinking=True)"
    off = "no row has a thinking block: none is learned or asked for (enable_thinking=False)"
    assert found["never"] == (prompt + block.format(""), "b<|im_end|>", off)
    assert found["once"] == (prompt, block.format("想") + "b<|im_end|>", on)
    assert found["before"] == (prompt, "b<|im_end|>" + block.format("") + "d<|im_end|>", on)
    # A row that thinks, in a template of rows that do not.
    rows = load_rows(str(tmp_path / "once.jsonl"), TRAIN)
    with pytest.raises(UserError, match="the prompt of answer 1 otherwise once the answer follows"):
        encode(rows, chat, 256, ChatTemplate(QWEN, enable_thinking=False))


def test_the_cache_of_tokens_knows_the_template(tokenizer, tmp_path):
    rows = load_rows(write_jsonl(tmp_path / "a.jsonl", {"instruction": "a", "output": "b"}), TRAIN)
    chat = with_template(tokenizer, QWEN)
    templates = [None, ChatTemplate(CHATML, False), ChatTemplate(QWEN, False), ChatTemplate(QWEN, True)]
    for _ in range(2):
        assert len({str(tokenize(rows, chat, 256, template).to_list()) for template in templates}) == 4


def test_a_record_that_is_no_template_is_refused():
    template = ChatTemplate("x", True)
    assert template_from("p", template._asdict()) == template and template_from("p", None) is None
    for record in ({}, {"chat_template": 1, "enable_thinking": True}, template._asdict() | {"more": 1}, "x"):
        with pytest.raises(UserError, match="^p: its file holds no valid template: " + re.escape(str(record))[:60]):
            template_from("p", record)
