import json
from pathlib import Path

import pytest
import torch
from models import prefix_config, random_bloom, training_state
from runs import metrics_without_timings
from safetensors.torch import load_file

from prefix_tuning import bundled, distributed
from prefix_tuning.files.names import CARD_FILE, ENCODER_FILE
from prefix_tuning.model.encoder import PrefixEncoder
from prefix_tuning.training.checkpoints import Checkpoints, find_checkpoints
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig


def test_the_best_prefix_is_kept_and_a_run_that_gets_no_better_stops(settings, tmp_path):
    # The first training rows have the held-out answer, the later ones another: the held-out loss falls, and then rises.
    rows = [{"instruction": "？", "output": answer} for answer in ["是"] * 24 + ["否"] * 72]
    for name, part in (("train", rows), ("eval", rows[:6])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    settings |= {"dataset": str(tmp_path / "train.jsonl"), "eval_dataset": str(tmp_path / "eval.jsonl"), "shuffle": False}
    settings |= {"model_name_or_path": bundled.MODEL, "num_train_epochs": 1, "eval_steps": 2, "early_stopping_patience": 3}
    summary = train(TrainConfig(**settings))
    losses = {
        line["step"]: line["eval_loss"] for line in metrics_without_timings(settings["output_dir"]) if "eval_loss" in line
    }
    del losses[0]  # the frozen base
    best = min(losses, key=losses.get)
    assert summary["steps"] == max(losses) == best + 2 * 3 < 16
    path = next(p for p in find_checkpoints(Path(settings["output_dir"])) if p.stem.endswith(f"-{summary['steps']}"))
    saved, kept = load_file(Path(settings["output_dir"]) / ENCODER_FILE), load_file(path)
    assert all(torch.equal(saved[name], kept[f"best.{name}"]) for name in saved)
    assert not torch.equal(saved["embedding.weight"], kept["encoder.embedding.weight"])


def test_a_tie_is_no_improvement(small_pass_settings):
    """With rate 0 all evaluations are alike: the first one stays the best, and the run stops early."""
    patient = {"learning_rate": 0.0, "early_stopping_patience": 2, "eval_steps": 2, "logging_steps": 3}
    assert train(TrainConfig(**small_pass_settings | patient))["steps"] == 6
    lines = metrics_without_timings(small_pass_settings["output_dir"])
    assert len({line["eval_loss"] for line in lines if "eval_loss" in line and "frozen_base" not in line}) == 1
    assert [line["step"] for line in lines if "loss" in line] == [3, 6]
    card = (Path(small_pass_settings["output_dir"]) / CARD_FILE).read_text("utf-8")
    assert "this prefix, step 2 |" in card


def test_a_rank_names_a_checkpoint_that_was_written(tmp_path, monkeypatch):
    """Only rank 0 writes checkpoints. Another rank that fails alone names the newest one that all have saved."""
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    state, checkpoints = training_state(PrefixEncoder(prefix_config(random_bloom()))), Checkpoints(tmp_path, {}, None)
    for step in (3, 5):
        state.progress.step = step
        with pytest.raises(MemoryError), checkpoints.checkpoint_on_error(state, None):
            raise MemoryError
        assert checkpoints.newest == (None if step == 3 else tmp_path / "checkpoint-4.safetensors")
        state.progress.step += 1
        checkpoints.save(state, None)
        assert f"checkpoint-{step + 1}.safetensors is intact" in checkpoints.how_to_resume()
