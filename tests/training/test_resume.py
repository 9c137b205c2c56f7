"""A resumed run is the run that it resumes, or it is refused; a folder has one run at a time and one line of checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from models import random_bloom
from runs import LATEST, UNEVALUATED, assert_same_run, checkpoint_names, contents, interrupt, metrics_without_timings
from safetensors.torch import load_file

from prefix_tuning import distributed
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import ADAPTER_CONFIG_FILE, ADAPTER_FILE, CARD_FILE, ENCODER_FILE, METRICS_FILE
from prefix_tuning.training.checkpoints import SAME, find_checkpoints
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig

OTHER = {
    "precision": "bf16", "max_length": 255, "eval_fraction": 0.3, "eval_exact_match": True, "save_best": False,
    "num_virtual_tokens": 4, "prefix_projection": False, "encoder_hidden_size": 7, "prefix_init": "zero",
    "per_device_train_batch_size": 3, "gradient_accumulation_steps": 4, "learning_rate": 1e-3, "lr_scheduler_type": "cosine",
    "warmup_steps": 1, "weight_decay": 0.5, "max_grad_norm": 0.5, "shuffle": False, "seed": 7,
}  # fmt: skip


def test_other_settings_are_refused_by_name_and_nothing_changes(small_pass_settings, tmp_path):
    small_pass_settings |= {"eval_dataset": None, "eval_fraction": 0.25}
    train(TrainConfig(**small_pass_settings | {"max_steps": 2}))
    before, rows = contents(small_pass_settings["output_dir"]), tmp_path / "eval.jsonl"
    shutil.copy(small_pass_settings["dataset"], rows)
    changes = [({name: value}, f"--{name} ") for name, value in OTHER.items()]
    text = {"prefix_init": "text", "init_text": "请回答。"}
    changes += [
        (text, "--init_text unset, not 请回答"),
        ({"prefix_from": small_pass_settings["output_dir"]}, "--prefix_from unset"),
    ]
    changes += [({"eval_dataset": str(rows), "eval_fraction": 0.0}, "another --eval_dataset")]
    teacher = {"distill_text": str(rows), "distill_alpha": 0.5}
    changes += [
        (teacher, "--distill_alpha 0.0, not 0.5; no --distill_text"),
        (text | {"init_from": "chunks"}, "--init_from first, not chunks"),
        (text | {"freeze_first_token": True}, "--freeze_first_token False, not True"),
    ]
    assert {name for change, _ in changes for name in change} - {"eval_dataset", "distill_text"} == set(SAME) - {"template"}
    for change, said in changes:
        with pytest.raises(UserError, match=f"was made with .*{said}.*; resume with the same"):
            train(TrainConfig(**small_pass_settings | LATEST | change))
        assert contents(small_pass_settings["output_dir"]) == before, change


def test_a_precision_by_another_name_is_the_same(quick_settings, monkeypatch):
    """auto means float32 where oneDNN may use no bf16 units."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    train(TrainConfig(**quick_settings | {"precision": "fp32", "max_steps": 2, "save_steps": 1}))
    train(TrainConfig(**quick_settings | LATEST | {"precision": "auto", "max_steps": 3}))


def test_a_changed_row_is_noticed_wherever_it_is(small_pass_settings, tmp_path):
    """Of 3,000 rows, the second one; of the held-out rows, the last one."""
    lines = Path(small_pass_settings["dataset"]).read_text("utf-8").splitlines(True) * 75
    held_out = lines[:40]
    files = {"dataset": (tmp_path / "many.jsonl", lines, 1), "eval_dataset": (tmp_path / "eval.jsonl", held_out, 39)}
    for path, rows, _ in files.values():
        path.write_text("".join(rows), "utf-8")
    small_pass_settings |= {name: str(path) for name, (path, _, _) in files.items()}
    train(TrainConfig(**small_pass_settings | {"max_steps": 1}))
    for name, (path, rows, index) in files.items():
        row = json.loads(rows[index])
        changed = [*rows[:index], json.dumps(row | {"output": row["output"] + "！"}) + "\n", *rows[index + 1 :]]
        path.write_text("".join(changed), "utf-8")
        with pytest.raises(UserError, match=f"another --{name}"):
            train(TrainConfig(**small_pass_settings | {"max_steps": 2} | LATEST))
        path.write_text("".join(rows), "utf-8")
    # A held-out row without labels is no part of the run: it is not scored.
    path, *_ = files["eval_dataset"]
    path.write_text("".join([*held_out, json.dumps({"instruction": "长" * 300, "output": "短"}) + "\n"]), "utf-8")
    # Where the file lies does not matter.
    moved = Path(small_pass_settings["dataset"]).rename(tmp_path / "moved.jsonl")
    train(TrainConfig(**small_pass_settings | {"max_steps": 2, "dataset": str(moved)} | LATEST))


@pytest.mark.parametrize("max_steps", [3, 0])
def test_a_run_that_is_over_already_saves_its_prefix_and_says_so(small_pass_settings, max_steps, capsys):
    train(TrainConfig(**small_pass_settings | {"max_steps": 6, "save_steps": 2}))
    kept = checkpoint_names(small_pass_settings["output_dir"])
    for name in (ADAPTER_FILE, ENCODER_FILE):
        (Path(small_pass_settings["output_dir"]) / name).unlink()
    assert train(TrainConfig(**small_pass_settings | {"max_steps": max_steps, "save_steps": 2} | LATEST))["steps"] == 6
    assert "the run is over already: it is at step 6" in capsys.readouterr().out
    assert (
        checkpoint_names(small_pass_settings["output_dir"]) == kept
        and (Path(small_pass_settings["output_dir"]) / ENCODER_FILE).exists()
    )


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_new_ones_stay(small_pass_settings, tmp_path, capsys):
    small_pass_settings |= {"lr_scheduler_type": "constant_with_warmup"}
    train(TrainConfig(**small_pass_settings))
    broken = small_pass_settings | {"output_dir": str(tmp_path / "broken"), "save_total_limit": 2}
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
    assert_same_run(broken["output_dir"], small_pass_settings["output_dir"])


def test_resuming_from_an_earlier_checkpoint_makes_it_the_latest(small_pass_settings, tmp_path):
    small_pass_settings |= {"save_total_limit": None}
    train(TrainConfig(**small_pass_settings))
    again = tmp_path / "again"
    shutil.copytree(small_pass_settings["output_dir"], again)
    earlier = {"output_dir": str(again), "resume_from_checkpoint": str(again / "checkpoint-4.safetensors")}
    interrupt(small_pass_settings | earlier, 1)
    assert checkpoint_names(again) == [f"checkpoint-{step}" for step in range(1, 7)]
    assert len(list(again.glob("*.set-aside"))) == 7
    with pytest.raises(UserError, match=r"checkpoint-8\.set-aside: rename it to checkpoint-STEP\.safetensors"):
        train(
            TrainConfig(**small_pass_settings | earlier | {"resume_from_checkpoint": str(again / "checkpoint-8.set-aside")})
        )
    train(TrainConfig(**small_pass_settings | earlier | LATEST))
    assert_same_run(again, small_pass_settings["output_dir"])
    train(
        TrainConfig(
            **small_pass_settings | earlier | {"resume_from_checkpoint": None, "overwrite_output_dir": True, "max_steps": 1}
        )
    )
    assert checkpoint_names(again) == ["checkpoint-1"] and not list(again.glob("*.set-aside"))


def test_a_text_start_is_resumed_with_all_its_tensors(small_pass_settings, tmp_path, capsys):
    text = {"prefix_init": "text", "init_text": "请回答下面的问题。"}
    train(TrainConfig(**small_pass_settings | text | {"output_dir": str(tmp_path / "start"), "max_steps": 1}))
    small_pass_settings |= {"prefix_from": str(tmp_path / "start")}
    train(TrainConfig(**small_pass_settings))
    again = small_pass_settings | {"output_dir": str(tmp_path / "again")}
    train(TrainConfig(**again | {"max_steps": 5}))
    with pytest.raises(UserError, match="--prefix_from start, not unset"):
        train(TrainConfig(**again | LATEST | {"prefix_from": None}))
    # What it started from is in the checkpoint: that folder may be gone.
    shutil.rmtree(tmp_path / "start")
    path = find_checkpoints(tmp_path / "again")[-1]
    assert "encoder.text_prefix" in load_file(path)
    train(TrainConfig(**again | {"resume_from_checkpoint": str(path), "num_train_epochs": 1.5}))
    # The rate fell to zero in 5 steps, not in 11, so only what was taken over can be compared.
    ours, theirs = (load_file(Path(run["output_dir"]) / ENCODER_FILE) for run in (again, small_pass_settings))
    assert torch.equal(ours["text_prefix"], theirs["text_prefix"])


def test_another_runs_checkpoint_replaces_nothing(small_pass_settings, tmp_path):
    train(TrainConfig(**small_pass_settings))
    other = small_pass_settings | {
        "output_dir": str(tmp_path / "other"),
        "resume_from_checkpoint": small_pass_settings["output_dir"],
    }
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / CARD_FILE).write_text("# Mine", "utf-8")
    with pytest.raises(UserError, match=r"holds a README\.md"):
        train(TrainConfig(**other))
    shutil.copy(
        find_checkpoints(Path(small_pass_settings["output_dir"]))[-1], tmp_path / "other" / "checkpoint-99.safetensors"
    )
    with pytest.raises(UserError, match="holds checkpoints of a run that did not finish"):
        train(TrainConfig(**other))
    shutil.rmtree(tmp_path / "other")
    shutil.copytree(small_pass_settings["output_dir"], tmp_path / "other")
    before = contents(tmp_path / "other")
    with pytest.raises(UserError, match="holds a prefix already; add --overwrite_output_dir"):
        train(TrainConfig(**other))
    assert contents(tmp_path / "other") == before
    train(TrainConfig(**other | {"overwrite_output_dir": True}))
    assert_same_run(tmp_path / "other", small_pass_settings["output_dir"])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 5,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 3,
        },
        {"prefix_projection": False, "shuffle": False, "max_tokens_per_batch": 50, "save_best": False},
    ],
    ids=["shuffled", "odd steps, cosine", "no projection"],
)
def test_going_on_from_any_step_gives_the_same_bits(settings, tmp_path, changes):
    settings |= changes | {"save_total_limit": None}
    train(TrainConfig(**settings))
    whole = find_checkpoints(Path(settings["output_dir"]))
    assert len(whole) >= 11
    for checkpoint in whole[::2]:
        again = tmp_path / checkpoint.stem
        train(TrainConfig(**settings | {"output_dir": str(again), "resume_from_checkpoint": str(checkpoint)}))
        assert_same_run(again, settings["output_dir"])


def test_latest_without_a_checkpoint_starts_from_the_beginning(settings, tmp_path, capsys):
    train(TrainConfig(**settings))
    fresh = settings | {"output_dir": str(tmp_path / "fresh"), "resume_from_checkpoint": "latest"}
    draft = tmp_path / "fresh" / ".checkpoint-1.safetensors.draft"
    draft.mkdir(parents=True)
    (draft / ".tmpQyq52s").write_bytes(b"half")  # safetensors' own name for a file that is not whole yet
    train(TrainConfig(**fresh))
    assert "holds no checkpoint to resume from: starting from the beginning" in capsys.readouterr().out
    assert_same_run(fresh["output_dir"], settings["output_dir"])


def test_latest_does_not_overwrite_a_finished_run_that_has_no_checkpoint(settings):
    train(TrainConfig(**settings | {"save_steps": 0}))
    with pytest.raises(UserError, match="holds a prefix already"):
        train(TrainConfig(**settings | {"save_steps": 0, "resume_from_checkpoint": "latest"}))


def test_a_damaged_checkpoint_is_named_and_skipped(settings, tmp_path, capsys):
    train(TrainConfig(**settings))
    broken = tmp_path / "broken"
    shutil.copytree(settings["output_dir"], broken)
    newest = find_checkpoints(broken)[-1]
    newest.write_bytes(newest.read_bytes()[:-1])
    train(TrainConfig(**settings | {"output_dir": str(broken), "resume_from_checkpoint": "latest"}))
    assert newest.name in capsys.readouterr().err
    assert_same_run(broken, settings["output_dir"])


def test_metrics_that_lost_lines_do_not_stop_a_run(settings, tmp_path, capsys):
    train(TrainConfig(**settings))
    whole = metrics_without_timings(settings["output_dir"])
    file = Path(settings["output_dir"]) / METRICS_FILE
    for kept, lines in ((file.read_bytes()[:150], 1), (b"", 0), (None, 0)):
        file.unlink()
        if kept is not None:
            file.write_bytes(kept)
        train(TrainConfig(**settings | {"resume_from_checkpoint": "latest"}))
        assert "is shorter than at the checkpoint" in capsys.readouterr().err
        assert metrics_without_timings(settings["output_dir"]) == whole[:lines] + whole[-2:]


def test_more_epochs_go_on_where_the_run_ended(settings, tmp_path):
    settings |= UNEVALUATED | {"lr_scheduler_type": "constant_with_warmup"}
    train(TrainConfig(**settings | {"num_train_epochs": 2, "logging_steps": 1}))
    shorter = settings | {"num_train_epochs": 1, "output_dir": str(tmp_path / "shorter"), "logging_steps": 1}
    train(TrainConfig(**shorter))
    train(TrainConfig(**shorter | {"num_train_epochs": 2, "resume_from_checkpoint": "latest"}))
    assert_same_run(shorter["output_dir"], settings["output_dir"])


def test_going_on_as_another_run_is_refused_with_what_differs(settings, tmp_path, tokenizer):
    train(TrainConfig(**settings | {"max_steps": 1}))
    resumed = settings | {"resume_from_checkpoint": "latest"}
    before = {path.name: path.read_bytes() for path in Path(settings["output_dir"]).iterdir()}
    rows = Path(settings["dataset"]).read_text("utf-8").splitlines(True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:-1]), "utf-8")
    random_bloom(seed=1).save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    for changes, said in (
        ({"learning_rate": 1e-3}, "--learning_rate 0.01, not 0.001"),
        ({"seed": 1, "num_virtual_tokens": 4}, "--num_virtual_tokens 10, not 4; --seed 42, not 1"),
        ({"gradient_accumulation_steps": 4}, "--gradient_accumulation_steps 3, not 4"),
        ({"precision": "bf16"}, "--precision fp32, not bf16"),
        ({"dataset": str(tmp_path / "rows.jsonl")}, "another --dataset"),
        ({"model_name_or_path": str(tmp_path / "other")}, r"another --model_name_or_path \(weights\)"),
    ):
        with pytest.raises(UserError, match=said):
            train(TrainConfig(**resumed | changes))
    assert before == {path.name: path.read_bytes() for path in Path(settings["output_dir"]).iterdir()}


def test_an_unfinished_run_is_not_forgotten_by_accident(settings):
    train(TrainConfig(**settings | {"max_steps": 2}))
    folder = Path(settings["output_dir"])
    for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE, ENCODER_FILE):
        (folder / name).unlink()
    with pytest.raises(UserError, match="did not finish; resume it with --resume_from_checkpoint latest"):
        train(TrainConfig(**settings))
    train(TrainConfig(**settings | {"overwrite_output_dir": True, "save_steps": 0}))
    assert not find_checkpoints(folder)


def test_a_finished_run_is_not_overwritten_silently(quick_settings):
    train(TrainConfig(**quick_settings))
    folder = Path(quick_settings["output_dir"])
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="--overwrite_output_dir"):
        train(TrainConfig(**quick_settings | {"seed": 1}))
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}
    train(TrainConfig(**quick_settings | {"seed": 1, "overwrite_output_dir": True}))
    assert before[ADAPTER_FILE] != (folder / ADAPTER_FILE).read_bytes()


def test_trainable_weights_alone_are_not_overwritten(quick_settings, tmp_path):
    train(TrainConfig(**quick_settings | {"max_steps": 0}))
    kept = tmp_path / "kept"
    kept.mkdir()
    shutil.copy(Path(quick_settings["output_dir"]) / ENCODER_FILE, kept)
    before = contents(kept)
    again = quick_settings | {"prefix_from": str(kept), "output_dir": str(kept), "max_steps": 1}
    with pytest.raises(UserError, match=r"kept holds trainable weights .*; add --overwrite_output_dir or name another"):
        train(TrainConfig(**again))
    assert contents(kept) == before
    train(TrainConfig(**again | {"overwrite_output_dir": True}))
    assert (kept / ADAPTER_FILE).exists() and contents(kept)[ENCODER_FILE] != before[ENCODER_FILE]


def test_a_job_that_is_restarted_goes_on_and_any_other_is_refused(quick_settings, monkeypatch, capsys):
    def start(job, max_steps):
        monkeypatch.setattr(distributed, "torchrun_job", lambda: job)
        return train(TrainConfig(**quick_settings | {"max_steps": max_steps, "save_steps": 1}))["steps"]

    assert start("one", 2) == 2 and "resuming" not in capsys.readouterr().out
    for job in ("two", None):
        with pytest.raises(UserError, match="holds a prefix already"):
            start(job, 4)
    capsys.readouterr()
    assert start("one", 4) == 4
    out, err = capsys.readouterr()
    assert "resuming after step 2" in out and "is shorter than" not in err
    for path in find_checkpoints(Path(quick_settings["output_dir"])):
        path.unlink()
    assert start("one", 3) == 3 and "resuming" not in capsys.readouterr().out  # it had failed before its first checkpoint
