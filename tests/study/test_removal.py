import statistics

import pytest
import torch
import torch.nn.functional as F

from prefix_tuning.generation.cache import CACHE
from prefix_tuning.model.batch import IGNORED
from prefix_tuning.model.bloom import prefix_cache
from prefix_tuning.study import removal
from prefix_tuning.study.attention import attend_with_weights, attending
from prefix_tuning.study.removal import passes_of_removals, removals
from prefix_tuning.study.scoring import score_prefix
from prefix_tuning.study.shares import attention_shares


@pytest.fixture(scope="module")
def alone(studied, batches):
    return score_prefix(studied.model, batches["short"], None)


@pytest.fixture(scope="module")
def found(studied, batches, alone):
    model = studied.model
    prefix = model.prefixes["short"]
    shares = attention_shares(model, batches["short"], prefix)["share"]
    passed = []
    return removals(model, batches["short"], prefix, shares, alone, passed.append), prefix, shares, passed


def test_every_part_is_removed_once_and_the_worst_comes_first(found):
    parts = found[0]["parts"]
    kinds = [part["kind"] for part in parts]
    assert [kinds.count(kind) for kind in ("layer", "head", "token", "keys only", "values only")] == [4, 24, 16, 1, 1]
    assert len({tuple(part.get(key) for key in ("kind", "layer", "head", "token")) for part in parts}) == len(parts)
    losses = [part["loss"] for part in parts]
    assert losses == sorted(losses, reverse=True)


def test_as_many_rows_pass_as_were_estimated(found, studied):
    _, prefix, _, passed = found
    assert sum(passed) == 24 * passes_of_removals(studied.model, prefix) and max(passed) <= 24


def test_figures_are_those_of_prefixes_that_never_had_the_part(found, studied, batches, alone):
    model, (record, prefix) = studied.model, found[:2]
    by_part = {(part["kind"], part.get("token")): part for part in record["parts"]}
    for key, variant in {
        ("keys only", None): prefix * prefix.new_tensor([1, 0]).view(1, 2, 1, 1, 1),
        ("values only", None): prefix * prefix.new_tensor([0, 1]).view(1, 2, 1, 1, 1),
    }.items():
        expected = score_prefix(model, batches["short"], variant)
        assert by_part[key]["loss"] == pytest.approx(expected.loss, abs=1e-5)
        assert by_part[key]["exact_match"] == expected.exact_match
    whole = score_prefix(model, batches["short"], prefix)
    assert record["whole"]["loss"] == pytest.approx(whole.loss, abs=1e-5) and record["base"] == alone._asdict()
    assert record["whole"]["exact_match"] == whole.exact_match


@torch.no_grad()
def test_without_a_token_the_loss_is_what_transformers_gives_if_it_masks_it(found, studied, batches):
    """Token 0, because Bloom counts positions by the mask: without a later one, those before it would come nearer."""
    record, prefix = found[:2]
    losses = []
    for batch in batches["short"]:
        labels = torch.full_like(batch.input_ids, IGNORED)
        labels[batch.label_positions] = batch.labels
        for ids, expected in zip(batch.input_ids.split(batch.lengths), labels.split(batch.lengths), strict=True):
            cache, mask = prefix_cache([prefix])
            mask[:, 0] = 0
            inputs = {"attention_mask": torch.cat((mask, torch.ones(1, len(ids), dtype=torch.long)), dim=1), CACHE: cache}
            if studied.model.config.model_type != "bloom":
                inputs["position_ids"] = torch.arange(16, 16 + len(ids))[None]
            logits = studied.eager(ids[None], **inputs).logits[0]
            losses += F.cross_entropy(logits[expected != IGNORED], expected[expected != IGNORED], reduction="none").tolist()
    (part,) = [part for part in record["parts"] if part["kind"] == "token" and part["token"] == 0]
    assert part["loss"] == pytest.approx(statistics.mean(losses), abs=1e-5)


@pytest.mark.parametrize("removed_axes", [{"layer": 0}, {"layer": 3}, {"layer": 2, "head": 3}, {"token": 2}])
def test_removed_pairs_against_attention_whose_keys_never_had_them(found, studied, batches, removed_axes):
    """For a layer, a head and a token. The twin loops over the heads and concatenates the pairs that are left."""
    model, (record, prefix) = studied.model, found[:2]
    removed = torch.zeros(4, 6, 16, dtype=torch.bool)
    removed[tuple(removed_axes.get(axis, slice(None)) for axis in ("layer", "head", "token"))] = True

    def attend_in(layer):
        def attend_left(qkv, pairs, batch, bias, label_positions_only, **scores):
            queries = qkv[:, :, :-2].flatten(1, 2)
            context, bias = torch.zeros_like(queries), bias.expand(-1, len(removed[layer]), -1, -1)
            for head, gone in enumerate(removed[layer]):
                own, group = bias[:, head : head + 1], head * qkv.shape[1] // queries.shape[1]
                left = torch.cat((own[..., : len(gone)][..., ~gone], own[..., len(gone) :]), dim=-1)
                alone = torch.cat((queries[:, head : head + 1], qkv[:, group, -2:]), dim=1).unsqueeze(1)
                one = alone, pairs[:, group : group + 1, ~gone]
                context[:, head : head + 1] = attend_with_weights(*one, batch, left, lambda weights: None)
            return context

        return attend_left

    with attending(model, attend_in):
        expected = score_prefix(model, batches["short"], prefix)
    axes = ("layer", "head", "token")
    (part,) = [one for one in record["parts"] if {axis: one[axis] for axis in axes if axis in one} == removed_axes]
    assert part["loss"] == pytest.approx(expected.loss, abs=1e-4) and part["exact_match"] == expected.exact_match
    assert part["loss"] != pytest.approx(record["whole"]["loss"], abs=1e-4)


def test_of_many_heads_those_with_the_largest_share_are_removed(found, studied, batches, alone, monkeypatch):
    _, prefix, shares, _ = found
    monkeypatch.setattr(removal, "MOST_HEADS", 3)
    record = removals(studied.model, batches["short"][:1], prefix, shares, alone)
    heads = {(part["layer"], part["head"]) for part in record["parts"] if part["kind"] == "head"}
    every = sorted(((layer, head) for layer in range(4) for head in range(6)), key=lambda head: -shares[head[0]][head[1]])
    assert heads == set(every[:3]) and record["left_out"] == 21
