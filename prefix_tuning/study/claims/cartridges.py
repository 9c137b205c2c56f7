"""What was found about Cartridges, caches of keys and values that are trained on a text (Eyuboglu et al. 2025, arXiv
2506.06266): "Learned Structure in Cartridges: Keys as Shareable Routers in Self-Studied Representations",
https://arxiv.org/abs/2508.17032.
"""

import statistics
from typing import Any, NamedTuple

import torch

from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.record import Chart, Claim, Finding, Part, Table, percent
from prefix_tuning.study.claims.settings import Scale
from prefix_tuning.study.claims.tables import medians, numbers_of, table_of, training
from prefix_tuning.study.claims.tasks import load_task
from prefix_tuning.study.claims.trials import Trial, held_out_batches, tune
from prefix_tuning.study.page import Text

STYLES = ("short", "sentence")
MIXES = ("own", "other keys", "other values")
MIX_NAMES = ("own · 自己的", "keys of the other · 换键", "values of the other · 换值")
PARAMETRISATIONS = {
    "prefix": Text("MLP，随机开始", "MLP, random start"),
    "direct from text": Text("直接，从文本开始（如 Cartridges）", "direct pairs from a text, as Cartridges"),
}


class Exchange(NamedTuple):
    """A job: one seed, and the rates of one method for both styles."""

    method: str
    rates: tuple[float, float]
    seed: int
    scale: Scale


def exchange_pairs(job: Exchange) -> dict[str, dict[str, float]]:
    """Trains a prefix for each style from the same start, and gives each the other's keys, then the other's values.

    Returns exact match by style and by MIXES.
    """
    tuned = [
        tune(Trial(job.method, task=style), job.scale, rate, job.seed) for style, rate in zip(STYLES, job.rates, strict=True)
    ]
    pairs = [run.encoder.bake() for run in tuned]
    found = {}
    for own, other, run, style in zip(pairs, reversed(pairs), tuned, STYLES, strict=True):
        batches = held_out_batches(load_task(style), job.scale)
        mixed = own, mix(other, own), mix(own, other)
        found[style] = {name: run.score(batches, prefix).exact_match for name, prefix in zip(MIXES, mixed, strict=True)}
    return found


def mix(keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """The prefix (L, 2, H, P, D) with the keys of one and the values of another."""
    return torch.stack((keys[:, 0], values[:, 1]), dim=1)


EXCHANGE = Claim(
    Text(
        "在任务之间交换键",
        "Keys exchanged between tasks",
    ),
    "Learned Structure in Cartridges 2025, arXiv 2508.17032",
    Text(
        "键像可共享的路由，可在任务之间交换而代价很小；学到的内容主要在值里。",
        "Keys act as routers that tasks can share: to exchange them costs little, while most of what is learnt "
        "lies in the values.",
    ),
    Text(
        "任务 short 与 sentence，同一起点。相符：换键后两个任务都保住八成以上的完全匹配；换值后都失去一半以上。",
        "Tasks short and sentence, from the same start. Agreement: with the other's keys both keep at least 80 % "
        "of their exact match; with the other's values both lose more than half.",
    ),
)


def exchange(lab: Lab) -> Finding:
    """Keys of one Cartridge can stand in for those of another at little cost; what is learnt lies mostly in the values."""
    scale = lab.scale
    trials = [Trial(method, task=style) for method in PARAMETRISATIONS for style in STYLES]
    measured = lab.measure(*trials)
    rates = {trial: found.rate for trial, found in zip(trials, measured, strict=True)}
    jobs = [
        Exchange(method, (rates[Trial(method)], rates[Trial(method, task="sentence")]), seed, scale)
        for method in PARAMETRISATIONS
        for seed in scale.seeds
    ]
    results = lab.map(exchange_pairs, jobs)
    parts, charts = [], []
    head: list[str | Text] = [Text("任务", "task"), *(Text(*reversed(name.split(" · "))) for name in MIX_NAMES)]
    table: Table = [head]
    for method, title in PARAMETRISATIONS.items():
        of_method = [found for job, found in zip(jobs, results, strict=True) if job.method == method]
        middle = {
            style: [statistics.median(found[style][name] for found in of_method) for name in MIXES] for style in STYLES
        }
        table += [[Text(f"{style}，{title.zh}", f"{style}, {title.en}"), *map(percent, middle[style])] for style in STYLES]
        parts += parts_of_exchange(title, middle)
        series = {name: [middle[style][place] for style in STYLES] for place, name in enumerate(MIX_NAMES)}
        charts.append(Chart("bar", f"task · 任务（{title.en}）", "exact match · 完全匹配", list(STYLES), {**series}))
    numbers: dict[str, Any] = numbers_of(trials, measured)
    numbers["exchanges"] = [
        {"method": job.method, "seed": job.seed, "rates": job.rates, "exact_match": found}
        for job, found in zip(jobs, results, strict=True)
    ]
    return EXCHANGE.finding(
        training(scale),
        parts,
        table,
        charts,
        numbers,
    )


def parts_of_exchange(title: Text, middle: dict[str, list[float]]) -> list[Part]:
    """middle: of each style, the exact match with its own pairs, with other keys, with other values."""
    keys, values = (" / ".join(percent(middle[style][place]) for style in STYLES) for place in (1, 2))
    own = " / ".join(percent(middle[style][0]) for style in STYLES)
    kept = [
        (mixed_keys / max(whole, 1e-9), mixed_values / max(whole, 1e-9))
        for whole, mixed_keys, mixed_values in middle.values()
    ]
    return [
        Part(
            Text(f"{title.zh}：换键 {own} → {keys}", f"{title.en}: other keys {own} -> {keys}"),
            all(by_keys >= 0.8 for by_keys, _ in kept),
        ),
        Part(
            Text(f"{title.zh}：换值 {own} → {values}", f"{title.en}: other values {own} -> {values}"),
            all(by_values < 0.5 for _, by_values in kept),
        ),
    ]


FIXED_KEYS = Claim(
    Text(
        "只训练值，键随机固定",
        "Values alone, behind random fixed keys",
    ),
    "Learned Structure in Cartridges 2025, arXiv 2508.17032",
    Text(
        "学到的内容主要在值里；键是稳定的路由。",
        "Most of what is learnt lies in the values; keys are stable routers.",
    ),
    Text(
        "我们的推论：如果键只是路由，就不必训练。值来自 MLP，键从不改变：标准正态，或冻结模型为 16 个随机词算出的键。"
        "相符：完全匹配至多低 5 个百分点。",
        "Our reading: if keys only route, they need not be trained. The MLP emits values only; keys never change: "
        "standard normal, or those that the frozen base computes for 16 random words. Agreement: an exact match at "
        "most 5 points lower.",
    ),
)


def fixed_keys(lab: Lab) -> Finding:
    """If keys only route, values that are trained behind random keys, which never change, do about as well."""
    trials = [Trial(method) for method in ("prefix", "fixed normal", "fixed words")]
    measured = lab.measure(*trials)
    shares = medians(measured)
    fixed = [
        Text("固定：正态随机键", "fixed: normal random keys"),
        Text("固定：随机词的键", "fixed: keys of random words"),
    ]
    return FIXED_KEYS.finding(
        training(lab.scale),
        [
            Part(
                Text(
                    f"{name.zh} {percent(share)}（训练键：{percent(shares[0])}）",
                    f"{name.en} {percent(share)}, trained {percent(shares[0])}",
                ),
                share >= shares[0] - 0.05,
            )
            for name, share in zip(fixed, shares[1:], strict=True)
        ],
        table_of(Text("键", "keys"), [Text("键也训练", "keys trained, too"), *fixed], measured),
        [
            Chart(
                "bar",
                "keys · 键",
                "exact match · 完全匹配",
                ["trained · 训练", "fixed normal · 固定正态", "fixed words · 固定词"],
                {"exact match · 完全匹配": [*shares]},
            )
        ],
        numbers_of(trials, measured),
    )
