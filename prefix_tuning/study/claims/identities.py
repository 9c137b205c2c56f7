"""Two identities of attention with a prefix, checked in float64 on real rows, in each layer and head.

- A prefix scales the attention of the text and adds its values: Petrov et al. 2023, "When Do Prompting and Prefix-Tuning
  Work? A Theory of Capabilities and Limitations", https://arxiv.org/abs/2310.19698, section 4.
- A prefix is a gated adapter: He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning",
  https://arxiv.org/abs/2110.04366, section 3.1.

Both hold for any prefix, so also for a random one; here a tuned one is checked.

Legend: L layers, H heads, T tokens of all rows, P prefix tokens, D head_dim, S tokens of the longest row.
"""

import copy
from typing import Any, NamedTuple

import torch

from prefix_tuning import bundled
from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import Bloom
from prefix_tuning.study.attention import attend_with_weights, attending
from prefix_tuning.study.claims.forms import attend_gated
from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.record import Chart, Finding, Part, Table, Text, finding, label, say
from prefix_tuning.study.claims.settings import Scale
from prefix_tuning.study.claims.tables import training_once
from prefix_tuning.study.claims.tasks import load_task
from prefix_tuning.study.claims.trials import Trial, sample_batches, tune
from prefix_tuning.study.scoring import label_logits

EXACT = 1e-6  # larger errors are not rounding


class Errors(NamedTuple):
    """The largest absolute differences over all tokens.

    weights (L, H): the attention between text tokens, from (1 - share) times the attention without a prefix.
    scaled (L, H): the context, from (1 - share) times the context without a prefix plus the prefix's weights times values.
    gated (L, H): the context, from He et al.'s form.
    share (L, H): no difference, but the mean share of the prefix.
    logits: of the whole model with the gated form in every layer. largest_logit: to compare it with.
    """

    weights: torch.Tensor
    scaled: torch.Tensor
    gated: torch.Tensor
    share: torch.Tensor
    logits: float
    largest_logit: float


@torch.no_grad()
def check_identities(base: Bloom, batch: Batch, prefix: torch.Tensor) -> Errors:
    """prefix: (L, 2, H, P, D). base: any dtype; the check runs in a float64 copy of it."""
    base, prefix = copy.deepcopy(base).double(), prefix.double()
    found: list[list[torch.Tensor]] = []

    def attend_and_compare(qkv, pairs, batch, bias, only_labels):
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
        gated = context - attend_gated(qkv, pairs, batch, bias, only_labels)
        found.append([*(difference.abs().amax((0, 2)) for difference in (ratios, scaled, gated)), shares.mean((0, 2))])
        return context

    with attending(base, lambda layer: attend_and_compare):
        base.packed_hidden(batch, prefix)
    plain = label_logits(base, batch, prefix)
    with attending(base, lambda layer: attend_gated):
        logits = label_logits(base, batch, prefix)
    weights, scaled, gated, share = (torch.stack(layers) for layers in zip(*found, strict=True))
    return Errors(weights, scaled, gated, share, (logits - plain).abs().max().item(), plain.abs().max().item())


def identities_of(task: str, scale: Scale) -> dict[str, Any]:
    """`check_identities` on held-out questions, with a prefix that was tuned at the demo's rate; lists of numbers."""
    tuned = tune(Trial("prefix", task), scale, bundled.SETTINGS["learning_rate"], scale.seeds[0])
    batch = sample_batches(load_task(task).held_out, min(64, scale.scored))[0]
    found = check_identities(tuned.base, batch, tuned.encoder.bake())
    return {name: torch.as_tensor(value).tolist() for name, value in found._asdict().items()}


def tuned_errors(lab: Lab) -> Errors:
    """The errors with a tuned prefix."""
    (found,) = lab.run(identities_of, ["short"])
    weights, scaled, gated, share, *logits = (torch.tensor(found[name]) for name in Errors._fields)
    return Errors(weights, scaled, gated, share, *(number.item() for number in logits))


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
    return finding(
        "identity",
        "Petrov et al. 2023, arXiv 2310.19698, section 4",
        training_once(lab.scale),
        [Part(say("identity.error", worst=worst), worst <= EXACT)],
        table,
        [bars_by_layer(errors.share, say("axis.share"))],
        exact=EXACT,
    )


def gated(lab: Lab) -> Finding:
    """Compared: attention with a prefix, and an adapter beside the attention behind a gate, which is the prefix's share.

    Agrees: neither any head's output nor the logits of the whole model differ by more than EXACT.
    """
    errors = tuned_errors(lab)
    worst = errors.gated.max().item()
    table: Table = [[say("layer"), *(say("head", head=head) for head in range(errors.gated.shape[1]))]]
    table += [[str(layer), *(f"{error:.1e}" for error in heads)] for layer, heads in enumerate(errors.gated.tolist())]
    return finding(
        "gated",
        "He et al. 2021, arXiv 2110.04366, section 3.1",
        training_once(lab.scale),
        [
            Part(say("gated.error", worst=worst), worst <= EXACT),
            Part(say("gated.logits", error=errors.logits, largest=errors.largest_logit), errors.logits <= EXACT),
        ],
        table,
        [bars_by_layer(errors.gated, say("axis.error"), log_y=True)],
        exact=EXACT,
    )


def bars_by_layer(figures: torch.Tensor, axis: Text, log_y: bool = False) -> Chart:
    """A bar for each head (L, H)."""
    series = {label(say("head", head=head)): heads for head, heads in enumerate(figures.T.tolist())}
    layers = [str(layer) for layer in range(len(figures))]
    return Chart("bar", label(say("layer")), label(axis), layers, series, log_y=log_y)
