import pytest

from prefix_tuning.study import removal
from prefix_tuning.study.removal import removals
from prefix_tuning.study.scoring import score
from prefix_tuning.study.shares import attention_shares


@pytest.fixture(scope="module")
def found(tuned_model, batches):
    prefix = tuned_model.prefixes["short"]
    shares = attention_shares(tuned_model, batches["short"], prefix)["share"]
    return removals(tuned_model, batches["short"], prefix, shares), prefix, shares


def test_every_part_is_removed_once_and_the_worst_comes_first(found):
    parts = found[0]["parts"]
    kinds = [part["kind"] for part in parts]
    assert [kinds.count(kind) for kind in ("layer", "head", "token", "keys only", "values only")] == [4, 24, 16, 1, 1]
    assert len({tuple(part.get(key) for key in ("kind", "layer", "head", "token")) for part in parts}) == len(parts)
    losses = [part["loss"] for part in parts]
    assert losses == sorted(losses, reverse=True)


def test_figures_are_those_of_prefixes_that_never_had_the_part(found, tuned_model, batches):
    record, prefix, _ = found
    by_place = {(part["kind"], part.get("token")): part for part in record["parts"]}
    for key, variant in {
        ("token", 0): prefix[:, :, :, 1:],  # the farthest: without it, all others stay where they are
        ("keys only", None): prefix * prefix.new_tensor([1, 0]).view(1, 2, 1, 1, 1),
        ("values only", None): prefix * prefix.new_tensor([0, 1]).view(1, 2, 1, 1, 1),
    }.items():
        expected = score(tuned_model, batches["short"], variant)
        assert by_place[key]["loss"] == pytest.approx(expected.loss, abs=1e-5)
        assert by_place[key]["exact_match"] == expected.exact_match
    assert record["whole"] == score(tuned_model, batches["short"], prefix)._asdict()
    assert record["base"] == score(tuned_model, batches["short"], None)._asdict()


def test_of_many_heads_those_with_the_largest_share_are_removed(found, tuned_model, batches, monkeypatch):
    _, prefix, shares = found
    monkeypatch.setattr(removal, "MOST_HEADS", 3)
    record = removals(tuned_model, batches["short"][:1], prefix, shares)
    heads = {(part["layer"], part["head"]) for part in record["parts"] if part["kind"] == "head"}
    every = sorted(((layer, head) for layer in range(4) for head in range(6)), key=lambda place: -shares[place[0]][place[1]])
    assert heads == set(every[:3]) and record["left_out"] == 21
