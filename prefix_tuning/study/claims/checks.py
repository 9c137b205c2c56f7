"""Two identities of attention with a prefix, checked layer by layer on real rows in float64.

Legend: L layers, H heads, T tokens of all rows, P prefix tokens, D head_dim, N labels, V vocabulary.
"""

import copy
from typing import Any, NamedTuple

import torch

from prefix_tuning import bundled
from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import Bloom
from prefix_tuning.study.attention import attend_openly, attending
from prefix_tuning.study.claims.forms import attend_gated
from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.settings import Scale
from prefix_tuning.study.claims.tasks import load_task
from prefix_tuning.study.claims.trials import Trial, some, tune
from prefix_tuning.study.scoring import label_logits

EXACT = 1e-6  # an error up to this is one of rounding


class Errors(NamedTuple):
    """The largest absolute differences over all tokens.

    weights: of the attention between text tokens, from (1 - share) times what it is without a prefix. scaled: of the
    context, from (1 - share) times the context without a prefix, plus the prefix's weights times its values. gated: of the
    context, from He et al.'s form. All (L, H). share: the mean share of the prefix, (L, H). logits: of the whole model with
    the gated form on its blocks, one number; largest_logit: what to compare it with.
    """

    weights: torch.Tensor
    scaled: torch.Tensor
    gated: torch.Tensor
    share: torch.Tensor
    logits: float
    largest_logit: float


@torch.no_grad()
def check_identities(base: Bloom, batch: Batch, prefix: torch.Tensor) -> Errors:
    """prefix: (L, 2, H, P, D), a tuned one as a rule. base: any dtype; the check runs in a float64 copy of it."""
    base, prefix = copy.deepcopy(base).double(), prefix.double()
    found: list[list[torch.Tensor]] = []

    def attend_in(layer: int):
        def attend_compared(qkv, pairs, batch, bias, only_labels):
            length = pairs.shape[2]
            seen: list[torch.Tensor] = []
            context = attend_openly(qkv, pairs, batch, bias, seen.append)
            text = attend_openly(qkv, pairs[:, :, :0], batch, bias[..., length:], seen.append)
            with_prefix, without = seen
            of_prefix, of_text = with_prefix[..., :length], with_prefix[..., length:]
            share = of_prefix.sum(-1, keepdim=True)
            in_rows = [
                batch.from_grid(x.transpose(1, 2)) for x in (share, of_prefix @ pairs[1], of_text - (1 - share) * without)
            ]
            shares, added, difference = in_rows  # (T, H, 1), (T, H, D), (T, H, S)
            scaled = context - ((1 - shares) * text + added)
            gated = context - attend_gated(qkv, pairs, batch, bias, only_labels)
            found.append([largest(difference), largest(scaled), largest(gated), shares.mean((0, 2))])
            return context

        return attend_compared

    with attending(base, attend_in):
        base.packed_hidden(batch, prefix)
    plain = label_logits(base, batch, prefix)
    with attending(base, lambda layer: attend_gated):
        logits = label_logits(base, batch, prefix)
    weights, scaled, gated, share = (torch.stack(layers) for layers in zip(*found, strict=True))
    return Errors(weights, scaled, gated, share, (logits - plain).abs().max().item(), plain.abs().max().item())


def largest(difference: torch.Tensor) -> torch.Tensor:
    """(T, H, ...) -> (H)"""
    return difference.abs().amax((0, 2))


def identities_of(task: str, scale: Scale) -> dict[str, Any]:
    """`check_identities` on held-out questions, with a prefix that was tuned at the demo's rate; lists of numbers."""
    tuned = tune(Trial("prefix", task), scale, bundled.SETTINGS["learning_rate"], scale.seeds[0])
    batch = some(load_task(task).held_out, min(64, scale.scored))[0]
    found = check_identities(tuned.base, batch, tuned.encoder.bake())
    return {name: torch.as_tensor(value).tolist() for name, value in found._asdict().items()}


def tuned_errors(lab: Lab) -> Errors:
    """Those of a tuned prefix."""
    (found,) = lab.run(identities_of, ["short"])
    tensors = {name: torch.tensor(found[name]) for name in ("weights", "scaled", "gated", "share")}
    return Errors(**tensors, logits=found["logits"], largest_logit=found["largest_logit"])
