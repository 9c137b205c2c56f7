"""Li & Liang 2021, "Prefix-Tuning", https://arxiv.org/abs/2101.00190."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import replace

from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.methods import RELATED, UNRELATED
from prefix_tuning.study.claims.record import Chart, Finding, Part, above, finding, label, say
from prefix_tuning.study.claims.tables import bars_of, chart_by_rows, named, named_by_rows, rows_text, table_of, training
from prefix_tuning.study.claims.trials import Measured, Trial

PAPER = "Li & Liang 2021, arXiv 2101.00190"
FEWEST = 50  # rows, as in the paper's figure on few rows


def length(lab: Lab) -> Finding:
    """Trained: prefixes of several lengths. Compared: the losses of the longest and of the best shorter one.

    Agrees: the longest has the lowest loss on its training rows; a shorter one has the lowest on held-out rows.
    """
    lengths = lab.scale.lengths
    found = lab.run_trials({tokens: Trial("prefix", rows=lab.scale.length_rows, tokens=tokens) for tokens in lengths})

    def best(figure: str, among: Iterable[int]) -> int:
        return min(among, key=lambda tokens: found[tokens].median(figure))

    def part(figure: str, agrees: bool | None) -> Part:
        tokens = best(figure, lengths)
        return Part(say(f"length.{figure}", tokens=tokens, loss=found[tokens].median(figure)), agrees)

    longest = found[lengths[-1]]
    by_training, by_held_out = (found[best(figure, lengths[:-1])] for figure in ("train_loss", "held_out_loss"))
    losses = {
        label(say(name)): [one.median(figure) for one in found.values()]
        for name, figure in (("training", "train_loss"), ("held_out", "held_out_loss"))
    }
    return finding(
        "length",
        f"{PAPER}, section 7.1, figure 4",
        training(lab.scale, lab.scale.length_rows),
        [
            part("train_loss", above(by_training.train_loss, longest.train_loss)),
            part("held_out_loss", above(longest.held_out_loss, by_held_out.held_out_loss)),
        ],
        table_of(say("tokens"), {str(tokens): one for tokens, one in found.items()}),
        [Chart("line", label(say("tokens")), label(say("axis.loss")), list(lengths), losses, log_x=True, log_y=True)],
    )


def infix(lab: Lab) -> Finding:
    """Trained: a prefix, an infix and embeddings alone, 16 tokens each. Agrees: the prefix has the higher exact match."""
    found = lab.run_trials({method: Trial(method) for method in ("prefix", "infix", "embeddings")})
    shares = matches(found)
    return finding(
        "infix",
        f"{PAPER}, sections 7.2-7.3, table 4",
        training(lab.scale),
        [
            Part(say(f"infix.{other}", **shares), above(found["prefix"].exact_match, found[other].exact_match))
            for other in ("infix", "embeddings")
        ],
        table_of(say("method"), named("method", found)),
        [bars_of(named("method", found))],
    )


def low_data(lab: Lab) -> Finding:
    """Trained: a prefix, and all weights, on few rows. Compared: by how much the prefix's exact match leads.

    Agrees: it leads on average over the sizes from FEWEST rows on; it leads by less with most rows than with FEWEST.
    """
    methods = ("prefix", "full")
    found = lab.run_trials({(size, method): Trial(method, rows=size) for method in methods for size in lab.scale.sizes})

    def lead(size: int) -> float:
        return found[size, "prefix"].median("exact_match") - found[size, "full"].median("exact_match")

    sizes = [size for size in lab.scale.sizes if size >= FEWEST]
    pairs = [(found[size, "prefix"].exact_match, found[size, "full"].exact_match) for size in sizes]
    by_seed = [statistics.mean(ours[seed] - theirs[seed] for ours, theirs in pairs) for seed in range(len(lab.scale.seeds))]
    first, last = lead(sizes[0]), lead(sizes[-1])
    return finding(
        "low_data",
        f"{PAPER}, section 6.3, figure 3",
        training(lab.scale),
        [
            Part(say("low_data.mean", mean=100 * statistics.median(by_seed)), above(by_seed, [0.0])),
            Part(say("low_data.lead", first=100 * first, last=100 * last), last < first if first > 0 else None),
        ],
        table_of(say("method and rows"), named_by_rows("method", found)),
        [chart_by_rows("method", found, "exact_match", lines=True)],
        fewest=FEWEST,
    )


def words(lab: Lab) -> Finding:
    """Trained: prefixes that start at random, from words of the task, or from other words, on few rows and on all.

    Agrees: with few rows, words of the task end with a higher exact match and a lower loss than each other start; with all
    rows, their exact match is within 2 points of the random start's.
    """
    sizes, starts = [*lab.scale.few, None], ("prefix", "related", "unrelated")
    found = lab.run_trials({(size, start): Trial(start, rows=size) for size in sizes for start in starts})
    parts = []
    for size in sizes:
        for start in ("prefix", "unrelated") if size else ("prefix",):
            both = found[size, "related"], found[size, start]
            shares, losses = ([one.median(figure) for one in both] for figure in ("exact_match", "held_out_loss"))
            agrees = better(*both) if size else round(abs(shares[0] - shares[1]), 4) <= 0.02
            names = {"rows": rows_text(size), "start": say(f"words.{start}")}
            parts.append(Part(say("words.found", **names, shares=shares, losses=losses), agrees))
    return finding(
        "words",
        f"{PAPER}, section 7.4, figure 5",
        training(lab.scale),
        parts,
        table_of(say("start and rows"), named_by_rows("words", found)),
        [chart_by_rows("words", found, figure) for figure in ("exact_match", "held_out_loss")],
        related=RELATED,
        unrelated=UNRELATED,
    )


def better(one: Measured, other: Measured) -> bool | None:
    """Whether one has the higher exact match and the lower loss. None if the two figures do not say the same."""
    by_match, by_loss = above(one.exact_match, other.exact_match), above(other.held_out_loss, one.held_out_loss)
    return by_match if by_match == by_loss else None


def projection(lab: Lab) -> Finding:
    """Trained: a prefix by the MLP, and direct pairs, each at several rates until the best is found.

    Agrees: direct pairs have the lower exact match; their loss grows by the larger factor beside their best rate.
    """
    found = lab.run_trials({method: Trial(method) for method in ("prefix", "direct")})
    factors = {method: factor_beside_the_best(one) for method, one in found.items()}
    rates = sorted({float(rate) for one in found.values() for rate in one.tried})
    losses = {label(say(f"line.{method}")): [one.tried.get(f"{rate:g}") for rate in rates] for method, one in found.items()}
    return finding(
        "projection",
        f"{PAPER}, section 4.3",
        training(lab.scale),
        [
            Part(say("projection.match", **matches(found)), above(found["prefix"].exact_match, found["direct"].exact_match)),
            Part(say("projection.factor", **factors), factors["direct"] > factors["prefix"]),
        ],
        table_of(say("method"), named("projection", found)),
        [Chart("line", label(say("rate")), label(say("axis.held_out_loss")), rates, losses, log_x=True, log_y=True)],
    )


def factor_beside_the_best(found: Measured) -> float:
    """The larger loss of the two rates beside the best, over that of the best. A loss that was not finite is infinite."""
    losses = [math.inf if loss is None else loss for loss in found.tried.values()]
    best = losses.index(min(losses))
    return max(losses[max(0, best - 1) : best + 2]) / losses[best]


def extrapolation(lab: Lab) -> Finding:
    """Trained: a prefix, and all weights, on every second relation. Scored: questions about the other relations.

    Agrees: the prefix has the higher exact match; it has the lower loss.
    """
    found = lab.run_trials({method: Trial(method, task="relations") for method in ("prefix", "full")})
    prefix, full = found.values()
    losses = {method: one.median("held_out_loss") for method, one in found.items()}
    return finding(
        "extrapolation",
        f"{PAPER}, section 6.4, table 3",
        training(lab.scale),
        [
            Part(say("extrapolation.match", **matches(found)), above(prefix.exact_match, full.exact_match)),
            Part(say("extrapolation.loss", **losses), above(full.held_out_loss, prefix.held_out_loss)),
        ],
        table_of(say("method"), named("method", found)),
        [replace(bars_of(named("method", found)), y_title=label(say("extrapolation.axis")))],
    )


def matches(found: dict[str, Measured]) -> dict[str, float]:
    """The median exact match of each trial."""
    return {method: one.median("exact_match") for method, one in found.items()}
