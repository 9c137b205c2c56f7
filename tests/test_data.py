import copy
import json
import os
import resource
from itertools import accumulate

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import REAL_ROWS, examples_of, needs_real_rows
from datasets import Dataset, DatasetDict, concatenate_datasets

from prefix_tuning.data import rows as data
from prefix_tuning.data.rows import digest, load_rows, prompt_of, read_questions, take, tokenize
from prefix_tuning.errors import UserError
from prefix_tuning.model.batch import EMPTY_BATCH, IGNORED, count_labels, pack

TRAIN = ("train",)
GOOD = {"instruction": "一加一等于几？", "input": "", "output": "二"}


def notebook_process(example, tokenizer, max_length=256):
    """The notebook's own function, row by row: the twin that `tokenize` must agree with."""
    prompt = tokenizer("\n".join(["Human: " + example["instruction"], example["input"]]).strip() + "\n\nAssistant: ")
    response = tokenizer(example["output"] + tokenizer.eos_token)
    input_ids = prompt["input_ids"] + response["input_ids"]
    labels = [-100] * len(prompt["input_ids"]) + response["input_ids"]
    return input_ids[:max_length], labels[:max_length]


def write(path, *rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    return str(path)


def agree_with_the_notebook(rows, tokenizer, max_length):
    expected = [notebook_process(row, tokenizer, max_length) for row in rows]
    expected = [pair for pair in expected if any(label != IGNORED for label in pair[1])]
    tokenized = tokenize(rows, tokenizer, max_length)
    found = take(tokenized, list(range(len(tokenized))))
    assert [(example.input_ids, example.labels) for example in found] == expected
    return len(rows) - len(tokenized)


@needs_real_rows
@pytest.mark.parametrize("file", ["train.jsonl", "test.jsonl"])
def test_ids_and_labels_equal_the_notebooks_on_all_real_rows(file, tokenizer):
    rows = load_rows(str(REAL_ROWS / file), TRAIN)
    agree_with_the_notebook(rows, tokenizer, 256)
    assert agree_with_the_notebook(rows, tokenizer, 24) > 0  # some rows lose all labels


def test_ids_and_labels_equal_the_notebooks(rows_file, tokenizer):
    rows = load_rows(str(rows_file), TRAIN)
    assert agree_with_the_notebook(rows, tokenizer, 256) == 0
    dropped = agree_with_the_notebook(rows, tokenizer, 26)
    assert 0 < dropped < len(rows)


def test_a_row_is_kept_if_there_is_room_for_one_label(rows_file, tokenizer):
    row = load_rows(str(rows_file), TRAIN).select([0])
    prompt = tokenizer(prompt_of(row[0]["instruction"], row[0]["input"])).input_ids
    assert [len(tokenize(row, tokenizer, len(prompt) + room)) for room in (-1, 0, 1)] == [0, 0, 1]


def test_every_kind_of_source_gives_the_same_rows(tmp_path):
    import pandas

    rows = [GOOD, {"instruction": "翻译，\n“好”", "input": "a,b", "output": "8"}, GOOD | {"input": None}]
    expected = [row | {"input": row["input"] or ""} for row in rows]
    write(tmp_path / "a.jsonl", *rows)
    write(tmp_path / "lines.json", *rows)
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


def test_input_may_be_missing_and_other_columns_are_passed_over(tmp_path):
    path = write(tmp_path / "a.jsonl", {"instruction": "你好", "output": "好", "history": [1]})
    assert load_rows(path, TRAIN).to_list() == [{"instruction": "你好", "input": "", "output": "好"}]
    assert prompt_of("你好") == "Human: 你好\n\nAssistant: "
    assert prompt_of("你好", "世界") == "Human: 你好\n世界\n\nAssistant: "


BAD_FILES = {
    "missing column": ("a.jsonl", json.dumps({"instruction": "x"}), r"a\.jsonl, line 1: has no column 'output'"),
    "number as output": (
        "a.jsonl",
        json.dumps(GOOD) + "\n\n" + json.dumps(GOOD | {"output": 3}),
        r"a\.jsonl, line 3: 'output' must be a text, not 3",
    ),
    "Chinese list as output": ("a.jsonl", json.dumps(GOOD | {"output": ["好"]}), r"'output' must be a text, not \[\"好\"\]"),
    "null instruction": ("a.jsonl", json.dumps(GOOD | {"instruction": None}), "line 1: 'instruction' must be a text"),
    "list as input": ("a.json", json.dumps([GOOD, GOOD | {"input": []}]), r"a\.json, row 2: 'input' must be a text"),
    "empty output": ("a.json", json.dumps([GOOD, GOOD | {"output": " "}]), r"a\.json, row 2: 'output' is empty"),
    "no object": ("a.jsonl", "[1, 2]", "line 1: is no object"),
    "empty file": ("a.jsonl", "", r"a\.jsonl: holds no rows"),
    "empty list": ("a.json", "[]", r"a\.json: holds no rows"),
    "empty csv": ("a.csv", "instruction,output\n", r"a\.csv: holds no rows"),
    "no JSON": ("a.jsonl", json.dumps(GOOD) + "\nhello", r"a\.jsonl, line 2: is not JSON"),
    "half a character": ("a.jsonl", '{"instruction": "a\\ud83d", "output": "b"}', "line 1: 'instruction' holds half of a"),
    "one object over lines": ("a.json", '{\n"data": []\n}', "is one object over several lines"),
    "broken JSON list": ("a.json", "[{", r"a\.json, as a whole: is not JSON"),
    "deeply nested": ("a.json", "[" * 100_000, "is not JSON"),
    "no CSV": ("a.csv", 'instruction,output\n"a', r"a\.csv, row 1: is not CSV"),
    "CSV with too many cells": ("a.csv", "instruction,output\na,b,c\n", "row 1: has more cells"),
    "CSV with too few cells": ("a.csv", "instruction,output\na\n", "row 1: 'output' must be a text, not null"),
    "CSV without the column": ("a.csv", "question,answer\na,b\n", "row 1: has no column 'instruction'"),
    "no Parquet": ("a.parquet", "hello", r"a\.parquet: cannot be read as Parquet: "),
    "unknown kind": ("a.txt", "hello", r"a\.txt: unknown kind of file"),
}


@pytest.mark.parametrize("name, text, message", BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_named_with_its_row(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    with pytest.raises(UserError, match=message):
        load_rows(str(path), TRAIN)


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
    write(path, GOOD)
    assert len(load_rows(str(path), TRAIN)) == 1
    write(path, GOOD, GOOD | {"output": "三" * 10_000})
    assert len(load_rows(str(path), TRAIN)) == 2
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    write(path, GOOD, GOOD | {"output": "四" * 10_000})
    os.utime(path, ns=times)
    assert load_rows(str(path), TRAIN)[1]["output"] == "四" * 10_000


def test_of_a_large_file_the_cache_notices_time_and_size(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "HASHED_BYTES", 10)
    path = tmp_path / "a.jsonl"
    for answer, time in (("三", 1), ("四", 2), ("十四", 2)):
        write(path, GOOD | {"output": answer})
        os.utime(path, (time, time))
        assert load_rows(str(path), TRAIN)[0]["output"] == answer
    monkeypatch.setattr(data, "HASHED_BYTES", path.stat().st_size)  # large is what is larger
    write(path, GOOD | {"output": "十五"})
    os.utime(path, (2, 2))
    assert load_rows(str(path), TRAIN)[0]["output"] == "十五"


def test_tokenising_is_cached(rows_file, tokenizer):
    rows = load_rows(str(rows_file), TRAIN)
    first, second = (tokenize(rows, tokenizer, 64) for _ in range(2))
    assert first.cache_files == second.cache_files and first.cache_files
    assert tokenize(rows, tokenizer, 63).cache_files != first.cache_files


def test_the_cache_knows_the_program(rows_file, tokenizer, monkeypatch):
    rows = load_rows(str(rows_file), TRAIN)
    first = tokenize(rows, tokenizer, 64)
    monkeypatch.setattr(data, "_THIS_CODE", "of a later version")
    assert tokenize(rows, tokenizer, 64).cache_files != first.cache_files
    assert load_rows(str(rows_file), TRAIN).cache_files != rows.cache_files


def test_the_cache_of_tokens_knows_the_eos_token(rows_file, tokenizer):
    rows = load_rows(str(rows_file), TRAIN)
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<s>"
    for one in (tokenizer, other):
        assert {ids[-1] for ids in tokenize(rows, one, 256)["input_ids"]} == {one.eos_token_id}


def test_a_digest_covers_every_row_and_nothing_but_the_rows(tmp_path, tokenizer):
    rows = [GOOD | {"instruction": f"{number}加一等于几？"} for number in range(3000)]
    tokenized = tokenize(load_rows(write(tmp_path / "a.jsonl", *rows), TRAIN), tokenizer, 64)
    rows[1], rows[2] = rows[2], rows[1]
    swapped = tokenize(load_rows(write(tmp_path / "a.jsonl", *rows), TRAIN), tokenizer, 64)
    rows[1], rows[2] = rows[2], rows[1] | {"output": "三"}
    changed = tokenize(load_rows(write(tmp_path / "a.jsonl", *rows), TRAIN), tokenizer, 64)
    label = tokenized.map(lambda row, place: {"labels": [7, *row["labels"][1:]]} if place == 1234 else {}, with_indices=True)
    assert len({digest(each) for each in (tokenized, swapped, changed, label, tokenized.select(range(2999)))}) == 5
    parts = concatenate_datasets([tokenized.select(range(700)), tokenized.select(range(700, 3000))])
    for same in (parts, tokenized.select(range(2999, -1, -1)).select(range(2999, -1, -1))):
        assert digest(same) == digest(tokenized)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, tokenizer, monkeypatch):
    path = write(tmp_path / "a.jsonl", *(GOOD | {"instruction": f"{number}加一等于几？"} for number in range(5000)))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/nope")
    for name in (path, "nobody/no-such-set"):
        with pytest.raises(UserError, match=r"/proc/nope: .*HF_DATASETS_CACHE"):
            load_rows(name, TRAIN)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def with_files_of(size, call, *arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            return call(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    message = r"cache: prepared rows .*File too large; .*HF_DATASETS_CACHE"
    with pytest.raises(UserError, match=message):
        with_files_of(10_000, load_rows, path, TRAIN)
    rows = load_rows(path, TRAIN)
    with pytest.raises(UserError, match=message):
        with_files_of(500_000, tokenize, rows, tokenizer, 64)
    assert len(tokenize(rows, tokenizer, 64)) == 5000


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [3, 9, 1, 7, 2, 30], [1, 1]])
@pytest.mark.parametrize("max_tokens", [1, 16, 1000])
def test_packing_keeps_every_token_and_label_once(lengths, max_tokens):
    examples = examples_of(lengths)
    batches = list(pack(examples, max_tokens))
    assert all(batch.rows == 1 or len(batch.input_ids) <= max_tokens for batch in batches)
    packed = [token for batch in batches for token in batch.input_ids.tolist()]
    assert sorted(packed) == sorted(token for example in examples for token in example.input_ids)
    for batch in batches:
        # A label is predicted one position before the token itself.
        assert torch.equal(batch.input_ids[batch.label_positions + 1], batch.labels)
        for first, start, length in zip(batch.first_labels, accumulate([0, *batch.lengths]), batch.lengths, strict=False):
            in_row = [place - start for place in batch.label_positions.tolist() if start <= place < start + length]
            assert first == min(in_row, default=length)
        values = torch.randn(len(batch.input_ids), 4)
        grid = batch.to_grid(values)
        assert grid.shape == (batch.rows, batch.max_length, 4)
        assert torch.equal(batch.from_grid(grid), values)
    labels = sum(label != IGNORED for example in examples for label in example.labels[1:])
    assert sum(len(batch.labels) for batch in batches) == labels == count_labels(examples)


def test_a_batch_moves_with_all_its_tensors():
    for lengths in ([4, 9], [4, 4]):
        (batch,) = pack(examples_of(lengths), 100)
        same, elsewhere = (vars(batch.to(torch.device(name))) for name in ("cpu", "meta"))
        assert same.keys() == elsewhere.keys() == vars(batch).keys()
        for name, value in vars(batch).items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(same[name], value) and elsewhere[name].is_meta and elsewhere[name].shape == value.shape
            else:
                assert same[name] is elsewhere[name] is value


def test_a_batch_is_filled_as_far_as_it_may_be():
    assert [batch.lengths for batch in pack(examples_of([3, 4, 3, 10, 2, 11]), 10)] == [[2, 3, 3], [4], [10], [11]]
    assert [batch.lengths for batch in pack(examples_of([5] * 5), 10)] == [[5, 5], [5, 5], [5]]
    assert (EMPTY_BATCH.input_ids.tolist(), EMPTY_BATCH.lengths, EMPTY_BATCH.first_labels) == ([0], [1], [1])
    assert len(EMPTY_BATCH.labels) == 0 and EMPTY_BATCH.slots is None


def test_a_csv_cell_may_be_long_and_keeps_its_line_breaks(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "a" / "new" / "folder"))
    answer = "一\r\n" * 100_000
    (tmp_path / "a.csv").write_bytes(f'instruction,output\n"a","{answer}"\n'.encode())
    assert load_rows(str(tmp_path / "a.csv"), TRAIN)["output"][:] == [answer]


def test_a_question_may_name_its_prefix(tmp_path):
    rows = [{"instruction": "你好", "more": 1}, {"instruction": "好", "input": "吗", "prefix": "b"}]
    rows += [{"instruction": "好", "input": None, "prefix": empty} for empty in (None, "")]
    found = list(read_questions(write(tmp_path / "a.jsonl", *rows), ["a", "b"]))
    prompts = [prompt_of("你好"), prompt_of("好", "吗"), prompt_of("好"), prompt_of("好")]
    assert found == list(zip(rows, prompts, [None, "b", None, None], strict=True))
    for change, message in (
        ({"prefix": "c"}, "line 2: names the prefix 'c'; there are a, b"),
        ({"response": ""}, "line 2: has a column 'response' already"),
        ({"instruction": None}, "line 2: 'instruction' must be a text"),
    ):
        path = write(tmp_path / "a.jsonl", rows[0], rows[1] | change)
        with pytest.raises(UserError, match=message):
            list(read_questions(path, ["a", "b"]))


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


def test_a_table_whose_own_columns_are_wrong_is_named_with_its_row(tmp_path):
    table = pa.table({"instruction": ["a", "b", "c"], "output": STRANGE["text"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet, row 3: 'output' cannot be read: 'utf-8'"):
        load_rows(str(tmp_path / "a.parquet"), TRAIN)
    Dataset(table).save_to_disk(tmp_path / "folder")
    with pytest.raises(UserError, match="folder, row 3: cannot be read: 'utf-8'"):
        load_rows(str(tmp_path / "folder"), TRAIN)
    table = pa.table({"question": ["a"], "answer": ["b"]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    Dataset(table).save_to_disk(tmp_path / "other")
    for name in ("b.parquet", "other"):
        with pytest.raises(UserError, match=f"{name}, row 1: has no column 'instruction'; it has 'question', 'answer'"):
            load_rows(str(tmp_path / name), TRAIN)
    damaged = (tmp_path / "b.parquet").read_bytes().replace(b"question", b"quest\xffon")
    (tmp_path / "b.parquet").write_bytes(damaged)
    with pytest.raises(UserError, match=r"b\.parquet: cannot be read as Parquet: 'utf-8'"):
        load_rows(str(tmp_path / "b.parquet"), TRAIN)


def test_the_bar_names_the_split(tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", GOOD)
    for splits in (TRAIN, ("validation", "test", "train")):
        assert load_rows(path, splits).to_list() == [GOOD]
        bars = {line.split(":")[0] for line in capsys.readouterr().err.split("\r") if line}
        assert bars == {f"Generating {splits[0]} split"}
