"""What is put on the layers from outside changes no number."""

import copy
import functools

import pytest
import torch
from models import examples_of, loss_and_gradient, prefix_config, random_bloom, random_decoder, random_prefix, relative

from prefix_tuning.base_model.loading import compile_now, wrap_layers
from prefix_tuning.errors import UserError
from prefix_tuning.generation.prefix_bloom import PrefixBloom
from prefix_tuning.model.batch import pack
from prefix_tuning.model.encoder import PrefixEncoder


@pytest.mark.parametrize("options", [{}, {"apply_residual_connection_post_layernorm": True}, {"n_head": 1}])
def test_gradient_checkpointing_gives_the_same_bits_and_computes_each_layer_twice(options, monkeypatch):
    model, examples = random_bloom(**options), examples_of([7, 12, 30])
    prefix, results, calls = PrefixEncoder(prefix_config(model)).bake(), [], []
    model.transformer.h[0].mlp.register_forward_pre_hook(lambda *_: calls.append("transformers"))  # is not called
    model.transformer.h[0].input_layernorm.register_forward_pre_hook(lambda *_: calls.append("packed"))
    for checkpointing in (False, True):
        wrapped = copy.deepcopy(model)
        wrap_layers(wrapped, checkpointing, torch_compile=False)
        results.append(loss_and_gradient(lambda x, m=wrapped: m.label_losses(*_batch(examples), x).sum(), prefix))
    (loss, gradient), (other_loss, other_gradient) = results
    assert loss == other_loss and torch.equal(gradient, other_gradient)
    assert calls == ["packed"] * 3


def _batch(examples):
    return pack(examples, 1000)


@pytest.mark.parametrize("family", ["bloom", "llama"])
def test_compiled_layers_give_the_same_gradient_and_only_training_uses_them(family, monkeypatch):
    if family == "llama":  # traced as for Bloom, but run by torch's own kernels: compiling them takes 10 s
        compile = functools.partial(torch.compile, backend="eager")
        monkeypatch.setattr(torch, "compile", lambda forward, *, dynamic: compile(forward, dynamic=dynamic))
    model = random_bloom() if family == "bloom" else random_decoder(family, num_hidden_layers=1)
    examples = examples_of([7, 12, 30], vocab_size=99)
    prefix, batches = PrefixEncoder(prefix_config(model)).bake(), list(pack(examples, 40))
    plain = copy.deepcopy(model)
    wrap_layers(model, gradient_checkpointing=False, torch_compile=True)
    assert compile_now(model, batches, prefix) > 0
    results = [
        loss_and_gradient(lambda x, m=m: sum(m.label_losses(b, x).sum() for b in batches), prefix) for m in (plain, model)
    ]
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-5) and relative(results[1][1], results[0][1]) < 1e-5
    with torch.no_grad():
        assert all(torch.equal(plain.label_losses(batch, prefix), model.label_losses(batch, prefix)) for batch in batches)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_copy_of_a_model_runs_its_own_wrapped_layers(compiled, monkeypatch):
    """Only its own configuration asks them for packed attention."""
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: forward)
    model, (batch,) = random_decoder("llama"), _batch(examples_of([7, 12, 30], vocab_size=99))
    prefix = random_prefix(model)
    expected = loss_and_gradient(lambda x: model.label_losses(batch, x).sum(), prefix)
    wrap_layers(model, gradient_checkpointing=True, torch_compile=compiled)
    found = loss_and_gradient(lambda x: PrefixBloom(model).label_losses(batch, x).sum(), prefix)
    assert found[0] == expected[0] and torch.equal(found[1], expected[1])


def test_where_nothing_can_be_compiled_a_line_says_so(monkeypatch):
    def fail(graph, inputs):
        raise RuntimeError("no compiler is found")

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda forward, *, dynamic: compile(forward, dynamic=dynamic, backend=fail))
    model = random_bloom(n_layer=1)
    wrap_layers(model, gradient_checkpointing=False, torch_compile=True)
    with pytest.raises(UserError, match=r"--torch_compile does not work here: .*; leave the flag out"):
        compile_now(model, pack(examples_of([7]), 100), PrefixEncoder(prefix_config(model)).bake())
