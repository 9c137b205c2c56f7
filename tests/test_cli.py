import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, prefix_config, random_bloom

from prefix_tuning import bundled
from prefix_tuning.cli import parse_infer_config, parse_train_config
from prefix_tuning.errors import UserError
from prefix_tuning.files.prefixes import save_adapter
from prefix_tuning.inference.run import infer
from prefix_tuning.model.encoder import PrefixEncoder
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig


def run(script, *flags, cwd=ROOT):
    """Runs train.py or infer.py as a user does."""
    return subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=cwd, capture_output=True, text=True)


def fails_with(message, script, *flags, cwd=ROOT):
    result = run(script, *flags, cwd=cwd)
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, result.stderr
    assert lines[-1].startswith("error: ") and message in lines[-1], result.stderr
    assert "Traceback" not in result.stderr


def test_the_notebooks_command_has_the_notebooks_settings():
    config = parse_train_config(["--model_name_or_path", "Langboat/bloom-1b4-zh", "--dataset", "../data/alpaca_data_zh"])
    assert (config.num_virtual_tokens, config.prefix_projection, config.max_length) == (10, True, 256)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (1, 8)
    assert (config.num_train_epochs, config.learning_rate, config.logging_steps) == (1.0, 5e-5, 10)
    assert (config.lr_scheduler_type, config.output_dir, config.shuffle) == ("linear", "./chatbot", True)
    assert config.eval_dataset is None and not config.eval_fraction and not config.eval_exact_match


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
    own = parse_train_config(["--dataset", "my.jsonl"])
    assert own.learning_rate == TrainConfig.learning_rate and own.eval_dataset is None


def test_a_prefix_may_have_a_longer_name_than_a_file():
    config = parse_infer_config(["？", "--prefix", "长" * 300 + "=folder"])
    assert config.named_prefixes() == {"长" * 300: "folder"}


BAD_FLAGS = {
    "--num_virtual_tokens 0": "--num_virtual_tokens must be at least 1",
    "--num_virtual_tokens -1": "--num_virtual_tokens must be at least 1",
    "--max_length 0": "--max_length must be at least 1",
    "--learning_rate nan": "--learning_rate must be at least 0",
    "--learning_rate -1": "--learning_rate",
    "--gradient_accumulation_steps 0": "--gradient_accumulation_steps",
    "--eval_fraction 1.5": "--eval_fraction must be below 1",
    "--eval_fraction 0.5 --eval_dataset a.jsonl": "exclude each other",
    "--max_lenght 5": "did you mean --max_length?",
    "--nonsense": "unknown argument --nonsense",
    "--num_train_epochs 0": "--num_train_epochs 0 trains nothing",
    "--prefix_init text": "--init_text",
    "--prefix_init random --init_text hello": "--prefix_init text only",
    "--prefix_init none": "--prefix_init",
    "--prefix_from out --num_virtual_tokens 3": "leave out --num_virtual_tokens",
    "--max_steps one": "--max_steps",
    "--output_dir pyproject.toml": "is a file",
    "--output_dir pyproject.toml/below": "is a file",
    "--save_best --dataset my.jsonl": "--save_best needs held-out rows",
    "--early_stopping_patience 2 --dataset my.jsonl": "needs held-out rows",
    "--eval_exact_match --dataset my.jsonl": "--eval_exact_match needs held-out rows",
    "--eval_steps 5 --eval_fraction 0": "--eval_steps needs held-out rows",
    "--encoder_hidden_size 64 --prefix_projection false": "--encoder_hidden_size is the width of the projection",
    "--output_dir=": "--output_dir is empty",
    "--prefix_init text --init_text \udcff": "--init_text holds bytes that are no UTF-8 text",
    "--save_steps -1": "--save_steps must be at least 0",
    "--save_total_limit 0": "--save_total_limit must be at least 1",
}


@pytest.mark.parametrize("flags, message", BAD_FLAGS.items())
def test_flags_that_make_no_sense_are_refused(flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        parse_train_config(flags.split())


def test_prefix_from_drops_the_demos_prefix_settings(capsys):
    config = parse_train_config(["--prefix_from", "out"])
    assert config.num_virtual_tokens == TrainConfig.num_virtual_tokens
    assert "--num_virtual_tokens" not in capsys.readouterr().out


def test_flags_are_read_before_torch_is_imported():
    code = "import sys; from prefix_tuning.cli import parse_train_config as p; p([]); print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"


def test_help_names_every_flag_once_in_groups():
    text = run("train.py", "--help").stdout
    for group in ("model:", "data:", "prefix:", "training:", "output:"):
        assert f"\n{group}\n" in text
    for name in TrainConfig.__dataclass_fields__:
        assert f"--{name}" in text
    for name in ("shuffle", "prefix_projection"):
        assert re.search(rf"--no_{name}, \S+\s+The same as --{name} false\.\n  --", text)


def test_help_shows_the_default_of_prefix_once(capsys):
    with pytest.raises(SystemExit):
        parse_infer_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "named (default: ./chatbot). what to answer:" in text and "goes behind --. options:" in text


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A prefix after a few steps on the demo, made from a folder that is not the checkout."""
    folder = tmp_path_factory.mktemp("trained")
    result = run("train.py", "--max_steps", "30", "--eval_exact_match", "false", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder


def test_infer_answers_from_any_folder_and_repeats_itself(trained, monkeypatch, capsys):
    greedy = run("infer.py", "法国的首都是哪里？", cwd=trained)
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


def test_closed_streams_are_no_error(trained):
    command = f"{sys.executable} {ROOT / 'infer.py'}"
    for flags in ("--chat <&-", "--compare 法国的首都是哪里？ >&-"):
        result = subprocess.run(f"{command} {flags}", shell=True, cwd=trained, capture_output=True, text=True)
        assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr


def test_max_length_counts_the_question_and_max_new_tokens_does_not(trained, tokenizer, monkeypatch, capsys):
    monkeypatch.chdir(trained)
    question = "法国的首都是哪里？"
    prompt = len(tokenizer(f"Human: {question}\n\nAssistant: ").input_ids)
    infer(parse_infer_config([question, "--max_new_tokens", "1"]))
    one = capsys.readouterr().out
    infer(parse_infer_config([question, "--max_length", str(prompt + 1)]))
    assert capsys.readouterr().out == one
    with pytest.raises(UserError, match="leaves no room"):
        infer(parse_infer_config([question, "--max_length", str(prompt)]))


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
