from itertools import accumulate

import pytest
import torch
from models import examples_of

from prefix_tuning.model.batch import EMPTY_BATCH, IGNORED, Grid, count_labels, pack


@pytest.mark.parametrize("lengths", [[5], [4, 4, 4], [3, 9, 1, 7, 2, 30], [1, 1]])
@pytest.mark.parametrize("max_tokens", [1, 16, 1000])
def test_packing_keeps_every_token_and_label_once(lengths, max_tokens):
    examples = examples_of(lengths)
    batches = list(pack(examples, max_tokens))
    assert all(batch.rows == 1 or len(batch.input_ids) <= max_tokens for batch in batches)
    packed = [token for batch in batches for token in batch.input_ids.tolist()]
    assert sorted(packed) == sorted(token for example in examples for token in example.input_ids)
    for batch in batches:
        # A label is predicted one position before the token itself.
        assert torch.equal(batch.input_ids[batch.label_positions + 1], batch.labels)
        for first, start, length in zip(batch.first_labels, accumulate([0, *batch.lengths]), batch.lengths, strict=False):
            in_row = [index - start for index in batch.label_positions.tolist() if start <= index < start + length]
            assert first == min(in_row, default=length)
        values = torch.randn(len(batch.input_ids), 4)
        grid = batch.to_grid(values)
        assert grid.shape == (batch.rows, batch.max_length, 4)
        assert torch.equal(batch.from_grid(grid), values)
    labels = sum(label != IGNORED for example in examples for label in example.labels[1:])
    assert sum(len(batch.labels) for batch in batches) == labels == count_labels(examples)


@pytest.mark.parametrize("lengths, tokens, labels", [([5], 8, 8), ([3, 9, 1, 4], 24, 16), ([16], 16, 8), ([1], 8, 0)])
def test_a_filled_batch_has_multiples_of_tokens_and_labels_and_the_same_rows_first(lengths, tokens, labels):
    (batch,) = pack(examples_of(lengths), 100)
    filled = batch.filled(8)
    assert len(filled.input_ids) == sum(filled.lengths) == tokens
    assert len(filled.labels) == len(filled.label_positions) == labels
    for name in ("input_ids", "label_positions", "labels", "lengths", "first_labels"):
        before, after = list(getattr(batch, name)), list(getattr(filled, name))
        assert after[: len(before)] == before
    values = torch.randn(tokens, 4)
    assert torch.equal(filled.from_grid(filled.to_grid(values)), values)


def test_a_batch_moves_with_all_its_tensors():
    for lengths in ([4, 9], [4, 4]):
        (batch,) = pack(examples_of(lengths), 100)
        same, elsewhere = (vars(batch.to(torch.device(name))) for name in ("cpu", "meta"))
        assert same.keys() == elsewhere.keys() == vars(batch).keys()
        for name, value in vars(batch).items():
            tensors = flat_tensors(value)
            for found, moved, tensor in zip(flat_tensors(same[name]), flat_tensors(elsewhere[name]), tensors, strict=True):
                assert torch.equal(found, tensor) and moved.is_meta and moved.shape == tensor.shape
            assert tensors or same[name] is elsewhere[name] is value


def flat_tensors(value):
    return [value] if isinstance(value, torch.Tensor) else value if isinstance(value, Grid) else []


@pytest.mark.parametrize("lengths", [[4, 4], [3, 9, 1, 7]])
def test_the_gradient_of_the_grid_is_that_of_plain_indexing(lengths):
    """Also after the end of a row, where the grid's queries read real keys: their gradients must not reach a real token."""
    (batch,) = pack(examples_of(lengths), 100)
    lengths = batch.lengths
    values = torch.randn(len(batch.input_ids), 3, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(batch.rows, batch.max_length, batch.max_length, dtype=torch.float64)
    mixed = batch.from_grid(weights.tril() @ batch.to_grid(values))
    rows = values.split(lengths)
    expected = torch.cat([weight[: len(row), : len(row)].tril() @ row for weight, row in zip(weights, rows, strict=True)])
    factors = torch.randn_like(expected)
    ours, plain = (torch.autograd.grad((result * factors).sum(), values)[0] for result in (mixed, expected))
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)


def test_a_batch_is_filled_as_far_as_it_may_be():
    assert [batch.lengths for batch in pack(examples_of([3, 4, 3, 10, 2, 11]), 10)] == [[11], [10], [4, 3], [3, 2]]
    assert [batch.lengths for batch in pack(examples_of([5] * 5), 10)] == [[5, 5], [5, 5], [5]]
    # As large as they must be for two batches, though nine would fit.
    assert [batch.lengths for batch in pack(examples_of([3] * 4), 11)] == [[3, 3], [3, 3]]
    assert (EMPTY_BATCH.input_ids.tolist(), EMPTY_BATCH.lengths, EMPTY_BATCH.first_labels) == ([0], [1], [1])
    assert len(EMPTY_BATCH.labels) == 0 and EMPTY_BATCH.grid is None
