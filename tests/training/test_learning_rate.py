"""The search for a learning rate: what it leaves as it was, what it finds, where it is written."""

import copy
import json
import math

import pytest
import torch
from models import beginning
from runs import LATEST, metrics_of, metrics_without_timings

from prefix_tuning.files.names import PLOT_FILE, SEARCH_FILE
from prefix_tuning.model.encoder import PrefixConfig
from prefix_tuning.training import learning_rate
from prefix_tuning.training.learning_rate import find_learning_rate, first_guess, rate_at, valley, walk_downhill
from prefix_tuning.training.loop import optimizer_step
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig


@pytest.fixture
def searching(quick_settings):
    return quick_settings | {"learning_rate": None}


@pytest.mark.parametrize("lowest", [-9, -5, -4, -3, 0])
def test_the_walk_ends_in_the_valley_and_tries_nothing_beyond(lowest):
    losses = walk_downhill(lambda index: (index - lowest) ** 2 + 1.0, -4)
    assert valley(losses) == lowest and len(losses) <= abs(lowest + 4) + 3
    assert {lowest - 1, lowest + 1} <= losses.keys()


def test_the_valley_lies_between_grid_points_where_the_losses_say_so():
    assert valley({-5: 2.0, -4: 1.0, -3: 1.5}) == pytest.approx(-4 + 1 / 6)
    assert valley({-5: 2.0, -4: 1.0, -3: math.inf}) == -4  # it diverged
    assert valley({-4: 13.8, -5: 13.8, -3: 13.8}) == -4  # nothing is learnt at any rate
    assert valley({0: 1.0, 1: 0.5}) == 1  # the highest rate of all


def test_rates_are_half_a_decade_apart_and_the_first_guess_is_by_the_encoders_width():
    assert [rate_at(index) for index in (-5, -4, -1, 0, 1)] == [3.2e-3, 1e-2, 0.32, 1.0, 3.2]
    for width, rate in ((64, 3.2e-2), (192, 1e-2), (2048, 1e-3)):
        assert rate_at(first_guess(PrefixConfig(10, 2, 2, 8, width, True))) == rate
    assert rate_at(first_guess(PrefixConfig(10, 2, 2, 8, 8, False))) == 0.32


def test_a_search_leaves_the_run_as_it_was_and_finds_the_same_again(searching, monkeypatch):
    found = []

    def watched(base, state, steps):
        before = copy.deepcopy((state.encoder.state_dict(), state.numbers(), state.optimizer.state_dict(), vars(steps)))
        found.append(find_learning_rate(base, state, steps))
        after = state.encoder.state_dict(), state.numbers(), state.optimizer.state_dict(), vars(steps)
        assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
        before[1]["progress"]["peak_learning_rate"] = found[-1].rate
        assert before[1:3] == after[1:3] and before[3].keys() == after[3].keys()
        assert all(parameter.grad is None for parameter in state.encoder.parameters())
        return found[-1]

    monkeypatch.setattr("prefix_tuning.training.run.find_learning_rate", watched)
    train(TrainConfig(**searching))
    train(TrainConfig(**searching | {"overwrite_output_dir": True}))
    assert found[0].rates == found[1].rates and found[0].losses == found[1].losses and found[0].rate == found[1].rate


def test_a_run_that_searches_is_the_run_with_the_rate_that_was_found(searching, tmp_path, capsys):
    train(TrainConfig(**searching))
    out = capsys.readouterr().out
    search, *lines = metrics_without_timings(searching["output_dir"])
    search = search["learning_rate_search"]
    best = search["rates"][search["losses"].index(min(search["losses"]))]
    assert len(search["rates"]) >= 3 and best / 2 < search["rate"] < best * 2
    assert f"learning rate {search['rate']:.1e}, found in " in out
    described = json.loads((tmp_path / "out" / "training_config.json").read_text("utf-8"))
    assert described["learning_rate"] == search["rate"]
    fixed = searching | {"learning_rate": search["rate"], "output_dir": str(tmp_path / "fixed")}
    train(TrainConfig(**fixed))
    assert "found in" not in capsys.readouterr().out
    assert metrics_without_timings(fixed["output_dir"]) == lines


def test_a_resumed_run_keeps_what_was_found(searching, tmp_path, capsys):
    whole = searching | {"max_steps": 6, "save_steps": 3}
    train(TrainConfig(**whole))
    resumed = whole | {"output_dir": str(tmp_path / "resumed")}
    train(TrainConfig(**resumed))
    (tmp_path / "resumed" / "checkpoint-6.safetensors").unlink()
    capsys.readouterr()
    train(TrainConfig(**resumed | LATEST))
    assert "found in" not in capsys.readouterr().out
    assert metrics_without_timings(resumed["output_dir"]) == metrics_without_timings(whole["output_dir"])
    described = json.loads((tmp_path / "resumed" / "training_config.json").read_text("utf-8"))
    assert described["learning_rate"] == metrics_of(whole["output_dir"])[0]["learning_rate_search"]["rate"]


@pytest.mark.usefixtures("curves")
def test_the_trials_are_drawn_and_a_later_run_without_them_removes_the_picture(searching, tmp_path):
    train(TrainConfig(**searching))
    assert (tmp_path / "out" / SEARCH_FILE).read_bytes().startswith(b"\x89PNG")
    train(TrainConfig(**searching | {"learning_rate": 1e-3, "overwrite_output_dir": True}))
    assert not (tmp_path / "out" / SEARCH_FILE).exists() and (tmp_path / "out" / PLOT_FILE).exists()


def test_a_run_without_steps_searches_for_nothing(searching, tmp_path):
    train(TrainConfig(**searching | {"max_steps": 0}))
    assert [line for line in metrics_of(tmp_path / "out") if "learning_rate_search" in line] == []


@pytest.mark.parametrize("projection, init", [(True, "random"), (True, "zero"), (False, "random"), (False, "zero")])
def test_the_found_rate_learns_more_than_the_notebooks(searching, tmp_path, projection, init):
    losses = []
    for rate in (None, 5e-5):
        flags = {"learning_rate": rate, "prefix_projection": projection, "prefix_init": init, "max_steps": 14}
        train(TrainConfig(**searching | flags | {"overwrite_output_dir": True}))
        losses.append([line["loss"] for line in metrics_of(tmp_path / "out") if "loss" in line][-1])
    assert losses[0] < losses[1] - 0.05


@pytest.fixture
def searched(searching, monkeypatch):
    """Searches for the rate of a run of `total` steps. Returns the search, and rate and loss of each step of its trials."""

    def search(total):
        taken = []

        def step(base, state, step):
            rate, result = state.learning_rate(), optimizer_step(base, state, step)
            taken.append((rate, result[1].item()))
            return result

        monkeypatch.setattr(learning_rate, "optimizer_step", step)
        config = TrainConfig(**searching | {"max_steps": total})
        begun = beginning(config)
        return find_learning_rate(begun.base, begun.state, begun.steps), taken

    return search


@pytest.mark.parametrize("total, length", [(5, 5), (14, 8), (800, 10)], ids=["of a short run", "least", "a share"])
def test_a_trial_is_a_short_run_whose_rate_falls_to_zero(searched, total, length):
    """Never longer than the run, and its loss is the mean over the last quarter."""
    search, taken = searched(total)
    assert search.steps == length and len(taken) == length * len(search.rates)
    last = math.ceil(length / 4)
    for number, (rate, loss) in enumerate(zip(search.rates, search.losses, strict=True)):
        rates, losses = zip(*taken[number * length : (number + 1) * length], strict=True)
        assert rates == pytest.approx([rate * (length - step) / length for step in range(length)])
        assert loss == pytest.approx(sum(losses[-last:]) / last)


def test_one_step_is_too_few_for_trials(searching, capsys):
    """A trial of one step has only the loss before its update, which is the same for every rate."""
    train(TrainConfig(**searching | {"max_steps": 1}))
    out, lines = capsys.readouterr().out, metrics_of(searching["output_dir"])
    assert "looking for" not in out and "found in" not in out
    assert "learning rate 3.2e-02, guessed by the width of the encoder" in out
    assert lines[0]["learning_rate"] == 3.2e-2 and not any("learning_rate_search" in line for line in lines)
