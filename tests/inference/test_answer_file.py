import datetime
import json
import locale
import re
import signal

import pytest
from answers import FRANCE, refuses, run_infer
from forks import Fork
from launching import wait_until
from rows import questions, write_rows

from prefix_tuning.data.rows import read_questions
from prefix_tuning.data.templates import talk_of
from prefix_tuning.errors import Interrupted, UserError
from prefix_tuning.inference.answer_file import answer_file, rows_done
from prefix_tuning.inference.ask import Answerer


def read_lines(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_files_are_answered_in_their_order(tmp_path, prefixes, capsys, kind):
    rows = questions(50)
    source, output = write_rows(tmp_path / f"rows.{kind}", rows), tmp_path / "answers.jsonl"
    flags = ["--input", source, "--output", output, *prefixes, "--batch_size", 3, "--max_new_tokens", 24]
    run_infer(*flags)
    assert capsys.readouterr().out == ""  # the answers are in the file
    found = read_lines(output)
    assert [int(row["id"]) for row in found] == list(range(50))
    assert [list(row) for row in found] == [[*rows[0], "response"]] * 50
    answered = [row["response"] == row["output"] for row in found]
    assert sum(answered[::4]) >= 8 and sum(answered[3::4]) >= 8 and not any(answered[2::4])  # short, short, base
    assert all(len(row["response"]) > len(row["output"]) for row in found[1::4])  # sentence
    refuses("is there already; continue it with --resume", *flags)


def test_what_json_does_not_know_becomes_text_or_null(tmp_path, prefixes):
    rows = [{"instruction": "？", "when": datetime.date(2026, 1, 2), "share": float("nan"), "more": ["\u20ac"]}]
    rows[0]["deep"] = [{"x": float("inf")}]
    source, output = write_rows(tmp_path / "rows.parquet", rows), tmp_path / "answers.jsonl"
    flags = ["--input", source, "--output", output, *prefixes, "--max_new_tokens", 4]
    run_infer(*flags)
    (found,) = read_lines(output)
    assert (found["when"], found["share"], found["more"]) == ("2026-01-02", None, ["\u20ac"])
    assert found["deep"] == [{"x": None}]
    run_infer(*flags, "--resume")
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"instruction": "a", "note": "\\ud800"}\n', "utf-8")
    for resume in ([], ["--resume"]):
        run_infer("--input", odd, "--output", tmp_path / "odd-answers.jsonl", *flags[4:], *resume)
    assert read_lines(tmp_path / "odd-answers.jsonl")[0]["note"] == "\ud800"


def test_a_full_disk_is_named_and_the_rest_can_be_answered_later(tmp_path, prefixes):
    source, output = write_rows(tmp_path / "rows.jsonl", questions(40)), tmp_path / "answers.jsonl"
    flags = ["--input", source, "--output", output, *prefixes, "--batch_size", 4, "--max_new_tokens", 8]
    program = Fork("infer.py", *flags, limit=1024)
    _, errors = program.communicate()
    assert program.returncode == 2 and "Traceback" not in errors
    assert "cannot be written" in errors and "--resume" in errors.splitlines()[-1]
    run_infer(*flags, "--resume")
    assert [row["id"] for row in read_lines(output)] == list(range(40))


def test_several_sequences_become_a_list(tmp_path, prefixes):
    source, output = write_rows(tmp_path / "rows.jsonl", questions(5)), tmp_path / "answers.jsonl"
    run_infer("--input", source, "--output", output, *prefixes, "--do_sample", "--num_return_sequences", 2)
    assert all(isinstance(row["response"], list) and len(row["response"]) == 2 for row in read_lines(output))


def test_a_question_that_is_asked_again_is_drawn_anew_whatever_the_batches(tmp_path, prefixes):
    source, outputs = write_rows(tmp_path / "rows.jsonl", questions(1) * 24), []
    for batch_size in (2, 7, 24):
        output = tmp_path / f"{batch_size}.jsonl"
        flags = ["--input", source, "--output", output, *prefixes, "--batch_size", batch_size, "--max_new_tokens", 8]
        run_infer(*flags, "--do_sample", "--temperature", "3")
        outputs.append(output.read_bytes())
    assert outputs[0] == outputs[1] == outputs[2]
    assert len({row["response"] for row in read_lines(output)}) > 18


@pytest.mark.parametrize("sampling", [[], ["--do_sample", "--temperature", "2"]], ids=["greedy", "sampling"])
def test_a_resumed_run_writes_the_same_bytes(tmp_path, prefixes, sampling):
    source, output = write_rows(tmp_path / "rows.jsonl", questions(25)), tmp_path / "answers.jsonl"
    flags = ["--input", source, "--output", output, *prefixes, "--batch_size", 2, "--max_new_tokens", 16, *sampling]
    run_infer(*flags)
    whole = output.read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", whole)]
    for cut in (0, 1, ends[0], ends[2] + 5, ends[8], ends[16] - 1, ends[22] + 1, len(whole)):
        output.write_bytes(whole[:cut])
        run_infer(*flags, "--resume")
        assert output.read_bytes() == whole, cut


def test_a_killed_run_can_be_resumed(tmp_path, prefixes):
    source, output = write_rows(tmp_path / "rows.jsonl", questions(600)), tmp_path / "answers.jsonl"
    flags = ["--input", source, "--output", output, *prefixes, "--batch_size", 1, "--max_new_tokens", 16]
    program = Fork("infer.py", *flags)
    wait_until(lambda: output.exists() and output.read_bytes().count(b"\n") >= 20, program)
    program.send_signal(signal.SIGKILL)
    program.communicate()
    killed = output.read_bytes().count(b"\n")
    assert 20 <= killed < 600
    run_infer(*flags[:-4], "--max_new_tokens", 16, "--resume")
    found = read_lines(output)
    assert [row["id"] for row in found] == list(range(600))


def test_each_line_is_written_at_once_in_utf8_and_ctrl_c_counts_them(tmp_path, tuned_model, tokenizer):
    """In a locale whose own encoding is ASCII."""
    output, written = tmp_path / "answers.jsonl", []
    options = {"num_beams": 1, "num_return_sequences": 1, "max_new_tokens": 1}
    rows = [({"instruction": FRANCE, "id": number}, talk_of(FRANCE), "short") for number in range(5)]

    def interrupt(*_):
        written.append(output.read_bytes().count(b"\n"))
        if len(written) == 4:
            raise KeyboardInterrupt

    hook, before = tuned_model.lm_head.register_forward_pre_hook(interrupt), locale.setlocale(locale.LC_CTYPE)
    locale.setlocale(locale.LC_CTYPE, "C")
    try:
        with pytest.raises(Interrupted, match="stopped after 3 of 5 rows; continue with --resume"):
            answer_file(Answerer(tuned_model, tokenizer, options, seed=0), lambda: iter(rows), output, 1, len(rows))
    finally:
        locale.setlocale(locale.LC_CTYPE, before)
        hook.remove()
    assert written == [0, 1, 2, 3]
    assert output.read_text("utf-8") == as_lines(*(row | {"response": "巴黎"} for row, *_ in rows[:3]), ensure_ascii=False)


def test_resuming_another_input_is_refused(tmp_path, prefixes):
    source, output = write_rows(tmp_path / "rows.jsonl", questions(6)), tmp_path / "answers.jsonl"
    flags = ["--input", source, "--output", output, *prefixes, "--max_new_tokens", 8]
    run_infer(*flags)
    kept = output.read_bytes()
    write_rows(source, [*questions(3), questions(4)[3] | {"instruction": "？"}])
    refuses("line 4: does not answer row 4", *flags, "--resume")
    precious = tmp_path / "precious.jsonl"
    precious.write_text('{"my": "precious data"}', "utf-8")
    refuses("line 1: does not answer row 1", *flags[:3], precious, *flags[4:], "--resume")
    assert precious.read_text("utf-8") == '{"my": "precious data"}'
    write_rows(source, questions(3))
    refuses("line 4: does not answer row 4", *flags, "--resume")
    assert output.read_bytes() == kept


def as_lines(*rows, end="\n", **options):
    return "".join(json.dumps(row, **options) + end for row in rows)


EDITED = {
    "no final newline": lambda rows: as_lines(*rows, ensure_ascii=False).removesuffix("\n"),
    "CRLF": lambda rows: as_lines(*rows, end="\r\n", ensure_ascii=False),
    "blank lines": lambda rows: "\n" + as_lines(*rows, end="\n\n \n"),
    "escapes": lambda rows: as_lines(*rows),
    "other order": lambda rows: as_lines(*[dict(reversed(row.items())) for row in rows]),
    "other spacing": lambda rows: as_lines(*rows, separators=(" ,  ", ":")),
    "a mark of its encoding": lambda rows: "\ufeff" + as_lines(*rows, ensure_ascii=False),
}


@pytest.mark.parametrize("edit", EDITED.values(), ids=EDITED)
@pytest.mark.parametrize("killed", [b"", b'{"instruction": "\xe7\xac', b'{"instruction": "\xe7\xac\xac4"\r\n\n'])
def test_a_line_answers_its_row_however_it_is_written(tmp_path, edit, killed):
    rows = [{"instruction": f"第{number}", "id": number, "odd": ["\ud800", None]} for number in range(1, 7)]
    source, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "answers.jsonl"
    answers = ["好", 'she said "}"', "\ud800"]
    edited = edit([row | {"response": answer} for row, answer in zip(rows[:3], answers, strict=True)])
    content = edited.encode(errors="backslashreplace")
    whole = content if content.endswith(b"\n") else content + b"\n"
    output.write_bytes((whole if killed else content) + killed)
    assert rows_done(output, read_questions(str(source), [])) == 3
    # Nothing of what was there is changed; a line can be appended.
    assert output.read_bytes().rstrip() == whole.rstrip() and output.read_bytes().endswith(b"\n")
    assert rows_done(output, read_questions(str(source), [])) == 3


@pytest.mark.parametrize("response", ["好", "a\\b\n\u0001}", '"', ["一", "}]", ""]])
def test_a_line_is_cut_off_wherever_it_ends_early(tmp_path, response):
    row = {"instruction": "第一"}
    source, output = write_rows(tmp_path / "rows.jsonl", [row]), tmp_path / "answers.jsonl"
    line = json.dumps(row | {"response": response}, ensure_ascii=False).encode()
    for length in range(len(line) + 1):
        output.write_bytes(line[:length])
        assert rows_done(output, read_questions(str(source), [])) == (length == len(line))
        assert output.read_bytes() == (line + b"\n" if length == len(line) else b"")


def test_what_a_person_broke_is_named_and_stays(tmp_path):
    source, output = write_rows(tmp_path / "rows.jsonl", [{"instruction": "a"}] * 2), tmp_path / "answers.jsonl"
    good = '{"instruction": "a", "response": "b"}'
    for broken, message in {
        '{"instruction": "a", "response": "he said "b""}': "line 2: is not JSON; mend it",
        '{"instruction": "a", "answer': "line 2: is not JSON; mend it",
        '{"instruction": "a", "response": "b\n' + good: "line 2: is not JSON; mend it",
        '{"instruction": "a", "response": "b", "more": 1}': "line 2: does not answer row 2 of --input; give the --input",
        '{"instruction": "a"}': "line 2: does not answer row 2",
        '["instruction", "a", "response"]': "line 2: does not answer row 2",
        good + "\n" + good: "line 3: does not answer row 3",
    }.items():
        # Many editors write no line break after the last line.
        output.write_text(f"{good}\n{broken}", "utf-8")
        with pytest.raises(UserError, match=message):
            rows_done(output, read_questions(str(source), []))
        assert output.read_text("utf-8") == f"{good}\n{broken}"
    output.write_text("my notes", "utf-8")  # without a line break, but not how the line of a row begins
    with pytest.raises(UserError, match="line 1: is not JSON; mend it"):
        rows_done(output, read_questions(str(source), []))
    assert output.read_text("utf-8") == "my notes"


def test_what_a_person_edited_is_kept_and_the_rest_answered(tmp_path, prefixes):
    source, output = write_rows(tmp_path / "rows.jsonl", questions(6)), tmp_path / "answers.jsonl"
    flags = ["--input", source, "--output", output, *prefixes, "--max_new_tokens", 8]
    run_infer(*flags)
    whole = read_lines(output)
    output.write_text(as_lines(*whole[:2], whole[2] | {"response": "由人写的"}).removesuffix("\n"), "utf-8")
    run_infer(*flags, "--resume")
    assert read_lines(output) == [*whole[:2], whole[2] | {"response": "由人写的"}, *whole[3:]]


BAD_ROWS = {
    "no question": ({"output": "a"}, "line 2: has no column 'instruction'; it has 'output'"),
    "a number": ({"instruction": 5}, "line 2: 'instruction' must be a text, not 5"),
    "a prefix that is a number": ({"instruction": "a", "prefix": 0}, "names the prefix 0; there are base"),
    "an unknown prefix": ({"instruction": "a", "prefix": "x"}, "names the prefix 'x'; there are base, short, sentence"),
    "an answered row": ({"instruction": "a", "response": "b"}, "line 2: has a column 'response' already"),
    "half a character": ({"instruction": "\ud800"}, "half of a character"),
    "no object": ([], "line 2: is no object"),
}


@pytest.mark.parametrize("row, message", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_before_anything_is_written(tmp_path, prefixes, row, message):
    source, output = write_rows(tmp_path / "rows.jsonl", [{"instruction": "a"}, row]), tmp_path / "answers.jsonl"
    refuses(message, "--input", source, "--output", output, *prefixes)
    assert not output.exists()


def test_files_that_cannot_be_read_or_written_are_named(tmp_path, prefixes):
    source = write_rows(tmp_path / "rows.jsonl", questions(2))
    refuses("nowhere.jsonl: cannot be read", "--input", "nowhere.jsonl", "--output", tmp_path / "a.jsonl", *prefixes)
    refuses("unknown kind of file", "--input", "rows.txt", "--output", tmp_path / "a.jsonl", *prefixes)
    refuses("there is no such folder", "--input", source, "--output", tmp_path / "no" / "a.jsonl", *prefixes)
    before = source.read_bytes()
    refuses("is the --input", "--input", source, "--output", source, "--resume", *prefixes)
    assert source.read_bytes() == before
    refuses("nowhere", "--input", source, "--output", tmp_path / "a.jsonl", *prefixes, "--model_name_or_path", "./nowhere")
    assert not (tmp_path / "a.jsonl").exists()
    source.write_text("", "utf-8")
    refuses("holds no rows", "--input", source, "--output", tmp_path / "a.jsonl", *prefixes)


def test_talks_are_answered_after_their_history_and_keep_their_columns(tmp_path, prefixes, capsys):
    said = [FRANCE, "巴黎", "3加5等于多少？", "8"]
    messages = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, said, strict=True)]
    rows = [{"messages": messages[:turns], "id": turns, "prefix": "sentence"} for turns in (1, 2, 3, 4)]
    source, output = write_rows(tmp_path / "rows.parquet", rows), tmp_path / "answers.jsonl"
    flags = ["--input", source, "--output", output, *prefixes, "--max_new_tokens", 24, "--precision", "fp32"]
    run_infer(*flags)
    captured = capsys.readouterr()
    assert (
        captured.out == ""
        and captured.err.count(f"{source}: each row of messages is read as a talk; not part of the question: id\n") == 1
    )
    found = read_lines(output)
    assert [{name: row[name] for name in rows[0]} for row in found] == rows
    first, same, third, also = [row["response"] for row in found]
    assert first == same and third == also  # the last answer is not read
    alone = write_rows(tmp_path / "alone.jsonl", [{"instruction": said[2], "prefix": "sentence"}])
    run_infer("--input", alone, "--output", tmp_path / "alone-answers.jsonl", *flags[4:])
    assert first.startswith("法国的首都是") and third != read_lines(tmp_path / "alone-answers.jsonl")[0]["response"]
    output.write_bytes(output.read_bytes()[:-9])
    run_infer(*flags, "--resume")
    assert read_lines(output) == found


def test_questions_may_be_in_other_columns(tmp_path, prefixes, capsys):
    row = questions(1)[0]
    names = {"question": "", "frage": "--columns=instruction=frage"}
    for name, flag in names.items():
        source, output = (
            write_rows(tmp_path / f"{name}.csv", [{name: row["instruction"], "id": 1}]),
            tmp_path / f"{name}.jsonl",
        )
        run_infer("--input", source, "--output", output, *prefixes, *flag.split())
        assert f"{source}: {name} is read as instruction; not part of the question: id\n" in capsys.readouterr().err
        assert read_lines(output) == [{name: row["instruction"], "id": "1", "response": row["output"]}]
    flags = ["--input", source, "--output", tmp_path / "a.jsonl", *prefixes]
    refuses("row 1: its columns are not known as question and answer: 'frage', 'id'", *flags)
    refuses("row 1: has no column 'x', which --columns names; it has 'frage', 'id'", *flags, "--columns", "instruction=x")
