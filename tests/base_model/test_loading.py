import copy
import json

import pytest
import torch
from models import examples_of, prefix_config, random_bloom, random_decoder, random_prefix
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoTokenizer, BloomForCausalLM

from prefix_tuning.base_model.loading import load_base
from prefix_tuning.data.templates import Talk, prompt_ids
from prefix_tuning.errors import UserError
from prefix_tuning.files.prefixes import save_adapter
from prefix_tuning.model.batch import pack
from prefix_tuning.model.encoder import PrefixEncoder


def resave(folder, change):
    """Changes the JSON of a saved tokenizer."""
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(change(json.loads(path.read_text("utf-8")))), "utf-8")


def renumber_last_token(folder, number):
    """Gives the last token of a saved tokenizer another id."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text("utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = number
    path.write_text(json.dumps(content), "utf-8")


def test_the_base_is_frozen_and_in_the_compute_type(tmp_path, tokenizer):
    random_bloom().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, loaded = load_base(str(tmp_path), torch.bfloat16, torch.device("cpu"))
    assert not model.training and model.dtype == torch.bfloat16
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert loaded.padding_side == "left"


def test_layers_are_compiled_or_computed_again_only_if_that_is_asked_for(random_base, monkeypatch):
    compiled, calls = [], []
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: compiled.append(forward) or forward)
    for flags in ({}, {"gradient_checkpointing": True}, {"torch_compile": True}):
        model, _ = load_base(random_base, torch.float32, torch.device("cpu"), **flags)
        calls.clear()
        model.transformer.h[0].input_layernorm.register_forward_pre_hook(lambda *_: calls.append("layer 0"))
        model.label_losses(*pack(examples_of([7]), 100), random_prefix(model).requires_grad_()).sum().backward()
        assert len(calls) == (2 if flags.get("gradient_checkpointing") else 1)
        assert len(compiled) == (model.config.n_layer if flags.get("torch_compile") else 0)


def test_a_base_in_safetensors_is_no_cause_for_a_warning(random_base, capsys):
    load_base(random_base, torch.float32, torch.device("cpu"))
    assert "pickled" not in capsys.readouterr().err


def test_a_base_that_is_missing_or_of_an_unknown_family_is_named(tmp_path, tokenizer):
    with pytest.raises(UserError, match="model_name_or_path no/such-model"):
        load_base("no/such-model", torch.float32, torch.device("cpu"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty"):
        load_base(str(tmp_path / "empty"), torch.float32, torch.device("cpu"))
    tokenizer.save_pretrained(tmp_path)
    for family in ("bert", "t5", "mamba", "deepseek_v3", "falcon", "gemma4_text", "qwen3_next"):
        CONFIG_MAPPING[family]().save_pretrained(tmp_path)
        with pytest.raises(UserError, match=f"is a {family} model; this program tunes bloom, .*llama"):
            load_base(str(tmp_path), torch.float32, torch.device("cpu"))


def test_quantised_weights_of_other_families_than_bloom_are_refused_before_they_are_read(tmp_path, tokenizer):
    tokenizer.save_pretrained(tmp_path)
    CONFIG_MAPPING["llama"](quantization_config={"quant_method": "awq"}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="its weights are quantised"):
        load_base(str(tmp_path), torch.float32, torch.device("cpu"))


def test_a_base_with_broken_or_missing_weights_is_refused(tmp_path, tokenizer):
    random_bloom().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}  # not a view of the file
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        load_base(str(tmp_path), torch.float32, torch.device("cpu"))
    save_file({name: tensor for name, tensor in weights.items() if "h.1." not in name}, file, {"format": "pt"})
    with pytest.raises(UserError, match="of its weights"):
        load_base(str(tmp_path), torch.float32, torch.device("cpu"))
    save_file({name: tensor[:2].contiguous() for name, tensor in weights.items()}, file, {"format": "pt"})
    with pytest.raises(UserError, match="cannot be loaded"):
        load_base(str(tmp_path), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("parts", [None, 1])
def test_a_tokenizer_that_does_not_serve_is_refused(tmp_path, tokenizer, parts):
    def refused(folder, match):
        with pytest.raises(UserError, match=rf"--model_name_or_path .*{folder.name}: its tokenizer {match}"):
            load_base(str(folder), torch.float32, torch.device("cpu"), parts)

    for name, size in (("small", len(tokenizer) - 1), ("no_eos", len(tokenizer)), ("slow", 384)):
        random_bloom(vocab_size=size).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    refused(tmp_path / "small", "has 4096 tokens, .* 4095")
    random_bloom(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "gap")
    tokenizer.save_pretrained(tmp_path / "gap")
    renumber_last_token(tmp_path / "gap", 5000)  # as many tokens as embeddings, but one has none
    refused(tmp_path / "gap", "has 5001 tokens, .* 4096")
    resave(tmp_path / "no_eos", lambda settings: settings | {"eos_token": None})
    refused(tmp_path / "no_eos", "has no EOS token")
    (tmp_path / "slow" / "tokenizer.json").unlink()
    resave(tmp_path / "slow", lambda settings: {"tokenizer_class": "ByT5Tokenizer"})
    refused(tmp_path / "slow", "has no tokenizer.json")


def test_a_base_may_have_more_embeddings_than_tokens(tmp_path, tokenizer):
    random_bloom(vocab_size=len(tokenizer) + 100).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_base(str(tmp_path), torch.float32, torch.device("cpu"))
    assert model.config.vocab_size == len(tokenizer) + 100


def test_a_special_token_without_an_embedding_is_no_hindrance_where_none_of_our_texts_has_it(tmp_path, tokenizer):
    """Gemma 3's tokenizer has <image_soft_token>. An ordinary token, or one that begins a text, needs an embedding."""
    base = random_decoder("gemma3_text", vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    larger = copy.deepcopy(tokenizer)
    larger.add_special_tokens({"extra_special_tokens": ["<image_soft_token>"]})
    for folder, used in (("fine", larger), ("plain", tokenizer), ("first", larger)):
        base.save_pretrained(tmp_path / folder)
        used.save_pretrained(tmp_path / folder)
    _, loaded = load_base(str(tmp_path / "fine"), torch.float32, torch.device("cpu"))
    assert len(loaded) == base.config.vocab_size + 1
    (prompt,) = prompt_ids(loaded, [Talk(["<image_soft_token>"])])
    assert max(prompt) < base.config.vocab_size
    plain, first = (AutoTokenizer.from_pretrained(tmp_path / folder) for folder in ("plain", "first"))
    plain.add_tokens("<ordinary>")
    first.bos_token = "<image_soft_token>"
    for folder, used in (("plain", plain), ("first", first)):
        used.save_pretrained(tmp_path / folder)
        with pytest.raises(UserError, match="has 4097 tokens, but the base has embeddings for 4096"):
            load_base(str(tmp_path / folder), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("kind", ["a LoRA", "a prefix"])
def test_an_adapter_beside_the_weights_is_left_out_and_named(tmp_path, tokenizer, capsys, kind):
    model = random_bloom()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if kind == "a LoRA":
        lora = LoraConfig(target_modules=["query_key_value"], init_lora_weights=False)
        get_peft_model(model, lora).save_pretrained(tmp_path)
        attached = BloomForCausalLM.from_pretrained(tmp_path)  # as transformers does, if PEFT is installed as it is here
        assert any("lora" in name for name in attached.state_dict())
    else:
        encoder = PrefixEncoder(prefix_config(model))
        save_adapter(tmp_path, encoder.bake(), encoder.config, {"name_or_path": "base"})
    capsys.readouterr()
    loaded, _ = load_base(str(tmp_path), torch.float32, torch.device("cpu"))
    assert loaded.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.state_dict().items())
    assert f"{tmp_path}: the adapter beside its weights (adapter_config.json) is ignored" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting, hint",
    [
        ({"slow_but_exact": True, "pretraining_tp": 2}, 'slow_but_exact, .* set "slow_but_exact": false'),
        ({"is_causal": False}, 'later tokens; set "is_causal": true'),
    ],
)
def test_a_base_that_would_be_trained_as_another_function_is_refused(tmp_path, tokenizer, setting, hint):
    random_bloom(**setting).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"--model_name_or_path {tmp_path}: its config\.json asks for .*{hint}"):
        load_base(str(tmp_path), torch.float32, torch.device("cpu"))


@pytest.mark.parametrize("setting", [{"pretraining_tp": 2}, {"slow_but_exact": True}])
def test_a_base_whose_pretraining_settings_change_no_result_is_used(tmp_path, tokenizer, setting):
    """bloom-7b1 has the first one."""
    random_bloom(**setting).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    load_base(str(tmp_path), torch.float32, torch.device("cpu"))


def test_padding_is_the_tokenizers_or_else_its_eos(tmp_path, tokenizer):
    random_bloom().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for pad in (3, 2):
        model, loaded = load_base(str(tmp_path), torch.float32, torch.device("cpu"))
        assert loaded.pad_token_id == model.generation_config.pad_token_id == pad
        resave(tmp_path, lambda settings: settings | {"pad_token": None})


def test_a_base_needs_an_embedding_for_every_token(tmp_path, tokenizer):
    tokens = max(tokenizer.get_vocab().values()) + 1
    tokenizer.save_pretrained(tmp_path)
    random_bloom(vocab_size=tokens).save_pretrained(tmp_path)
    assert load_base(str(tmp_path), torch.float32, torch.device("cpu"))[0].config.vocab_size == tokens
    random_bloom(vocab_size=tokens - 1).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"has {tokens} tokens, but the base has embeddings for {tokens - 1};"):
        load_base(str(tmp_path), torch.float32, torch.device("cpu"))
