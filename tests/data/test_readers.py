import json
import os

import pyarrow as pa
import pyarrow.parquet
import pytest
from datasets import Dataset, DatasetDict
from launching import TRAIN
from rows import GOOD, write_jsonl

from prefix_tuning.data import readers
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import read_questions
from prefix_tuning.data.templates import prompt_of
from prefix_tuning.errors import UserError


def test_every_kind_of_source_gives_the_same_rows(tmp_path):
    import pandas

    rows = [GOOD, {"instruction": "翻译，\n“好”", "input": "a,b", "output": "8"}, GOOD | {"input": None}]
    expected = [row | {"input": row["input"] or "", "system": "", "history": [], "weights": []} for row in rows]
    write_jsonl(tmp_path / "a.jsonl", *rows)
    write_jsonl(tmp_path / "lines.json", *rows)
    (tmp_path / "a.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), "utf-8")
    (tmp_path / "bom.json").write_text("\ufeff" + json.dumps(rows), "utf-8")
    (tmp_path / "crlf.jsonl").write_bytes((tmp_path / "a.jsonl").read_bytes().replace(b"\n", b"\r\n\r\n"))
    pandas.DataFrame(rows).to_csv(tmp_path / "a.csv", index=False)  # "8" must stay a text
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    Dataset.from_list(rows).save_to_disk(tmp_path / "folder")
    DatasetDict({"train": Dataset.from_list(rows), "test": Dataset.from_list(rows[:1])}).save_to_disk(tmp_path / "splits")
    for path in sorted(tmp_path.iterdir()):
        assert load_rows(str(path), TRAIN).to_list() == expected, path.name
    assert load_rows(str(tmp_path / "splits"), ("validation", "test", "train")).to_list() == expected[:1]


def test_input_may_be_missing(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", {"instruction": "你好", "output": "好"})
    expected = {"instruction": "你好", "input": "", "output": "好", "system": "", "history": [], "weights": []}
    assert load_rows(path, TRAIN).to_list() == [expected]
    assert prompt_of("你好") == "Human: 你好\n\nAssistant: "
    assert prompt_of("你好", "世界") == "Human: 你好\n世界\n\nAssistant: "


BAD_FILES = {
    "missing column": (
        "a.jsonl",
        json.dumps({"instruction": "x"}),
        r"a\.jsonl, line 1: its columns are not known .*: 'instruction'",
    ),
    "missing later": ("a.jsonl", json.dumps(GOOD) + '\n{"instruction": "x"}', r"line 2: has no column 'output'"),
    "number as output": (
        "a.jsonl",
        json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | {"output": 3}),
        r"a\.jsonl, line 3: 'output' must be a text, not 3",
    ),
    "Chinese list as output": ("a.jsonl", json.dumps(GOOD | {"output": ["好"]}), r"'output' must be a text, not \[\"好\"\]"),
    "null instruction": ("a.jsonl", json.dumps(GOOD | {"instruction": None}), "line 1: 'instruction' must be a text"),
    "list as input": ("a.json", json.dumps([GOOD, GOOD | {"input": []}]), r"a\.json, row 2: 'input' must be a text"),
    "empty output": ("a.json", json.dumps([GOOD, GOOD | {"output": " "}]), r"a\.json, row 2: 'output' is empty"),
    "no object": ("a.jsonl", "1", "line 1: is no object"),
    "a list without objects": ("a.jsonl", "[1]", "row 1: is no object"),
    "empty file": ("a.jsonl", "", r"a\.jsonl: holds no rows"),
    "empty list": ("a.json", "[]", r"a\.json: holds no rows"),
    "empty csv": ("a.csv", "instruction,output\n", r"a\.csv: holds no rows"),
    "no JSON": ("a.jsonl", json.dumps(GOOD) + "\nhello", r"a\.jsonl, line 2: is not JSON"),
    "half a character": ("a.jsonl", '{"instruction": "a\\ud83d", "output": "b"}', "line 1: 'instruction' holds half of a"),
    "one object over lines": ("a.json", '{\n"data": []\n}', "has an object over several lines; it must be a list of rows"),
    "objects over lines": ("a.jsonl", '{\n "a": 1\n}\n{\n "a": 1\n}\n', r"has an object over several lines; .*`jq -c \.`"),
    "broken JSON list": ("a.json", "[{", r"a\.json, as a whole: is not JSON"),
    "deeply nested": ("a.json", "[" * 100_000, "is not JSON"),
    "no CSV": ("a.csv", 'instruction,output\n"a', r"a\.csv, row 1: is not CSV"),
    "CSV with too many cells": ("a.csv", "instruction,output\na,b,c\n", "row 1: has more cells"),
    "CSV with too few cells": ("a.csv", "instruction,output\na\n", "row 1: 'output' must be a text, not null"),
    "CSV without the column": ("a.csv", "frage,antwort\na,b\n", "row 1: its columns are not known .*: 'frage', 'antwort'"),
    "no Parquet": ("a.parquet", "hello", r"a\.parquet: cannot be read as Parquet: "),
    "unknown kind": ("a.txt", "hello", r"a\.txt: unknown kind of file"),
}


@pytest.mark.parametrize("name, text, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named_with_its_row(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    with pytest.raises(UserError, match=message):
        load_rows(str(path), TRAIN)


def test_the_first_ten_bad_rows_are_named_at_once(tmp_path):
    def write(*bad):
        lines = [json.dumps(GOOD | {"instruction": str(number)}) for number in range(1, 31)]
        for number, line in bad:
            lines[number - 1] = line if isinstance(line, str) else json.dumps(GOOD | line)
        (tmp_path / "a.jsonl").write_text("\n".join(lines), "utf-8")
        return str(tmp_path / "a.jsonl")

    bad = [(1, "{]"), (3, {"output": 3}), (7, "hello"), (9, "5"), (11, {"instruction": None})]
    errors = (
        "line 1: is not JSON: .*; line 3: 'output' must be a text, not 3; line 7: is not JSON: .*; line 9: is no object .*"
    )
    errors += "; line 11: 'instruction' must be a text, not null"
    for read in (lambda name: load_rows(name, TRAIN), lambda name: list(read_questions(name, []))):
        with pytest.raises(UserError, match=r"a\.jsonl, line 3: 'input' must be a text, not 3$"):
            read(write((3, {"input": 3})))
    with pytest.raises(UserError, match=rf"a\.jsonl: 5 bad rows: {errors}$"):
        load_rows(write(*bad), TRAIN)
    # A file that breaks later hides none of them.
    broken = tmp_path / "broken.csv"
    broken.write_text('instruction,output\na,b,c\nd,e\n"x"y,z\n', "utf-8")
    with pytest.raises(UserError, match=r"broken\.csv: 2 bad rows: row 1: has more cells .*; row 3: is not CSV"):
        load_rows(str(broken), TRAIN)
    many = [(number, {"instruction": number}) for number in range(10, 30)]
    for read in (lambda name: load_rows(name, TRAIN), lambda name: list(read_questions(name, []))):
        with pytest.raises(UserError, match=r"a\.jsonl: 20 bad rows, the first 10: line 10: .*; line 19: ") as error:
            read(write(*many))
        assert "line 20" not in str(error.value)


def test_bad_rows_of_questions_are_named_at_once(tmp_path):
    rows = [{"instruction": "a", "prefix": "x"}, {"instruction": "b"}, {"instruction": "c", "response": ""}]
    with pytest.raises(UserError, match=r"2 bad rows: line 1: names the prefix 'x'; .*; line 3: has a column 'response' al"):
        list(read_questions(write_jsonl(tmp_path / "a.jsonl", *rows), ["p"]))


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_list_is_read_whatever_the_file_is_called(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    for indent in (None, 2):
        path.write_text(json.dumps([GOOD, GOOD], indent=indent), "utf-8")
        assert load_rows(str(path), TRAIN)["output"][:] == ["二", "二"]


CSV = {
    "semicolons": ("a.csv", "instruction;input;output\na;b,c;d\n"),
    "tabs": ("a.csv", "instruction\tinput\toutput\na\tb,c\td\n"),
    "tabs in a .tsv": ("a.tsv", "instruction\tinput\toutput\r\na\tb,c\td\r\n"),
    "sep=": ("a.csv", "sep=;\r\ninstruction;input;output\r\na;b,c;d\r\n"),
    "sep=|": ("a.csv", "sep=|\ninstruction|input|output\na|b,c|d\n"),
    "quotes": ("a.csv", '"instruction";"input";"output"\n"a";"b,c";"d"\n'),
    "commas": ("a.csv", 'instruction,input,output\na,"b,c",d\n'),
    "empty last columns": ("a.csv", 'instruction,input,output,,\na,"b,c",d,,\n'),
    "empty last cells": ("a.csv", "instruction;input;output\na;b,c;d;; \n"),
}


@pytest.mark.parametrize("name, text", CSV.values(), ids=CSV)
def test_a_csv_as_excel_writes_it(tmp_path, capsys, name, text):
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert load_rows(str(tmp_path / name), TRAIN).to_list() == [
        {"instruction": "a", "input": "b,c", "output": "d", "system": "", "history": [], "weights": []}
    ]
    assert capsys.readouterr().out == ""


def test_known_names_tell_the_separator_and_blank_lines_before_them_do_not_count(tmp_path):
    (tmp_path / "a.csv").write_text('\n\nquestion,answer,"notes (a; b; c; d)"\na,d,n\n', "utf-8")
    assert load_rows(str(tmp_path / "a.csv"), TRAIN)["output"][:] == ["d"]


def test_a_quote_that_begins_a_cell_is_explained(tmp_path):
    (tmp_path / "a.tsv").write_text('instruction\toutput\n"甲" 是什么\t乙\n', "utf-8")
    with pytest.raises(UserError, match=r'a\.tsv, row 1: is not CSV: .*; write a quote within a cell as ""'):
        load_rows(str(tmp_path / "a.tsv"), TRAIN)


def test_an_object_over_several_lines_is_named_however_it_begins(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "a",\n"output": "b"}\n', "utf-8")
    with pytest.raises(UserError, match=r"has an object over several lines; it must be .*jq -c"):
        load_rows(str(tmp_path / "a.jsonl"), TRAIN)


def test_a_cell_without_a_column_is_named(tmp_path):
    (tmp_path / "a.csv").write_text("instruction,output,\na,b,c\n", "utf-8")
    with pytest.raises(UserError, match=r"a\.csv, row 1: has more cells"):
        load_rows(str(tmp_path / "a.csv"), TRAIN)


@pytest.mark.parametrize(
    "encoding, hint",
    [
        ("gbk", "it looks like GBK: iconv -f GB18030 -t UTF-8 .*a"),
        ("utf-16", "it looks like UTF-16: iconv -f UTF-16 -t UTF-8 .*a"),
        ("utf-16-le", "it looks like UTF-16"),
        ("ascii utf-16-le", "it looks like UTF-16"),
        ("latin-1", "save it as UTF-8$"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_another_encoding_is_named_with_the_way_out(tmp_path, name, encoding, hint):
    instruction = "straße; fräge" if encoding == "latin-1" else "法国的首都是哪里？请用“一个词”回答。"
    if encoding.startswith("ascii"):
        encoding, instruction = encoding.split()[1], "France?"
    text = f"instruction,output\n{instruction},a\n" * 500
    if name == "a.jsonl":
        text = json.dumps({"instruction": instruction, "output": "a"}, ensure_ascii=False) + "\n"
    (tmp_path / name).write_bytes(text.encode(encoding))
    for read in (lambda path: load_rows(path, TRAIN), lambda path: list(read_questions(path, []))):
        with pytest.raises(UserError, match=rf"{name}: is not UTF-8 text.*; {hint}"):
            read(str(tmp_path / name))


@pytest.mark.parametrize(
    "form, columns",
    [("torch", ["instruction", "output"]), ("numpy", ["output"]), ("pandas", None), ("arrow", None), (None, ["output"])],
)
def test_a_saved_format_hides_nothing(tmp_path, form, columns):
    rows = [GOOD | {"input": "请回答"}] * 3
    Dataset.from_list(rows).with_format(form, columns=columns).save_to_disk(tmp_path / "folder")
    found = load_rows(str(tmp_path / "folder"), TRAIN)
    assert found.to_list() == [row | {"system": "", "history": [], "weights": []} for row in rows]


@pytest.mark.parametrize("form", ["torch", None])
def test_a_saved_set_without_rows_is_named(tmp_path, form):
    Dataset.from_list([GOOD]).select([]).with_format(form).save_to_disk(tmp_path / "rows")
    Dataset.from_dict({}).save_to_disk(tmp_path / "nothing")
    for name in ("rows", "nothing"):
        with pytest.raises(UserError, match=f"{name}: holds no rows, or a split without rows$"):
            load_rows(str(tmp_path / name), TRAIN)


def test_bytes_that_are_no_text_are_named(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xff")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        load_rows(str(path), TRAIN)


def test_a_file_that_fails_while_it_is_read_is_named(tmp_path):
    (tmp_path / "a.jsonl").symlink_to("/proc/self/mem")
    for read in (lambda name: load_rows(name, TRAIN), lambda name: list(read_questions(name, []))):
        with pytest.raises(UserError, match=r"a\.jsonl: cannot be read: Input/output error"):
            read(str(tmp_path / "a.jsonl"))


def test_a_csv_cell_may_be_long_and_keeps_its_line_breaks(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "a" / "new" / "folder"))
    answer = "一\r\n" * 100_000
    (tmp_path / "a.csv").write_bytes(f'instruction,output\n"a","{answer}"\n'.encode())
    assert load_rows(str(tmp_path / "a.csv"), TRAIN)["output"][:] == [answer]


def test_columns_of_one_name_are_refused(tmp_path):
    (tmp_path / "rows.csv").write_text("instruction,output,output\na,b,c\n", "utf-8")
    table = pa.table([["a"], ["b"], ["c"]], names=["instruction", "output", "output"])
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    for kind in ("csv", "parquet"):
        with pytest.raises(UserError, match="more than one column 'output'"):
            load_rows(str(tmp_path / f"rows.{kind}"), ("train",))


STRANGE = {
    "late": pa.array([0, 1, 2**62], pa.timestamp("us")),
    "zone": pa.array([None, None, 2], pa.timestamp("us", tz="Mars/Olympus")),
    "text": pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"b", b"\xff\xfe"]).buffers()),
}


@pytest.mark.parametrize("column", STRANGE)
def test_a_table_is_read_for_its_three_columns_only(tmp_path, column):
    table = pa.table({"instruction": ["a", "b", "c"], "output": ["d", "e", "f"], column: STRANGE[column]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    Dataset(table).save_to_disk(tmp_path / "folder")
    for name in ("a.parquet", "folder"):
        assert load_rows(str(tmp_path / name), TRAIN)["output"][:] == ["d", "e", "f"]
    questions = read_questions(str(tmp_path / "a.parquet"), [])
    assert [next(questions)[0]["instruction"] for _ in range(2)] == ["a", "b"]
    with pytest.raises(UserError, match=rf"a\.parquet, row 3: '{column}' cannot be read: "):
        next(questions)


def test_rows_of_a_long_table_are_numbered_to_its_end(tmp_path):
    rows = [GOOD] * 1500
    rows[1299] = GOOD | {"output": " "}
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 1300: 'output' is empty"):
        load_rows(str(tmp_path / "a.parquet"), TRAIN)


def test_a_table_whose_own_columns_are_wrong_is_named_with_its_row(tmp_path):
    table = pa.table({"instruction": ["a", "b", "c"], "output": STRANGE["text"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 3: 'output' cannot be read: 'utf-8'"):
        load_rows(str(tmp_path / "a.parquet"), TRAIN)
    Dataset(table).save_to_disk(tmp_path / "folder")
    with pytest.raises(UserError, match="folder, row 3: cannot be read: 'utf-8'"):
        load_rows(str(tmp_path / "folder"), TRAIN)
    table = pa.table({"frage": ["a"], "antwort": ["b"]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    Dataset(table).save_to_disk(tmp_path / "other")
    for name in ("b.parquet", "other"):
        with pytest.raises(UserError, match=f"{name}, row 1: its columns are not known .*: 'frage', 'antwort'; say"):
            load_rows(str(tmp_path / name), TRAIN)
    damaged = (tmp_path / "b.parquet").read_bytes().replace(b"frage", b"fr\xffge")
    (tmp_path / "b.parquet").write_bytes(damaged)
    with pytest.raises(UserError, match=r"b\.parquet: cannot be read as Parquet: 'utf-8'"):
        load_rows(str(tmp_path / "b.parquet"), TRAIN)


def test_a_name_that_comes_twice_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"instruction": "a", "output": "b", "output": "c"}\n', "utf-8")
    with pytest.raises(UserError, match=r"a\.jsonl, line 1: .*'output' comes twice"):
        load_rows(str(tmp_path / "a.jsonl"), ("train",))


def test_half_a_character_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"instruction": "\\ud83d", "output": "b"}\n', "utf-8")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: 'instruction' holds half of a character"):
        load_rows(str(tmp_path / "rows.jsonl"), ("train",))


def test_sources_that_are_not_there_are_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        load_rows(str(tmp_path / "gone.jsonl"), TRAIN)
    with pytest.raises(UserError, match="not one written by save_to_disk"):
        load_rows(str(tmp_path), TRAIN)
    with pytest.raises(UserError, match="nobody/no-such-set"):
        load_rows("nobody/no-such-set", TRAIN)
    DatasetDict({"extra": Dataset.from_list([GOOD])}).save_to_disk(tmp_path / "splits")
    with pytest.raises(UserError, match="has the splits extra"):
        load_rows(str(tmp_path / "splits"), TRAIN)


def test_the_cache_notices_a_changed_file(tmp_path):
    path = tmp_path / "a.jsonl"
    write_jsonl(path, GOOD)
    assert len(load_rows(str(path), TRAIN)) == 1
    write_jsonl(path, GOOD, GOOD | {"output": "三" * 10_000})
    assert len(load_rows(str(path), TRAIN)) == 2
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    write_jsonl(path, GOOD, GOOD | {"output": "四" * 10_000})
    os.utime(path, ns=times)
    assert load_rows(str(path), TRAIN)[1]["output"] == "四" * 10_000


def test_of_a_large_file_the_cache_notices_time_and_size(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "HASHED_BYTES", 10)
    path = tmp_path / "a.jsonl"
    for answer, time in (("三", 1), ("四", 2), ("十四", 2)):
        write_jsonl(path, GOOD | {"output": answer})
        os.utime(path, (time, time))
        assert load_rows(str(path), TRAIN)[0]["output"] == answer
    # A file of just this size is not large yet: its content is hashed.
    monkeypatch.setattr(readers, "HASHED_BYTES", path.stat().st_size)
    write_jsonl(path, GOOD | {"output": "十五"})
    os.utime(path, (2, 2))
    assert load_rows(str(path), TRAIN)[0]["output"] == "十五"


def test_the_bar_names_the_split(tmp_path, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", GOOD)
    for splits in (TRAIN, ("validation", "test", "train")):
        assert load_rows(path, splits).to_list() == [GOOD | {"system": "", "history": [], "weights": []}]
        bars = {line.split(":")[0] for line in capsys.readouterr().err.split("\r") if line}
        assert bars == {f"Generating {splits[0]} split"}
