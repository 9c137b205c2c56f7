"""Keys and values exchanged between two prefixes. Diaz 2025, "Learned Structure in Cartridges: Keys as Shareable Routers in
Self-Studied Representations", https://arxiv.org/abs/2508.17032, did this with caches that are trained on a text.
"""

import statistics
from dataclasses import replace
from typing import NamedTuple

import torch.nn.functional as F

from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.record import Chart, Finding, Part, Table, above, finding, label, say, training
from prefix_tuning.study.claims.settings import Scale
from prefix_tuning.study.claims.tasks import load_task
from prefix_tuning.study.claims.trials import Trial, sample_batches, tune
from prefix_tuning.study.mixing import mix
from prefix_tuning.study.page import Text, joined

STYLES = ("short", "sentence")
STARTS = ("prefix", "direct from text")
MIXES = ("own", "other keys", "other values")
Scores = dict[str, dict[str, float]]  # one seed's: exact match by style and mix; and "moved", a cosine by style


class Exchange(NamedTuple):
    """A job: one seed, and the rates of one method for both styles."""

    method: str
    rates: tuple[float, float]
    seed: int


def exchange_pairs(job: Exchange, scale: Scale) -> Scores:
    """Trains a prefix for each style from the same start, and gives each the other's keys, then the other's values.

    moved: the mean cosine of each style's keys with the start's.
    """
    start = tune(Trial(job.method), replace(scale, steps=0), 0.0, job.seed).encoder.bake()
    tuned = [
        tune(Trial(job.method, task=style), scale, rate, job.seed) for style, rate in zip(STYLES, job.rates, strict=True)
    ]
    pairs = [run.encoder.bake() for run in tuned]
    found: Scores = {"moved": {}}
    for own, other, run, style in zip(pairs, reversed(pairs), tuned, STYLES, strict=True):
        batches = sample_batches(load_task(style).held_out, scale.scored)
        mixed = own, mix(other, own), mix(own, other)
        found[style] = {name: run.score_on(batches, prefix).exact_match for name, prefix in zip(MIXES, mixed, strict=True)}
        found["moved"][style] = F.cosine_similarity(own[:, 0], start[:, 0], dim=-1).mean().item()
    return found


def exchange(lab: Lab) -> Finding:
    """Trained: a prefix for each style of answer, both from one start: the virtual tokens of two prefixes from different
    starts have nothing to do with each other. Compared: each with the other's keys, and with the other's values.

    Agrees: with the other's keys both keep 80 % of their exact match; in both, that is better than the other's values.
    """
    trials = {(method, style): Trial(method, task=style) for method in STARTS for style in STYLES}
    rates = {key: one.rate for key, one in lab.run_trials(trials).items()}
    of_both = {method: (rates[method, "short"], rates[method, "sentence"]) for method in STARTS}
    jobs = [Exchange(method, of_both[method], seed) for method in STARTS for seed in lab.scale.seeds]
    results = lab.run(exchange_pairs, jobs)
    parts, charts = [], []
    table: Table = [[say("task"), *(say(f"exchange.{name}") for name in MIXES), say("exchange.cosine")]]
    for method in STARTS:
        found = [result for job, result in zip(jobs, results, strict=True) if job.method == method]
        start, middle = say(f"exchange.{method}"), medians(found)
        for style in STYLES:
            shares = (f"{middle[style][name]:.1%}" for name in MIXES)
            table.append([joined([Text(style, style), start]), *shares, f"{middle['moved'][style]:.2f}"])
        parts += parts_of_exchange(start, found)
        series = {label(say(f"exchange.{name}")): [middle[style][name] for style in STYLES] for name in MIXES}
        axis = f"{label(say('task'))}（{start.en}）"
        charts.append(Chart("bar", axis, label(say("axis.exact_match")), list(STYLES), series))
    return finding("exchange", "Diaz 2025, arXiv 2508.17032", training(lab.scale), parts, table, charts)


def medians(found: list[Scores]) -> Scores:
    """Over the seeds."""
    return {
        row: {name: statistics.median(one[row][name] for one in found) for name in names} for row, names in found[0].items()
    }


def parts_of_exchange(start: Text, found: list[Scores]) -> list[Part]:
    """found: for each seed, what `exchange_pairs` returned."""
    middle = medians(found)
    own, keys, values = (" / ".join(f"{middle[style][name]:.1%}" for style in STYLES) for name in MIXES)
    keeps = [middle[style]["other keys"] >= 0.8 * middle[style]["own"] for style in STYLES]
    keys_better = [
        above([one[style]["other keys"] for one in found], [one[style]["other values"] for one in found]) for style in STYLES
    ]
    return [
        Part(say("exchange.keys", start=start, own=own, mixed=keys), all(keeps)),
        Part(say("exchange.values", start=start, mixed=values), keys_better[0] if len({*keys_better}) == 1 else None),
    ]
