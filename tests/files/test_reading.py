import json
import re
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from models import random_bloom
from runs import RECORDED_BASE
from safetensors.torch import load_file, save_file

from prefix_tuning import PrefixBloom
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import ADAPTER_CONFIG_FILE, ADAPTER_FILE, ENCODER_FILE
from prefix_tuning.files.prefixes import load_encoder, load_prefix, recorded_history
from prefix_tuning.files.reading import opened


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


def test_a_file_that_is_gone_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"gone\.safetensors: no such file$"), opened(tmp_path / "gone.safetensors"):
        pass


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


class Busy(BaseHTTPRequestHandler):
    """A hub that is out of order, and counts the requests."""

    def log_message(self, *_):
        self.server.asked.append(self.path)

    def do_HEAD(self):
        self.send_response(503)
        self.send_header("Content-Length", "0")
        self.end_headers()


def test_the_hub_is_asked_once_for_a_folder_that_does_not_exist(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with HTTPServer(("127.0.0.1", 0), Busy) as server:
        url, server.asked = f"http://127.0.0.1:{server.server_port}", []
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
        monkeypatch.setattr(
            "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        threading.Thread(target=server.serve_forever).start()
        with pytest.raises(UserError, match=r"^runs/chatbot: no such folder, nor a repository of the hub"):
            load_prefix("runs/chatbot")
        server.shutdown()
    assert len(server.asked) == 1 and "runs/chatbot" in server.asked[0]


def test_a_field_of_pefts_that_is_not_understood_is_named(saved):
    folder, encoder = saved
    file = folder / ADAPTER_CONFIG_FILE
    description = json.loads(file.read_text("utf-8"))
    for more in ({"modules_to_save": None, "later": [], "peft_version": "0.99"}, {"prefix_projection": True}):
        file.write_text(json.dumps(description | more), "utf-8")
        assert torch.equal(load_prefix(folder).tensor, encoder.bake())
    for more, named in (
        ({"modules_to_save": ["lm_head"], "scale": 2.0}, "sets modules_to_save, scale, which this program does not know"),
        ({"num_transformer_submodules": 2}, "is for 2 submodules"),
    ):
        file.write_text(json.dumps(description | more), "utf-8")
        with pytest.raises(UserError, match=f"^{file}: {named}"):
            load_prefix(folder)


def test_of_other_tensors_one_is_named(saved):
    folder, _ = saved
    flat = load_file(folder / ADAPTER_FILE)["prompt_embeddings"]
    for tensors, named in (
        ({"prompt_embeddings": flat, "a": flat.clone()}, "a is (5, 288) where no tensor of that name is expected"),
        ({"a": flat, "b": flat.clone()}, "a is (5, 288) where no tensor of that name is expected, and 2 more differ"),
        ({"a": flat}, "a is (5, 288) where no tensor of that name is expected, and 1 more differ"),
        ({"prompt_embeddings": flat[1:]}, "prompt_embeddings is (4, 288) where (5, 288) is expected"),
    ):
        save_file(tensors, folder / ADAPTER_FILE)
        with pytest.raises(UserError, match=re.escape(f"{ADAPTER_FILE}: {named}") + "$"):
            load_prefix(folder)


def test_the_revision_of_a_base_is_named_with_it(saved, capsys):
    folder, _ = saved
    save_file(load_file(folder / ADAPTER_FILE), folder / ADAPTER_FILE)  # without a fingerprint, as PEFT writes it
    description = json.loads((folder / ADAPTER_CONFIG_FILE).read_text("utf-8")) | {"revision": "v2"}
    (folder / ADAPTER_CONFIG_FILE).write_text(json.dumps(description), "utf-8")
    PrefixBloom(random_bloom()).attach("a", load_prefix(folder))
    assert f"it names {RECORDED_BASE['name_or_path']}, revision v2" in capsys.readouterr().err
