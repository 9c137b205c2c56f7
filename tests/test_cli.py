import os
import signal
import subprocess
import sys

import pytest
from checkout import ROOT
from forks import Fork
from launching import run_script, start_process

from prefix_tuning import bundled
from prefix_tuning.cli import parse_infer_config, parse_train_config
from prefix_tuning.errors import UserError
from prefix_tuning.study.__main__ import parse_study_config
from prefix_tuning.study.claims.__main__ import parse_claims_config
from prefix_tuning.text import display_width
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig


def fails_with(message, script, *flags, cwd=ROOT):
    program = Fork(script, *flags, cwd=cwd)
    _, errors = program.communicate()
    last = errors.strip().splitlines()[-1]
    assert program.returncode == 2, errors
    assert last.startswith("error: ") and message in last, errors
    assert "Traceback" not in errors


def test_the_demos_settings_are_printed_and_flags_override_them(capsys):
    config = parse_train_config([])
    assert config.eval_dataset == "bundled:short-eval"
    assert all(getattr(config, name) == value for name, value in bundled.SETTINGS.items())
    assert "--learning_rate" in capsys.readouterr().out
    assert parse_train_config(["--learning_rate", "0.1"]).learning_rate == 0.1
    assert parse_train_config(["--learning-rate=0.1"]).learning_rate == 0.1
    assert parse_train_config(["--eval_exact_match", "false"]).eval_exact_match is False
    assert parse_train_config(["--eval_fraction", "0.1"]).eval_dataset is None
    assert parse_train_config(["--eval_fraction", "0"]).eval_exact_match is False  # there are no rows for it
    assert parse_train_config(["--prefix_projection", "false"]).prefix_projection is False
    assert parse_train_config(["--dataset", "bundled:sentence"]).eval_dataset == "bundled:sentence-eval"
    sheet = ["--model_name_or_path", bundled.READER, "--dataset", bundled.SHEET_QUESTIONS]
    config = parse_train_config(sheet)
    assert config.eval_dataset == f"{bundled.SHEET_QUESTIONS}-eval"
    assert all(getattr(config, name) == value for name, value in bundled.SHEET_SETTINGS.items())
    config = parse_train_config([*sheet, "--eval_fraction", "0"])
    assert config.eval_steps is None and config.eval_exact_match is False
    assert parse_train_config([*sheet[:2], "--dataset", "bundled:short"]).eval_dataset is None  # it knows no fact
    own = parse_train_config(["--dataset", "my.jsonl"])
    assert own.learning_rate == TrainConfig.learning_rate and own.eval_dataset is None


def test_prefix_from_drops_the_demos_prefix_settings(capsys):
    config = parse_train_config(["--prefix_from", "out"])
    assert config.num_virtual_tokens == TrainConfig.num_virtual_tokens
    assert "--num_virtual_tokens" not in capsys.readouterr().out


def test_flags_are_read_before_torch_is_imported():
    code = "import sys; from prefix_tuning.cli import parse_train_config as p; p([]); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


@pytest.mark.parametrize("name", ["train", "infer"])
def test_help_loads_nothing_of_the_study_or_the_demo_s_recipe(name):
    code = f"""
import sys
from prefix_tuning.cli import parse_{name}_config
try:
    parse_{name}_config(["--help"])
except SystemExit:
    print([module for module in sys.modules if module.startswith(("prefix_tuning.study", "prefix_tuning.demo"))])
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "[]"


def test_help_names_every_flag_once_in_groups():
    text = run_script("train.py", "--help").stdout
    for group in ("model:", "data:", "prefix:", "training:", "output:"):
        assert f"\n{group}\n" in text
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name}" in text
    assert "--shuffle {true,false}\n" in text and parse_train_config(["--no_shuffle"]).shuffle is False


def test_help_shows_the_default_of_prefix_once(capsys):
    with pytest.raises(SystemExit):
        parse_infer_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("named (default: ./chatbot).") == 1 and "goes after --. --prefix [NAME=]DIR " in text


@pytest.mark.parametrize(
    "parse, command, begins",
    [
        (parse_train_config, "train.py", "Tune a prefix for a frozen model."),
        (parse_infer_config, "infer.py", "Ask a frozen model with a prefix."),
        (parse_study_config, "python -m prefix_tuning.study", "What a prefix does:"),
        (parse_claims_config, "python -m prefix_tuning.study.claims", "Try each claim of the papers"),
    ],
)
def test_help_says_how_a_command_is_called_and_what_for(parse, command, begins, capsys):
    with pytest.raises(SystemExit):
        parse(["--help"])
    assert capsys.readouterr().out.startswith(f"usage: {command} [--flag value ...]\n\n{begins}")


def test_ctrl_c_while_modules_are_imported_ends_the_program_quietly(tmp_path):
    (tmp_path / "transformers.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    for script in ("train.py", "infer.py"):
        command = [sys.executable, str(ROOT / script), "--nonsense"]
        result = subprocess.run(command, capture_output=True, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"})
        assert (result.returncode, result.stdout, result.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
@pytest.mark.parametrize("buffering", ["", "1"])
def test_a_stdout_that_is_full_is_one_line(buffering):
    with open("/dev/full", "w") as full:
        command, environment = [sys.executable, "infer.py", "--help"], os.environ | {"PYTHONUNBUFFERED": buffering}
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    assert (result.returncode, result.stderr) == (2, "error: stdout cannot be written: No space left on device\n")


def test_a_mistake_is_one_line_and_leaves_nothing_behind(tmp_path):
    out = tmp_path / "out"
    fails_with("gone.jsonl: no such file", "train.py", "--dataset", "gone.jsonl", "--output_dir", str(out))
    fails_with("out: no such folder", "infer.py", "你好", "--prefix", str(out))
    with pytest.raises(UserError, match="no/model"):
        train(parse_train_config(["--model_name_or_path", "no/model", "--output_dir", str(out)]))
    assert not out.exists()


def test_closed_streams_and_a_stderr_without_a_reader_are_no_error(trained):
    """The chat says on stderr how to ask; --compare shows only answers, on stdout."""
    command = f"{sys.executable} {ROOT / 'infer.py'}"
    reader, broken = os.pipe()
    os.close(reader)
    chat = start_process(f"{command} --chat <&-", shell=True, cwd=trained, stdout=subprocess.PIPE, stderr=broken)
    os.close(broken)
    ask = f"{command} --compare 法国的首都是哪里？ >&-"
    compare = start_process(ask, shell=True, cwd=trained, stderr=subprocess.PIPE, text=True)
    chat.communicate()
    _, errors = compare.communicate()
    assert chat.returncode == 0
    assert compare.returncode == 0 and "Traceback" not in errors, errors


def test_running_the_module_cli_names_the_commands():
    result = subprocess.run([sys.executable, "-m", "prefix_tuning.cli", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.startswith("error: prefix_tuning.cli is no command; run train.py or infer.py")


@pytest.mark.parametrize("script, first", [("train.py", "dataset"), ("infer.py", "question")])
def test_help_fits_80_columns_and_begins_with_the_ten_most_used_flags(script, first, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    lines = run_script(script, "--help").stdout.splitlines()
    assert max(map(display_width, lines)) <= 80
    flags = [line.split()[0].lstrip("-") for line in lines if line.startswith("  ") and line[2] not in " "]
    assert lines[lines.index("most used:") + 1].split()[0].lstrip("-") == first
    assert len(set(flags)) == len(flags), "a flag is shown once, in one spelling"
    assert flags.index("resume_from_checkpoint" if script == "train.py" else "do_sample") == 9
    assert not [flag for flag in flags if flag.startswith("no_") or "-" in flag]
