import pytest
import torch

from prefix_tuning.errors import UserError
from prefix_tuning.training.checkpoints import (
    checkpoint_path,
    find_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)


def test_checkpoints_come_back_and_only_the_newest_stay(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(2.5), "c": torch.arange(5, dtype=torch.uint8)}
    for step in (2, 10, 9, 100):
        save_checkpoint(tmp_path, step, tensors | {"a": tensors["a"] + step}, {"step": step}, keep=2)
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
    save_checkpoint(tmp_path, 1, tensors, [], keep=None)
    with pytest.raises(UserError, match="no checkpoint of this program"):
        load_checkpoint(checkpoint_path(tmp_path, 1))


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
