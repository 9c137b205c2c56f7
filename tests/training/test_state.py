"""What changes during a run: its figures, its best weights, and the way through a checkpoint and back."""

import json
import math
import signal

import pytest
import torch
from models import training_state
from transformers import get_scheduler

from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder
from prefix_tuning.training.state import Clock, NotFinite, TrainingState, make_schedule
from prefix_tuning.training.steps import Step


def new_state(seed=0, projection=True, loss_scaling=False) -> TrainingState:
    torch.manual_seed(seed)
    return training_state(PrefixEncoder(PrefixConfig(5, 2, 2, 8, 6, projection)), loss_scaling=loss_scaling)


def step(state: TrainingState) -> None:
    state.encoder().square().sum().backward()
    for group in state.optimizer.param_groups:
        group["lr"] = state.learning_rate()
    state.optimizer.step()
    state.progress.updates += 1
    state.optimizer.zero_grad()


def trained(steps=3) -> TrainingState:
    """A state in which every number differs from the same number of a new state."""
    state = new_state()
    for _ in range(steps):
        step(state)
    state.losses, state.grad_norm = torch.tensor(1.5), torch.tensor(2.5)
    state.bad_step, state.good_prefix = torch.tensor(7.0), state.encoder.bake()
    state.progress.step, state.clock = steps, Clock(12.5)
    state.note_evaluation(3.0, keep_best=True)
    return state


def test_a_new_run_is_at_the_start():
    state = new_state()
    assert vars(state.progress) == {
        **dict.fromkeys(("step", "updates", "epoch", "row", "rows_per_step", "tokens", "logged_step", "logged_tokens"), 0),
        **dict.fromkeys(("seconds", "logged_seconds", "learning_rate"), 0.0),
        **{"evaluated_step": -1, "best_step": -1, "best_loss": None, "evaluations_since_best": 0},
        "peak_learning_rate": 0.1,
    }
    assert state.losses == 0 and state.grad_norm == 0 and state.bad_step == math.inf and state.compile_seconds == 0
    assert torch.equal(state.good_prefix, state.encoder.bake())
    assert not state.scaler.is_enabled() and new_state(loss_scaling=True).scaler.is_enabled()


def test_the_optimizer_is_trainers():
    decayed, others = new_state().optimizer.param_groups
    assert [len(group["params"]) for group in (decayed, others)] == [3, 2]
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.5, 0)
    for group in (decayed, others):
        assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8 and group["fused"]


@pytest.mark.parametrize("name", ["linear", "cosine", "constant_with_warmup"])
def test_the_rate_is_a_function_of_the_updates_and_transformers_own(name):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.3)
    scheduler, share = get_scheduler(name, optimizer, 2, 10), make_schedule(name, warmup_steps=2, total_steps=10)
    for updates in range(10):
        assert 0.3 * share(updates) == optimizer.param_groups[0]["lr"]
        optimizer.step()
        scheduler.step()


def test_a_step_is_recorded_and_a_loss_that_is_not_finite_keeps_the_prefix_before():
    state, prefixes = new_state(), [torch.full((2, 2, 2, 5, 4), float(number)) for number in range(4)]
    for number, loss in enumerate((3.0, 2.0, math.nan, 1.0), start=1):
        step = Step(number, [], 6, 100, 1, 8 * number)
        state.advance(step, prefixes[number - 1], torch.tensor(loss), torch.tensor(0.5))
        assert (state.progress.step, state.progress.row, state.progress.epoch) == (number, 8 * number, 1)
    assert state.progress.tokens == 400 and state.bad_step == 3 and torch.equal(state.good_prefix, prefixes[1])
    for scaled in (False, True):  # a gradient that overflowed fp16 is the loss scale's business
        state = new_state(loss_scaling=scaled)
        state.advance(Step(1, [], 6, 100, 0, 8), prefixes[1], torch.tensor(1.0), torch.tensor(math.inf))
        assert state.bad_step == (math.inf if scaled else 1)
    state.advance(Step(2, [], 6, 100, 0, 16), prefixes[2], torch.tensor(math.inf), torch.tensor(1.0))
    assert state.bad_step == 2


def test_the_clock_counts_while_it_runs_and_is_not_stopped(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    clock = Clock(5.0)
    wait(1)
    with clock.running():
        wait(2)
        with clock.stopped():
            wait(4)
            assert clock.seconds() == 7
        wait(8)
        assert clock.seconds() == 15
    wait(16)
    assert clock.seconds() == 15


def test_a_step_in_which_the_process_was_stopped_counts_at_most_as_the_longest_before(monkeypatch):
    now = 0.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    state = new_state()
    prefix, one, taken = state.encoder.bake(), torch.tensor(1.0), []
    before = signal.getsignal(signal.SIGCONT)
    with state.clock.running():
        for number, (seconds, was_stopped) in enumerate([(9, True), (3, False), (3600, True), (2, True), (20, False)]):
            now += seconds
            if was_stopped:
                signal.raise_signal(signal.SIGCONT)
            state.advance(Step(number, [], 6, 100, 0, 8), prefix, one, one)
            taken.append(state.clock.seconds())
    # The first step counts in full, because no step came before it.
    assert taken == [9, 12, 21, 23, 43] and signal.getsignal(signal.SIGCONT) is before


def test_the_lowest_loss_is_the_best_and_only_then_weights_are_kept():
    state = new_state()
    for number, (loss, best, since) in enumerate([(5.0, 1, 0), (5.0, 1, 1), (6.0, 1, 2), (4.0, 4, 0)], start=1):
        state.progress.step = number
        state.note_evaluation(loss, keep_best=False)
        assert (state.progress.evaluated_step, state.progress.best_step) == (number, best)
        assert state.progress.evaluations_since_best == since
    assert state.progress.best_loss == 4.0 and state.best_weights == {}
    state.note_evaluation(3.0, keep_best=True)
    kept = {name: tensor.clone() for name, tensor in state.encoder.state_dict().items()}
    step(state)
    step(state)  # the first one has rate 0
    assert state.best_weights.keys() == kept.keys()
    assert all(torch.equal(state.best_weights[name], tensor) for name, tensor in kept.items())
    assert not torch.equal(state.encoder.state_dict()["embedding.weight"], kept["embedding.weight"])


def test_an_eval_loss_that_is_no_number_is_never_the_best():
    state = new_state()
    for number, loss in enumerate((math.nan, math.inf, 4.0, math.nan), start=1):
        state.progress.step = number
        state.note_evaluation(loss, keep_best=True)
    assert (state.progress.best_loss, state.progress.best_step, state.progress.evaluations_since_best) == (4.0, 3, 1)


def test_what_is_not_finite_is_named_by_its_step_with_the_prefix_before():
    state = new_state()
    state.check_finite()
    state.progress.step = 4
    for bad_step, named in ((3.0, 3), (1.0, 1)):
        state.bad_step = torch.tensor(bad_step)
        with pytest.raises(NotFinite) as error:
            state.check_finite()
        assert error.value.step == named and (error.value.good_prefix is None) == (named == 1)
    state.bad_step = torch.tensor(math.inf)
    state.encoder.embedding.weight.data[0, 0] = math.nan  # the weights broke in the step that has just ended
    with pytest.raises(NotFinite) as error:
        state.check_finite()
    assert error.value.step == 5 and error.value.good_prefix is state.good_prefix
    state.bad_step = torch.tensor(2.0)
    with pytest.raises(NotFinite) as error:
        state.check_finite()
    assert error.value.step == 2


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_a_checkpoint_holds_all_of_a_state(steps):
    old, new = trained(steps), new_state(seed=1)
    tensors = {name: tensor.clone() for name, tensor in old.tensors().items()}
    numbers = json.loads(json.dumps(old.numbers()))
    new.encoder.load_state_dict(old.encoder.state_dict())
    new.restore(tensors, numbers)
    assert new.progress == old.progress and new.numbers() == numbers and new.clock.seconds() == 12.5
    assert new.tensors().keys() == tensors.keys()
    assert all(torch.equal(new.tensors()[name], tensor) for name, tensor in tensors.items())
    for _ in range(3):
        for state in (old, new):
            step(state)
        assert new.optimizer.param_groups[0]["lr"] == old.optimizer.param_groups[0]["lr"]
        assert torch.equal(new.encoder(), old.encoder())


CHANGES = {
    "another figure": lambda tensors, numbers: numbers["progress"].update(more=1),
    "a figure less": lambda tensors, numbers: numbers["progress"].pop("step"),
    "a figure of another type": lambda tensors, numbers: numbers["progress"].update(step="3"),
    "a tensor of no use": lambda tensors, numbers: tensors.update({"encoder.more": torch.zeros(1)}),
    "a part of no use": lambda tensors, numbers: tensors.update({"more.losses": torch.zeros(1)}),
    "another shape": lambda tensors, numbers: tensors.update({"exp_avg.transform.0.bias": torch.zeros(7)}),
    "another type": lambda tensors, numbers: tensors.update({"best.transform.0.bias": torch.zeros(6).double()}),
    "a moment of another shape": lambda tensors, numbers: tensors.update({"step.transform.0.bias": torch.zeros(6)}),
    "no figures": lambda tensors, numbers: [tensors.pop(name) for name in [*tensors] if name.startswith("figures.")],
    "no second moments": lambda tensors, numbers: [tensors.pop(n) for n in [*tensors] if n.startswith("exp_avg_sq.")],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_is_no_state_of_this_run_is_refused(change):
    state = trained()
    tensors, numbers = state.tensors(), json.loads(json.dumps(state.numbers()))
    change(tensors, numbers)
    with pytest.raises((KeyError, TypeError, ValueError)):
        new_state().restore(tensors, numbers)


def test_the_loss_scale_is_resumed():
    """Only fp16 has a loss scale, and only CUDA trains in fp16. The code that keeps the scale is the same everywhere."""
    old, new = new_state(projection=False, loss_scaling=True), new_state(1, projection=False, loss_scaling=True)
    old.scaler.scale(old.encoder().sum()).backward()
    old.scaler.step(old.optimizer)
    old.scaler.update(2.0**7)
    new.restore(old.tensors(), json.loads(json.dumps(old.numbers())))
    assert new.scaler.is_enabled() and new.scaler.get_scale() == 2.0**7
