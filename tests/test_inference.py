"""What infer.py does, on the bundled model and real prefixes."""

import csv
import datetime
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from conftest import ROOT, at_end, start_process

from prefix_tuning import bundled
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.cli import parse_infer_config
from prefix_tuning.data.rows import load_rows, tokenize
from prefix_tuning.errors import UserError
from prefix_tuning.evaluation import evaluate_loss
from prefix_tuning.files.prefixes import load_prefix
from prefix_tuning.inference.run import infer, open_model
from prefix_tuning.text import display_width

FRANCE = "法国的首都是哪里？"


@pytest.fixture(scope="module")
def prefixes(tuned):
    return [flag for name, folder in tuned.items() for flag in ("--prefix", f"{name}={folder}")]


def run_infer(*flags):
    infer(parse_infer_config([str(flag) for flag in flags]))


def refuses(message, *flags):
    with pytest.raises(UserError, match=re.escape(message)):
        run_infer(*flags)


# --- flags ---

BAD_FLAGS = {
    "": "ask one question, or use one of --chat, --input and --score",
    "hello --chat": "a question and --chat exclude each other",
    "--chat --score a.jsonl": "--chat and --score exclude each other",
    "--input a.jsonl": "--input needs an --output that ends in .jsonl",
    "--input a.jsonl --output b.json": "--input needs an --output that ends in .jsonl",
    "--score a.jsonl --output b.jsonl": "must end in .json",
    "hello --output b.jsonl": "--output goes with --input or --score, not with a question",
    "--score a.jsonl --resume": "--resume goes with --input, not with --score",
    "--input a.jsonl --output b.jsonl --compare": "--compare goes with a question or --chat, not with --input",
    "--input a.jsonl --output b.jsonl --max_length 9": "--max_length goes with a question or --chat",
    "hello --max_length 9 --max_new_tokens 9": "exclude each other",
    "hello --temperature 0.5": "--temperature is used with --do_sample only",
    "hello --temperature 0": "--temperature must be at least 0.00001",
    "hello --do_sample --temperature 0": "--temperature must be at least 0.00001",
    "hello --do_sample --top_p 0": "--top_p must be above 0",
    "hello --do_sample --top_k -1": "--top_k must be at least 0",
    "hello --repetition_penalty nan": "--repetition_penalty must be at least",
    "hello --num_beams 0": "--num_beams must be at least 1",
    "hello --num_return_sequences 2": "--num_return_sequences 2 needs --do_sample, or as many --num_beams",
    "hello --do_sample --num_beams 2 --num_return_sequences 3": "cannot be above --num_beams",
    "hello --seed -1": "--seed must be at least 0",
    "hello --seed 18446744073709551616": "--seed must be at least 0 and at most",
    "hello --do_sample --temperature 1e-40": "--temperature must be at least 0.00001",
    "a\udcff": "no UTF-8 text",
    "--chat --max_length 100 --max_new_tokens 100": "must leave room for a question",
    "--score a.jsonl --num_beams 3": "--num_beams goes with a question or --chat or --input, not with --score",
    "hello --prefix a=x --prefix a=y": "there is a prefix a already",
    "hello --prefix base=x": "give it another name",
    "hello --prefix a=x --prefix=": "--prefix is empty",
    "hello --prefix nowhere/at/all": "nowhere/at/all: no such folder",
    "hello --prefix no/where": "no/where: no such folder, nor a repository of the hub that can be reached",
    "hello --btach_size 4": "did you mean --batch_size?",
    "-5加3等于几？": "goes behind -- if it begins with -",
}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.items())
def test_flags_that_make_no_sense_are_refused(flags, message):
    refuses(message, *flags.split())


def test_prefixes_are_named_or_take_the_name_of_their_folder(tmp_path):
    (tmp_path / "a=b").mkdir()
    config = parse_infer_config(["hello", "--prefix", "one=x/y", "--prefix", "x/two", "--prefix", str(tmp_path / "a=b")])
    assert config.named_prefixes() == {"one": "x/y", "two": "x/two", "a=b": str(tmp_path / "a=b")}
    assert list(parse_infer_config(["hello"]).named_prefixes()) == ["chatbot"]


@pytest.mark.parametrize("flags", ["-- -5加3？ --prefix x --compare", "--compare --prefix x -- -5加3？"])
def test_a_question_that_begins_with_a_dash_goes_behind_two(flags):
    config = parse_infer_config(flags.split())
    assert (config.question, config.prefix, config.compare) == ("-5加3？", ["x"], True)


# --- one question ---


def test_a_question_is_answered_and_compared(prefixes, capsys):
    run_infer(FRANCE, *prefixes)
    assert capsys.readouterr().out == "巴黎\n"
    run_infer(FRANCE, *prefixes, "--compare")
    base, short, sentence = capsys.readouterr().out.splitlines()
    assert base.startswith("base      ") and short == "short     巴黎" and sentence.startswith("sentence  法国的首都是")
    run_infer(FRANCE, *prefixes, "--num_beams", "3", "--num_return_sequences", "2")
    assert capsys.readouterr().out.splitlines()[0] == "巴黎"
    run_infer(FRANCE, *prefixes, "--compare", "--num_beams", "2", "--num_return_sequences", "2")
    labels = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert labels == ["base", "base", "short", "short", "sentence", "sentence"]
    run_infer(FRANCE, *prefixes, "--max_length", "400")
    assert capsys.readouterr().out == "巴黎\n"
    refuses("--max_length 5 leaves no room for an answer", FRANCE, *prefixes, "--max_length", "5")


def test_wide_names_and_questions_stay_in_their_columns(tmp_path, tuned, capsys):
    named = ["--prefix", f"短={tuned['short']}", "--prefix", f"完整句子={tuned['sentence']}"]
    run_infer(FRANCE, *named, "--compare")
    base, short, sentence = capsys.readouterr().out.splitlines()
    assert base.startswith("base      ") and short == "短        巴黎" and sentence.startswith("完整句子  法国的首都是")
    long = "请用一句完整的话回答下面这个问题：" * 3
    run_infer("--score", write_rows(tmp_path / "rows.jsonl", [{"instruction": long, "output": "巴黎"}]), *named)
    header, row, _ = capsys.readouterr().out.splitlines()
    assert row.endswith("  " + long[:28] + "...")
    assert display_width(header.removesuffix("question")) == display_width(row.removesuffix(long[:28] + "..."))


# --- files ---


def questions(count):
    lines = Path(bundled.resolve("bundled:short-eval")).read_text("utf-8").splitlines()[:count]
    names = [None, "sentence", "base", "short"]
    return [json.loads(line) | {"prefix": names[index % 4], "id": index} for index, line in enumerate(lines)]


def write_rows(path, rows):
    if path.suffix == ".csv":
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    elif path.suffix == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), "utf-8")
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


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
    refuses("is there already; go on with it by --resume", *flags)


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
    limited = f"ulimit -f 1; {sys.executable} infer.py {shlex.join(map(str, flags))}"
    result = subprocess.run(["bash", "-c", limited], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert "cannot be written" in result.stderr and "--resume" in result.stderr.splitlines()[-1]
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
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(tmp_path, prefixes, sampling):
    source, output = write_rows(tmp_path / "rows.jsonl", questions(45)), tmp_path / "answers.jsonl"
    flags = ["--input", source, "--output", output, *prefixes, "--batch_size", 2, "--max_new_tokens", 16, *sampling]
    run_infer(*flags)
    whole = output.read_bytes()
    ends = [match.end() for match in re.finditer(b"\n", whole)]
    for cut in (0, 1, ends[0], ends[2] + 5, ends[15], ends[30] - 1, ends[40] + 1, len(whole)):
        output.write_bytes(whole[:cut])
        run_infer(*flags, "--resume")
        assert output.read_bytes() == whole, cut


def test_a_killed_process_goes_on(tmp_path, prefixes):
    source, output = write_rows(tmp_path / "rows.jsonl", questions(600)), tmp_path / "answers.jsonl"
    flags = ["--input", source, "--output", output, *prefixes, "--batch_size", 1, "--max_new_tokens", 16]
    command = [sys.executable, str(ROOT / "infer.py"), *map(str, flags)]
    process = start_process(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None and (not output.exists() or output.read_bytes().count(b"\n") < 20):
        select.select([process.stderr], [], [], 1)
        os.read(process.stderr.fileno(), 65536)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    killed = output.read_bytes().count(b"\n")
    assert 20 <= killed < 600
    run_infer(*flags[:-4], "--max_new_tokens", 16, "--resume")
    found = read_lines(output)
    assert [row["id"] for row in found] == list(range(600))


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


# --- scores ---


def test_scores_are_the_evaluations(tmp_path, tuned, prefixes, tokenizer, capsys):
    rows = [
        row | {"output": answer} for row, answer in zip(questions(9), ["巴黎", "法国的首都是巴黎。", "4"] * 3, strict=True)
    ]
    source, output = write_rows(tmp_path / "rows.jsonl", rows), tmp_path / "scores.json"
    run_infer("--score", source, *prefixes, "--output", output)
    header, *lines, total = capsys.readouterr().out.splitlines()
    assert header.split() == [
        "row",
        "labels",
        "base",
        "loss",
        "perplexity",
        "short",
        "loss",
        "perplexity",
        *header.split()[8:],
    ]
    scores = json.loads(output.read_text("utf-8"))
    assert [row["instruction"] for row in scores["rows"]] == [row["instruction"] for row in rows]
    base, _ = load_base(bundled.MODEL, torch.float32, torch.device("cpu"))
    all_rows = load_rows(str(source), ("train",))
    for name, folder in {"base": None, **tuned}.items():
        prefix = load_prefix(str(folder)).tensor if folder else None
        mean = evaluate_loss(base, tokenize(all_rows, tokenizer, 10**6), prefix, 100)
        assert scores["all"]["loss"][name] == pytest.approx(mean["eval_loss"], rel=1e-5)
        assert scores["all"]["perplexity"][name] == pytest.approx(mean["eval_perplexity"], rel=1e-5)
        for index, row in enumerate(scores["rows"]):
            alone = evaluate_loss(base, tokenize(all_rows.select([index]), tokenizer, 10**6), prefix, 100)
            assert row["loss"][name] == pytest.approx(alone["eval_loss"], rel=1e-4)
            assert f"{row['loss'][name]:.4f}" in lines[index].split()
        assert f"{scores['all']['loss'][name]:.4f}" in total.split()
    refuses("scores.json is there already; name another", "--score", source, *prefixes, "--output", output)
    refuses("'output' is empty", "--score", write_rows(source, [{"instruction": "a", "output": " "}]), *prefixes)


# --- the terminal ---


class Terminal:
    """A program on a pseudo-terminal, as a person would use it."""

    def __init__(self, *flags, env=None):
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            os.environ.update(env or {})
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, "infer.py", *map(str, flags)])
        self.seen, self.exit_code = "", None
        at_end.callback(self.kill)

    def wait_for(self, text, seconds=600):
        """Reads until `text` comes, and returns what came up to its end."""
        deadline, raw = time.monotonic() + seconds, self.seen.encode()
        while text.encode() not in raw:
            if not select.select([self.handle], [], [], max(0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"no {text!r} in {raw.decode(errors='replace')!r}")
            try:
                raw += os.read(self.handle, 65536)
            except OSError as error:  # the program has ended
                raise AssertionError(f"no {text!r} in {raw.decode(errors='replace')!r}") from error
        found, _, rest = raw.partition(text.encode())
        self.seen = rest.decode(errors="replace")
        return (found + text.encode()).decode()

    def send(self, text):
        os.write(self.handle, text.encode())

    def ask(self, text):
        self.send(text + "\r")
        return self.wait_for("\n> ")

    def ends_with(self):
        self.exit_code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.exit_code

    def kill(self):
        """Ends the program, which would go on answering after a test that failed."""
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.ends_with()
        os.close(self.handle)


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """The bundled model, but without an end to its answers."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(bundled.resolve(bundled.MODEL), folder)
    settings = json.loads((folder / "generation_config.json").read_text("utf-8"))
    (folder / "generation_config.json").write_text(json.dumps(settings | {"eos_token_id": 0}), "utf-8")
    return folder


def test_a_chat(prefixes):
    terminal = Terminal("--chat", *prefixes, env={"LC_ALL": "xx_XX.UTF-8", "PYTHONUTF8": "0"})  # no such locale: ASCII
    assert "base, short, sentence: answering with short" in terminal.wait_for("> ")
    assert "巴黎" in terminal.ask(FRANCE)
    assert "the conversation is forgotten" in terminal.ask("/reset")
    # A question typed with a gap, mended with the arrow keys: 法国的首都是|里？
    assert "巴黎" in terminal.ask("法国的首都是里？" + "\x1b[D" * 2 + "哪" + "\x1b[C")
    terminal.ask("/reset")
    # A wide character deleted, and the line before called up again.
    assert "巴黎" in terminal.ask("法国的首都是哪里？呢\x7f")
    terminal.ask("/reset")
    assert "巴黎" in terminal.ask("\x1b[A\x1b[A")
    terminal.ask("/reset")
    assert "there are base, short, sentence; now short" in terminal.ask("/prefix")
    assert "there are base, short, sentence; now short" in terminal.ask("/prefix nothing")
    assert "answering with sentence" in terminal.ask("/prefix sentence")
    assert re.search("法国的首都是.+。", terminal.ask(FRANCE).split("\n", 1)[1])
    terminal.ask("/reset")
    assert "comparing: on" in terminal.ask("/compare")
    compared = terminal.ask(FRANCE)
    assert compared.count("\033[33mbase ") == compared.count("\033[36mshort ") == 1  # coloured
    assert "comparing: off" in terminal.ask("/compare")
    assert "/reset        forget" in terminal.ask("/help")
    assert "/reset        forget" in terminal.ask("/what")
    terminal.send("half a question\x03")
    terminal.wait_for("> ")
    assert "answering with base" in terminal.ask("/prefix base")
    terminal.send("/quit\r")
    assert terminal.ends_with() == 0


def test_ctrl_c_stops_an_answer_and_ctrl_d_the_chat(prefixes, endless):
    flags = ["--chat", *prefixes, "--model_name_or_path", endless, "--max_new_tokens", 100_000, "--max_length", 200_000]
    terminal = Terminal(*flags, env={"NO_COLOR": "1"})
    terminal.wait_for("> ")
    terminal.send(FRANCE + "\r")
    terminal.wait_for("巴黎")
    terminal.send("\x03")
    assert "stopped" in terminal.wait_for("\n> ")
    terminal.ask("/compare")
    terminal.send(FRANCE + "\r")
    assert "\033[3" not in terminal.wait_for("base  ")
    terminal.send("\x03")
    terminal.wait_for("\n> ")
    terminal.send("\x04")
    assert terminal.ends_with() == 0


def test_the_conversation_is_kept_within_max_length(tuned, tokenizer, capsys):
    from prefix_tuning.inference.chat import Chat

    flags = ["--chat", "--prefix", str(tuned["short"]), "--max_length", "80", "--max_new_tokens", "20"]
    config = parse_infer_config(flags)
    chat = Chat(config, *open_model(config, torch.device("cpu"), None))
    asked = []
    for number in range(4):
        chat.answer(f"{number}加5等于多少？")
        asked.append((f"{number}加5等于多少？", capsys.readouterr().out.strip()))
    assert chat.turns == asked
    prompt = chat.prompt("？")
    kept = prompt.count("Human: ") - 1
    assert 0 < kept < 4
    history = "".join(f"Human: {question}\n\nAssistant: {answer}\n\n" for question, answer in asked[-kept:])
    assert prompt == history + "Human: ？\n\nAssistant: "
    assert len(tokenizer(prompt).input_ids) <= 60
    chat.answer("长" * 60)
    assert len(chat.turns) == 4 and "too long" in capsys.readouterr().err


def test_in_a_pipe_there_are_answers_only(tmp_path, tuned, prefixes):
    def run(*flags, **options):
        command = [sys.executable, str(ROOT / "infer.py"), *map(str, flags)]
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT, **options)

    without_locale = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    assert run(FRANCE, *prefixes, env=without_locale).stdout == "巴黎\n"
    chat = run("--chat", *prefixes, input=f"{FRANCE}\n/prefix base\n/reset\n{FRANCE}\n/compare\n{FRANCE}\n")
    short, base, *compared = chat.stdout.splitlines()
    assert short == "巴黎" and base and [line.split()[0] for line in compared] == ["base", "short", "sentence"]
    assert "answering with base" in chat.stderr
    # A table of more than the 64 KiB that a pipe holds: 300 rows under the widest name.
    source, wide = write_rows(tmp_path / "rows.jsonl", questions(300)), f"{'x' * 200}={tuned['short']}"
    head = f"{sys.executable} infer.py --score {source} --prefix {wide} | head -1"
    table = subprocess.run(["bash", "-c", f"set -o pipefail; {head}"], capture_output=True, text=True, cwd=ROOT)
    assert table.stdout.startswith("   row") and "Traceback" not in table.stderr and table.returncode == 141
