import os
import shlex
import subprocess
import sys

import pytest
import torch
from forks import Fork
from helpers import FRANCE, ROOT, prefix_config, questions, random_bloom, start_process, write_rows

from prefix_tuning import bundled
from prefix_tuning.cli import parse_infer_config, parse_train_config
from prefix_tuning.errors import UserError
from prefix_tuning.files.prefixes import save_adapter
from prefix_tuning.inference.run import infer
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
