"""The identities of Petrov et al. and He et al. to 1e-6; both hold for any prefix, so also for a random one."""

import torch
from models import examples_of, random_prefix

from prefix_tuning.model.batch import pack
from prefix_tuning.study.attention import attending, watching
from prefix_tuning.study.claims import identities
from prefix_tuning.study.claims.identities import attend_gated, check_identities, gated, scaled, tuned_errors
from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.scoring import label_logits


def test_both_identities_hold_in_every_layer_and_head(base):
    batch = next(pack(examples_of([7, 1, 30, 12]), 1000))
    prefix = random_prefix(base, tokens=6)
    found = check_identities(base, batch, prefix)
    assert found.weights.shape == found.scaled.shape == found.gated.shape == found.share.shape == (4, 6)
    assert max(figure.max().item() for figure in (found.weights, found.scaled, found.gated)) < 1e-6
    assert found.logits < 1e-6 < found.largest_logit
    seen = []
    with watching(
        base, lambda layer, weights: seen.append(batch.from_grid(weights[..., :6].sum(-1).transpose(1, 2)).mean(0))
    ):
        base.packed_hidden(batch, prefix)
    torch.testing.assert_close(found.share.float(), torch.stack(seen), atol=1e-5, rtol=0)
    assert base.dtype == torch.float32


def test_an_error_would_be_seen(base, monkeypatch):
    """A gate that is off by a thousandth."""

    def off(qkv, pairs, batch, bias, label_positions_only):
        return attend_gated(qkv, pairs * 1.001, batch, bias, label_positions_only)

    monkeypatch.setattr(identities, "attend_gated", off)
    found = check_identities(base, next(pack(examples_of([9, 5]), 1000)), random_prefix(base))
    assert found.gated.max() > 1e-6 and found.logits > 1e-6


def test_the_prefix_of_the_check_is_tuned(tiny):
    found = tuned_errors(Lab(tiny))
    assert found.scaled.max() < 1e-6 and found.share.min() > 0 and found.share.max() < 1
    assert found.logits < 1e-6 < found.largest_logit


def test_both_forms_are_the_same_numbers(tiny):
    finding = gated(Lab(tiny))
    assert finding.verdict.en == "agrees" and len(finding.parts) == 2
    assert [len(row) for row in finding.table] == [7] * 5


def test_identity_agrees_on_a_real_prefix(tiny):
    finding = scaled(Lab(tiny))
    assert finding.verdict.en == "agrees" and len(finding.table) == 5


@torch.no_grad()
def test_the_gated_form_is_the_model_itself(in_float64):
    model, _, prefix, batch = in_float64
    with attending(model, lambda layer: attend_gated):
        found = label_logits(model, batch, prefix)
    torch.testing.assert_close(found, label_logits(model, batch, prefix), atol=1e-9, rtol=0)
