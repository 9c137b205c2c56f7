import pytest
import torch
from models import training_state
from runs import LATEST, metrics_of, metrics_without_timings

from prefix_tuning import distributed
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder
from prefix_tuning.training.metrics import Metrics, TrainingBar
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.state import Clock
from prefix_tuning.training.steps import Step, Steps


def test_an_early_stop_writes_the_loss_of_its_last_interval(small_pass_settings, tmp_path, capsys):
    patient = {"learning_rate": 0.0, "early_stopping_patience": 1, "eval_steps": 2, "logging_steps": 3, "shuffle": False}
    train(TrainConfig(**small_pass_settings | patient | {"logging_steps": 100}))
    out = capsys.readouterr().out
    assert "stopping early" in out and "of training left" not in out
    train(TrainConfig(**small_pass_settings | patient | {"overwrite_output_dir": True}))
    every_step = small_pass_settings | patient | {"logging_steps": 1, "output_dir": str(tmp_path / "every-step")}
    train(TrainConfig(**every_step))
    losses = {line["step"]: line["loss"] for line in metrics_without_timings(every_step["output_dir"]) if "loss" in line}
    found = {
        line["step"]: line["loss"] for line in metrics_without_timings(small_pass_settings["output_dir"]) if "loss" in line
    }
    assert list(losses) == [1, 2, 3, 4] and list(found) == [3, 4]
    assert found == pytest.approx({3: (losses[1] + losses[2] + losses[3]) / 3, 4: losses[4]})
    # Resumed where it had stopped, it writes the same line again.
    before = metrics_without_timings(small_pass_settings["output_dir"])
    train(TrainConfig(**small_pass_settings | patient | LATEST))
    assert metrics_without_timings(small_pass_settings["output_dir"]) == before


def test_a_line_of_metrics_is_the_mean_of_its_steps(quick_settings, tmp_path):
    """Also of the last ones, which are fewer."""
    losses = {}
    for steps in (1, 4):
        run = quick_settings | {"max_steps": 10, "logging_steps": steps, "output_dir": str(tmp_path / str(steps))}
        train(TrainConfig(**run))
        losses[steps] = [line["loss"] for line in metrics_of(run["output_dir"]) if "loss" in line]
    parts = losses[1][:4], losses[1][4:8], losses[1][8:]
    assert losses[4] == pytest.approx([sum(part) / len(part) for part in parts], rel=1e-6)


def write_lines(folder, monkeypatch, total, intervals):
    """Writes a line of metrics for each interval, whose steps are (seconds, tokens, loss), of a run of `total` steps."""
    now = 0.0
    monkeypatch.setattr("prefix_tuning.training.state.time.perf_counter", lambda: now)
    state = training_state(PrefixEncoder(PrefixConfig(5, 2, 2, 8, 6, prefix_projection=True)))
    state.progress.rows_per_step = 8
    metrics, number = Metrics(folder, 1, Steps(range(80), 8, total=total, max_tokens=100)), 0
    with state.clock.running():
        for steps in intervals:
            for seconds, tokens, loss in steps:
                now, number = now + seconds, number + 1
                step = Step(number, [], 5, tokens, next_epoch=0, next_row=8 * number)
                state.advance(step, state.good_prefix, torch.tensor(loss), grad_norm=torch.tensor(float(number)))
            metrics.write_interval(state)


def test_a_line_of_metrics_has_the_figures_of_its_interval_alone(tmp_path, monkeypatch):
    write_lines(tmp_path, monkeypatch, 3, [[(2, 100, 3.0)], [(4, 1000, 2.0)], [(1, 30, 2.5)]])
    found = [[line[name] for name in ("epoch", "tokens_per_second", "loss", "grad_norm")] for line in metrics_of(tmp_path)]
    assert found == [[0.1, 50.0, 3.0, 1.0], [0.2, 250.0, 2.0, 2.0], [0.3, 30.0, 2.5, 3.0]]


def test_the_first_line_tells_the_time_that_is_left(tmp_path, monkeypatch, capsys):
    """Of 10 steps, 4 took 12 s together."""
    write_lines(tmp_path, monkeypatch, 10, [[(3, 60, 1.0)] * 4, [(3, 60, 1.0)] * 2])
    assert capsys.readouterr().out == "about 18 s of training left, at 20 tokens/s\n"


def test_the_bar_counts_neither_evaluations_nor_an_earlier_part_of_the_run(monkeypatch):
    now = 0.0
    monkeypatch.setattr("prefix_tuning.training.state.time.perf_counter", lambda: now)
    clock = Clock(seconds=500.0)
    steps = Steps(range(80), 8, total=110, max_tokens=100, done=100)
    bar = TrainingBar(steps, clock)
    bar._time, bar.start_t, bar.last_print_t = lambda: now, 0.0, 0.0  # tqdm's own clock, which knows of no stops
    with clock.running():
        for seconds in (2.0, 1.0, 3.0, 2.0):
            now += seconds
            bar.update()
        with clock.stopped():
            now += 1000.0
        now += 2.0
        bar.update()
        shown = bar.format_meter(**bar.format_dict)
    assert "training:" in shown and "105/110 [00:10<00:10,  2.00s/step" in shown
    bar.close()
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    assert TrainingBar(steps, clock).disable


def test_the_time_that_is_left_is_said_once_it_is_known(quick_settings, capsys):
    train(TrainConfig(**quick_settings | {"max_steps": 6, "logging_steps": 2, "save_steps": 4}))
    assert capsys.readouterr().out.count(" s of training left, at ") == 1
    train(TrainConfig(**quick_settings | LATEST | {"max_steps": 12, "logging_steps": 2}))
    assert capsys.readouterr().out.count(" s of training left, at ") == 1
