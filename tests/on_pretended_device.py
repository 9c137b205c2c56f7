"""Runs the code of a GPU on a pretended one (pretended.py): the same figures as on the CPU, and no tensor is left there.

test_pretended_device.py runs this file in a process of its own.
"""

import re
import sys

import pretended
import pytest
import torch
from answers import PROMPTS, complete
from datasets import Dataset
from models import examples_of, prefix_config, random_bloom, random_prefix, relative, step_of, training_state
from rows import write_jsonl
from runs import metrics_of
from safetensors.torch import load_file, save_file

from prefix_tuning import bundled, plain
from prefix_tuning.base_model.loading import compile_now, load_base
from prefix_tuning.evaluation import evaluate_rows
from prefix_tuning.files.prefixes import load_prefix
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.model.batch import pack
from prefix_tuning.model.distillation import Distillation
from prefix_tuning.model.encoder import PrefixEncoder
from prefix_tuning.training import run
from prefix_tuning.training.checkpoints import load_checkpoint, save_checkpoint
from prefix_tuning.training.learning_rate import find_learning_rate
from prefix_tuning.training.loop import optimizer_step
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.start import new_encoder, start_pairs, text_prefix
from prefix_tuning.training.steps import Steps
from prefix_tuning.training.teacher import read_pairs


@pytest.fixture
def device():
    return pretended.device()


def three_steps(where, dtype=torch.float32, loss_scaling=False, text=()):
    """Losses and gradient norms of three steps, and the state after them. text: token ids that are distilled."""
    model = random_bloom(dtype=dtype).to(where)
    objective = Distillation(model, read_pairs(model, text, 5)) if text else model
    torch.manual_seed(1)
    state = training_state(PrefixEncoder(prefix_config(model)).to(where), 1e-2, loss_scaling)
    assert {getattr(state, name).device for name in state.STATISTICS} == {torch.device(where)}
    figures = []
    for number in range(1, 4):
        step = step_of(examples_of([7, 12, 30], seed=number), max_tokens=30, number=number)
        prefix, loss, norm = optimizer_step(objective, state, step)
        state.advance(step, prefix, loss, norm)
        figures += [loss.item(), norm.item()]
    return figures, state


@pytest.mark.parametrize("dtype, loss_scaling", [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True)])
def test_steps_give_the_same_figures_as_on_the_cpu(device, dtype, loss_scaling):
    (ours, state), (expected, _) = (three_steps(where, dtype, loss_scaling) for where in (device, "cpu"))
    assert {getattr(state, name).device for name in state.STATISTICS} == {device}
    assert {tensor.device for tensor in state.encoder.parameters()} == {device}
    # Attention adds up in another order in a GPU's padded grid than in a CPU's row by row.
    assert ours == pytest.approx(expected, rel=1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype, loss_scaling", [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True)])
def test_a_text_is_distilled_with_the_same_figures_as_on_the_cpu(device, dtype, loss_scaling):
    text = torch.randint(4, 99, (13,), generator=torch.Generator().manual_seed(0)).tolist()
    (ours, _), (expected, _) = (three_steps(where, dtype, loss_scaling, text) for where in (device, "cpu"))
    # A divergence is a difference of logits. Each is off by up to 1/16 in bf16.
    assert ours == pytest.approx(expected, **({"rel": 1e-3} if dtype == torch.float32 else {"rel": 0.1, "abs": 1e-3}))
    model = random_bloom().to(device)
    assert start_pairs(model, text, 4, "chunks", 5).device == device


def test_a_checkpoint_is_resumed_on_the_device(device, tmp_path):
    _, state = three_steps(device)
    state.note_evaluation(1.0, keep_best=True)
    # On the device the best weights would take up memory beside the current ones.
    assert {tensor.device.type for tensor in state.best_weights.values()} == {"cpu"}
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
    ours, theirs = resumed.tensors(), state.tensors()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name].cpu(), theirs[name].cpu()) for name in ours)


def test_losses_of_rows_and_of_the_base_alone(device):
    plain_model, model = random_bloom(), random_bloom().to(device)
    examples = examples_of([7, 12, 30])
    rows = Dataset.from_list([vars(example) for example in examples])

    def both(row, tokens):
        return [row, tokens]

    for prefix in (None, random_prefix(plain_model)):
        ours, likeliest = evaluate_rows(model, rows, None if prefix is None else prefix.to(device), 30, both)
        plain, plain_likeliest = evaluate_rows(plain_model, rows, prefix, 30, both)
        assert ours == pytest.approx(plain, rel=1e-5) and likeliest == plain_likeliest
    # The passes that make wrapped layers compile; the result is their seconds.
    assert compile_now(model, pack(examples, 30), random_prefix(plain_model).to(device)) > 0


def test_a_text_start_and_the_search_for_a_rate(device, tokenizer):
    config = TrainConfig(prefix_init="text", init_text="请用一句话回答。", num_virtual_tokens=6)
    found = []
    for where in ("cpu", device):
        model = random_bloom().to(where)
        pairs = text_prefix(model, tokenizer, config.init_text, 6)
        torch.manual_seed(1)
        encoder = new_encoder(run.prefix_config_of(config, model), model, tokenizer, config.prefix_init, config.init_text)
        assert {tensor.device.type for tensor in encoder.state_dict().values()} == {"cpu"}
        state = training_state(encoder.to(where))
        state.progress.peak_learning_rate = None
        steps = Steps(Dataset.from_list([vars(example) for example in examples_of([7, 12, 30])]), 2, total=2, max_tokens=30)
        found.append((pairs.cpu(), find_learning_rate(model, state, steps)))
    (pairs, search), (our_pairs, ours) = found
    assert relative(our_pairs, pairs) < 1e-5
    assert ours.rates == search.rates and ours.losses == pytest.approx(search.losses, rel=1e-3)


def test_a_run_gives_the_same_figures_as_on_the_cpu(device, quick_settings, tmp_path, monkeypatch):
    settings = quick_settings | {
        "prefix_init": "text",
        "init_text": "请用一句话回答。",
        "eval_fraction": 0.1,
        "save_best": True,
    }
    figures, prefixes = [], []
    for where in (torch.device("cpu"), device):
        monkeypatch.setattr(run, "resolve_device", lambda name, where=where: where)
        settings["output_dir"] = str(tmp_path / where.type)
        run.train(TrainConfig(**settings))
        lines = metrics_of(settings["output_dir"])
        figures.append([line[name] for line in lines for name in ("loss", "grad_norm", "eval_loss") if name in line])
        prefixes.append(load_prefix(settings["output_dir"])[0])
    assert figures[1] == pytest.approx(figures[0], rel=1e-4) and len(figures[0]) == 8
    assert relative(prefixes[1], prefixes[0]) < 1e-3


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
        assert {prefix.device for prefix in model.prefixes.values()} == {torch.device(where)}
    assert answers[0] == answers[1]


def test_passes_without_a_mask_or_after_a_cache_or_without_a_prompt(device):
    found = []
    for where in ("cpu", device):
        model = PrefixBloom(random_bloom().to(where))
        model.attach("own", random_prefix(random_bloom()))
        ids = torch.tensor([[9, 8, 7, 6]], device=where)
        begun = model(ids[:, :3], prefix_name="own", use_cache=True)
        found.append([begun.logits.cpu(), model(ids[:, 3:], begun.past_key_values).logits.cpu()])
        begun = model.generate(prefix_name="own", bos_token_id=1, max_new_tokens=5, do_sample=False)
        found[-1].append(begun.cpu())
    (first, following, ids), ours = found
    assert relative(ours[0], first) < 1e-5 and relative(ours[1], following) < 1e-5 and torch.equal(ours[2], ids)


def test_the_page_trains_and_answers_on_the_device(device, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plain, "ACCUMULATION", 2)
    # safetensors knows CUDA, but not this device.
    monkeypatch.setattr(
        plain, "save_file", lambda tensors, path: save_file({name: x.cpu() for name, x in tensors.items()}, path)
    )
    monkeypatch.setattr(
        plain, "load_file", lambda path, device="cpu": {name: x.to(device) for name, x in load_file(path).items()}
    )
    rows = write_jsonl(
        tmp_path / "rows.jsonl", *({"instruction": f"{n}加1等于多少？", "output": str(n + 1)} for n in range(7))
    )
    said = []
    for where in ("cpu", device):
        monkeypatch.setattr(plain, "DEVICE", str(where))
        plain.main(rows)
        said.append(capsys.readouterr().out)
    losses, ours = ([float(number) for number in re.findall(r"(?:loss|norm) (\d+\.\d+)", text)] for text in said)
    assert ours == pytest.approx(losses, abs=2e-4) and len(losses) == 2
    assert said[1].partition("\n\n")[2] == said[0].partition("\n\n")[2] and said[0].count("with prefix") == 3


@pytest.mark.parametrize(
    "operation", [lambda x: x + torch.ones(2), lambda x: torch.cat((x, torch.ones(2))), lambda x: torch.ones(2)[x > 0]]
)
def test_what_cuda_refuses_is_refused(device, operation):
    with pytest.raises(RuntimeError, match="all tensors must be on the same device"):
        operation(torch.ones(2, device=device))
    ones = torch.ones(2, device=device)
    assert (ones + torch.ones(())).device == ones[torch.tensor([1, 0])].device == device


if __name__ == "__main__":
    sys.exit(pytest.main(["-n", "0", "-q", __file__]))
