"""What was found about Cartridges, caches of keys and values that are trained on a text (Eyuboglu et al. 2025, arXiv
2506.06266): Diaz 2025, "Learned Structure in Cartridges: Keys as Shareable Routers in Self-Studied Representations",
https://arxiv.org/abs/2508.17032.
"""

import statistics
from dataclasses import replace
from typing import NamedTuple

import torch.nn.functional as F

from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.record import Chart, Claim, Finding, Part, Table, above, percent
from prefix_tuning.study.claims.settings import Scale
from prefix_tuning.study.claims.tables import both, label, medians, table_of, training
from prefix_tuning.study.claims.tasks import load_task
from prefix_tuning.study.claims.trials import Trial, held_out_batches, tune
from prefix_tuning.study.mixing import mix
from prefix_tuning.study.page import Text

STYLES = ("short", "sentence")
MIXES = {
    "own": Text("自己的", "own"),
    "other keys": Text("换键", "keys of the other"),
    "other values": Text("换值", "values of the other"),
}
STARTS = {
    "prefix": Text("MLP，随机开始", "MLP, random start"),
    "direct from text": Text("直接，从文本开始", "direct pairs from a text"),
}


class Exchange(NamedTuple):
    """A job: one seed, and the rates of one method for both styles."""

    method: str
    rates: tuple[float, float]
    seed: int


def exchange_pairs(job: Exchange, scale: Scale) -> dict[str, dict[str, float]]:
    """Trains a prefix for each style from the same start, and gives each the other's keys, then the other's values.

    Returns exact match by style and by MIXES; and, as "moved", the mean cosine of each style's keys with the start's.
    """
    start = tune(Trial(job.method), replace(scale, steps=0), 0.0, job.seed).encoder.bake()
    tuned = [
        tune(Trial(job.method, task=style), scale, rate, job.seed) for style, rate in zip(STYLES, job.rates, strict=True)
    ]
    pairs = [run.encoder.bake() for run in tuned]
    found: dict[str, dict[str, float]] = {"moved": {}}
    for own, other, run, style in zip(pairs, reversed(pairs), tuned, STYLES, strict=True):
        batches = held_out_batches(load_task(style), scale)
        mixed = own, mix(other, own), mix(own, other)
        found[style] = {name: run.score(batches, prefix).exact_match for name, prefix in zip(MIXES, mixed, strict=True)}
        found["moved"][style] = F.cosine_similarity(own[:, 0], start[:, 0], dim=-1).mean().item()
    return found


EXCHANGE = Claim(
    Text("在任务之间交换键", "Keys exchanged between tasks"),
    "Diaz 2025, arXiv 2508.17032",
    Text(
        "键像稳定、可共享的路由，在任务之间换掉代价很小；学到的内容主要在值里。",
        "Keys are stable routers that tasks can share: to exchange them costs little, while most of what is learnt "
        "lies in the values.",
    ),
    Text(
        "论文在不同语料之间交换；这里事实相同，回答的形式不同：short 与 sentence，从同一起点训练，"
        "另一种形式的回答算错。相符：换键后两个任务都保住八成以上的完全匹配；"
        "两个任务都是换键（留自己的值）好于换值（留自己的键）。",
        "The paper exchanges between corpora; here the facts are the same and the form of the answer differs: short "
        "and sentence, trained from the same start, and an answer in the other's form is wrong. Agreement: with the "
        "other's keys both keep at least 80 % of their exact match; in both, the other's keys with own values do "
        "better than the other's values with own keys.",
    ),
)


def exchange(lab: Lab) -> Finding:
    """The same start, as otherwise the tokens of two prefixes have nothing to do with each other."""
    trials = [Trial(method, task=style) for method in STARTS for style in STYLES]
    rates = [found.rate for found in lab.measure(*trials)]
    jobs = [
        Exchange(method, (rates[2 * place], rates[2 * place + 1]), seed)
        for place, method in enumerate(STARTS)
        for seed in lab.scale.seeds
    ]
    results = lab.run(exchange_pairs, jobs)
    parts, charts = [], []
    table: Table = [[Text("任务", "task"), *MIXES.values(), Text("键与起点的余弦", "cosine of keys with the start")]]
    for method, title in STARTS.items():
        found = [result for job, result in zip(jobs, results, strict=True) if job.method == method]
        for style in STYLES:
            middle = [statistics.median(one[style][name] for one in found) for name in MIXES]
            moved = statistics.median(one["moved"][style] for one in found)
            table.append([both(Text(style, style), title), *map(percent, middle), f"{moved:.2f}"])
        parts += parts_of_exchange(title, found)
        series = {
            label(text): [statistics.median(one[style][name] for one in found) for style in STYLES]
            for name, text in MIXES.items()
        }
        charts.append(Chart("bar", f"task · 任务（{title.en}）", "exact match · 完全匹配", list(STYLES), series))
    return EXCHANGE.finding(training(lab.scale), parts, table, charts)


def parts_of_exchange(title: Text, found: list[dict[str, dict[str, float]]]) -> list[Part]:
    """found: what `exchange_pairs` returned for each seed."""
    middle = {name: [statistics.median(one[style][name] for one in found) for style in STYLES] for name in MIXES}
    own, keys, values = (" / ".join(map(percent, middle[name])) for name in MIXES)
    keeps = [mixed >= 0.8 * whole for mixed, whole in zip(middle["other keys"], middle["own"], strict=True)]
    by_style = [
        above([one[style]["other keys"] for one in found], [one[style]["other values"] for one in found]) for style in STYLES
    ]
    return [
        Part(Text(f"{title.zh}：换键 {own} → {keys}", f"{title.en}: other keys {own} -> {keys}"), all(keeps)),
        Part(
            Text(f"{title.zh}：换值 → {values}", f"{title.en}: other values -> {values}"),
            by_style[0] if by_style[0] == by_style[1] else None,
        ),
    ]


FIXED_KEYS = Claim(
    Text(
        "只训练值，键随机固定",
        "Values alone, behind random fixed keys",
    ),
    "Diaz 2025, arXiv 2508.17032",
    Text(
        "学到的内容主要在值里；键是稳定的路由。",
        "Most of what is learnt lies in the values; keys are stable routers.",
    ),
    Text(
        "论文没有这样说，这是我们的问题：如果键只是路由，要不要训练？值来自 MLP，键从不改变：标准正态，或冻结模型为 "
        "16 个随机词算出的键。因此不判断是否相符。",
        "A question of ours, as the paper does not say so: if keys only route, do they have to be trained? The MLP "
        "emits values only; keys never change: standard normal, or those that the frozen base computes for 16 random "
        "words. So there is no verdict.",
    ),
)


def fixed_keys(lab: Lab) -> Finding:
    """Values that are trained behind random keys, which never change."""
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
                None,
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
    )
