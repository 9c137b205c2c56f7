"""The claims that are tried by training: what is trained, what is compared, and when the result agrees with the paper.

- Li & Liang 2021, "Prefix-Tuning", https://arxiv.org/abs/2101.00190
- Le et al. 2025 (ICLR), "Revisiting Prefix-tuning: Statistical Benefits of Reparameterization among Prompts",
  https://arxiv.org/abs/2410.02200
- Petrov et al. 2023, "When Do Prompting and Prefix-Tuning Work? A Theory of Capabilities and Limitations",
  https://arxiv.org/abs/2310.19698
- Diaz 2025, "Learned Structure in Cartridges: Keys as Shareable Routers in Self-Studied Representations",
  https://arxiv.org/abs/2508.17032. Cartridges are caches of keys and values that are trained on a text.
"""

import math
import statistics
from collections.abc import Iterable
from dataclasses import replace

from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.methods import RELATED, UNRELATED
from prefix_tuning.study.claims.record import (
    Chart,
    Finding,
    Part,
    above,
    bars_of,
    chart_by_rows,
    chart_of,
    finding,
    label,
    named,
    rows_text,
    say,
    table_of,
    training,
)
from prefix_tuning.study.claims.trials import Longer, Measured, Trial, train_longer
from prefix_tuning.study.page import joined

LI_LIANG = "Li & Liang 2021, arXiv 2101.00190"
FEWEST = 50  # rows in the claim on few rows, as in the paper's figure
TIMES = 10  # how many times the steps of the others `unlock`'s long training takes


def length(lab: Lab) -> Finding:
    """Trained: prefixes of several lengths. Compared: the losses of the longest and of the best shorter one.

    Agrees: the longest has the lowest loss on its training rows; a shorter one has the lowest on held-out rows.
    """
    lengths = lab.scale.lengths
    found = lab.run_trials({tokens: Trial("prefix", rows=lab.scale.length_rows, tokens=tokens) for tokens in lengths})

    def best(figure: str, among: Iterable[int] = lengths) -> int:
        return min(among, key=lambda tokens: found[tokens].median(figure))

    longest = found[lengths[-1]]
    by_training, by_held_out = (found[best(figure, lengths[:-1])] for figure in ("train_loss", "held_out_loss"))
    agrees = {
        "train_loss": above(by_training.train_loss, longest.train_loss),
        "held_out_loss": above(longest.held_out_loss, by_held_out.held_out_loss),
    }
    texts = [say(f"length.{name}", tokens=best(name), loss=found[best(name)].median(name)) for name in agrees]
    losses = {label(say(f"length.line.{name}")): [one.median(name) for one in found.values()] for name in agrees}
    chart = Chart("line", label(say("tokens")), label(say("axis.loss")), list(lengths), losses, log_x=True, log_y=True)
    table = table_of(say("tokens"), {str(tokens): one for tokens, one in found.items()})
    trained, source = training(lab.scale, lab.scale.length_rows), f"{LI_LIANG}, section 7.1, figure 4"
    return finding("length", source, trained, list(map(Part, texts, agrees.values())), table, [chart])


def infix(lab: Lab) -> Finding:
    """Trained: a prefix, an infix and embeddings alone, 16 tokens each. Agrees: the prefix has the higher exact match."""
    found = lab.run_trials({method: Trial(method) for method in ("prefix", "infix", "embeddings")})
    parts = [
        Part(say(f"infix.{other}", **matches(found)), above(found["prefix"].exact_match, found[other].exact_match))
        for other in ("infix", "embeddings")
    ]
    table, chart = table_of(say("method"), named("method", found)), bars_of(named("method", found))
    return finding("infix", f"{LI_LIANG}, sections 7.2-7.3, table 4", training(lab.scale), parts, table, [chart])


def low_data(lab: Lab) -> Finding:
    """Trained: a prefix, and all weights, on few rows. Compared: by how much the prefix's exact match leads.

    Agrees: it leads on average over the sizes from FEWEST rows on; it leads by less with most rows than with FEWEST.
    """
    methods = ("prefix", "full")
    found = lab.run_trials({(size, method): Trial(method, rows=size) for method in methods for size in lab.scale.sizes})
    sizes = [size for size in lab.scale.sizes if size >= FEWEST]
    pairs = [(found[size, "prefix"], found[size, "full"]) for size in sizes]
    by_seed = [
        statistics.mean(prefix.exact_match[seed] - full.exact_match[seed] for prefix, full in pairs)
        for seed in range(len(lab.scale.seeds))
    ]
    leads = [prefix.median("exact_match") - full.median("exact_match") for prefix, full in pairs]
    first, last = leads[0], leads[-1]
    parts = [
        Part(say("low_data.mean", mean=100 * statistics.median(by_seed)), above(by_seed, [0.0])),
        Part(say("low_data.lead", first=100 * first, last=100 * last), last < first if first > 0 else None),
    ]
    table, chart = table_of(say("method and rows"), named("method", found)), chart_by_rows("method", found, lines=True)
    source = f"{LI_LIANG}, section 6.3, figure 3"
    return finding("low_data", source, training(lab.scale), parts, table, [chart], fewest=FEWEST)


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
            names = {"rows": rows_text(size), "start": say(f"words.{start}")}
            agrees = better(*both) if size else round(abs(shares[0] - shares[1]), 4) <= 0.02
            parts.append(Part(say("words.found", **names, shares=shares, losses=losses), agrees))
    table = table_of(say("start and rows"), named("words", found))
    charts = [chart_by_rows("words", found, figure) for figure in ("exact_match", "held_out_loss")]
    source, texts = f"{LI_LIANG}, section 7.4, figure 5", {"related": RELATED, "unrelated": UNRELATED}
    return finding("words", source, training(lab.scale), parts, table, charts, **texts)


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
    parts = [
        Part(say("projection.match", **matches(found)), above(found["prefix"].exact_match, found["direct"].exact_match)),
        Part(say("projection.factor", **factors), factors["direct"] > factors["prefix"]),
    ]
    rates = sorted({float(rate) for one in found.values() for rate in one.tried})
    losses = {name: [one.tried.get(f"{rate:g}") for rate in rates] for name, one in named("projection.line", found).items()}
    axes = label(say("rate")), label(say("axis.held_out_loss"))
    chart = Chart("line", *axes, rates, {label(name): line for name, line in losses.items()}, log_x=True, log_y=True)
    table = table_of(say("method"), named("projection", found))
    return finding("projection", f"{LI_LIANG}, section 4.3", training(lab.scale), parts, table, [chart])


def factor_beside_the_best(found: Measured) -> float:
    """How many times the loss grows half a decade beside the best rate, on the worse side. A loss that is not finite counts
    as infinite.
    """
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
    parts = [
        Part(say("extrapolation.match", **matches(found)), above(prefix.exact_match, full.exact_match)),
        Part(say("extrapolation.loss", **losses), above(full.held_out_loss, prefix.held_out_loss)),
    ]
    table = table_of(say("method"), named("method", found))
    chart = replace(bars_of(named("method", found)), y_title=label(say("extrapolation.axis")))
    return finding("extrapolation", f"{LI_LIANG}, section 6.4, table 3", training(lab.scale), parts, table, [chart])


def shared(lab: Lab) -> Finding:
    """Trained: a prefix by one MLP, direct pairs, and keys and values by an MLP each, on few rows and on all.

    Agrees: the one MLP has the lower held-out loss. Each of the others is compared with it at each number of rows.
    """
    sizes, others = [*lab.scale.few, None], ("direct", "separate")
    found = lab.run_trials({(size, method): Trial(method, rows=size) for size in sizes for method in ("prefix", *others)})
    parts = []
    for size in sizes:
        for other in others:
            ours, theirs = found[size, "prefix"], found[size, other]
            losses = {"shared": ours.median("held_out_loss"), "loss": theirs.median("held_out_loss")}
            text = say("shared.loss", rows=rows_text(size), other=say(f"shared.{other}"), **losses)
            parts.append(Part(text, above(theirs.held_out_loss, ours.held_out_loss)))
    table = table_of(say("method and rows"), named("shared", found))
    charts = [chart_by_rows("shared", found, figure) for figure in ("held_out_loss", "exact_match")]
    return finding("shared", "Le et al. 2025, arXiv 2410.02200", training(lab.scale), parts, table, charts)


def unlock(lab: Lab) -> Finding:
    """Trained: a prefix, and all weights, on questions that the base knows from its pre-training, and on a new task, to
    write three words in reverse order. Control: to copy three words.

    Agrees: the prefix answers at least 80 % of the known; below 10 % of the new, even with TIMES the steps; all weights
    reach 80 % of the new. If the prefix does not even learn to copy, it is open whether the order matters.
    """
    tasks, methods = ("short", "reversed", "copied"), ("prefix", "full")
    trials = {(task, method): Trial(method, task=task) for task in tasks for method in methods}
    found = lab.run_trials(trials)
    (known, _), (new, new_full), (copied, copied_full) = (
        [found[task, method].median("exact_match") for method in methods] for task in tasks
    )
    hard = "reversed", "prefix"
    (longer,) = (one["exact_match"] for one in lab.run(train_longer, [Longer(trials[hard], found[hard].rate, TIMES)]))
    parts = [
        Part(say("unlock.known", share=known), known >= 0.8),
        Part(say("unlock.new", share=new), new < 0.1),
        Part(say("unlock.longer", times=TIMES, share=longer), longer < 0.1),
        Part(say("unlock.full", share=new_full), new_full >= 0.8),
        Part(say("unlock.control", prefix=copied, full=copied_full), True if copied >= 0.5 else None),
    ]
    of_task, of_method = {task: say(f"unlock.{task}") for task in tasks}, {one: say(f"method.{one}") for one in methods}
    names = {joined([of_task[task], of_method[method]]): one for (task, method), one in found.items()}
    series = {name: [found[task, method] for task in tasks] for method, name in of_method.items()}
    chart = chart_of("exact_match", say("task"), list(of_task.values()), series)
    source, table = "Petrov et al. 2023, arXiv 2310.19698, section 5", table_of(say("task and method"), names)
    return finding("unlock", source, training(lab.scale), parts, table, [chart], times=TIMES)


def fixed_keys(lab: Lab) -> Finding:
    """Trained: keys and values, and values alone behind random keys. No verdict: the question is ours, not Diaz's."""
    found = lab.run_trials({method: Trial(method) for method in ("prefix", "fixed normal", "fixed words")})
    (_, trained), *fixed = ((name, one.median("exact_match")) for name, one in named("fixed_keys", found).items())
    parts = [Part(say("fixed_keys.found", keys=name, share=share, trained=trained), None) for name, share in fixed]
    table, chart = table_of(say("keys"), named("fixed_keys", found)), bars_of(named("fixed_keys.bar", found), "keys")
    return finding("fixed_keys", "Diaz 2025, arXiv 2508.17032", training(lab.scale), parts, table, [chart])


def matches(found: dict[str, Measured]) -> dict[str, float]:
    """The median exact match of each trial."""
    return {method: one.median("exact_match") for method, one in found.items()}
