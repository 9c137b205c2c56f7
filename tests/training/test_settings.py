import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from checkout import ROOT

from prefix_tuning import bundled
from prefix_tuning.cli import parse_infer_config, parse_train_config
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import CONFIG_FILE
from prefix_tuning.study.__main__ import parse_study_config
from prefix_tuning.study.claims.__main__ import parse_claims_config
from prefix_tuning.training.output import PATH_SETTINGS
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig

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
    "--save_best --dataset my.jsonl --eval_fraction 0": "--save_best needs held-out rows",
    "--early_stopping_patience 2 --dataset my.jsonl --eval_fraction 0": "needs held-out rows",
    "--eval_exact_match --dataset my.jsonl --eval_fraction 0": "--eval_exact_match needs held-out rows",
    "--columns a=b": "--columns a=b: there is no 'a' to read; there are instruction, input, output, history,",
    "--columns instruction=": "--columns instruction=: must be like instruction=NAME,output=NAME",
    "--eval_steps 5 --eval_fraction 0": "--eval_steps needs held-out rows",
    "--encoder_hidden_size 64 --prefix_projection false": "--encoder_hidden_size is the width of the projection",
    "--output_dir=": "--output_dir is empty",
    "--prefix_init text --init_text \udcff": "--init_text is not encoded in UTF-8",
    "--seed 4611686018427387905": "--seed must be at least 0 and at most 4611686018427387904",
    "--num_train_epochs inf": "--num_train_epochs must be at least 0 and at most 1000000000, not inf",
    "--shard_degree 1": "--shard_degree goes with --shard_base; add that flag",
    "--save_steps -1": "--save_steps must be at least 0",
    "--save_total_limit 0": "--save_total_limit must be at least 1",
    "--distill_text gone.md": "--distill_text gone.md: no such file",
    "--distill_text tests": "--distill_text tests: no such file",
    "--distill_text README.md --distill_prefix out": "--distill_text and --distill_prefix exclude each other",
    "--distill_text README.md --distill_alpha 1.5": "--distill_alpha must be at least 0 and at most 1, not 1.5",
    "--distill_alpha 0.5": "--distill_alpha needs a teacher: --distill_text or --distill_prefix",
    "--distill_prefix out --prefix_init text": "--prefix_init text needs a text: .* or --distill_text FILE",
    "--init_from chunks": "--init_from is used by --prefix_init text only",
    "--prefix_init zero --freeze_first_token": "--freeze_first_token is used by --prefix_init text only",
    "--prefix_init text --init_text a --num_virtual_tokens 1 --freeze_first_token": "leaves nothing to train of one token",
    "--prefix_from out --init_from chunks": "leave out --init_from",
    "--push_to_hub me/base --model_name_or_path me/base": "--push_to_hub me/base is the base; name another repository",
}

# The flags with bounds: with the value at the bound, and with one beyond it.
BOUNDS = {
    "--eval_fraction": ("0", "-0.1"),
    "--max_length": ("1", "0"),
    "--num_virtual_tokens": ("1", "0"),
    "--encoder_hidden_size": ("1", "0"),
    "--per_device_train_batch_size": ("1", "0"),
    "--gradient_accumulation_steps": ("1", "0"),
    "--max_steps 1 --num_train_epochs": ("0", "-1"),
    "--max_tokens_per_batch": ("1", "0"),
    "--max_steps": ("-1", "-2"),
    "--learning_rate": ("0", "-0.1"),
    "--warmup_steps": ("0", "-1"),
    "--weight_decay": ("0", "-0.1"),
    "--distill_prefix out --distill_alpha": ("1", "1.1"),
    "--max_grad_norm": ("0", "-0.1"),
    "--seed": (str(2**62), str(2**62 + 1)),
    "--logging_steps": ("1", "0"),
    "--eval_dataset a.jsonl --eval_steps": ("1", "0"),
    "--save_steps": ("0", "-1"),
    "--save_total_limit": ("1", "0"),
    "--eval_dataset a.jsonl --early_stopping_patience": ("1", "0"),
}


@pytest.mark.parametrize("flags, bounds", BOUNDS.items())
def test_a_value_at_a_bound_is_taken_and_one_beyond_it_refused(flags, bounds):
    parse_train_config(["--dataset", "my.jsonl", *flags.split(), bounds[0]])
    with pytest.raises(UserError, match=f"{flags.split()[-1]} must be at least"):
        parse_train_config(["--dataset", "my.jsonl", *flags.split(), bounds[1]])


def test_flags_that_are_not_given_have_their_defaults():
    defaults = {"eval_dataset": None, "columns": None, "eval_fraction": None, "eval_exact_match": False, "max_length": 256}
    defaults |= {"num_virtual_tokens": 10, "prefix_projection": True, "encoder_hidden_size": None, "prefix_init": "random"}
    defaults |= {"distill_text": None, "distill_prefix": None, "distill_alpha": 0.0, "init_from": "first"}
    defaults |= {"freeze_first_token": False, "init_text": None, "prefix_from": None}
    defaults |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8}
    defaults |= {"num_train_epochs": 1.0, "max_tokens_per_batch": None, "gradient_checkpointing": False, "max_steps": -1}
    defaults |= {"torch_compile": False, "learning_rate": None, "lr_scheduler_type": "linear", "warmup_steps": 0}
    defaults |= {"weight_decay": 0.0, "max_grad_norm": 1.0, "shuffle": True, "seed": 42, "output_dir": "./chatbot"}
    defaults |= {"overwrite_output_dir": False, "logging_steps": 10, "eval_steps": None, "save_steps": 500}
    defaults |= {"save_total_limit": 2, "report_to": "none", "push_to_hub": None, "resume_from_checkpoint": None}
    defaults |= {"save_best": False, "early_stopping_patience": None, "model_name_or_path": "bundled:mini-bloom"}
    defaults |= {"precision": "auto", "device": "auto", "force": False, "shard_base": False, "shard_degree": None}
    assert vars(parse_train_config(["--dataset", "my.jsonl"])).items() >= defaults.items()
    assert parse_train_config(["--max_steps", "0", "--num_train_epochs", "0"]).max_steps == 0
    assert parse_train_config(["--prefix_init", "text", "--init_text", "请回答。"]).init_text == "请回答。"


def test_flags_that_need_held_out_rows_are_named_as_they_are_written():
    assert parse_train_config(["--dataset", "my.jsonl"]).need_held_out() == ""
    flags = ["--eval_steps", "5", "--save_best", "--early_stopping_patience", "2", "--eval_exact_match"]
    named = parse_train_config(["--dataset", "my.jsonl", *flags]).need_held_out()
    assert set(named.split(", ")) == {flag for flag in flags if flag.startswith("--")}


def test_the_notebooks_command_has_the_notebooks_settings():
    flags = "--learning_rate 5e-5 --eval_fraction 0 --model_name_or_path Langboat/bloom-1b4-zh"
    config = parse_train_config([*flags.split(), "--dataset", "../data/alpaca_data_zh"])
    assert (config.num_virtual_tokens, config.prefix_projection, config.max_length) == (10, True, 256)
    assert (config.per_device_train_batch_size, config.gradient_accumulation_steps) == (1, 8)
    assert (config.num_train_epochs, config.learning_rate, config.logging_steps) == (1.0, 5e-5, 10)
    assert (config.lr_scheduler_type, config.output_dir, config.shuffle) == ("linear", "./chatbot", True)
    assert config.eval_dataset is None and not config.eval_fraction and not config.eval_exact_match


def test_every_setting_says_what_a_resume_does_with_it():
    for field in dataclasses.fields(TrainConfig):
        assert field.metadata["rules"].on_resume in ("same", "content", "new"), field.name


def test_an_output_folder_that_holds_a_model_is_refused(random_base, tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(random_base)
    (tmp_path / "models").symlink_to(Path(random_base).parent)
    before = sorted(Path(random_base).iterdir())
    monkeypatch.chdir(random_base)
    # The base itself, by any of its paths, and another model.
    for name in (random_base, ".", f"../{Path(random_base).name}", tmp_path / "link", tmp_path / "models" / "base"):
        for base in (random_base, bundled.MODEL):
            with pytest.raises(UserError, match=r"--output_dir .*: holds a model \(config\.json\).*name another folder"):
                parse_train_config(["--model_name_or_path", base, "--output_dir", str(name), "--overwrite_output_dir"])
    assert sorted(Path(random_base).iterdir()) == before
    parse_train_config(["--model_name_or_path", random_base, "--output_dir", "below"])
    # A config.json of something else is none of our business.
    (tmp_path / "config.json").write_text('{"port": 1}', "utf-8")
    parse_train_config(["--output_dir", str(tmp_path)])


@pytest.mark.parametrize("flags, message", BAD_FLAGS.items())
def test_flags_that_make_no_sense_are_refused(flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        parse_train_config(flags.split())


FLOATS = [field.name for field in dataclasses.fields(TrainConfig) if field.type in (float, float | None)]


@pytest.mark.parametrize("name", FLOATS)
@pytest.mark.parametrize("value", [1e308, 1e-308])
def test_a_number_at_its_extremes_is_used_or_ends_in_one_line(quick_settings, name, value):
    """A UserError is that line. Anything else that is raised would be a traceback."""
    with contextlib.suppress(UserError):
        epochs = {"max_steps": -1 if name == "num_train_epochs" else 2}
        assert train(TrainConfig(**quick_settings | epochs | {name: value}))["steps"] in (1, 2)


def test_no_number_and_no_path_is_left_out_of_these_tests():
    numbers = {"learning_rate", "num_train_epochs", "weight_decay", "max_grad_norm", "eval_fraction", "distill_alpha"}
    assert numbers == set(FLOATS)
    paths = {"model_name_or_path", "dataset", "eval_dataset", "prefix_from", "output_dir", "resume_from_checkpoint"}
    assert set(PATH_SETTINGS) == paths | {"distill_text", "distill_prefix"}


@pytest.mark.parametrize("name", PATH_SETTINGS)
def test_a_path_that_leads_nowhere_ends_in_one_line(quick_settings, tmp_path, name):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").touch()
    quick_settings |= {"eval_fraction": None} if name == "eval_dataset" else {}
    for path in ("dangling", "circle", "circle/below", "file/below", "x" * 300):
        with pytest.raises(UserError, match=r"dangling|circle: Too many|below: Too many|below|x: File name too long"):
            train(TrainConfig(**quick_settings | {name: str(tmp_path / path)}))


# As nobody, because nothing is forbidden to root.
TRY_FOLDERS = """
import os, sys
from prefix_tuning.errors import UserError
from prefix_tuning.training.settings import TrainConfig
os.getuid() or os.setuid(65534)
for folder in sys.argv[1:]:
    try:
        TrainConfig(output_dir=folder)
        print("accepted")
    except UserError as error:
        print(error)
"""


def test_a_folder_that_cannot_be_opened_is_refused():
    with tempfile.TemporaryDirectory() as parent:
        os.chmod(parent, 0o755)
        folders = [Path(parent, f"{mode:o}") for mode in (0o777, 0o333, 0o666, 0o000)]
        for folder in folders:
            folder.mkdir()
            folder.chmod(int(folder.name, 8))
        command = [sys.executable, "-c", TRY_FOLDERS, *map(str, folders), str(folders[-1] / "below")]
        answers = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert answers[0] == "accepted" and answers[4].endswith("below: Permission denied; name another")
    assert all(answer.endswith("no permission to read and write there; name another folder") for answer in answers[1:4])


@pytest.mark.parametrize("parse", [parse_train_config, parse_infer_config, parse_study_config, parse_claims_config])
def test_a_name_that_is_no_utf8_is_refused_before_any_work(parse):
    name = "/rows/" + "名".encode("gbk").decode("utf-8", "surrogateescape")
    flags = {
        "dataset",
        "eval_dataset",
        "prefix_from",
        "model_name_or_path",
        "output_dir",
        "input",
        "score",
        "prefix",
        "output",
    }
    refused = set()
    for flag in flags:
        with pytest.raises(UserError) as error:
            parse([f"--{flag}", name])
        refused |= {flag} if f"--{flag} is not encoded in UTF-8" in str(error.value) else set()
        assert flag in refused or "unknown argument" in str(error.value)
    assert refused


def test_a_name_that_python_takes_for_ascii_is_recorded_as_what_it_is(quick_settings, tmp_path):
    """As in a process whose locale is C: the bytes of the name are good UTF-8."""
    folder = tmp_path / "输出".encode().decode("ascii", "surrogateescape")
    train(TrainConfig(**quick_settings | {"output_dir": str(folder)}))
    assert json.loads((tmp_path / "输出" / CONFIG_FILE).read_text("utf-8"))["output_dir"] == "local:输出"
