import os
import subprocess
import sys

import pytest
import torch
from helpers import FRANCE, ROOT, prefix_config, questions, random_bloom, run_script, write_rows

from prefix_tuning import bundled
from prefix_tuning.cli import parse_infer_config, parse_train_config
from prefix_tuning.errors import UserError
from prefix_tuning.files.prefixes import save_adapter
from prefix_tuning.inference.run import infer
from prefix_tuning.model.encoder import PrefixEncoder
from prefix_tuning.training.run import train


def test_infer_answers_from_any_folder_and_repeats_itself(trained, monkeypatch, capsys):
    greedy = run_script("infer.py", "法国的首都是哪里？", cwd=trained)
    assert greedy.returncode == 0, greedy.stderr
    assert greedy.stdout.endswith("\n") and greedy.stdout.strip()
    # Only the answer is on stdout.
    assert "prefix" not in greedy.stdout
    monkeypatch.chdir(trained)
    sample = ["考试有哪些技巧？", "--max_length", "128", "--do_sample", "--temperature", "2"]
    answers = []
    for seed in "112":
        infer(parse_infer_config([*sample, "--seed", seed]))
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] != answers[2]
    infer(parse_infer_config(["--compare", "法国的首都是哪里？"]))
    both = capsys.readouterr().out.splitlines()
    assert both[0].startswith("base     ") and both[-1] == f"chatbot  {greedy.stdout.strip()}"


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
