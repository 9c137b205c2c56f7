import pytest
import torch
from runs import run_quietly

from prefix_tuning.base_model.loading import load_base
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import tokenize
from prefix_tuning.files.prefixes import load_prefix
from prefix_tuning.study import growth as module
from prefix_tuning.study.growth import growth, saved_step, singular_values
from prefix_tuning.study.scoring import pack_rows
from prefix_tuning.study.shares import attention_shares
from prefix_tuning.training.checkpoints import find_checkpoints, load_checkpoint


def test_every_checkpoint_is_a_stage_and_the_last_is_the_prefix(settings, tmp_path, monkeypatch):
    run_quietly(settings | {"save_steps": 2, "save_total_limit": 100, "save_best": False})
    base, tokenizer = load_base(settings["model_name_or_path"], torch.float32, torch.device("cpu"))
    batches = pack_rows(tokenize(load_rows(settings["dataset"], ("train",)), tokenizer, 256), 300)
    prefix = load_prefix(tmp_path / "out").tensor
    found = growth(base, batches, tmp_path / "out", prefix)
    assert [stage["step"] for stage in found["stages"]] == [2, 4, 6, 8, 10, 11] and found["left_out"] == 0
    last = found["stages"][-1]
    assert last["norm"] == pytest.approx([prefix[:, half].norm(dim=-1).mean().item() for half in range(2)], rel=1e-5)
    share = torch.tensor(attention_shares(base, batches, prefix)["share"])
    assert last["share"] == pytest.approx(share.mean(dim=1).tolist())
    assert last["singular_values"] == pytest.approx(singular_values(prefix)) and len(last["singular_values"]) == 10
    weights, _ = load_checkpoint(find_checkpoints(tmp_path / "out")[0])
    assert found["stages"][0]["norm"] != last["norm"] and "encoder.embedding.weight" in weights
    assert [step for step, _ in found["losses"]] == [4, 8, 11] and found["held_out"][0][0] == 0
    monkeypatch.setattr(module, "MOST_CHECKPOINTS", 4)
    found = growth(base, batches, tmp_path / "out", prefix)
    assert [stage["step"] for stage in found["stages"]] == [2, 4, 8, 10, 11] and found["left_out"] == 1


def test_damaged_checkpoints_are_skipped_and_damaged_records_are_no_growth(settings, tmp_path, capsys):
    run_quietly(settings | {"save_steps": 5, "save_total_limit": 100})
    base, tokenizer = load_base(settings["model_name_or_path"], torch.float32, torch.device("cpu"))
    batches = pack_rows(tokenize(load_rows(settings["dataset"], ("train",)), tokenizer, 256), 300)
    prefix, first = load_prefix(tmp_path / "out").tensor, find_checkpoints(tmp_path / "out")[0]
    first.write_bytes(first.read_bytes()[:-10])
    steps = [stage["step"] for stage in growth(base, batches, tmp_path / "out", prefix)["stages"]]
    assert 10 in steps and 5 not in steps and "skipped: " in capsys.readouterr().err
    metrics = tmp_path / "out" / "metrics.jsonl"
    whole = metrics.read_text("utf-8")
    for damaged in (whole[:-20], "", "[1]\n"):
        metrics.write_text(damaged, "utf-8")
        assert growth(base, batches, tmp_path / "out", prefix) is None
    metrics.write_text(whole, "utf-8")
    for path in find_checkpoints(tmp_path / "out"):
        path.unlink()
    assert growth(base, batches, tmp_path / "out", prefix) is None


def test_with_save_best_the_saved_prefix_stands_at_the_step_of_the_lowest_held_out_loss():
    records = [{"step": 0, "frozen_base": True, "eval_loss": 0.1}, {"step": 5, "eval_loss": 1.0}, {"step": 7, "loss": 0.5}]
    records += [{"step": 10, "eval_loss": 2.0}, {"summary": True}]
    assert saved_step(records, {"save_best": True}) == 5 and saved_step(records, {"save_best": False}) == 10


def test_alike_tokens_have_one_singular_value():
    one = torch.randn(2, 2, 3, 1, 4, generator=torch.Generator().manual_seed(0))
    values = singular_values(one * torch.tensor([1.0, 2.0, -2.0]).view(1, 1, 1, 3, 1))
    assert values == pytest.approx([3 * one.norm().item(), 0, 0], abs=1e-5)
