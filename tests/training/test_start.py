import shutil

import pytest
import torch
from models import initial_encoder, random_bloom, relative
from rows import write_jsonl
from runs import metrics_of
from safetensors.torch import load_file, save_file
from transformers import DynamicCache

from prefix_tuning.errors import UserError
from prefix_tuning.files.names import ADAPTER_FILE
from prefix_tuning.files.prefixes import load_prefix, recorded_history
from prefix_tuning.model.bloom import cached_pairs, prefix_cache
from prefix_tuning.model.encoder import PrefixConfig
from prefix_tuning.training.run import count_steps, prefix_config_of, train
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.start import text_prefix
from prefix_tuning.training.state import Progress


def test_text_prefix_is_what_the_model_computes_for_the_text(tokenizer):
    model = random_bloom()
    ids = tokenizer("法国的首都是巴黎。").input_ids
    prefix = text_prefix(model, tokenizer, "法国的首都是巴黎。", len(ids))
    assert prefix.shape == (3, 2, 6, len(ids), 8)
    # A prefix made of the text's own keys and values continues exactly as the text itself does.
    rest = torch.tensor([[50, 60, 70]])
    after_text = model(torch.cat((torch.tensor([ids]), rest), dim=1)).logits[0, -3:]
    cache = prefix_cache([prefix.to(model.dtype)])[0]
    after_prefix = model(rest, past_key_values=cache, attention_mask=torch.ones(1, len(ids) + 3)).logits[0]
    assert relative(after_prefix, after_text) < 1e-5
    # Cut or repeated to the length that is asked for.
    assert relative(text_prefix(model, tokenizer, "法国的首都是巴黎。", 2), prefix[:, :, :, :2]) < 1e-5
    assert text_prefix(model, tokenizer, "法", 7).shape[3] == 7
    # What looks like the end of a text is read as it is written.
    cache = DynamicCache()
    model(torch.tensor([[tokenizer.eos_token_id]]), cache)
    end = cached_pairs(cache)
    assert relative(text_prefix(model, tokenizer, tokenizer.eos_token, 1), end) > 0.1
    with pytest.raises(UserError, match="init_text"):
        text_prefix(model, tokenizer, "", 7)
    model.config.return_dict = model.config.use_cache = False  # as the base's config.json may say
    assert torch.equal(text_prefix(model, tokenizer, "法国的首都是巴黎。", len(ids)), prefix)


def test_max_steps_0_saves_the_initial_prefix(quick_settings, tokenizer):
    config = TrainConfig(**quick_settings | {"max_steps": 0})
    assert train(config)["steps"] == 0
    initial = initial_encoder(config, tokenizer)
    assert torch.equal(load_prefix(quick_settings["output_dir"])[0], initial.bake())


@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("init", ["random", "zero", "text"])
def test_every_start_trains_and_goes_on_from_its_file(quick_settings, tmp_path, init, projection):
    start = {"prefix_init": init, "prefix_projection": projection, "init_text": "请回答。" if init == "text" else None}
    train(
        TrainConfig(**quick_settings | start | {"eval_dataset": quick_settings["dataset"], "eval_steps": 1, "max_steps": 10})
    )
    _, first, *_, last = [line["eval_loss"] for line in metrics_of(quick_settings["output_dir"]) if "eval_loss" in line]
    assert last < first
    again = str(tmp_path / "again")
    train(TrainConfig(**quick_settings | {"prefix_from": quick_settings["output_dir"], "output_dir": again, "max_steps": 0}))
    assert torch.equal(load_prefix(again)[0], load_prefix(quick_settings["output_dir"])[0])


def test_prefix_from_another_shape_is_refused(quick_settings, tmp_path, tokenizer):
    train(TrainConfig(**quick_settings | {"max_steps": 0}))
    random_bloom(n_layer=2).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    changed = {"model_name_or_path": str(tmp_path / "other"), "prefix_from": quick_settings["output_dir"]}
    with pytest.raises(UserError, match="a prefix for 3 layers"):
        train(TrainConfig(**quick_settings | changed | {"output_dir": str(tmp_path / "new")}))


def test_files_record_whether_any_row_had_history_through_all_that_begins_from_them(quick_settings, tmp_path):
    said = zip(["user", "assistant"] * 2, ["法国的首都是哪里？", "巴黎", "德国呢？", "柏林"], strict=True)
    talk = {"messages": [{"role": role, "content": text} for role, text in said]}
    talks = write_jsonl(tmp_path / "talks.jsonl", {"messages": talk["messages"][:2]}, talk)

    def record_of(name, **changes):
        folder = str(tmp_path / name)
        train(TrainConfig(**quick_settings | {"max_steps": 0, "output_dir": folder} | changes))
        return recorded_history(folder)

    assert record_of("single") is False and record_of("talks", dataset=talks) is True
    assert record_of("single, single", prefix_from=str(tmp_path / "single")) is False
    begun = {"prefix_from": str(tmp_path / "talks"), "save_steps": 1}
    assert record_of("talks, single", **begun, max_steps=1) is True
    shutil.rmtree(tmp_path / "talks")  # the checkpoint has the weights and this record
    assert record_of("talks, single", **begun, max_steps=2, resume_from_checkpoint="latest") is True
    flat = load_file(tmp_path / "single" / ADAPTER_FILE)
    save_file(flat, tmp_path / "single" / ADAPTER_FILE)  # as PEFT, and earlier versions of this program
    assert recorded_history(tmp_path / "single") is None
    assert record_of("unknown, single", prefix_from=str(tmp_path / "single")) is None
    assert record_of("unknown, talks", prefix_from=str(tmp_path / "single"), dataset=talks) is True


@pytest.mark.parametrize(
    "options, rows_per_step, progress, steps",
    [
        ({"num_train_epochs": 1.5}, 6, (0, 0, 0), 11),  # an epoch of 40 rows has 7 steps
        ({"num_train_epochs": 1.5}, 6, (9, 1, 12), 11),
        ({"num_train_epochs": 1.5}, 12, (9, 1, 12), 10),  # done with 6 rows a step: 7 and 2; left of 6 larger ones: 1
        ({"num_train_epochs": 3}, 6, (14, 2, 0), 21),
        ({"num_train_epochs": 1}, 6, (9, 1, 12), 9),  # never fewer than are done
        ({"max_steps": 5}, 6, (0, 0, 0), 5),
        ({"max_steps": 5}, 6, (9, 1, 12), 9),
        ({"max_steps": 0}, 6, (0, 0, 0), 0),
    ],
)
def test_finished_steps_count_with_the_size_that_they_had(options, rows_per_step, progress, steps):
    step, epoch, row = progress
    assert count_steps(TrainConfig(**options), 40, rows_per_step, Progress(step=step, epoch=epoch, row=row)) == steps


def test_a_new_prefix_has_the_shape_of_its_base_and_the_width_that_is_asked_for():
    model = random_bloom()
    options = {"num_virtual_tokens": 7, "encoder_hidden_size": 20}
    assert prefix_config_of(TrainConfig(**options), model) == PrefixConfig(7, 3, 6, 48, 20, prefix_projection=True)
    options = {"prefix_projection": False}
    assert prefix_config_of(TrainConfig(**options), model) == PrefixConfig(10, 3, 6, 48, 48, prefix_projection=False)
