"""A sharded base in one process, which holds all of it. The checks with several processes are in processes.py."""

import copy
import gc
import json
import platform
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from answers import complete
from launching import forks
from models import examples_of, loss_and_gradient, random_bloom, random_prefix, save_decoder
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from prefix_tuning import bundled, distributed
from prefix_tuning.base_model.identity import fingerprint
from prefix_tuning.base_model.loading import load_base, wrap_layers
from prefix_tuning.base_model.sharding import is_sharded, load_sharded, parts_of_base
from prefix_tuning.cli import parse_train_config
from prefix_tuning.data.templates import prompt_of
from prefix_tuning.errors import UserError
from prefix_tuning.files.prefixes import load_prefix
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.model.batch import pack
from prefix_tuning.training.run import train

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def group(tmp_path_factory):
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path_factory.mktemp('group')}/store", rank=0, world_size=1)
    yield
    gc.collect()
    dist.destroy_process_group()


def sharded(folder, dtype=torch.float32):
    model = load_sharded(str(folder), AutoConfig.from_pretrained(folder), dtype, CPU, parts=1)
    wrap_layers(model, gradient_checkpointing=False, torch_compile=False)
    return model


EMBEDDINGS = "transformer.word_embeddings.weight"


def stored(folder):
    """The weights in a folder's file, not views of it."""
    return {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}


def save_changed(model, folder, change):
    """change(weights) returns the entries of the file that differ from the model's. None leaves an entry out."""
    model.save_pretrained(folder)
    weights = stored(folder)
    weights |= change(weights)
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def with_head(noise):
    """Stores a head beside the embeddings, which differs from them by `noise` in its last row."""

    def head(weights):
        differing = torch.cat((torch.zeros(4095, 48), torch.randn(1, 48)))
        return {"lm_head.weight": weights[EMBEDDINGS] + noise * differing}

    return lambda model, folder: save_changed(model, folder, head)


def under_the_heads_name(model, folder):
    save_changed(model, folder, lambda weights: {"lm_head.weight": weights[EMBEDDINGS], EMBEDDINGS: None})


def with_adapter(model, folder):
    model.save_pretrained(folder)
    lora = LoraConfig(target_modules=["query_key_value"], init_lora_weights=False)
    get_peft_model(copy.deepcopy(model), lora).save_pretrained(folder)


def with_more(model, folder):
    save_changed(model, folder, lambda weights: {"masked_bias": torch.ones(1), "transformer.h.9.bias": torch.ones(1)})


def in_type(dtype):
    return lambda model, folder: copy.deepcopy(model).to(dtype).save_pretrained(folder)


def in_several_files(model, folder):
    model.save_pretrained(folder, max_shard_size="1MB")
    assert (folder / "model.safetensors.index.json").exists()


def headless(model, folder):
    """As the first Blooms were saved."""
    model.config.save_pretrained(folder)
    model.transformer.save_pretrained(folder)
    assert "word_embeddings.weight" in stored(folder)


def headless_with_head(model, folder):
    headless(model, folder)
    head = {"lm_head.weight": torch.randn(4096, 48)}
    save_file(stored(folder) | head, folder / "model.safetensors", {"format": "pt"})


def two_sets(model, folder):
    """transformers takes the one without an index, so the other must not matter."""
    model.save_pretrained(folder)
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {"a": "other.safetensors"}}')


def named_by_the_configuration(model, folder):
    model.save_pretrained(folder)
    (folder / "model.safetensors").rename(folder / "mine.safetensors")
    random_bloom(seed=1).save_pretrained(folder)
    model.config.transformers_weights = "mine.safetensors"
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))


def with_old_settings(model, folder):
    headless(model, folder)
    config = model.config.to_dict() | {"repetition_penalty": 1.5, "eos_token_id": 7}
    (folder / "config.json").write_text(json.dumps(config))


CHECKPOINTS = {
    "one file": lambda model, folder: model.save_pretrained(folder),
    "several files": in_several_files,
    "headless": headless,
    "headless, and a head": headless_with_head,
    "two sets": two_sets,
    "a file that the configuration names": named_by_the_configuration,
    "embeddings under the head's name": under_the_heads_name,
    "the embeddings twice": with_head(noise=0),
    "a head of its own": with_head(noise=1),
    "a head that differs by less than bfloat16 can tell": with_head(noise=1e-9),
    "settings of generate in config.json": with_old_settings,
    "more than a Bloom": with_more,
    "an adapter beside it": with_adapter,
    "bfloat16": in_type(torch.bfloat16),
    "float16": in_type(torch.float16),
    "float64": in_type(torch.float64),
}


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("save", CHECKPOINTS.values(), ids=CHECKPOINTS)
def test_a_sharded_base_is_the_plain_one_tensor_by_tensor(group, tmp_path, tokenizer, save, tied):
    tokenizer.save_pretrained(tmp_path)
    save(random_bloom(tie_word_embeddings=tied), tmp_path)
    lacks_head = not tied and save in (headless, under_the_heads_name, with_old_settings)
    for dtype in (torch.float32, torch.bfloat16):
        if lacks_head:
            for parts in (None, 1):
                with pytest.raises(UserError, match="lacks 1 of its weights"):
                    load_base(str(tmp_path), dtype, CPU, parts)
            continue
        plain, model = (load_base(str(tmp_path), dtype, CPU, parts)[0] for parts in (None, 1))
        ours, theirs = (dict(base.named_parameters(remove_duplicate=False)) for base in (model, plain))
        assert ours.keys() == theirs.keys() and "lm_head.weight" in ours
        for name, parameter in ours.items():
            assert parameter.dtype == dtype and torch.equal(parameter.to_local(), theirs[name]), name
        of_both = [base.generation_config.to_dict().items() for base in (model, plain)]
        settings, expected = ({name: value for name, value in items if value} for items in of_both)
        assert settings == expected and (settings.get("repetition_penalty") == 1.5) == (save is with_old_settings)
        assert fingerprint(model, None)["weights"] == fingerprint(plain, None)["weights"]
        batch = next(pack(examples_of([20, 50, 7]), 1000))
        assert torch.allclose(model.label_losses(batch, None), plain.label_losses(batch, None), rtol=1e-5)


# Buffers that are stored; constants and tables of rotation that are not; a head with a bias.
@pytest.mark.parametrize("family", ["apertus", "gemma3_text", "phi", "qwen3"])
def test_a_sharded_base_of_another_family_is_the_plain_one(group, tmp_path, tokenizer, family):
    save_decoder(tmp_path, tokenizer, family)
    batch = next(pack(examples_of([20, 50, 7]), 1000))
    for dtype in (torch.float32, torch.bfloat16):
        plain, model = (load_base(str(tmp_path), dtype, CPU, parts, gradient_checkpointing=True)[0] for parts in (None, 1))
        assert is_sharded(model) and not is_sharded(plain)
        for (name, ours), (same, theirs) in zip(model.named_buffers(), plain.named_buffers(), strict=True):
            assert name == same and ours.dtype == theirs.dtype and torch.equal(ours, theirs), name
        assert fingerprint(model, None) == fingerprint(plain, None)
        prefix = random_prefix(plain)
        (loss, gradient), expected = (
            loss_and_gradient(lambda leaf, base=base: base.label_losses(batch, leaf).sum(), prefix)
            for base in (model, plain)
        )
        assert loss == expected[0] and torch.equal(gradient, expected[1])
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            assert torch.equal(PrefixBloom(model)(ids).logits, plain(ids).logits)


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
    config = AutoConfig.from_pretrained(tmp_path)
    config.quantization_config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    with pytest.raises(UserError, match=r"--shard_base reads weights as they are, and those of .* are quantised"):
        load_sharded(str(tmp_path), config, torch.float32, CPU, parts=1)
    del weights["transformer.h.1.mlp.dense_h_to_4h.weight"]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks 1 of its weights, such as h\.1\.mlp\.dense_h_to_4h\.weight"):
        sharded(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    (tmp_path / "tokenizer.json").write_bytes(Path(bundled.resolve(bundled.MODEL), "tokenizer.json").read_bytes())
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_base(str(tmp_path), torch.float32, CPU, parts=1)


def test_weights_that_transformers_converts_as_it_loads_them_are_one_line(group, tmp_path, tokenizer):
    save_decoder(tmp_path, tokenizer, "mixtral")
    with pytest.raises(UserError, match=r"--shard_base .* transformers converts those of a mixtral model as it loads them"):
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


# Frees 96 MB of weights, in blocks of 1.5 MB, while small tensors between them stay in use. The exit code is the number of
# MB that it still holds.
FREE_WEIGHTS = """
import os, sys, torch
from prefix_tuning.base_model.sharding import return_freed_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

return_freed_memory()
large = torch.ones(2**21)
del large  # after this, glibc takes blocks of up to this size from its heap
before, weights, small = resident(), [], []
for _ in range(64):
    weights.append(torch.ones(3 * 2**17))
    small.append(torch.ones(2**8))
del weights
sys.exit(max(0, resident() - before) // 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other systems have another malloc")
def test_the_memory_of_freed_weights_goes_back_to_the_system():
    process = forks().Process(target=exec, args=(FREE_WEIGHTS, {}))
    process.start()
    process.join()
    # glibc's own choice leaves most of the 96 MB in the process.
    assert process.exitcode < 32
