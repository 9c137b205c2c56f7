"""Two identities of attention with a prefix, checked in float64 on real rows, in each layer and head.

- A prefix scales the attention of the text and adds its values: Petrov et al. 2023, "When Do Prompting and Prefix-Tuning
  Work? A Theory of Capabilities and Limitations", https://arxiv.org/abs/2310.19698, section 4.
- A prefix is a gated adapter: He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning",
  https://arxiv.org/abs/2110.04366, section 3.1.

Both hold for any prefix, so also for a random one; here a tuned one is checked.

Legend: L layers, H heads, T tokens of all rows, P prefix tokens, D head_dim, S tokens of the longest row.
"""

import copy
import math
from typing import Any, NamedTuple

import torch

from prefix_tuning import bundled
from prefix_tuning.model.attention import as_grid
from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import Bloom
from prefix_tuning.study.attention import attend_with_weights, attending
from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.record import Chart, Finding, Part, Table, finding, label, say, training_once
from prefix_tuning.study.claims.settings import Scale
from prefix_tuning.study.claims.tasks import load_task
from prefix_tuning.study.claims.trials import Trial, sample_batches, tune
from prefix_tuning.study.page import Text
from prefix_tuning.study.scoring import label_logits

EXACT = 1e-6  # larger errors are not rounding


class Errors(NamedTuple):
    """The largest absolute differences over all tokens.

    weights (L, H): the attention between text tokens, from (1 - share) times the attention without a prefix.
    scaled (L, H): the context, from (1 - share) times the context without a prefix plus the prefix's weights times values.
    gated (L, H): the context, from He et al.'s form.
    share (L, H): no difference, but the mean share of the prefix.
    logits: the logits of the whole model, with the gated form in every layer. largest_logit: to compare that with.
    """

    weights: torch.Tensor
    scaled: torch.Tensor
    gated: torch.Tensor
    share: torch.Tensor
    logits: torch.Tensor
    largest_logit: torch.Tensor


@torch.no_grad()
def check_identities(base: Bloom, batch: Batch, prefix: torch.Tensor) -> Errors:
    """prefix: (L, 2, H, P, D). base: any dtype; the check runs in a float64 copy of it."""
    base, prefix = copy.deepcopy(base).double(), prefix.double()
    found: list[list[torch.Tensor]] = []

    def attend_and_compare(qkv, pairs, batch, bias, label_positions_only):
        length = pairs.shape[2]
        seen: list[torch.Tensor] = []
        context = attend_with_weights(qkv, pairs, batch, bias, seen.append)
        text = attend_with_weights(qkv, pairs[:, :, :0], batch, bias[..., length:], seen.append)
        with_prefix, without = seen
        of_prefix, of_text = with_prefix[..., :length], with_prefix[..., length:]
        share = of_prefix.sum(-1, keepdim=True)
        compared = share, of_prefix @ pairs[1], of_text - (1 - share) * without
        shares, added, ratios = (batch.from_grid(x.transpose(1, 2)) for x in compared)  # (T, H, 1), (T, H, D), (T, H, S)
        scaled = context - ((1 - shares) * text + added)
        gated = context - attend_gated(qkv, pairs, batch, bias, label_positions_only)
        found.append([*(difference.abs().amax((0, 2)) for difference in (ratios, scaled, gated)), shares.mean((0, 2))])
        return context

    with attending(base, lambda layer: attend_and_compare):
        base.packed_hidden(batch, prefix)
    plain = label_logits(base, batch, prefix)
    with attending(base, lambda layer: attend_gated):
        logits = label_logits(base, batch, prefix)
    return Errors._make([*map(torch.stack, zip(*found, strict=True)), (logits - plain).abs().max(), plain.abs().max()])


def attend_gated(
    qkv: torch.Tensor, prefix: torch.Tensor, batch: Batch, bias: torch.Tensor, label_positions_only: bool
) -> torch.Tensor:
    """The adapter form of He et al. 2021 (arXiv 2110.04366, section 3.1): the prefix beside the attention, behind a gate.

    (1 - share) * softmax(q K^T) V + share * softmax(q P_k^T) P_v

    These are two separate softmaxes; the share follows from their sums.
    """
    query, key, value = as_grid(qkv, prefix, batch)
    length = prefix.shape[2]
    scores = query @ key.mT / math.sqrt(query.shape[-1]) + bias  # (R, H, S, P + S)
    on_prefix, on_text = scores[..., :length], scores[..., length:]
    share = torch.sigmoid(on_prefix.logsumexp(-1, keepdim=True) - on_text.logsumexp(-1, keepdim=True))
    of_text, of_prefix = on_text.softmax(-1) @ value[:, :, length:], on_prefix.softmax(-1) @ value[:, :, :length]
    return batch.from_grid(((1 - share) * of_text + share * of_prefix).transpose(1, 2))


def identities_of(task: str, scale: Scale) -> dict[str, Any]:
    """`check_identities` on held-out questions, with a prefix that was tuned at the demo's rate; lists of numbers."""
    tuned = tune(Trial("prefix", task), scale, bundled.SETTINGS["learning_rate"], scale.seeds[0])
    batch = sample_batches(load_task(task).held_out, min(64, scale.scored))[0]
    found = check_identities(tuned.base, batch, tuned.encoder.bake())
    return {name: error.tolist() for name, error in found._asdict().items()}


def tuned_errors(lab: Lab) -> Errors:
    """The errors with a tuned prefix."""
    (found,) = lab.run(identities_of, ["short"])
    return Errors(**{name: torch.tensor(error) for name, error in found.items()})


def scaled(lab: Lab) -> Finding:
    """Compared: attention with a prefix, and (1 - its share) times attention without it plus its values.

    Agrees: neither the weights nor the outputs differ by more than EXACT.
    """
    errors = tuned_errors(lab)
    worst = max(errors.weights.max().item(), errors.scaled.max().item())
    table: Table = [[say("layer"), *(say(f"identity.{name}") for name in ("share", "weights", "output"))]]
    for layer, share in enumerate(errors.share):
        differences = (f"{error[layer].max().item():.1e}" for error in (errors.weights, errors.scaled))
        table.append([str(layer), f"{share.mean().item():.1%}", *differences])
    parts, chart = [Part(say("identity.error", worst=worst), worst <= EXACT)], bars_by_layer(errors.share, say("axis.share"))
    source = "Petrov et al. 2023, arXiv 2310.19698, section 4"
    return finding("identity", source, training_once(lab.scale), parts, table, [chart], exact=EXACT)


def gated(lab: Lab) -> Finding:
    """Compared: attention with a prefix, and an adapter beside the attention behind a gate, which is the prefix's share.

    Agrees: neither any head's output nor the logits of the whole model differ by more than EXACT.
    """
    errors = tuned_errors(lab)
    worst = errors.gated.max().item()
    table: Table = [[say("layer"), *(say("head", head=head) for head in range(errors.gated.shape[1]))]]
    table += [[str(layer), *(f"{error:.1e}" for error in heads)] for layer, heads in enumerate(errors.gated.tolist())]
    logits, largest = errors.logits.item(), errors.largest_logit.item()
    parts = [
        Part(say("gated.error", worst=worst), worst <= EXACT),
        Part(say("gated.logits", error=logits, largest=largest), logits <= EXACT),
    ]
    source, chart = (
        "He et al. 2021, arXiv 2110.04366, section 3.1",
        bars_by_layer(errors.gated, say("axis.error"), log_y=True),
    )
    return finding("gated", source, training_once(lab.scale), parts, table, [chart], exact=EXACT)


def bars_by_layer(figures: torch.Tensor, axis: Text, log_y: bool = False) -> Chart:
    """A bar for each head (L, H)."""
    series = {label(say("head", head=head)): heads for head, heads in enumerate(figures.T.tolist())}
    layers = [str(layer) for layer in range(len(figures))]
    return Chart("bar", label(say("layer")), label(axis), layers, series, log_y=log_y)
