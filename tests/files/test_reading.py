import json
from pathlib import Path

import pytest
import torch
from helpers import RECORDED_BASE
from safetensors.torch import load_file, save_file

from prefix_tuning.errors import UserError
from prefix_tuning.files.names import ADAPTER_CONFIG_FILE, ADAPTER_FILE, ENCODER_FILE
from prefix_tuning.files.prefixes import load_encoder, load_prefix, recorded_history


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


def test_what_a_file_records_of_its_base_is_checked(saved):
    folder, _ = saved
    description = json.loads((folder / ADAPTER_CONFIG_FILE).read_text("utf-8"))
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(description | {"base_model_name_or_path": "other"}), "utf-8")
    assert load_prefix(folder).recorded_base == RECORDED_BASE | {"name_or_path": "other"}
    flat = load_file(folder / ADAPTER_FILE)
    for recorded in ("{", "[]"):
        save_file(flat, folder / ADAPTER_FILE, {"base_model": recorded})
        with pytest.raises(UserError, match="holds no valid base_model"):
            load_prefix(folder)
    save_file(flat, folder / ADAPTER_FILE, {"history": '"yes"'})
    with pytest.raises(UserError, match="holds no valid history: 'yes'"):
        recorded_history(folder)
    save_file(flat, folder / ADAPTER_FILE)  # as PEFT writes it
    assert load_prefix(folder).recorded_base == {"name_or_path": "other"}
    assert recorded_history(folder) is None


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
