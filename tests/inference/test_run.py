import io
import os
import re
import shlex
import subprocess
import sys

import pytest
import torch
from answers import FRANCE, refuses, run_infer
from checkout import ROOT
from forks import Fork
from launching import start_process
from models import prefix_config, random_bloom
from rows import questions, write_rows

from prefix_tuning import bundled, distributed
from prefix_tuning.cli import parse_infer_config, parse_train_config
from prefix_tuning.errors import UserError
from prefix_tuning.files.prefixes import save_adapter
from prefix_tuning.inference.run import decoding_options, infer
from prefix_tuning.model.encoder import PrefixEncoder
from prefix_tuning.training.run import train


def test_infer_answers_from_any_folder_and_repeats_itself(trained, monkeypatch, capsys):
    program = Fork("infer.py", "法国的首都是哪里？", cwd=trained)
    greedy, errors = program.communicate()
    assert program.returncode == 0, errors
    assert greedy.endswith("\n") and greedy.strip()
    # Only the answer is on stdout.
    assert "prefix" not in greedy
    monkeypatch.chdir(trained)
    sample = ["考试有哪些技巧？", "--max_length", "128", "--do_sample", "--temperature", "2"]
    answers = []
    for seed in "112":
        infer(parse_infer_config([*sample, "--seed", seed]))
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
    infer(parse_infer_config(["--compare", "法国的首都是哪里？"]))
    both = capsys.readouterr().out.splitlines()
    assert both[0].startswith("base     ") and both[-1] == f"chatbot  {greedy.strip()}"


def test_a_prefix_for_another_base_is_refused(trained, tmp_path, monkeypatch):
    model = random_bloom()
    torch.manual_seed(0)
    encoder = PrefixEncoder(prefix_config(model))
    save_adapter(tmp_path, encoder.bake(), encoder.config, {"name_or_path": bundled.MODEL})
    with pytest.raises(UserError, match="a prefix for 3 layers"):
        infer(parse_infer_config(["你好", "--prefix", str(tmp_path)]))
    monkeypatch.chdir(trained)
    with pytest.raises(UserError, match="holds a prefix already"):
        train(parse_train_config([]))


def test_in_a_pipe_there_are_answers_only(tmp_path, tuned, prefixes):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    infer = [sys.executable, str(ROOT / "infer.py")]
    without_locale = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0"}
    asked = start_process([*infer, FRANCE, *prefixes], env=without_locale, **pipes)
    (tmp_path / "lines").write_text(f"{FRANCE}\n/prefix base\n/reset\n{FRANCE}\n/compare\n{FRANCE}\n", "utf-8")
    chat = Fork("infer.py", "--chat", *prefixes, stdin=tmp_path / "lines")
    # A table of more than the 64 KiB that a pipe holds: 300 rows under the widest name.
    source, wide = write_rows(tmp_path / "rows.jsonl", questions(300)), f"{'x' * 200}={tuned['short']}"
    head = f"set -o pipefail; {shlex.join([*infer, '--score', str(source), '--prefix', wide])} | head -1"
    table = start_process(["bash", "-c", head], **pipes)
    assert asked.communicate()[0] == "巴黎\n" and asked.returncode == 0
    out, err = chat.communicate()
    short, base, *compared = out.splitlines()
    assert short == "巴黎" and base and [line.split()[0] for line in compared] == ["base", "short", "sentence"]
    assert "answering with base" in err and chat.returncode == 0
    out, err = table.communicate()
    assert out.startswith("   row") and "Traceback" not in err and table.returncode == 141


def test_several_processes_need_something_that_they_can_share(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    refuses("several processes can share an --input or, by --shard_base, a base", FRANCE)
    refuses("gone.jsonl", "--input", tmp_path / "gone.jsonl", "--output", tmp_path / "answers.jsonl")


def test_a_chat_reads_its_questions_from_stdin(prefixes, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "stdin", io.StringIO(f"{FRANCE}\n\n/prefix no one\n/prefix base\n/reset\n{FRANCE}\n/quit\n{FRANCE}\n")
    )
    run_infer("--chat", *prefixes)
    out, err = capsys.readouterr()
    assert out.startswith("巴黎\n") and out.count("巴黎") == 1 and len(out.splitlines()) == 2
    said = ("answering with short", "there are base, short, sentence; now short", "answering with base", "forgotten")
    assert sorted(said, key=err.index) == list(said)


def test_the_rows_that_are_answered_are_counted(tmp_path, prefixes, capsys):
    source, output = write_rows(tmp_path / "rows.jsonl", questions(3)), tmp_path / "answers.jsonl"
    run_infer("--input", source, "--output", output, *prefixes, "--max_new_tokens", "1")
    out, err = capsys.readouterr()
    assert not out and f"\n3 rows answered: {output}\n" in err and "3/3" in err  # the bar's last line
    assert re.search(r"torch\.\w+ on (cpu|cuda|mps)", err)


@pytest.mark.parametrize(
    "flags, options",
    [
        ("hello", {}),
        ("hello --max_new_tokens 7 --repetition_penalty 2", {"max_new_tokens": 7, "repetition_penalty": 2.0}),
        ("hello --num_beams 3 --num_return_sequences 2", {"num_beams": 3, "num_return_sequences": 2}),
        ("hello --cache static", {"cache_implementation": "static"}),
        ("hello --do_sample --top_k 3", {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 3}),
        ("hello --max_length 100", {}),
        ("--chat", {}),
        ("--chat --max_length 101", {"max_new_tokens": 50}),
        ("--chat --max_length 400", {}),
        ("--chat --max_length 101 --max_new_tokens 70", {"max_new_tokens": 70}),
    ],
)
def test_flags_of_decoding_are_options_of_generate(flags, options):
    """In a chat, an answer takes half of --max_length at most."""
    expected = {"do_sample": False, "repetition_penalty": 1.0, "num_beams": 1, "num_return_sequences": 1}
    assert decoding_options(parse_infer_config(flags.split())) == expected | {"max_new_tokens": 128} | options
