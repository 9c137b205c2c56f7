"""A resumed run is the run that it resumes, or it is refused; a folder has one run at a time and one line of checkpoints."""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_faults import assert_same_run, metrics_of

from prefix_tuning import distributed, evaluation, signals
from prefix_tuning.errors import Interrupted, UserError
from prefix_tuning.files import writing
from prefix_tuning.files.checkpoint_format import find_checkpoints
from prefix_tuning.files.names import ADAPTER_FILE, CARD_FILE, ENCODER_FILE, PLOT_FILE
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.training import evaluator, resume, run
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig

LATEST = {"resume_from_checkpoint": "latest"}


@pytest.fixture
def settings(settings):
    """Evaluations and steps of several passes."""
    return settings | {"max_tokens_per_batch": 100}


def names(folder) -> list[str]:
    return [path.stem for path in find_checkpoints(Path(folder))]


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_every_setting_says_what_a_resume_does_with_it():
    decided = [*resume.SAME, *resume.CONTENT, *resume.NEW]
    assert sorted(decided) == sorted(field.name for field in dataclasses.fields(TrainConfig))


OTHER = {
    "precision": "bf16", "max_length": 255, "eval_fraction": 0.3, "eval_exact_match": True, "save_best": False,
    "num_virtual_tokens": 4, "prefix_projection": False, "encoder_hidden_size": 7, "prefix_init": "zero",
    "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "learning_rate": 1e-3, "lr_scheduler_type": "cosine",
    "warmup_steps": 1, "weight_decay": 0.5, "max_grad_norm": 0.5, "shuffle": False, "seed": 7,
}  # fmt: skip


def test_other_settings_are_refused_by_name_and_nothing_changes(settings, tmp_path):
    settings |= {"eval_dataset": None, "eval_fraction": 0.25}
    train(TrainConfig(**settings | {"max_steps": 2}))
    before, rows = contents(settings["output_dir"]), tmp_path / "eval.jsonl"
    shutil.copy(settings["dataset"], rows)
    changes = [({name: value}, f"--{name} ") for name, value in OTHER.items()]
    text = {"prefix_init": "text", "init_text": "请回答。"}
    changes += [(text, "--init_text None, not 请回答"), ({"prefix_from": settings["output_dir"]}, "--prefix_from None")]
    changes += [({"eval_dataset": str(rows), "eval_fraction": 0.0}, "another --eval_dataset")]
    assert {name for change, _ in changes for name in change} - {"eval_dataset"} == set(resume.SAME)
    for change, said in changes:
        with pytest.raises(UserError, match=f"was made with .*{said}.*; resume with the same"):
            train(TrainConfig(**settings | LATEST | change))
        assert contents(settings["output_dir"]) == before, change


def test_a_changed_row_is_noticed_wherever_it_is(settings, tmp_path):
    """Of 3,000 rows, the second one; of the held-out rows, the last one."""
    lines = Path(settings["dataset"]).read_text("utf-8").splitlines(True) * 75
    held_out = lines[:40]
    files = {"dataset": (tmp_path / "many.jsonl", lines, 1), "eval_dataset": (tmp_path / "eval.jsonl", held_out, 39)}
    for path, rows, _ in files.values():
        path.write_text("".join(rows), "utf-8")
    settings |= {name: str(path) for name, (path, _, _) in files.items()}
    train(TrainConfig(**settings | {"max_steps": 1}))
    for name, (path, rows, place) in files.items():
        row = json.loads(rows[place])
        changed = [*rows[:place], json.dumps(row | {"output": row["output"] + "！"}) + "\n", *rows[place + 1 :]]
        path.write_text("".join(changed), "utf-8")
        with pytest.raises(UserError, match=f"another --{name}"):
            train(TrainConfig(**settings | {"max_steps": 2} | LATEST))
        path.write_text("".join(rows), "utf-8")
    # Also one that gives no labels: its answer is compared.
    long = json.dumps({"instruction": "长" * 300, "output": "短"}, ensure_ascii=False) + "\n"
    path, *_ = files["eval_dataset"]
    path.write_text("".join([*held_out, long]), "utf-8")
    train(TrainConfig(**settings | {"max_steps": 1, "overwrite_output_dir": True}))
    path.write_text("".join([*held_out, long.replace("短", "长")]), "utf-8")
    with pytest.raises(UserError, match="another --eval_dataset"):
        train(TrainConfig(**settings | {"max_steps": 2} | LATEST))
    path.write_text("".join([*held_out, long]), "utf-8")
    # Where the file lies does not matter.
    moved = Path(settings["dataset"]).rename(tmp_path / "moved.jsonl")
    train(TrainConfig(**settings | {"max_steps": 2, "dataset": str(moved)} | LATEST))


@pytest.mark.parametrize("max_steps", [3, 0])
def test_a_run_that_is_over_already_saves_its_prefix_and_says_so(settings, max_steps, capsys):
    train(TrainConfig(**settings | {"max_steps": 6, "save_steps": 2}))
    kept = names(settings["output_dir"])
    for name in (ADAPTER_FILE, ENCODER_FILE):
        (Path(settings["output_dir"]) / name).unlink()
    assert train(TrainConfig(**settings | {"max_steps": max_steps, "save_steps": 2} | LATEST))["steps"] == 6
    assert "the run is over already: it stands at step 6" in capsys.readouterr().out
    assert names(settings["output_dir"]) == kept and (Path(settings["output_dir"]) / ENCODER_FILE).exists()


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_new_ones_stay(settings, tmp_path, capsys):
    settings |= {"lr_scheduler_type": "constant_with_warmup"}
    train(TrainConfig(**settings))
    broken = settings | {"output_dir": str(tmp_path / "broken"), "save_total_limit": 2}
    train(TrainConfig(**broken | {"num_train_epochs": 1}))
    *_, older, newest = find_checkpoints(tmp_path / "broken")
    newest.write_bytes(newest.read_bytes()[:-50])
    interrupt(broken | LATEST | {"save_total_limit": 1}, 1)
    err = capsys.readouterr().err
    assert f"{newest} is later than {older.name}: renamed to {newest.stem}.set-aside" in err
    assert newest.with_suffix(".set-aside").exists()
    (kept,) = find_checkpoints(tmp_path / "broken")
    train(TrainConfig(**broken | LATEST))
    assert f"from {kept}" in capsys.readouterr().out
    assert_same_run(broken["output_dir"], settings["output_dir"])


def test_resuming_from_an_earlier_checkpoint_makes_it_the_latest(settings, tmp_path):
    settings |= {"save_total_limit": None}
    train(TrainConfig(**settings))
    again = tmp_path / "again"
    shutil.copytree(settings["output_dir"], again)
    earlier = {"output_dir": str(again), "resume_from_checkpoint": str(again / "checkpoint-4.safetensors")}
    interrupt(settings | earlier, 1)
    assert names(again) == [f"checkpoint-{step}" for step in range(1, 7)]
    assert len(list(again.glob("*.set-aside"))) == 7
    with pytest.raises(UserError, match=r"checkpoint-8\.set-aside: rename it to checkpoint-STEP\.safetensors"):
        train(TrainConfig(**settings | earlier | {"resume_from_checkpoint": str(again / "checkpoint-8.set-aside")}))
    train(TrainConfig(**settings | earlier | LATEST))
    assert_same_run(again, settings["output_dir"])
    train(TrainConfig(**settings | earlier | {"resume_from_checkpoint": None, "overwrite_output_dir": True, "max_steps": 1}))
    assert names(again) == ["checkpoint-1"] and not list(again.glob("*.set-aside"))


def test_a_text_start_is_resumed_with_all_its_tensors(settings, tmp_path, capsys):
    text = {"prefix_init": "text", "init_text": "请回答下面的问题。"}
    train(TrainConfig(**settings | text | {"output_dir": str(tmp_path / "start"), "max_steps": 1}))
    settings |= {"prefix_from": str(tmp_path / "start")}
    train(TrainConfig(**settings))
    again = settings | {"output_dir": str(tmp_path / "again")}
    train(TrainConfig(**again | {"max_steps": 5}))
    with pytest.raises(UserError, match="--prefix_from start, not None"):
        train(TrainConfig(**again | LATEST | {"prefix_from": None}))
    # What it started from is in the checkpoint: that folder may be gone.
    shutil.rmtree(tmp_path / "start")
    path = find_checkpoints(tmp_path / "again")[-1]
    assert "encoder.text_prefix" in load_file(path)
    train(TrainConfig(**again | {"resume_from_checkpoint": str(path), "num_train_epochs": 1.5}))
    # The rate fell to zero in 5 steps, not in 11, so only what was taken over can be compared.
    ours, theirs = (load_file(Path(run["output_dir"]) / ENCODER_FILE) for run in (again, settings))
    assert torch.equal(ours["text_prefix"], theirs["text_prefix"])


def test_another_runs_checkpoint_replaces_nothing(settings, tmp_path):
    train(TrainConfig(**settings))
    other = settings | {"output_dir": str(tmp_path / "other"), "resume_from_checkpoint": settings["output_dir"]}
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / CARD_FILE).write_text("# Mine", "utf-8")
    with pytest.raises(UserError, match=r"holds a README\.md"):
        train(TrainConfig(**other))
    shutil.copy(find_checkpoints(Path(settings["output_dir"]))[-1], tmp_path / "other" / "checkpoint-99.safetensors")
    with pytest.raises(UserError, match="holds checkpoints of a run that did not finish"):
        train(TrainConfig(**other))
    shutil.rmtree(tmp_path / "other")
    shutil.copytree(settings["output_dir"], tmp_path / "other")
    before = contents(tmp_path / "other")
    with pytest.raises(UserError, match="holds a prefix already; add --overwrite_output_dir"):
        train(TrainConfig(**other))
    assert contents(tmp_path / "other") == before
    train(TrainConfig(**other | {"overwrite_output_dir": True}))
    assert_same_run(tmp_path / "other", settings["output_dir"])


def test_a_folder_has_one_run_at_a_time(settings, monkeypatch, capsys):
    folder = Path(settings["output_dir"])
    with writing.locked(folder):
        before = contents(folder)
        with pytest.raises(UserError, match="another run is writing to it; wait until it ends, or name another folder"):
            train(TrainConfig(**settings))
        assert contents(folder) == before == {}
    assert not folder.exists()  # nothing was written to it
    train(TrainConfig(**settings | {"max_steps": 1}))

    class NoLocks:
        """What fcntl does on some network folders."""

        LOCK_EX, LOCK_NB = fcntl.LOCK_EX, fcntl.LOCK_NB

        @staticmethod
        def flock(*arguments):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(writing, "fcntl", NoLocks)
    train(TrainConfig(**settings | {"max_steps": 2} | LATEST))
    assert "cannot be locked (No locks available): start no second run into it" in capsys.readouterr().err


# --- signals ---


def interrupt(settings: dict, evaluations: int, call: int = 2, watched: tuple = (evaluation, "label_losses")) -> None:
    """Runs a training that gets SIGINT during its last of so many evaluations, at its second pass, or at another call
    of a function that is `watched`. There must be no call after that."""
    calls, evaluate_loss, real = [], evaluator.evaluate_loss, getattr(*watched)

    def begin(*arguments):
        calls.append(0)
        return evaluate_loss(*arguments)

    def count(*arguments, **options):
        calls[-1] += 1
        if len(calls) == evaluations and calls[-1] == call:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted, match="SIGINT: stopped after step") as stop:
        patch.setattr(evaluator, "evaluate_loss", begin)
        patch.setattr(*watched, count)
        train(TrainConfig(**settings))
    assert stop.value.signal == signal.SIGINT and len(calls) == evaluations and calls[-1] == call


# Evaluations: the frozen base, steps 3, 6 and 9, and the last step, 11.
@pytest.mark.parametrize("evaluations, step", [(1, 0), (2, 3), (3, 6), (5, 11)], ids=["frozen base", "3", "6", "last step"])
def test_a_signal_during_an_evaluation_saves_at_once(settings, tmp_path, capfd, evaluations, step):
    settings |= {"save_steps": 0}
    train(TrainConfig(**settings))
    stopped = settings | {"output_dir": str(tmp_path / "stopped")}
    interrupt(stopped, evaluations)
    assert "SIGINT: the run stops once it is saved (once more: it stops at once)" in capfd.readouterr().err
    assert names(tmp_path / "stopped") == ([f"checkpoint-{step}"] if step else [])
    assert step not in [line["step"] for line in metrics_of(tmp_path / "stopped") if "eval_loss" in line]
    train(TrainConfig(**stopped | LATEST))
    assert_same_run(stopped["output_dir"], settings["output_dir"])


def test_a_signal_during_the_answers_of_an_evaluation_saves_at_once(settings, tmp_path):
    settings |= {"save_steps": 0, "eval_exact_match": True}
    train(TrainConfig(**settings))
    stopped = settings | {"output_dir": str(tmp_path / "stopped")}
    interrupt(stopped, 2, call=1, watched=(PrefixBloom, "generate"))
    assert names(tmp_path / "stopped") == ["checkpoint-3"]
    train(TrainConfig(**stopped | LATEST))
    assert_same_run(stopped["output_dir"], settings["output_dir"])


def test_memory_that_runs_out_during_an_evaluation_loses_nothing(settings, tmp_path, monkeypatch):
    settings |= {"save_steps": 0}
    train(TrainConfig(**settings))
    stopped, real, evaluations = settings | {"output_dir": str(tmp_path / "stopped")}, evaluator.evaluate_loss, []

    def run_out(*arguments):
        evaluations.append(None)
        if len(evaluations) == 5:  # of the last step
            raise MemoryError
        return real(*arguments)

    monkeypatch.setattr(evaluator, "evaluate_loss", run_out)
    with pytest.raises(UserError, match=r"ran out of memory; .*checkpoint-11\.safetensors is intact, resume with"):
        train(TrainConfig(**stopped))
    train(TrainConfig(**stopped | LATEST))
    assert_same_run(stopped["output_dir"], settings["output_dir"])


def test_a_signal_during_the_last_files_lets_them_be_written(settings, monkeypatch):
    def write_card(folder):
        real(folder)
        os.kill(os.getpid(), signal.SIGTERM)

    real = run.write_card
    monkeypatch.setattr(run, "write_card", write_card)
    with pytest.raises(Interrupted, match="SIGTERM: stopped after step 11, which was the last one; the prefix is saved"):
        train(TrainConfig(**settings))
    assert (Path(settings["output_dir"]) / CARD_FILE).exists()


@pytest.mark.parametrize("job", [None, "torchrun"])
def test_two_signals_at_once_are_one(job, monkeypatch, capfd):
    """As torchrun sends them: its own, and the terminal's that it passes on."""
    monkeypatch.setattr(distributed, "torchrun_job", lambda: job)
    monkeypatch.setattr(sys, "unraisablehook", pytest.fail)  # what Python calls for "ignored due to race condition"
    both = {signal.SIGINT, signal.SIGTERM}
    with signals.listening("stops"):
        signal.pthread_sigmask(signal.SIG_BLOCK, both)
        for number in both:
            os.kill(os.getpid(), number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, both)
        assert signals.heard() in both
    assert not signals.heard() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert "SIGINT: stops" in capfd.readouterr().err


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.listening("stops"):
            os.kill(os.getpid(), signal.SIGINT)
            assert not signals.heard()
    finally:
        signal.signal(signal.SIGINT, before)


# --- what is said of a run ---


def test_a_tie_is_no_improvement(settings):
    """With rate 0 all evaluations are alike: the first one stays the best, and the run stops early."""
    patient = {"learning_rate": 0.0, "early_stopping_patience": 2, "eval_steps": 2, "logging_steps": 3}
    assert train(TrainConfig(**settings | patient))["steps"] == 6
    lines = metrics_of(settings["output_dir"])
    assert len({line["eval_loss"] for line in lines if "eval_loss" in line and "frozen_base" not in line}) == 1
    assert [line["step"] for line in lines if "loss" in line] == [3, 6]
    card = (Path(settings["output_dir"]) / CARD_FILE).read_text("utf-8")
    assert "this prefix, step 2 |" in card


def test_an_early_stop_writes_the_loss_of_its_last_interval(settings, tmp_path):
    patient = {"learning_rate": 0.0, "early_stopping_patience": 1, "eval_steps": 2, "logging_steps": 3, "shuffle": False}
    train(TrainConfig(**settings | patient))
    every_step = settings | patient | {"logging_steps": 1, "output_dir": str(tmp_path / "every-step")}
    train(TrainConfig(**every_step))
    losses = {line["step"]: line["loss"] for line in metrics_of(every_step["output_dir"]) if "loss" in line}
    found = {line["step"]: line["loss"] for line in metrics_of(settings["output_dir"]) if "loss" in line}
    assert list(losses) == [1, 2, 3, 4] and list(found) == [3, 4]
    assert found == pytest.approx({3: (losses[1] + losses[2] + losses[3]) / 3, 4: losses[4]})
    # Resumed where it had stopped, it writes the same line again.
    before = metrics_of(settings["output_dir"])
    train(TrainConfig(**settings | patient | LATEST))
    assert metrics_of(settings["output_dir"]) == before


def test_a_picture_of_an_earlier_run_does_not_stand_in_the_card(settings):
    train(TrainConfig(**settings))
    folder = Path(settings["output_dir"])
    assert (folder / PLOT_FILE).exists() and PLOT_FILE in (folder / CARD_FILE).read_text("utf-8")
    train(TrainConfig(**settings | {"overwrite_output_dir": True, "max_steps": 0}))
    assert not (folder / PLOT_FILE).exists() and PLOT_FILE not in (folder / CARD_FILE).read_text("utf-8")
