import os

import pytest
import torch
from safetensors.torch import save_file

from prefix_tuning.errors import UserError
from prefix_tuning.files.writing import atomic_write, remove_drafts, write_json


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


def test_others_may_read_what_they_may_read_of_any_file(saved):
    folder, _ = saved
    (folder / "plain").write_text("as the user's umask has it")
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1
