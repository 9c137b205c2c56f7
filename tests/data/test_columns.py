import csv
import json

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset
from launching import TRAIN
from rows import write_jsonl, write_rows

from prefix_tuning.data.columns import PAIRS, columns_of, parse_columns
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import read_questions
from prefix_tuning.data.templates import Talk, prompt_ids, talk_of
from prefix_tuning.errors import UserError

KINDS = ("json", "jsonl", "csv", "parquet", "folder")


def write(folder, kind, rows):
    """The rows as a file or a folder of this kind; its path."""
    if kind == "folder":
        Dataset.from_list(rows).save_to_disk(folder / "folder")
        return str(folder / "folder")
    return str(write_rows(folder / f"rows.{kind}", rows))


def ours(instruction, output, input="", history=(), weights=(), system=""):
    row = {"instruction": instruction, "input": input, "output": output, "system": system}
    return row | {"history": list(history), "weights": list(weights)}


def read(tmp_path, *rows, flag=None):
    """Reads rows from a .jsonl file. Returns them in our columns, and the lines about their columns."""
    said = []
    path = write_jsonl(tmp_path / "a.jsonl", *rows)
    found = load_rows(path, TRAIN, parse_columns(flag), said.append).to_list()
    return found, [line.removeprefix(f"{path}: ") for line in said]


def talk(*texts, system=None):
    """Messages of user and assistant in turn, as both conventions write them."""
    roles = [("user", "human"), ("assistant", "gpt")] * len(texts)
    said = [("system", "system", system)] * (system is not None) + [
        (*role, text) for role, text in zip(roles, texts, strict=False)
    ]
    return (
        {"messages": [{"role": role, "content": text} for role, _, text in said]},
        {"conversations": [{"from": role, "value": text} for _, role, text in said]},
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("asked, answer", PAIRS)
def test_common_pairs_are_recognised_and_said_also_from_the_cache(tmp_path, capsys, kind, asked, answer):
    rows = [{"id": "1", asked: "法国？", answer: "巴黎"}, {"id": "2", asked: "3+5", answer: "8"}]
    source = write(tmp_path, kind, rows)
    for _ in range(2):
        assert load_rows(source, TRAIN).to_list() == [ours("法国？", "巴黎"), ours("3+5", "8")]
        assert capsys.readouterr().out == f"{source}: {asked} is read as instruction, {answer} as output; not read: id\n"


def test_input_stays_input_whichever_row_has_it(tmp_path):
    rows = [{"question": "a", "answer": "b"}, {"question": "c", "input": "d", "answer": "e"}]
    assert load_rows(write_jsonl(tmp_path / "a.jsonl", *rows), TRAIN).to_list() == [ours("a", "b"), ours("c", "e", "d")]


def test_our_own_names_come_first_and_nothing_is_said_of_them(tmp_path):
    assert read(tmp_path, {"instruction": "a", "output": "b", "input": "c"}) == ([ours("a", "b", "c")], [])
    row = {"question": "x", "answer": "y", "instruction": "a", "output": "b", "messages": []}
    assert read(tmp_path, row) == ([ours("a", "b")], ["not read: question, answer, messages"])


@pytest.mark.parametrize("kind", KINDS)
def test_any_other_columns_are_named_by_the_flag(tmp_path, capsys, kind):
    source = write(tmp_path, kind, [{"frage": "a", "kontext": "b", "antwort": "c", "input": "d"}])
    assert load_rows(source, TRAIN, parse_columns("instruction=frage,output=antwort")).to_list() == [ours("a", "c", "d")]
    assert capsys.readouterr().out == f"{source}: frage is read as instruction, antwort as output; not read: kontext\n"
    given = parse_columns("output=antwort, input=kontext,instruction=frage")
    assert load_rows(source, TRAIN, given).to_list() == [ours("a", "c", "b")]  # the same file, cached otherwise
    reading = "frage is read as instruction, kontext as input, antwort as output"
    assert capsys.readouterr().out == f"{source}: {reading}; not read: input\n"
    assert load_rows(source, TRAIN, parse_columns("instruction=input,output=kontext")).to_list() == [ours("d", "b")]


def test_a_column_that_the_flag_leaves_out_has_our_name_or_one_of_a_known_pair(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"instruction": "a", "context": "b", "response": "c"})
    assert load_rows(path, TRAIN, parse_columns("output=response,input=context")).to_list() == [ours("a", "c", "b")]
    path = write_jsonl(tmp_path / "a.jsonl", {"question": "a", "context": "b", "answer": "c"})
    assert load_rows(path, TRAIN, parse_columns("input=context")).to_list() == [ours("a", "c", "b")]


UNCLEAR = {
    "question answer prompt response": ("", True, "can be read in more than one way: 'question', 'answer', 'prompt', 'res"),
    "question answer messages": ("", True, "more than one way.*--columns instruction=NAME,output=NAME or messages=NAME"),
    "messages conversations": ("", True, "more than one way"),
    "frage antwort": ("", True, "are not known as question and answer: 'frage', 'antwort'; say .*--columns inst"),
    "instruction response": ("", True, "are not known as"),
    "frage": ("instruction=frage", True, "are not known as"),
    "question answer": (
        "instruction=frage",
        True,
        "has no column 'frage', which --columns names; it has 'question'",
    ),
    "messages extra": ("input=extra", True, "are not known as"),
    "answer": ("", False, "are not known as .*--columns instruction=NAME or"),
    "question query": ("", False, "more than one way"),
    "": ("", True, "not known .*: none;"),
}


@pytest.mark.parametrize("found", UNCLEAR)
def test_columns_that_cannot_be_told_apart_are_listed(found):
    flag, answered, message = UNCLEAR[found]
    with pytest.raises(UserError, match=f"^a.jsonl, line 1: .*{message}"):
        columns_of("a.jsonl, line 1", found.split(), parse_columns(flag), answered)


READABLE = {
    "question answer": ("", {"instruction": "question", "input": "input"}),
    "question": ("", {"instruction": "question", "input": "input"}),
    "instruction question": ("", {"instruction": "instruction", "input": "input"}),
    "prompt messages": ("", {"messages": "messages"}),
    "conversations messages": ("messages=conversations", {"messages": "conversations"}),
    "frage": ("instruction=frage", {"instruction": "frage", "input": "input"}),
}


@pytest.mark.parametrize("found", READABLE)
def test_a_file_of_questions_needs_no_answers(found):
    flag, sources = READABLE[found]
    found = columns_of("a", found.split(), parse_columns(flag), answered=False).sources
    assert {ours: found[ours] for ours in sources} == sources and not {"output", "question"} & found.keys()


@pytest.mark.parametrize("flag", ["frage", "instruction=", "=a", "instruction=a,", "input=a,input=b", "input=a,output=a"])
def test_a_malformed_flag_is_refused(flag):
    with pytest.raises(UserError, match=f"--columns {flag}: (must be like instruction=NAME,output=NAME|there is no '')"):
        parse_columns(flag)


def test_unknown_names_in_the_flag_are_refused():
    with pytest.raises(
        UserError, match="no 'question' to read; there are instruction, input, output, history, system, mess"
    ):
        parse_columns("question=frage")
    with pytest.raises(UserError, match="exclude the others"):
        parse_columns("messages=a,system=c,input=b")
    assert parse_columns(None) == {} and parse_columns("output=a=b") == {"output": "a=b"}


STRANGE = pa.array([0, 2**62], pa.timestamp("us"))  # the second is beyond Python's dates


def test_only_the_needed_columns_of_a_table_are_read(tmp_path):
    talks = [talk(text, "d")[0]["messages"] for text in "ab"]
    for name, columns in (
        ("pair", {"prompt": ["a", "b"], "completion": ["d", "d"], "input": [None, None], "instruction": STRANGE}),
        ("talk", {"messages": talks, "prompt": STRANGE, "input": STRANGE, "output": STRANGE}),
    ):
        table = pa.table(columns)
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        Dataset(table).save_to_disk(tmp_path / name)
        for source in (f"{name}.parquet", name):
            assert load_rows(str(tmp_path / source), TRAIN).to_list() == [ours("a", "d"), ours("b", "d")]


TALKS = [
    (talk("a", "b"), ours("a", "b")),
    (talk("a", "b", system="s"), ours("a", "b", system="s")),
    (talk("a", "b", system=""), ours("a", "b")),
    (talk("a", "b", "c", "d"), ours("c", "d", history=["a", "b"])),
    (talk("a", "b", "c", "d", system="s"), ours("c", "d", history=["a", "b"], system="s")),
    (talk("a", "b", "c", "d", "e", "f", "g"), ours("e", "f", history=["a", "b", "c", "d"])),  # without the last question
    (talk("", "b", "c"), ours("", "b")),
]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "csv"])
@pytest.mark.parametrize("convention", [0, 1], ids=["messages", "conversations"])
def test_talks_are_rows_with_a_history(tmp_path, capsys, kind, convention):
    rows = [form[convention] | {"id": index} for index, (form, _) in enumerate(TALKS)]
    source = write(tmp_path, kind, rows)
    assert load_rows(source, TRAIN).to_list() == [row for _, row in TALKS]
    column = ("messages", "conversations")[convention]
    assert capsys.readouterr().out == f"{source}: each row of {column} is read as a talk; not read: id\n"


def test_a_talk_may_stand_in_any_column_and_have_more_than_role_and_content(tmp_path):
    said = [{"role": "user", "content": "a", "weight": 0}, {"from": "gpt", "value": "b", "tools": None}]
    path = write_jsonl(tmp_path / "a.jsonl", {"chosen": said, "messages": 5})
    assert load_rows(path, TRAIN, parse_columns("messages=chosen")).to_list() == [ours("a", "b")]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "csv"])
def test_an_answer_whose_weight_is_0_is_read_but_not_learned(tmp_path, kind):
    def weighed(*weights, key="weight"):
        messages = talk("a", "b", "c", "d", "e", "f")[0]["messages"]
        return {"messages": [m | {key: weights[n // 2] if n % 2 else None} for n, m in enumerate(messages)]}

    rows = [weighed(0, 1, 1), weighed(1, 1, None), weighed(0, 1, 0), weighed(1, 0, 0)]
    expected = [
        ours("e", "f", history="abcd", weights=[0, 1, 1]),
        ours("e", "f", history="abcd"),
        ours("c", "d", history="ab", weights=[0, 1]),  # nothing is learned after its second answer
        ours("a", "b"),
    ]
    assert load_rows(write(tmp_path, kind, rows), TRAIN).to_list() == expected
    flags = [[False, True, True], [None, True, None]]
    assert [read(tmp_path, weighed(*weights, key="loss"))[0][0] for weights in flags] == expected[:2]


PAIRED = [["a", "b"], ["c", "d"]]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "csv"])
@pytest.mark.parametrize("history, texts", [(PAIRED, [*"abcd"]), ([*"abcd"], [*"abcd"])], ids=["pairs", "flat"])
def test_a_history_is_the_turns_before(tmp_path, capsys, kind, history, texts):
    rows = [{"instruction": "e", "input": "i", "output": "f", "history": each} for each in (history, [], None)]
    source = write(tmp_path, kind, rows)
    assert load_rows(source, TRAIN).to_list() == [ours("e", "f", "i", each) for each in (texts, [], [])]
    ((_, asked, _), *alone) = read_questions(source, []) if kind != "folder" else load_questions(tmp_path, rows)
    assert asked == talk_of("e", "i", texts) and [asked for _, asked, _ in alone] == [talk_of("e", "i")] * 2
    assert capsys.readouterr().out == ""


def load_questions(tmp_path, rows):
    return read_questions(write_jsonl(tmp_path / "questions.jsonl", *rows), [])


BAD_HISTORIES = {
    "a number": ([1], r"'history' must be a list of \[question, answer\], as .* can hold one, not \[1\]"),
    "a text": ("a: b", "'history' must be a list of .*, not \"a: b\""),
    "three of a turn": ([["a", "b", "c"]], "'history' must be a list of"),
    "messages": (talk("a", "b")[0]["messages"], "'history' must be a list of"),
    "a question at the end": (["a", "b", "c"], "'history' ends with a question"),
    "no text": ([["a", None]], "answer 1 of 'history' must be a text, not null"),
    "a pair among texts": (["a", ["b"]], r"answer 1 of 'history' must be a text, not \[\"b\"\]"),
    "an empty answer": ([["a", "b"], ["c", " "]], "answer 2 of 'history' is empty; every answer needs a text"),
}


@pytest.mark.parametrize("history, message", BAD_HISTORIES.values(), ids=BAD_HISTORIES)
def test_a_bad_history_is_named(tmp_path, history, message):
    with pytest.raises(UserError, match=rf"a\.jsonl, line 1: {message}"):
        read(tmp_path, {"instruction": "e", "output": "f", "history": history})


def test_the_system_text_is_a_column_and_in_the_notebook_s_template_comes_first(tmp_path, tokenizer):
    row = {"instruction": "c", "input": "i", "output": "d", "system": "s"}
    rows = [row, row | {"history": [["a", "b"]]}, row | {"system": None}, row | {"system": ""}]
    expected = [
        ours("c", "d", "i", system="s"),
        ours("c", "d", "i", ["a", "b"], system="s"),
        *[ours("c", "d", "i")] * 2,
    ]
    assert read(tmp_path, *rows) == (expected, [])
    talks = [talk_of("c", "i", system="s"), talk_of("c", "i", ["a", "b"], "s")]
    texts = [tokenizer.decode(ids) for ids in prompt_ids(tokenizer, talks)]
    c = "Human: c\ni\n\nAssistant: "
    assert texts == ["Human: s\nc\ni\n\nAssistant: ", f"Human: s\na\n\nAssistant: b</s>{c}"]
    alone, both = ({"system": "s"} | talk("a", "b", system=system)[0] for system in (None, "s"))
    line = ["each row of messages is read as a talk"]
    assert read(tmp_path, alone, both) == ([ours("a", "b", system="s")] * 2, line)
    with pytest.raises(UserError, match="line 1: has two system texts, one in 'system' and another in 'messages'; leave"):
        read(tmp_path, alone | talk("a", "b", system="t")[0])
    with pytest.raises(UserError, match="line 1: 'system' must be a text, not 1"):
        read(tmp_path, row | {"system": 1})


def test_columns_of_history_and_system_can_be_named(tmp_path):
    row = {"instruction": "c", "output": "d", "earlier": [["a", "b"]], "role": "s"}
    found, said = read(tmp_path, row, flag="history=earlier,system=role")
    assert found == [ours("c", "d", history=["a", "b"], system="s")] and said == [
        "earlier is read as history, role as system"
    ]
    found, said = read(tmp_path, {"chosen": talk("a", "b")[0]["messages"], "role": "s"}, flag="messages=chosen,system=role")
    assert found == [ours("a", "b", system="s")] and said == ["each row of chosen is read as a talk; role is read as system"]


@pytest.mark.parametrize("kind", KINDS)
def test_context_is_read_as_input_where_there_is_no_input(tmp_path, capsys, kind):
    rows = [{"question": "a", "context": "c", "answer": "b"}, {"question": "d", "context": "", "answer": "e"}]
    source = write(tmp_path, kind, rows)
    assert load_rows(source, TRAIN).to_list() == [ours("a", "b", "c"), ours("d", "e")]
    said = "question is read as instruction, context as input, answer as output"
    assert capsys.readouterr().out == f"{source}: {said}\n"


def test_beside_an_input_a_context_is_named(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "context": "c"}]
    rows += [rows[1] | {"input": None}, rows[0] | {"input": "i", "context": None}]
    expected = [ours("a", "b"), ours("a", "b", "c"), ours("a", "b", "c"), ours("a", "b", "i")]
    assert read(tmp_path, *rows) == (expected, ["context is read as input"])
    assert read(tmp_path, *rows[:2], rows[1] | {"input": "i"})[1] == [
        "context is read as input; not read: context in rows that have input"
    ]
    said = ["not read: context in rows that have input"]
    assert read(tmp_path, rows[1] | {"input": "i"}) == ([ours("a", "b", "i")], said)
    # An empty cell of a CSV file is no input.
    assert read(tmp_path, rows[1] | {"input": ""}) == ([ours("a", "b", "c")], ["context is read as input"])
    assert read(tmp_path, rows[1], flag="input=context") == ([ours("a", "b", "c")], ["context is read as input"])


@pytest.mark.parametrize("kind", KINDS)
def test_columns_that_are_not_read_are_named_also_from_the_cache(tmp_path, capsys, kind):
    source = write(tmp_path, kind, [{"": "y", "id": "1", "instruction": "a", "输入": "x", "output": "b"}])
    for _ in range(2):
        assert load_rows(source, TRAIN).to_list() == [ours("a", "b")]
        assert capsys.readouterr().out == f"{source}: not read: '', id, 输入\n"


def test_a_name_that_is_no_text_is_named(tmp_path):
    assert read(tmp_path, {"instruction": "a", "output": "b"})[1] == []
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": "b", "\\ud83d": 1, "x\\ny": 2}', "utf-8")
    said = []
    load_rows(str(tmp_path / "a.jsonl"), TRAIN, say=said.append)
    assert said == [f"{tmp_path / 'a.jsonl'}: not read: '\\ud83d', 'x\\ny'"]


def test_a_column_of_the_last_row_alone_is_named(tmp_path):
    row = {"instruction": "a", "output": "b"}
    assert read(tmp_path, *[row] * 2000, row | {"Input": "c"})[1] == ["not read: Input"]
    assert read(tmp_path, {"messages": talk("a", "b")[0]["messages"]}, talk("a", "b")[0] | {"history": PAIRED})[1] == [
        "each row of messages is read as a talk; not read: history"
    ]


def test_a_column_that_the_flag_names_may_be_missing_in_some_rows_but_not_in_all(tmp_path):
    row = {"instruction": "a", "output": "b"}
    rows = [row, row | {"kontext": "c"}]
    assert read(tmp_path, *rows, flag="input=kontext") == (
        [ours("a", "b"), ours("a", "b", "c")],
        ["kontext is read as input"],
    )
    with pytest.raises(UserError, match=r"a\.jsonl: no row has a column 'context', which --columns names; they have 'instr"):
        read(tmp_path, *rows, flag="input=context")


def test_columns_beside_the_question_are_named_in_a_file_of_questions(tmp_path):
    said = []
    row = {"id": 1, "question": "a", "输入": "x", "answer": "b", "prefix": None}
    assert len(list(read_questions(write_jsonl(tmp_path / "a.jsonl", row, row), [], say=said.append))) == 2
    line = "question is read as instruction; not part of the question: id, 输入, answer"
    assert said == [f"{tmp_path / 'a.jsonl'}: {line}"]


def test_rows_may_lack_their_answers_where_a_teacher_gives_them(tmp_path):
    """A source of questions alone, one whose rows have an answer or not, and talks that end with a question or not."""

    def lenient(*rows):
        return load_rows(write_jsonl(tmp_path / "a.jsonl", *rows), TRAIN, may_lack=True).to_list()

    assert lenient({"instruction": "a"}, {"instruction": "b", "input": "c"}) == [ours("a", ""), ours("b", "", "c")]
    assert lenient({"question": "a"}) == [ours("a", "")]
    rows = [{"question": "a", "answer": "b"}, {"question": "c"}, {"question": "d", "answer": None}, {"question": "e"}]
    rows[3]["answer"] = ""
    assert lenient(*rows) == [ours("a", "b"), ours("c", ""), ours("d", ""), ours("e", "")]
    history = {"history": ["a", "b"]}
    talks = [talk("a")[0], talk("a", "b")[0], talk("a", "b", "c")[0], talk("a", "b", "c", "d", system="s")[1]]
    assert lenient(*talks[:3]) == [ours("a", ""), ours("a", "b"), ours("c", "", **history)]
    assert lenient(talks[3]) == [ours("c", "d", **history, system="s")]
    weighted = {"messages": [*talks[1]["messages"], {"role": "user", "content": "c"}]}
    weighted["messages"][1]["weight"] = 0
    assert lenient(weighted) == [ours("c", "", **history, weights=[0, 1])]
    with pytest.raises(UserError, match="line 1: 'answer' is empty"):
        lenient({"question": "a", "answer": " "})
    # The same file, read strictly, is not taken from the cache of the lenient reading.
    lenient(*rows)
    with pytest.raises(UserError, match="3 bad rows: line 2: has no column 'answer'"):
        load_rows(str(tmp_path / "a.jsonl"), TRAIN)


def test_many_rows_without_history_may_come_before_one_with(tmp_path):
    rows = [talk("a", "b")[0]] * 2500 + [talk("a", "b", "c", "d")[0]]
    assert load_rows(write_jsonl(tmp_path / "a.jsonl", *rows), TRAIN)[-1] == ours("c", "d", history=["a", "b"])


def test_a_question_ends_with_the_users_last_message(tmp_path):
    said = []
    forms = [talk("a"), talk("a", "b"), talk("a", system="s"), talk("a", "b", "c", system="s"), talk("a", "b", "c", " ")]
    rows = [form[0] | {"prefix": "p", "note": 1} for form in forms[:4]]
    found = list(read_questions(write_jsonl(tmp_path / "a.jsonl", *rows), ["p"], say=said.append))
    assert [row for row, _, _ in found] == rows and {prefix for _, _, prefix in found} == {"p"}
    assert [asked for _, asked, _ in found] == [
        Talk([*texts], system) for texts, system in zip(["a", "a", "a", "abc"], ["", "", "s", "s"], strict=True)
    ]
    assert said == [f"{tmp_path / 'a.jsonl'}: each row of messages is read as a talk; not part of the question: note"]


def said(*pairs):
    return {"messages": [{"role": role, "content": text} for role, text in pairs]}


def with_keys(number, **keys):
    """A talk with a user called Wang. Message `number` has these keys, too; the other keys of all messages mean nothing."""
    messages = talk("a", "b", "c")[0]["messages"]
    for index, message in enumerate(messages):
        message |= {"tool_calls": None, "function_call": None, "weight": None, "id": 7} | (
            {"name": "Wang"} if index == 0 else {}
        )
    messages[number - 1] |= keys
    return {"messages": messages}


BAD_TALKS = {
    "a text": ({"messages": "hello"}, "'messages' must be a list of messages, as .* can hold one, not \"hello\""),
    "nothing": ({"messages": None}, "'messages' must be a list of messages, .*, not null"),
    "an empty list": ({"messages": []}, "'messages' holds no answer"),
    "a question only": (talk("a")[0], "'messages' holds no answer"),
    "a system only": (talk(system="a")[0], "'messages' holds no answer"),
    "texts": (
        {"messages": ["a", "b"]},
        "message 1 of 'messages' must have role and content, or from and value; it is \"a\"",
    ),
    "a tool": (said(("user", "a"), ("tool", "b")), 'message 2 .* is by "tool", where assistant is expected: user and'),
    "two questions": (said(("user", "a"), ("user", "b")), "message 2 of 'messages' is by \"user\", where assistant is exp"),
    "two answers": (said(("user", "a"), ("assistant", "b"), ("assistant", "c")), "message 3 .* where user is expected"),
    "an answer first": (said(("assistant", "b"), ("user", "a")), "message 1 .* where user is expected"),
    "a late system": (said(("user", "a"), ("system", "b")), 'message 2 .* by "system", where assistant is expected'),
    "two systems": (said(("system", "a"), ("system", "b")), 'message 2 .* by "system", where user is expected'),
    "a role that is a list": (said((["user"], "a")), r"message 1 .* is by \[\"user\"\], where user is expected"),
    "no role": ({"messages": [{"content": "a"}]}, "message 1 of 'messages' is by null, where user is expected"),
    "parts of content": (
        said(("user", [{"type": "text"}])),
        r"the content of message 1 of 'messages' must be a text, not \[",
    ),
    "null content": (said(("user", "a"), ("assistant", None)), "the content of message 2 of 'messages' must be a text"),
    "an empty answer": (said(("user", "a"), ("assistant", " \n")), "message 2 of 'messages' is empty; every answer needs"),
    "half a character": (said(("user", "\ud83d")), "the content of message 1 of 'messages' holds half of a character"),
    "a call of a tool": (
        with_keys(2, tool_calls=[{"id": 1}]),
        "message 2 of 'messages' has tool_calls, which cannot be learned",
    ),
    "a call of a function": (with_keys(2, function_call={"name": "f"}), "message 2 of 'messages' has function_call, which"),
    "half a weight": (with_keys(2, weight=0.5), r"the weight of message 2 of 'messages' must be 0 or 1, not 0\.5"),
    "a loss in words": (with_keys(2, loss="no"), "the loss of message 2 of 'messages' must be 0 or 1, not \"no\""),
    "two users": (
        with_keys(3, name="Li"),
        'message 3 of \'messages\' is by "Li", an earlier one by "Wang": a talk is between',
    ),
    "nothing to learn": (with_keys(2, weight=0), "'messages' holds no answer whose weight is 1"),
}


@pytest.mark.parametrize("row, message", BAD_TALKS.values(), ids=BAD_TALKS)
def test_a_bad_talk_is_named_with_its_row(tmp_path, row, message):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(talk("a", "b")[0]) + "\n" + json.dumps(row) + "\n", "utf-8")
    with pytest.raises(UserError, match=rf"a\.jsonl, line 2: {message}"):
        load_rows(str(path), TRAIN)


def test_keys_of_messages_that_are_not_read_are_named(tmp_path):
    row, _ = talk("a", "b")
    row["messages"][1] |= {"reasoning_content": "why", "id": 7, "refusal": None, "weight": 1}
    line = "each row of messages is read as a talk; not read: reasoning_content of messages, id of messages"
    assert read(tmp_path, row) == ([ours("a", "b")], [line])


@pytest.mark.parametrize("column, value", [("context", {"page": 1}), ("history", "earlier"), ("system", True)])
def test_a_column_of_another_kind_can_be_left_out(tmp_path, column, value):
    row = {"instruction": "a", "output": "b", column: value}
    with pytest.raises(UserError, match=rf"line 1: '{column}' must be .*; --columns {column}= leaves it out$"):
        read(tmp_path, row)
    assert read(tmp_path, row, flag=f"{column}=") == ([ours("a", "b")], [f"not read: {column}"])


def test_a_csv_holds_a_history_as_json(tmp_path):
    rows = [["instruction", "output", "history"], ["c", "d", '[["a", "b"]]'], ["e", "f", "[]"], ["g", "h", ""]]
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(rows)
    expected = [ours("c", "d", history=["a", "b"]), ours("e", "f"), ours("g", "h")]
    assert load_rows(str(tmp_path / "a.csv"), TRAIN).to_list() == expected


def test_csv_holds_no_talks(tmp_path):
    (tmp_path / "a.csv").write_text('messages\n"[{""role"": ""user"", ""content"": ""a""}]"\n', "utf-8")
    with pytest.raises(UserError, match=r"a\.csv, row 1: 'messages' must be a list .* as \.json, \.jsonl and \.parquet"):
        load_rows(str(tmp_path / "a.csv"), TRAIN)


def test_a_file_of_questions_without_a_question_is_refused(tmp_path):
    with pytest.raises(UserError, match="line 1: 'messages' holds no question"):
        list(read_questions(write_jsonl(tmp_path / "a.jsonl", talk(system="s")[0]), []))
