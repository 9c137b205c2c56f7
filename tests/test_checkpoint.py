import json

import pytest
import torch
from conftest import prefix_config, random_bloom
from safetensors.torch import load_file, save_file

from prefix_tuning import demo
from prefix_tuning.checkpoint import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    ENCODER_FILE,
    base_of,
    check_fits,
    load_encoder,
    load_prefix,
    portable_name,
    replacing,
    save_adapter,
    save_encoder,
)
from prefix_tuning.config import UserError
from prefix_tuning.encoder import PrefixEncoder


@pytest.fixture(params=["projection", "no projection", "projection and text"])
def saved(request, tmp_path):
    model = random_bloom()
    encoder = PrefixEncoder(prefix_config(model, projection=request.param != "no projection", width=20))
    if "text" in request.param:
        encoder.initialize("text", torch.randn(3, 2, 6, 5, 8))
    save_encoder(tmp_path, encoder, demo.MODEL, model.config)
    save_adapter(tmp_path, encoder.bake(), encoder.config, demo.MODEL)
    return tmp_path, encoder


def test_what_is_saved_is_read_back(saved):
    folder, encoder = saved
    again = load_encoder(str(folder))
    assert again.config == encoder.config
    assert again.state_dict().keys() == encoder.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in encoder.state_dict().items())
    assert all(parameter.requires_grad for parameter in again.parameters())
    prefix, base = load_prefix(str(folder))
    assert base == demo.MODEL
    assert torch.equal(prefix, encoder.bake())


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as draft:
        draft.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_names_in_files_hold_on_any_machine(tmp_path, monkeypatch):
    assert portable_name("Langboat/bloom-1b4-zh") == "Langboat/bloom-1b4-zh"
    assert portable_name(demo.MODEL) == demo.MODEL
    assert portable_name(str(tmp_path)) == f"local:{tmp_path.name}"
    assert portable_name("/no/longer/there.jsonl") == "local:there.jsonl"
    monkeypatch.chdir(tmp_path)
    assert portable_name(".") == f"local:{tmp_path.name}"
    assert base_of("./chatbot", "Langboat/bloom-1b4-zh") == "Langboat/bloom-1b4-zh"
    for noted in (f"local:{tmp_path.name}", None, ""):
        with pytest.raises(UserError, match=r"\./chatbot: .*--model_name_or_path PATH"):
            base_of("./chatbot", noted)


def test_missing_or_broken_files_are_named(saved):
    folder, _ = saved
    with pytest.raises(UserError, match="nowhere: holds no prefix"):
        load_prefix("nowhere")
    with pytest.raises(UserError, match="no such file"):
        load_encoder("nowhere")
    for name, load in ((ENCODER_FILE, load_encoder), (ADAPTER_FILE, load_prefix)):
        whole = (folder / name).read_bytes()
        for broken in (b"", whole[:10], whole[: len(whole) // 2], b"hello" * 100):
            (folder / name).write_bytes(broken)
            with pytest.raises(UserError, match=name):
                load(str(folder))
        (folder / name).write_bytes(whole)
    for text in ("", "[]", "{}", '{"peft_type": "LORA"}', '{"peft_type": "PREFIX_TUNING"}', "{"):
        (folder / ADAPTER_CONFIG_FILE).write_text(text)
        with pytest.raises(UserError, match=ADAPTER_CONFIG_FILE):
            load_prefix(str(folder))


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


def test_a_prefix_for_another_shape_is_refused():
    config = random_bloom().config
    check_fits((3, 2, 6, 5, 8), config, "./chatbot", "base")
    for shape in ((2, 2, 6, 5, 8), (3, 2, 3, 5, 16), (3, 2, 6, 5, 16)):
        with pytest.raises(UserError, match=r"\./chatbot: a prefix for .* but base has 3 layers of 6 x 8"):
            check_fits(shape, config, "./chatbot", "base")
