import json

import pytest
import torch
from models import random_bloom
from peft import PrefixTuningConfig, get_peft_model
from runs import RECORDED_BASE
from safetensors.torch import load_file, save_file

from prefix_tuning import bundled
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import ADAPTER_CONFIG_FILE, ADAPTER_FILE, ENCODER_FILE
from prefix_tuning.files.prefixes import load_encoder, load_prefix
from prefix_tuning.model.encoder import PrefixConfig


def test_what_is_saved_is_read_back(saved):
    folder, encoder = saved
    again, base = load_encoder(str(folder))
    assert base == RECORDED_BASE
    assert again.config == encoder.config
    assert again.state_dict().keys() == encoder.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in encoder.state_dict().items())
    assert all(parameter.requires_grad for parameter in again.parameters())
    prefix, base = load_prefix(str(folder))
    assert base == RECORDED_BASE
    assert torch.equal(prefix, encoder.bake())


def test_a_prefix_without_its_encoder_is_trained_directly(saved, capsys):
    folder, encoder = saved
    (folder / ENCODER_FILE).unlink()
    again, base = load_encoder(folder)
    assert again.config == PrefixConfig(5, 3, 6, 48, 48, prefix_projection=False) and base == RECORDED_BASE
    assert torch.equal(again.bake(), encoder.bake())
    assert "holds a baked prefix and no encoder" in capsys.readouterr().out


def test_a_folder_without_a_prefix_says_what_is_missing(saved):
    folder, encoder = saved
    description = json.loads((folder / ADAPTER_CONFIG_FILE).read_text("utf-8"))
    assert description == vars(encoder.config) | {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": bundled.MODEL,
        "inference_mode": True,
        "num_transformer_submodules": 1,
    }
    (folder / ADAPTER_FILE).unlink()
    with pytest.raises(UserError, match=f"{ADAPTER_FILE} is missing$"):
        load_prefix(folder)
    (folder / "adapter_model.bin").write_bytes(b"pickled")
    with pytest.raises(UserError, match=f"{ADAPTER_FILE} is missing; adapter_model.bin is a pickled file"):
        load_prefix(folder)
    (folder / ADAPTER_CONFIG_FILE).unlink()
    with pytest.raises(UserError, match=f"holds no prefix .{ADAPTER_CONFIG_FILE} is missing"):
        load_prefix(folder)


def test_paths_are_taken_and_other_tasks_refused(saved):
    folder, encoder = saved
    assert torch.equal(load_prefix(folder).tensor, encoder.bake()) and load_encoder(folder)[0].config == encoder.config
    description = json.loads((folder / ADAPTER_CONFIG_FILE).read_text("utf-8"))
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(description | {"task_type": None}), "utf-8")
    load_prefix(folder)
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(description | {"task_type": "SEQ_CLS"}), "utf-8")
    with pytest.raises(UserError, match="is for the task SEQ_CLS, not for CAUSAL_LM"):
        load_prefix(folder)


def test_shapes_and_values_are_checked(saved):
    folder, encoder = saved
    flat = load_file(folder / ADAPTER_FILE)["prompt_embeddings"]
    for tensors in (
        {"prompt_embeddings": flat[:, :-1].contiguous()},
        {"prompt_embeddings": flat, "more": flat.clone()},
        {"other": flat},
        {"prompt_embeddings": flat.long()},
        {"prompt_embeddings": flat * torch.nan},
    ):
        save_file(tensors, folder / ADAPTER_FILE)
        with pytest.raises(UserError, match=ADAPTER_FILE):
            load_prefix(str(folder))
    weights = dict(encoder.state_dict())
    metadata = {"prefix_config": json.dumps(vars(encoder.config))}
    for tensors, header in (
        (weights, {}),
        (weights, {"prefix_config": "[]"}),
        (weights, {"prefix_config": json.dumps(vars(encoder.config) | {"num_virtual_tokens": -1})}),
        (weights, {"prefix_config": json.dumps(vars(encoder.config) | {"num_virtual_tokens": 10**12})}),
        ({}, metadata),
        ({name: tensor * torch.inf for name, tensor in weights.items()}, metadata),
    ):
        save_file(tensors, folder / ENCODER_FILE, header)
        with pytest.raises(UserError, match=ENCODER_FILE):
            load_encoder(str(folder))


def test_a_prefix_in_half_precision_is_read_as_float32(saved):
    folder, encoder = saved
    flat = load_file(folder / ADAPTER_FILE)["prompt_embeddings"]
    for dtype in (torch.bfloat16, torch.float16):
        save_file({"prompt_embeddings": flat.to(dtype)}, folder / ADAPTER_FILE)
        prefix = load_prefix(folder).tensor
        assert prefix.dtype == torch.float32 and torch.equal(prefix, encoder.bake().to(dtype).float())


def test_pickled_adapters_are_not_read(tmp_path):
    theirs = get_peft_model(random_bloom(), PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
    with pytest.raises(UserError, match="pickled file, which is never read"):
        load_prefix(str(tmp_path))
