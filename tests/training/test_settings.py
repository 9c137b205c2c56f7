import dataclasses

import pytest
from helpers import ROOT

from prefix_tuning.cli import parse_train_config
from prefix_tuning.errors import UserError
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
    "--prefix_init text --init_text \udcff": "--init_text holds bytes that are no UTF-8 text",
    "--seed 4611686018427387905": "--seed must be at least 0 and at most 4611686018427387904",
    "--num_train_epochs inf": "--num_train_epochs must be at least 0, not inf",
    "--shard_degree 1": "--shard_degree goes with --shard_base; add that flag",
    "--save_steps -1": "--save_steps must be at least 0",
    "--save_total_limit 0": "--save_total_limit must be at least 1",
}


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


@pytest.mark.parametrize("flags, message", BAD_FLAGS.items())
def test_flags_that_make_no_sense_are_refused(flags, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        parse_train_config(flags.split())
