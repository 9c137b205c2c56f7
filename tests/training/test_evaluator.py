import pytest
from helpers import LATEST, assert_same_run, checkpoint_names, interrupt, metrics_without_timings

from prefix_tuning.errors import UserError
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.training import evaluator
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig


def test_a_run_that_went_on_shows_no_answers_of_the_base_that_it_did_not_ask(settings, capsys):
    settings |= {"eval_exact_match": True}
    train(TrainConfig(**settings))
    assert capsys.readouterr().out.count("\n  frozen base") == 5
    train(TrainConfig(**settings | {"resume_from_checkpoint": "latest", "num_train_epochs": 2}))
    out = capsys.readouterr().out
    assert out.count("\n  with prefix") == 5 and "\n  frozen base" not in out


# Evaluations: the frozen base, steps 3, 6 and 9, and the last step, 11.
@pytest.mark.parametrize("evaluations, step", [(1, 0), (2, 3), (3, 6), (5, 11)], ids=["frozen base", "3", "6", "last step"])
def test_a_signal_during_an_evaluation_saves_at_once(small_pass_settings, tmp_path, capfd, evaluations, step):
    small_pass_settings |= {"save_steps": 0}
    train(TrainConfig(**small_pass_settings))
    stopped = small_pass_settings | {"output_dir": str(tmp_path / "stopped")}
    interrupt(stopped, evaluations)
    assert "SIGINT: the run stops once it is saved (once more: it stops at once)" in capfd.readouterr().err
    assert checkpoint_names(tmp_path / "stopped") == ([f"checkpoint-{step}"] if step else [])
    assert step not in [line["step"] for line in metrics_without_timings(tmp_path / "stopped") if "eval_loss" in line]
    train(TrainConfig(**stopped | LATEST))
    assert_same_run(stopped["output_dir"], small_pass_settings["output_dir"])


def test_a_signal_during_the_answers_of_an_evaluation_saves_at_once(small_pass_settings, tmp_path):
    small_pass_settings |= {"save_steps": 0, "eval_exact_match": True}
    train(TrainConfig(**small_pass_settings))
    stopped = small_pass_settings | {"output_dir": str(tmp_path / "stopped")}
    interrupt(stopped, 2, call=1, watched=(PrefixBloom, "generate"))
    assert checkpoint_names(tmp_path / "stopped") == ["checkpoint-3"]
    train(TrainConfig(**stopped | LATEST))
    assert_same_run(stopped["output_dir"], small_pass_settings["output_dir"])


def test_memory_that_runs_out_during_an_evaluation_loses_nothing(small_pass_settings, tmp_path, monkeypatch):
    small_pass_settings |= {"save_steps": 0}
    train(TrainConfig(**small_pass_settings))
    stopped, real, evaluations = small_pass_settings | {"output_dir": str(tmp_path / "stopped")}, evaluator.evaluate_loss, []

    def run_out(*arguments):
        evaluations.append(None)
        if len(evaluations) == 5:  # of the last step
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(evaluator, "evaluate_loss", run_out)
    with pytest.raises(UserError, match=r"ran out of memory; .*checkpoint-11\.safetensors is intact, resume with"):
        train(TrainConfig(**stopped))
    train(TrainConfig(**stopped | LATEST))
    assert_same_run(stopped["output_dir"], small_pass_settings["output_dir"])
