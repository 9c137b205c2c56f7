import shutil

import pytest
import torch
from helpers import (
    examples_of,
    metrics_of,
    peft_model,
    plain_loss,
    prefix_config,
    random_bloom,
    relative,
    step_of,
    training_state,
)
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


def test_how_rows_share_forward_passes_does_not_change_the_losses(quick_settings, tmp_path):
    train(TrainConfig(**quick_settings))
    for number, changed in enumerate(
        (
            {"max_tokens_per_batch": 1},
            {"max_tokens_per_batch": 70},
            {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 1},
        )
    ):
        train(TrainConfig(**quick_settings | changed | {"output_dir": str(tmp_path / str(number))}))
        for ours, other in zip(metrics_of(quick_settings["output_dir"]), metrics_of(tmp_path / str(number)), strict=True):
            assert "loss" not in ours or ours["loss"] == pytest.approx(other["loss"], rel=1e-5)


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
def test_compiled_layers_give_the_same_losses(quick_settings, tmp_path, checkpointing):
    train(TrainConfig(**quick_settings))
    changed = {"torch_compile": True, "gradient_checkpointing": checkpointing, "output_dir": str(tmp_path / "compiled")}
    train(TrainConfig(**quick_settings | changed))
    *plain, plain_summary = metrics_of(quick_settings["output_dir"])
    *compiled, summary = metrics_of(tmp_path / "compiled")
    assert [line["loss"] for line in compiled] == pytest.approx([line["loss"] for line in plain], rel=1e-5)
    assert plain_summary["compile_seconds"] == 0 < summary["compile_seconds"]
