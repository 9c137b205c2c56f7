"""Decoders over packed rows, against transformers' own forward of each row with the prefix in a DynamicCache."""

import pytest
import torch
import torch.nn.functional as F
from models import examples_of, loss_and_gradient, random_decoder, relative

from prefix_tuning.base_model.loading import wrap_layers
from prefix_tuning.generation.cache import CACHE
from prefix_tuning.model import attention
from prefix_tuning.model.batch import pack
from prefix_tuning.model.bloom import prefix_cache
from prefix_tuning.model.decoder import FAMILIES, Decoder
from prefix_tuning.model.encoder import key_value_shape

# Families whose layer norms, rotation and softmax compute in the model's dtype, float64 included.
IN_FLOAT64 = {"gpt_neox", "phi", "starcoder2"}
# Short rows run as a grid, and long ones row by row. The sliding windows are 8 tokens.
EXAMPLES = examples_of([5, 9, 31, 50, 60], vocab_size=99)
MAX_TOKENS = 60


def random_prefix_of(model, tokens=4):
    layers, heads, head_dim = key_value_shape(model.config)
    return torch.randn(layers, 2, heads, tokens, head_dim, generator=torch.Generator().manual_seed(1)).to(model.dtype)


def cached_loss(model, prefix):
    loss = torch.zeros((), dtype=torch.float64)
    for example in EXAMPLES:
        ids, labels = torch.tensor([example.input_ids]), torch.tensor(example.labels)
        logits = model(ids, **{CACHE: prefix_cache([prefix])[0]}).logits[0, :-1]
        loss += F.cross_entropy(logits, labels[1:], reduction="sum")
    return loss


def packed_loss(model, prefix):
    return sum(model.label_losses(batch, prefix).sum() for batch in pack(EXAMPLES, MAX_TOKENS))


def assert_equal(ours, theirs, bound):
    (loss, gradient), (expected_loss, expected) = ours, theirs
    assert loss == pytest.approx(expected_loss, rel=bound)
    assert (gradient - expected).abs().max() <= bound * expected.abs().max()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_loss_and_gradient_equal_those_of_transformers(family, tied):
    dtype, bound = (torch.float64, 1e-9) if family in IN_FLOAT64 else (torch.float32, 1e-5)
    model = random_decoder(family, dtype, tie_word_embeddings=tied)
    prefix = random_prefix_of(model)
    expected = loss_and_gradient(lambda leaf: cached_loss(model, leaf), prefix)
    ours = loss_and_gradient(lambda leaf: packed_loss(model, leaf), prefix)
    assert_equal(ours, expected, bound)
    wrap_layers(model, gradient_checkpointing=True, torch_compile=False)
    loss, gradient = loss_and_gradient(lambda leaf: packed_loss(model, leaf), prefix)
    assert loss == ours[0]
    assert torch.equal(gradient, ours[1])


@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3"])
def test_bf16_is_near_float32(family):
    """The bound: bf16 keeps 8 bits, and a number passes about 10 roundings on its way through 3 layers and back."""
    model = random_decoder(family, torch.bfloat16)
    prefix = random_prefix_of(model).float()
    loss, gradient = loss_and_gradient(lambda leaf: packed_loss(model, leaf), prefix)
    expected_loss, expected = loss_and_gradient(lambda leaf: packed_loss(model.float(), leaf), prefix)
    assert loss == pytest.approx(expected_loss, rel=10 * 2**-8)
    assert relative(gradient, expected) < 10 * 2**-8


@pytest.mark.parametrize("in_bf16, expected", [(False, torch.float32), (True, torch.bfloat16)])
def test_heads_with_the_usual_scale_attend_in_the_dtype_of_rows(monkeypatch, in_bf16, expected):
    """32 ** -0.5 * 32 ** 0.5 is not 1 in floating point, and yet the query needs no other scale."""
    assert 32**-0.5 * 32**0.5 != 1
    monkeypatch.setattr(attention, "attends_in_bf16", lambda head_dim: in_bf16)
    model, found = random_decoder("qwen3", torch.bfloat16, head_dim=32), set()

    def attend(*inputs, **scores):
        context = Decoder.attend_in(0)(*inputs, **scores)
        found.add(context.dtype)
        return context

    model.attend_in = lambda layer: attend
    model.label_losses(next(pack(examples_of([90, 80], vocab_size=99), 200)), random_prefix_of(model))
    assert found == {expected}


def test_transformers_own_forward_stays():
    model = random_decoder("gemma2")
    ids = torch.tensor([EXAMPLES[0].input_ids])
    before = model(ids).logits
    packed_loss(model, random_prefix_of(model))
    assert torch.equal(model(ids).logits, before)
