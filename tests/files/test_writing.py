import json
import os
import sys

import pytest
import torch
from checkout import ROOT
from launching import start_process
from safetensors import safe_open
from safetensors.torch import save_file

from prefix_tuning.errors import UserError
from prefix_tuning.files.writing import atomic_write, locked, remove_drafts, write_json, write_tensors


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

    def recorded_fsync(handle):
        calls.append(("fsync", os.fstat(handle).st_ino))
        fsync(handle)

    def recorded_replace(source, target):
        calls.append(("replace", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "replace", recorded_replace)
    with atomic_write(tmp_path / "file") as draft:
        save_file({"a": torch.ones(3)}, draft)
    file, folder = (tmp_path / "file").stat().st_ino, tmp_path.stat().st_ino
    assert calls == [("fsync", file), ("replace", file), ("fsync", folder)]


def test_others_may_read_what_they_may_read_of_any_file(saved):
    folder, _ = saved
    (folder / "plain").write_text("as the user's umask has it")
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_a_lock_ends_with_its_block(tmp_path):
    for _ in range(2):
        with locked(tmp_path):
            pass


def test_a_lock_removes_the_folders_that_it_made_if_they_stay_empty(tmp_path):
    (tmp_path / "there").mkdir()
    with locked(tmp_path / "there" / "a" / "b" / "c"):
        assert (tmp_path / "there" / "a" / "b" / "c").is_dir()
    assert list(tmp_path.iterdir()) == [tmp_path / "there"] and not list((tmp_path / "there").iterdir())
    with locked(tmp_path / "a" / "b"):
        (tmp_path / "a" / "file").write_text("")
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "file"]


SAVE = """
import sys
from pathlib import Path
import torch
from prefix_tuning.training.checkpoints import save_checkpoint
from prefix_tuning.files.prefixes import save_adapter, save_encoder
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder
torch.manual_seed(0)
encoder, folder = PrefixEncoder(PrefixConfig(3, 2, 2, 8, 8, True)), Path(sys.argv[1])
try:
    encoder.initialize("text")
except ValueError:
    pass  # an assert would let it through where PYTHONOPTIMIZE is set, and the encoder start at zero
save_encoder(folder, encoder, {"name_or_path": "乐山", "n_layer": 2})
save_adapter(folder, encoder.bake(), encoder.config, {"name_or_path": "乐山", "n_layer": 2})
save_checkpoint(folder, 1, encoder.state_dict(), {"progress": {"step": 1}}, keep=None)
"""


def test_the_same_content_is_the_same_bytes_in_another_process(tmp_path):
    """safetensors alone would write the metadata in an order that differs from process to process."""
    folders, processes = [tmp_path / name for name in "ab"], []
    for seed, folder in enumerate(folders):
        folder.mkdir()
        environment = os.environ | {"PYTHONHASHSEED": str(seed), "PYTHONOPTIMIZE": str(seed)}
        processes.append(start_process([sys.executable, "-c", SAVE, folder], cwd=ROOT, env=environment))
    assert [process.wait() for process in processes] == [0, 0]
    first, other = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert len(first) == 4 and other == first


def test_metadata_are_sorted_and_any_text(tmp_path):
    metadata = {name: f'"{name}\\\n\t\x00\x1f\x7f\u2028 乐山 😀' for name in ("z", "b", 'a"\\ 乐')}
    tensors = {"small": torch.arange(3, dtype=torch.uint8), "one": torch.tensor(2.5), "turned": torch.randn(3, 4).T}
    write_tensors(tmp_path / "file", tensors, metadata)
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == metadata | {"format": "pt"}
        assert sorted(file.keys()) == sorted(tensors)
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
    content = (tmp_path / "file").read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    assert list(header["__metadata__"]) == ['a"\\ 乐', "b", "format", "z"]
