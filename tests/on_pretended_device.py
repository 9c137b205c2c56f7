"""What runs on a GPU, on a pretended one (pretended.py): the same figures as on the CPU, and no tensor is left behind.

test_pretended_device.py runs this file in a process of its own.
"""

import sys

import pretended
import pytest
import torch
from datasets import Dataset
from helpers import (
    PROMPTS,
    complete,
    examples_of,
    prefix_config,
    random_bloom,
    random_prefix,
    relative,
    step_of,
    training_state,
)

from prefix_tuning import bundled, plain
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.evaluation import evaluate_loss
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.model.encoder import PrefixEncoder
from prefix_tuning.training.checkpoints import load_checkpoint, save_checkpoint
from prefix_tuning.training.learning_rate import find_learning_rate
from prefix_tuning.training.loop import optimizer_step
from prefix_tuning.training.start import text_prefix
from prefix_tuning.training.steps import Steps


@pytest.fixture
def device():
    return pretended.device()


def three_steps(where, dtype=torch.float32, loss_scaling=False):
    """Losses and gradient norms of three steps, and the state after them."""
    model = random_bloom(dtype=dtype).to(where)
    torch.manual_seed(1)
    state = training_state(PrefixEncoder(prefix_config(model)).to(where), 1e-2, loss_scaling)
    figures = []
    for number in range(1, 4):
        step = step_of(examples_of([7, 12, 30], seed=number), max_tokens=30, number=number)
        prefix, loss, norm = optimizer_step(model, state, step)
        state.advance(step, prefix, loss, norm)
        figures += [loss.item(), norm.item()]
    return figures, state


@pytest.mark.parametrize("dtype, loss_scaling", [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True)])
def test_steps_are_those_of_the_cpu(device, dtype, loss_scaling):
    (ours, state), (expected, _) = (three_steps(where, dtype, loss_scaling) for where in (device, "cpu"))
    assert state.losses.device == state.good_prefix.device == device
    assert {tensor.device for tensor in state.encoder.parameters()} == {device}
    # The grid of a GPU and the rows of a CPU add up in another order.
    assert ours == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 2e-2)


def test_a_checkpoint_goes_on_there(device, tmp_path):
    _, state = three_steps(device)
    save_checkpoint(tmp_path, 3, state.tensors(), state.numbers(), None)
    tensors, numbers = load_checkpoint(tmp_path / "checkpoint-3.safetensors")
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
    resumed = three_steps(device)[1]
    weights = {name.removeprefix("encoder."): tensor for name, tensor in tensors.items() if name.startswith("encoder.")}
    resumed.encoder.load_state_dict(weights)
    resumed.restore(tensors, numbers)
    model, step = random_bloom().to(device), step_of(examples_of([9, 4], seed=4), number=4)
    for one in (state, resumed):
        one.advance(step, *optimizer_step(model, one, step))
    assert all(
        torch.equal(one.cpu(), other.cpu())
        for one, other in zip(*(x.tensors().values() for x in (state, resumed)), strict=True)
    )


def test_losses_of_rows_and_of_the_base_alone(device):
    plain_model, model = random_bloom(), random_bloom().to(device)
    examples = examples_of([7, 12, 30])
    rows = Dataset.from_list([vars(example) for example in examples])
    for prefix in (None, random_prefix(plain_model)):
        ours = evaluate_loss(model, rows, None if prefix is None else prefix.to(device), 30)
        assert ours == pytest.approx(evaluate_loss(plain_model, rows, prefix, 30), rel=1e-5)


def test_a_text_start_and_the_search_for_a_rate(device, tokenizer):
    found = []
    for where in ("cpu", device):
        model = random_bloom().to(where)
        pairs = text_prefix(model, tokenizer, "请用一句话回答。", 6)
        encoder = PrefixEncoder(prefix_config(model, tokens=6))
        torch.manual_seed(1)
        encoder.initialize("text", pairs.cpu())
        state = training_state(encoder.to(where))
        state.progress.peak_learning_rate = None
        steps = Steps(Dataset.from_list([vars(example) for example in examples_of([7, 12, 30])]), 2, total=2, max_tokens=30)
        found.append((pairs.cpu(), find_learning_rate(model, state, steps)))
    (pairs, search), (our_pairs, ours) = found
    assert relative(our_pairs, pairs) < 1e-5
    assert ours.rates == search.rates and ours.losses == pytest.approx(search.losses, rel=1e-3)


def test_answers_with_prefixes_mixed(device, tokenizer):
    names = ["five", "base", "nine", "five", "nine", "base"]
    answers = []
    for where in ("cpu", device):
        base, _ = load_base(bundled.MODEL, torch.float32, torch.device(where))
        model = PrefixBloom(base, tokenizer)
        for name, tokens in (("five", 5), ("nine", 9)):
            model.attach(name, random_prefix(random_bloom(n_layer=4, hidden_size=192), tokens))
        options = {"max_new_tokens": 8}
        answers.append(complete(model, tokenizer, PROMPTS + PROMPTS[:2], prefix_name=names, do_sample=False, **options))
        answers[-1] += complete(model, tokenizer, PROMPTS[:3], prefix_name="five", num_beams=2, do_sample=False, **options)
        with torch.no_grad():
            ids = tokenizer(PROMPTS[0], return_tensors="pt").input_ids.to(where)
            answers[-1] += model(ids, prefix_name="nine").logits.argmax(-1).tolist()
    assert answers[0] == answers[1]


def test_the_page_trains_there(device, monkeypatch):
    examples = [tuple(torch.tensor([x]) for x in vars(example).values()) for example in examples_of([7, 12, 30, 9])]
    found = []
    for where in ("cpu", device):
        monkeypatch.setattr(plain, "DEVICE", str(where))
        monkeypatch.setattr(plain, "ACCUMULATION", 2)
        model = random_bloom().to(where)
        torch.manual_seed(1)
        found.append(plain.train(model, plain.new_encoder(model).to(where), examples))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)


@pytest.mark.parametrize("operation", [lambda x: x + torch.ones(2), lambda x: torch.cat((x, torch.ones(2)))])
def test_what_cuda_refuses_is_refused(device, operation):
    with pytest.raises(RuntimeError, match="all tensors must be on the same device"):
        operation(torch.ones(2, device=device))
    assert (torch.ones(2, device=device) + torch.ones(())).device == device


if __name__ == "__main__":
    sys.exit(pytest.main(["-n", "0", "-q", __file__]))
