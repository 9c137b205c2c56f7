import pytest
import torch

from prefix_tuning.study.mixing import mixtures, passes_of_mixtures
from prefix_tuning.study.scoring import score_prefix


@pytest.fixture(scope="module")
def two(tuned_model):
    """Two prefixes of one length: the last 10 tokens of `short`, and all 10 of `sentence`."""
    return tuned_model.prefixes["short"][:, :, :, 6:], tuned_model.prefixes["sentence"]


def test_interpolation_begins_and_ends_at_the_prefixes_themselves(tuned_model, batches, two):
    passed = []
    found = mixtures(tuned_model, batches, *two, passed.append)
    assert len(found["between"]) == 11 and sum(passed) == 48 * passes_of_mixtures(*two)
    for end, alone, prefix in zip((found["between"][0], found["between"][-1]), found["alone"], two, strict=True):
        expected = {name: score_prefix(tuned_model, rows, prefix)._asdict() for name, rows in batches.items()}
        assert end == alone == expected
    middle = {name: score_prefix(tuned_model, rows, (two[0] + two[1]) / 2).loss for name, rows in batches.items()}
    assert {name: found["between"][5][name]["loss"] for name in batches} == pytest.approx(middle, abs=1e-5)
    swapped = torch.stack((two[0][:, 0], two[1][:, 1]), dim=1)
    assert found["exchanged"][0]["short"] == score_prefix(tuned_model, batches["short"], swapped)._asdict()
    swapped = torch.stack((two[1][:, 0], two[0][:, 1]), dim=1)
    assert found["exchanged"][1]["short"] == score_prefix(tuned_model, batches["short"], swapped)._asdict()


def test_cosines_by_layer(tuned_model, batches, two):
    rows = {"short": batches["short"][:1]}
    same = mixtures(tuned_model, rows, two[0], two[0] * torch.tensor([2.0, -3.0]).view(1, 2, 1, 1, 1))
    assert same["cosine"][0] == pytest.approx([1] * 4, abs=1e-6) and same["cosine"][1] == pytest.approx([-1] * 4, abs=1e-6)


def test_prefixes_of_two_lengths_can_only_follow_each_other(tuned_model, batches):
    first, second = tuned_model.prefixes["short"], tuned_model.prefixes["sentence"]
    passed = []
    found = mixtures(tuned_model, {"short": batches["short"]}, first, second, passed.append)
    assert sum(passed) == 24 * passes_of_mixtures(first, second)
    assert found["exchanged"] is found["between"] is found["cosine"] is None
    for scores, pair in zip(found["after"], ((first, second), (second, first)), strict=True):
        assert scores["short"] == score_prefix(tuned_model, batches["short"], torch.cat(pair, dim=3))._asdict()
    assert found["after"][0] != found["after"][1]
