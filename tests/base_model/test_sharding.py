"""A sharded base. Here with one process, which has all of it; processes.py has the checks with several."""

import gc
import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import complete, examples_of, random_bloom
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from prefix_tuning import bundled, distributed
from prefix_tuning.base_model.identity import fingerprint
from prefix_tuning.base_model.layers import wrap_layers
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.base_model.sharding import load_sharded, parts_of_base
from prefix_tuning.cli import parse_train_config
from prefix_tuning.data.rows import prompt_of
from prefix_tuning.errors import UserError
from prefix_tuning.files.prefixes import load_prefix
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.model.batch import pack
from prefix_tuning.training.run import train

CPU = torch.device("cpu")


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    gc.collect()
    dist.destroy_process_group()


def sharded(folder, dtype=torch.float32):
    model = load_sharded(str(folder), AutoConfig.from_pretrained(folder), dtype, CPU, parts=1)
    wrap_layers(model, gradient_checkpointing=False, torch_compile=False)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("files", ["one", "several", "headless", "under the head's name", "two sets"])
def test_every_kind_of_checkpoint_is_read(group, tmp_path, files, dtype):
    plain = random_bloom()
    if files == "headless":  # as the first Blooms were saved
        plain.config.save_pretrained(tmp_path)
        plain.transformer.save_pretrained(tmp_path)
        assert "word_embeddings.weight" in load_file(tmp_path / "model.safetensors")
    else:
        plain.save_pretrained(tmp_path, max_shard_size="1MB" if files == "several" else "5GB")
        assert (tmp_path / "model.safetensors.index.json").exists() == (files == "several")
    path = tmp_path / "model.safetensors"
    if files == "under the head's name":
        weights = load_file(path)
        weights["lm_head.weight"] = weights.pop("transformer.word_embeddings.weight")
        save_file(weights, path, {"format": "pt"})
    if files == "two sets":  # transformers takes the one without an index, so the other must not matter
        (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "other.safetensors"}}')
    plain, model = plain.to(dtype), sharded(tmp_path, dtype)
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.to_local(), theirs), name
    assert fingerprint(model, None)["weights"] == fingerprint(plain, None)["weights"]
    batch = next(pack(examples_of([20, 50, 7]), 1000))
    assert torch.allclose(model.label_losses(batch, None), plain.label_losses(batch, None), rtol=1e-5)


def test_answers_are_those_of_the_whole_base(group, tuned):
    plain, tokenizer = load_base(bundled.MODEL, torch.float32, CPU)
    model, _ = load_base(bundled.MODEL, torch.float32, CPU, parts=1)
    prompts = [prompt_of(question) for question in ("法国的首都是哪里？", "3加5等于多少？", "星期二用英语怎么说？")]
    answers, losses = [], []
    for base in (plain, model):
        prefixed = PrefixBloom(base)
        prefixed.attach("short", load_prefix(str(tuned["short"])))
        answers.append(complete(prefixed, tokenizer, prompts, max_new_tokens=12, do_sample=False))
        batch = next(pack(examples_of([20, 50, 7]), 1000))
        losses.append(prefixed.label_losses(batch, prefixed.prefixes["short"]))
    assert answers[0] == answers[1] and all(answers[0])
    assert torch.allclose(*losses, rtol=1e-5)


def test_a_base_that_cannot_be_sharded_is_one_line(group, tmp_path):
    plain = random_bloom()
    plain.config.save_pretrained(tmp_path)
    torch.save(plain.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"--shard_base reads safetensors files, and .* has none; save it as such"):
        sharded(tmp_path)
    plain.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"transformer.ln_f.bias": torch.zeros(7)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"transformer.ln_f.bias has the shape \(7,\) where \(48,\) is expected"):
        sharded(tmp_path)
    del weights["transformer.h.1.mlp.dense_h_to_4h.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its weights, such as transformer\.h\.1\.mlp\.dense_h_to_4h\.weight"):
        sharded(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "tokenizer.json").write_bytes(Path(bundled.resolve(bundled.MODEL), "tokenizer.json").read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_base(str(tmp_path), torch.float32, CPU, parts=1)


def test_a_degree_must_divide_the_processes(group, tmp_path):
    with pytest.raises(UserError, match="--shard_degree 2 does not divide the number of processes, 1"):
        train(parse_train_config(["--shard_base", "--shard_degree", "2", "--output_dir", str(tmp_path / "out")]))
    with pytest.raises(UserError, match="--shard_degree goes with --shard_base"):
        train(parse_train_config(["--shard_degree", "1", "--output_dir", str(tmp_path / "out")]))


def test_the_degree_says_how_many_processes_share_a_copy(group, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    assert [parts_of_base(True, degree) for degree in (None, 1, 2, 4)] == [4, 1, 2, 4]
    assert parts_of_base(False, None) is None
    for degree in (0, 3, 8):
        with pytest.raises(UserError, match=f"--shard_degree {degree}"):
            parts_of_base(True, degree)


def test_one_process_alone_is_told_to_start_several(tmp_path):
    with pytest.raises(UserError, match="--shard_base splits the base over processes; start them: torchrun"):
        train(parse_train_config(["--shard_base", "--output_dir", str(tmp_path / "out")]))
