import copy
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import prefix_config, random_bloom
from safetensors.torch import load_file, save_file

from prefix_tuning import bundled
from prefix_tuning.base_model.identity import base_of, check_base, fingerprint, portable_name
from prefix_tuning.errors import UserError
from prefix_tuning.files.checkpoint_format import find_checkpoints, load_checkpoint, newest_checkpoint, save_checkpoint
from prefix_tuning.files.names import ADAPTER_CONFIG_FILE, ADAPTER_FILE, ENCODER_FILE
from prefix_tuning.files.prefixes import load_encoder, load_prefix, save_adapter, save_encoder
from prefix_tuning.files.writing import atomic_write, remove_drafts, write_json
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder

BASE = {"name_or_path": bundled.MODEL, "weights": "abc"}


@pytest.fixture(params=["projection", "no projection", "projection and text"])
def saved(request, tmp_path):
    model = random_bloom()
    encoder = PrefixEncoder(prefix_config(model, projection=request.param != "no projection", width=20))
    if "text" in request.param:
        encoder.initialize("text", torch.randn(3, 2, 6, 5, 8))
    save_encoder(tmp_path, encoder, BASE)
    save_adapter(tmp_path, encoder.bake(), encoder.config, BASE)
    return tmp_path, encoder


def test_what_is_saved_is_read_back(saved):
    folder, encoder = saved
    again, base = load_encoder(str(folder))
    assert base == BASE
    assert again.config == encoder.config
    assert again.state_dict().keys() == encoder.state_dict().keys()
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in encoder.state_dict().items())
    assert all(parameter.requires_grad for parameter in again.parameters())
    prefix, base = load_prefix(str(folder))
    assert base == BASE
    assert torch.equal(prefix, encoder.bake())


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_write(path) as draft:
        draft.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as draft:
        draft.write_text("new")
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_draft_that_a_killed_run_left_is_no_hindrance_and_goes(tmp_path):
    for name in ("file", "other"):
        (tmp_path / f".{name}.draft").mkdir()
        (tmp_path / f".{name}.draft" / name).write_text("half")
    handles = os.listdir("/proc/self/fd")
    with atomic_write(tmp_path / "file") as draft:
        draft.write_text("new")
    assert os.listdir("/proc/self/fd") == handles
    remove_drafts(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "file"]


def test_a_file_that_cannot_be_written_is_one_line(tmp_path):
    with (
        pytest.raises(UserError, match="nowhere/file: cannot be written"),
        atomic_write(tmp_path / "nowhere" / "file") as draft,
    ):
        draft.write_text("new")


def test_json_is_for_people_too(tmp_path):
    write_json(tmp_path / "a.json", {"base": "乐山"})
    assert (tmp_path / "a.json").read_text("utf-8") == '{\n  "base": "乐山"\n}\n'


def test_a_file_is_on_the_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    """Else a power cut could leave an empty file under the name of a good one."""
    calls, fsync, replace = [], os.fsync, os.replace

    def noted_fsync(handle):
        calls.append(("fsync", os.fstat(handle).st_ino))
        fsync(handle)

    def noted_replace(source, target):
        calls.append(("replace", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", noted_replace)
    with atomic_write(tmp_path / "file") as draft:
        save_file({"a": torch.ones(3)}, draft)
    file, folder = (tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino
    assert calls == [("fsync", file), ("replace", file), ("fsync", folder)]


def test_names_in_files_hold_on_any_machine(tmp_path, monkeypatch):
    assert portable_name("Langboat/bloom-1b4-zh") == "Langboat/bloom-1b4-zh"
    assert portable_name(bundled.MODEL) == bundled.MODEL
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
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_prefix("nowhere")
    with pytest.raises(UserError, match="nowhere: no such folder"):
        load_encoder("nowhere")
    for load in (load_prefix, load_encoder):  # a Path is never a name of the hub's
        with pytest.raises(UserError, match="missing/x: no such folder; train"):
            load(Path("missing/x"))
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


def test_a_prefix_without_its_encoder_is_trained_directly(saved, capsys):
    folder, encoder = saved
    (folder / ENCODER_FILE).unlink()
    again, base = load_encoder(folder)
    assert again.config == PrefixConfig(5, 3, 6, 48, 48, prefix_projection=False) and base == BASE
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


def test_what_a_file_notes_of_its_base_is_checked(saved):
    folder, _ = saved
    description = json.loads((folder / ADAPTER_CONFIG_FILE).read_text("utf-8"))
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(description | {"base_model_name_or_path": "other"}), "utf-8")
    assert load_prefix(folder).base == BASE | {"name_or_path": "other"}
    flat = load_file(folder / ADAPTER_FILE)
    for noted in ("{", "[]"):
        save_file(flat, folder / ADAPTER_FILE, {"base_model": noted})
        with pytest.raises(UserError, match="holds no valid base_model"):
            load_prefix(folder)
    save_file(flat, folder / ADAPTER_FILE)  # PEFT's notes nothing
    assert load_prefix(folder).base == {"name_or_path": "other"}


def test_a_prefix_of_the_hub_is_found_in_its_cache(saved, tmp_path_factory, monkeypatch):
    folder, encoder = saved
    cache = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(cache))
    for name in ("me/prefix", "me/pre/fix", "prefix"):
        with pytest.raises(UserError, match=f"^{name}: no such folder" + ", nor a repository" * (name == "me/prefix")):
            load_prefix(name)
    repository, commit = cache / "models--me--prefix", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots").mkdir()
    folder = folder.rename(repository / "snapshots" / commit)
    assert torch.equal(load_prefix("me/prefix").tensor, encoder.bake())
    assert load_encoder("me/prefix")[0].config == encoder.config
    (folder / ENCODER_FILE).unlink()
    assert not load_encoder("me/prefix")[0].config.prefix_projection


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


def test_a_prefix_is_used_on_its_own_base_only(tokenizer, capsys):
    model = random_bloom()
    base = fingerprint(model, tokenizer) | {"name_or_path": "base"}
    shape = (3, 2, 6, 5, 8)
    check_base(shape, base, base, "./chatbot", force=False)
    assert not capsys.readouterr().err
    for other in ((2, 2, 6, 5, 8), (3, 2, 3, 5, 16), (3, 2, 6, 5, 16)):
        with pytest.raises(UserError, match=r"\./chatbot: a prefix for .* but base has 3 layers of 6 x 8"):
            check_base(other, base, base, "./chatbot", force=True)
    # Of another name only: said, but used.
    check_base(shape, base | {"name_or_path": "old"}, base, "./chatbot", force=False)
    assert "was trained on old; base has the same shape, but not the same name" in capsys.readouterr().err
    # Made elsewhere.
    check_base(shape, {"name_or_path": "old"}, base, "./chatbot", force=False)
    assert "it names old" in capsys.readouterr().err
    # By a version that knew no special tokens.
    check_base(shape, {key: value for key, value in base.items() if key != "special_tokens"}, base, "./chatbot", force=False)
    assert not capsys.readouterr().err
    for changed in ("weights", "tokenizer", "special_tokens"):
        said = f"not the same {changed.replace('_', ' ')}"
        with pytest.raises(UserError, match=f"{said}; use the right base, or add --force"):
            check_base(shape, base | {changed: "other"}, base, "./chatbot", force=False)
        check_base(shape, base | {changed: "other"}, base, "./chatbot", force=True)
        assert said in capsys.readouterr().err


def test_a_fingerprint_knows_weights_and_tokenizer_but_not_the_compute_type(tokenizer):
    model = random_bloom()
    base = fingerprint(model, tokenizer)
    assert fingerprint(random_bloom(dtype=torch.bfloat16), tokenizer) == base
    assert fingerprint(random_bloom(dtype=torch.float16), tokenizer) == base | {"weights": None}
    assert fingerprint(random_bloom(seed=1), tokenizer)["weights"] != base["weights"]
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["乐山大佛"])
    assert fingerprint(model, other) == base | {"tokenizer": fingerprint(model, other)["tokenizer"]} != base
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<pad>"
    assert fingerprint(model, other) == base | {"special_tokens": base["special_tokens"] | {"eos": 3}} != base


def test_a_fingerprint_knows_every_column():
    model = random_bloom(hidden_size=64, n_head=8, n_layer=1)
    attention, mlp = model.transformer.h[0].self_attention, model.transformer.h[0].mlp
    base = fingerprint(model, None)["weights"]
    for layer in (attention.query_key_value, attention.dense, mlp.dense_h_to_4h, model.transformer.word_embeddings):
        for column in layer.weight.T:
            kept = column.clone()
            column += 1
            assert fingerprint(model, None)["weights"] != base
            column.copy_(kept)
    assert fingerprint(model, None)["weights"] == base


def test_a_fingerprint_stays_what_it_was():
    """Prefixes note it: if it changed, they would all be refused."""
    model = random_bloom(hidden_size=64, n_head=8, n_layer=1)
    for parameter in model.parameters():
        parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / 1000)
    assert fingerprint(model, None)["weights"][:16] == "1c8a20ff45e5b1ab"


def test_checkpoints_come_back_and_only_the_newest_stay(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(2.5), "c": torch.arange(5, dtype=torch.uint8)}
    for step in (2, 10, 9, 100):
        written = save_checkpoint(tmp_path, step, tensors | {"a": tensors["a"] + step}, {"step": step}, keep=2)
        assert written == tmp_path / f"checkpoint-{step}.safetensors"
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-10.safetensors", "checkpoint-100.safetensors"]
    path, found, state = newest_checkpoint("latest", tmp_path)
    assert path.name == "checkpoint-100.safetensors" and state == {"step": 100}
    assert torch.equal(found["a"], tensors["a"] + 100) and torch.equal(found["b"], tensors["b"])
    path, _, _ = newest_checkpoint(str(tmp_path / "checkpoint-10.safetensors"), tmp_path / "elsewhere")
    assert path.name == "checkpoint-10.safetensors"
    for step in (200, 300):
        save_checkpoint(tmp_path, step, tensors, {}, keep=None)
    assert len(find_checkpoints(tmp_path)) == 4
    with pytest.raises(UserError, match="nowhere"):
        newest_checkpoint(str(tmp_path / "nowhere"), tmp_path)
    with pytest.raises(UserError, match="gone: no such file"):
        load_checkpoint(tmp_path / "gone")
    with pytest.raises(UserError, match="no checkpoint of this program"):
        load_checkpoint(save_checkpoint(tmp_path, 1, tensors, [], keep=None))


def test_every_damage_to_a_checkpoint_is_noticed(tmp_path, capsys):
    """Truncated anywhere, empty, or with any bit flipped: named, and the one before it is taken."""
    state, content = {"progress": {"step": 1}}, {"a": torch.randn(3), "b": torch.tensor(2.5)}
    for step in (1, 2):
        save_checkpoint(tmp_path, step, content, state, keep=None)
    path = tmp_path / "checkpoint-2.safetensors"
    whole = path.read_bytes()
    damaged = [whole[:size] for size in range(0, len(whole), 7)]
    damaged += [whole[:i] + bytes([whole[i] ^ (1 << i % 8)]) + whole[i + 1 :] for i in range(len(whole))]
    for each in damaged:
        path.write_bytes(each)
        found, tensors, kept = newest_checkpoint("latest", tmp_path)
        if found == path:  # a flipped bit in what nobody reads, such as the space that pads the header
            assert kept == state and tensors.keys() == content.keys()
            assert all(torch.equal(tensors[name], tensor) for name, tensor in content.items())
        else:
            assert found.name == "checkpoint-1.safetensors"
            assert str(path) in capsys.readouterr().err
    path.with_name("checkpoint-1.safetensors").write_bytes(b"")
    path.write_bytes(b"")
    assert newest_checkpoint("latest", tmp_path) is None
    assert "starting from the beginning" in capsys.readouterr().out


def test_others_may_read_what_they_may_read_of_any_file(saved):
    folder, _ = saved
    (folder / "plain").write_text("as the user's umask has it")
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
