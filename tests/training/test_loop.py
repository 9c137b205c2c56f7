import copy
import shutil

import pytest
import torch
from models import (
    STANDSTILL,
    examples_of,
    peft_model,
    plain_loss,
    prefix_config,
    random_bloom,
    relative,
    step_of,
    training_state,
)
from runs import metrics_of
from safetensors.torch import load_file

from prefix_tuning import bundled
from prefix_tuning.files.names import ENCODER_FILE
from prefix_tuning.model.batch import IGNORED, pack
from prefix_tuning.model.bloom import Bloom
from prefix_tuning.model.encoder import PrefixEncoder
from prefix_tuning.training.loop import optimizer_step
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig


def gradients(model, encoder, examples):
    """One step's gradients in the encoder, as the loop computes them, by name; its loss and the prefix that gave it."""
    found = {}
    for name, parameter in encoder.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: found.update({name: p.grad.clone()}))
    prefix, loss, _ = optimizer_step(model, training_state(encoder), step_of(examples))
    return found, loss.item(), prefix


def bundled_bloom():
    return Bloom.from_pretrained(bundled.resolve(bundled.MODEL)).eval().requires_grad_(False)


@pytest.mark.parametrize("base", [random_bloom, bundled_bloom])
@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("lengths", [[9], [7, 12, 3, 30]], ids=["one row", "ragged rows"])
def test_logits_loss_and_encoder_gradients_equal_pefts(base, projection, lengths):
    model = base()
    torch.manual_seed(1)
    ours = PrefixEncoder(prefix_config(model, projection=projection))
    theirs = peft_model(base(), ours).eval()
    examples = examples_of(lengths)

    for example in examples:
        (batch,) = pack([example], 100)
        logits = theirs(input_ids=torch.tensor([example.input_ids])).logits[0]
        assert relative(model.lm_head(model.packed_hidden(batch, ours.bake())), logits[batch.label_positions]) < 1e-5

    prefix = ours.bake()
    found, loss, used = gradients(model, ours, examples)
    assert torch.equal(prefix, used)
    labels = sum(label != IGNORED for example in examples for label in example.labels[1:])
    expected = 0.0
    for example in examples:  # PEFT's encoder runs for every micro-batch; autograd adds up in its weights
        ids, wanted = torch.tensor([example.input_ids]), torch.tensor([example.labels])
        part = theirs(input_ids=ids, labels=wanted).loss * sum(label != IGNORED for label in example.labels[1:]) / labels
        part.backward()
        expected += part.item()
    assert loss == pytest.approx(expected, rel=1e-5)
    expected = {name: parameter.grad for name, parameter in theirs.prompt_encoder["default"].named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        assert relative(gradient, expected[name]) < 1e-5, name


def test_the_loss_is_the_token_mean_over_the_step():
    model = random_bloom()
    encoder = PrefixEncoder(prefix_config(model))
    examples = examples_of([40, 6, 3])
    _, loss, prefix = gradients(model, encoder, examples)
    labels = sum(label != IGNORED for example in examples for label in example.labels[1:])
    assert loss == pytest.approx(plain_loss(model, examples, prefix).item() / labels, rel=1e-5)


def figures_of(folder):
    """Loss and gradient norm of every step."""
    return [(line["loss"], line["grad_norm"]) for line in metrics_of(folder) if "loss" in line]


def test_how_rows_share_forward_passes_does_not_change_losses_and_gradients(quick_settings, tmp_path):
    quick_settings |= {"learning_rate": STANDSTILL}
    train(TrainConfig(**quick_settings))
    for number, changed in enumerate(
        (
            {"max_tokens_per_batch": 1},
            {"max_tokens_per_batch": 70},
            {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1},
        )
    ):
        train(TrainConfig(**quick_settings | changed | {"output_dir": str(tmp_path / str(number))}))
        for ours, other in zip(figures_of(quick_settings["output_dir"]), figures_of(tmp_path / str(number)), strict=True):
            assert ours == pytest.approx(other, rel=1e-5)


def test_max_grad_norm_0_does_not_clip(quick_settings, tmp_path):
    quick_settings |= {"model_name_or_path": bundled.MODEL}  # its gradients are longer than 1
    weights = {}
    for norm in (0, 1e9, 1.0):
        train(TrainConfig(**quick_settings | {"max_grad_norm": norm, "output_dir": str(tmp_path / str(norm))}))
        weights[norm] = load_file(tmp_path / str(norm) / ENCODER_FILE)
    assert all(torch.equal(weights[0][name], weights[1e9][name]) for name in weights[0])
    assert not all(torch.equal(weights[0][name], weights[1.0][name]) for name in weights[0])  # it would have clipped


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_give_the_same_losses_and_gradients(quick_settings, tmp_path, checkpointing, capsys):
    quick_settings |= {"learning_rate": STANDSTILL}
    train(TrainConfig(**quick_settings))
    assert "compiling" not in capsys.readouterr().out
    changed = {"torch_compile": True, "gradient_checkpointing": checkpointing, "output_dir": str(tmp_path / "compiled")}
    train(TrainConfig(**quick_settings | changed))
    out = capsys.readouterr().out
    assert 0 < out.index("compiling the layers") < out.index("compiled in ")
    for ours, plain in zip(figures_of(tmp_path / "compiled"), figures_of(quick_settings["output_dir"]), strict=True):
        assert ours == pytest.approx(plain, rel=1e-5)
    summary, plain_summary = (metrics_of(folder)[-1] for folder in (tmp_path / "compiled", quick_settings["output_dir"]))
    assert plain_summary["compile_seconds"] == 0 < summary["compile_seconds"]


@pytest.mark.parametrize("prompt_share", [0.3, 0.98], ids=["28 labels", "one label"])
def test_in_fp16_a_step_with_confident_labels_has_the_gradient_of_float64(prompt_share):
    """The loss scale is the 2**16 that training begins with, which fp16 cannot hold. Each label is the likeliest token."""
    model = random_bloom(dtype=torch.float64)
    model.transformer.ln_f.weight.mul_(8)
    torch.manual_seed(1)
    encoder = PrefixEncoder(prefix_config(model))
    examples = examples_of([40], prompt_share=prompt_share)
    (batch,) = pack(examples, 100)
    batch.labels = model.lm_head(model.packed_hidden(batch, encoder.bake().double())).argmax(-1)
    step, found = step_of(examples)._replace(batches=[batch]), []
    for dtype in (torch.float64, torch.float16):
        copied = copy.deepcopy(encoder).to(torch.promote_types(dtype, torch.float32))
        state = training_state(copied, loss_scaling=dtype == torch.float16)
        scale, gradients = state.scaler.get_scale(), []
        copied.transform[2].weight.register_post_accumulate_grad_hook(
            lambda p, found=gradients: found.append(p.grad.clone())
        )
        optimizer_step(copy.deepcopy(model).to(dtype), state, step)
        found.append(gradients[0].double() / scale)
    exact, ours = found
    # A logit of 8 to 16 is rounded to a 128th, and so is a small probability.
    assert scale == 2**16 and relative(ours, exact) < 1 / 32


def test_a_gradient_that_overflows_skips_the_step_and_halves_the_loss_scale():
    """fp16 on a CPU. The scale is so large at first that gradients overflow, until it has been halved often enough; from
    there on, also from a checkpoint, updates are those of a base in float32 without a scale.
    """
    model, step = random_bloom(dtype=torch.float16), step_of(examples_of([7, 12, 30]))

    def new_state(loss_scaling):
        torch.manual_seed(0)
        return training_state(PrefixEncoder(prefix_config(model)), 1e-2, loss_scaling)

    scaled, resumed, exact = new_state(True), new_state(True), new_state(False)
    scaled.scaler.load_state_dict(scaled.scaler.state_dict() | {"scale": 2.0**24})
    start, number = copy.deepcopy(scaled.encoder.state_dict()), 0
    while scaled.progress.updates == 0:
        scale, number = scaled.scaler.get_scale(), number + 1
        prefix, loss, grad_norm = optimizer_step(model, scaled, step._replace(number=number))
        scaled.advance(step._replace(number=number), prefix, loss, grad_norm)
        assert loss.isfinite() and scaled.progress.learning_rate == 0.1 * scaled.schedule(0)  # the schedule counts updates
        if scaled.progress.updates == 0:
            assert not grad_norm.isfinite() and scaled.scaler.get_scale() == scale / 2
            assert all(torch.equal(tensor, start[name]) for name, tensor in scaled.encoder.state_dict().items())
    scaled.check_finite()  # a skipped step is no fault
    assert 1 < number < 20

    resumed.encoder.load_state_dict(scaled.encoder.state_dict())
    resumed.restore({name: tensor.clone() for name, tensor in scaled.tensors().items()}, scaled.numbers())
    assert resumed.scaler.get_scale() == scaled.scaler.get_scale() < 2**24 and resumed.progress.updates == 1
    for state in (scaled, resumed):
        prefix, _, grad_norm = optimizer_step(model, state, step)
    exact.progress.updates = 1
    same, _, exact_norm = optimizer_step(model.float(), exact, step)
    assert grad_norm.item() == pytest.approx(exact_norm.item(), rel=1e-2)
    for name, tensor in scaled.encoder.state_dict().items():
        assert torch.equal(tensor, resumed.encoder.state_dict()[name])
        assert not torch.equal(tensor, start[name])
    assert torch.equal(prefix, same)  # the first update was at the rate 0, as the warm-up begins
