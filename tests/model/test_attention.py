import pytest
import torch
from models import examples_of, random_bloom, relative

from prefix_tuning.model import attention
from prefix_tuning.model.batch import pack


@pytest.mark.parametrize(
    "lengths, form", [([47, 48], "padded"), ([48, 48], "rows"), ([90, 7], "rows"), ([90, 7, 9], "padded"), ([47], "padded")]
)
def test_on_a_cpu_rows_that_are_long_on_average_go_one_by_one(monkeypatch, lengths, form):
    called = []
    for name in ("padded", "rows"):
        real = getattr(attention, f"attend_{name}")
        monkeypatch.setattr(attention, f"attend_{name}", lambda *x, n=name, real=real: called.append(n) or real(*x))
    (batch,) = pack(examples_of(lengths), 1000)
    random_bloom(n_layer=1).label_losses(batch, None)
    assert called == [form]


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("label_positions_only", [False, True])
def test_the_gradient_of_attention_row_by_row_is_its_derivative(monkeypatch, label_positions_only, queries):
    """Numerically, in float64: of all rows, long ones in chunks, in queries, keys, values and the prefix.

    queries: those that share a key and a value.
    """
    monkeypatch.setattr(attention, "QUERY_CHUNK", 2)
    torch.manual_seed(0)
    (batch,) = pack(examples_of([5, 1, 3]), 100)
    qkv = torch.randn(9, 2, queries + 2, 4, dtype=torch.float64, requires_grad=True)
    prefix = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    bias = attention.attention_bias(2 * queries, 3, 5, qkv)

    def attended(qkv, prefix):
        context = attention.attend_rows(qkv, prefix, batch, bias, label_positions_only)
        return context[batch.label_positions] if label_positions_only else context

    assert torch.autograd.gradcheck(attended, (qkv, prefix))
    assert torch.autograd.gradcheck(lambda prefix: attended(qkv.detach(), prefix), (prefix,))  # as in the first layer
    padded = attention.attend_padded(qkv, prefix, batch, bias)
    if label_positions_only:
        padded = padded[batch.label_positions]
    torch.testing.assert_close(attended(qkv, prefix), padded, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("prefix_length", [1, 2, 10, 64])
@pytest.mark.parametrize("queries", [1, 3])
def test_in_bf16_gradients_stay_within_two_percent_of_float64s(monkeypatch, prefix_length, queries):
    """Of rows from 1 to 1,500 tokens, from the same numbers. bf16 keeps 8 bits, and a number passes about four roundings."""
    monkeypatch.setattr(attention, "attends_in_bf16", lambda head_dim: True)
    torch.manual_seed(0)
    for length in (1, 2, 3, 10, 63, 127, 128, 129, 200, 256, 257, 300, 1500):
        (batch,) = pack(examples_of([length]), 1000)
        inputs = torch.randn(length, 2, queries + 2, 64).bfloat16(), torch.randn(2, 2, prefix_length, 64).bfloat16()
        factors, found = torch.randn(length, 2 * queries, 64).bfloat16(), []
        for dtype in (torch.bfloat16, torch.float64):
            qkv, prefix = (x.to(dtype).requires_grad_() for x in inputs)
            bias = attention.attention_bias(2 * queries, prefix_length, length, qkv)
            context = attention.attend_rows(qkv, prefix.float() if dtype == torch.bfloat16 else prefix, batch, bias, False)
            assert context.dtype == dtype
            found.append([context, *torch.autograd.grad((context * factors.to(dtype)).sum(), (qkv, prefix))])
        for low, exact in zip(*found, strict=True):
            assert relative(low.double(), exact) < 0.02


def test_a_longer_prefix_leaves_the_distances_between_tokens(monkeypatch):
    short, long = (attention.attention_bias(4, tokens, 6, torch.zeros(1)) for tokens in (3, 8))
    # The row, and the prefix tokens next to it. The other prefix tokens are farther away.
    assert torch.equal(short[..., 3:], long[..., 8:])
    assert torch.equal(short[..., :3], long[..., 5:8])
    # The last prefix token is one position in front of the row's first token.
    slopes = long[0, :, 0, 7].abs()
    assert torch.allclose(long[0, :, 0, 0].abs(), 8 * slopes) and torch.allclose(long[0, :, 5, 0].abs(), 13 * slopes)
    assert torch.allclose(slopes, 2.0 ** -(2.0 * torch.arange(1, 5)))
    assert long[0, :, 0, 9].isneginf().all()  # the future
