"""Petrov et al. 2023, "When Do Prompting and Prefix-Tuning Work? A Theory of Capabilities and Limitations",
https://arxiv.org/abs/2310.19698.
"""

from prefix_tuning.study.claims.checks import EXACT, tuned_errors
from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.record import Chart, Claim, Finding, Part, Table, percent
from prefix_tuning.study.claims.tables import both, label, medians, table_of, training, training_once
from prefix_tuning.study.claims.trials import Longer, Trial, train_longer
from prefix_tuning.study.page import Text

TIMES = 10  # the steps of the others, of one long training

IDENTITY = Claim(
    Text(
        "前缀缩放文本的注意力，并加上自己的值",
        "A prefix scales the attention of the text and adds its values",
    ),
    "Petrov et al. 2023, arXiv 2310.19698, section 4",
    Text(
        "前缀不能改变文本词之间注意力的比例：它把全部乘以（1 − 自己的份额），再加上自己的值。",
        "A prefix cannot change the ratios of the attention between text tokens: it multiplies all of it by one "
        "minus its own share and adds its values.",
    ),
    Text(
        f"在真实行上，float64，逐层逐头比较。相符：最大误差不超过 {EXACT:g}。",
        f"Real rows, float64, every layer and head by itself. Agreement: no error above {EXACT:g}.",
    ),
)


def identity(lab: Lab) -> Finding:
    """For any prefix, so also for a random one; here for one that was tuned."""
    errors = tuned_errors(lab)
    layers = range(len(errors.share))
    worst = max(errors.weights.max().item(), errors.scaled.max().item())
    head: list[str | Text] = [
        Text("层", "layer"),
        Text("前缀的份额（各头平均）", "share of the prefix, mean of the heads"),
        Text("权重的最大误差", "largest error of the weights"),
        Text("输出的最大误差", "largest error of the output"),
    ]
    table: Table = [head]
    for layer in layers:
        figures = (errors.weights[layer].max(), errors.scaled[layer].max())
        table.append([str(layer), percent(errors.share[layer].mean().item()), *(f"{x.item():.1e}" for x in figures)])
    return IDENTITY.finding(
        training_once(lab.scale),
        [Part(Text(f"最大误差 {worst:.1e}", f"largest error {worst:.1e}"), worst <= EXACT)],
        table,
        [
            Chart(
                "bar",
                "layer · 层",
                "share of the prefix · 前缀的份额",
                [str(layer) for layer in layers],
                {f"head {head} · 头 {head}": column for head, column in enumerate(errors.share.T.tolist())},
            )
        ],
    )


UNLOCK = Claim(
    Text("解锁已会的，学不了新的注意力", "It unlocks what the base can do, and teaches no new attention"),
    "Petrov et al. 2023, arXiv 2310.19698, section 5",
    Text(
        "预训练里有的任务，前缀能学会（论文中大多高于 90 %）；需要新注意力模式的任务，前缀 0 %，全量微调 85 %。",
        "A prefix learns tasks that were part of pre-training (most of the paper's above 90 %). A task that needs a "
        "new attention pattern: 0 %, where full fine-tuning reaches 85 %.",
    ),
    Text(
        "已知任务：演示的问答（留出的事实）。新任务：把三个词倒过来写，词取自事实，每个词一个词元。相符："
        f"已知任务前缀不低于 80 %；新任务前缀不到 10 %，步数 {TIMES} 倍也是；新任务全量微调不低于 80 %。对照："
        "照原样写这三个词。如果前缀连这也学不会，缺的就不是顺序，而是照抄几个词的能力，顺序是否要紧就未定。",
        "Known: the demo's questions about other facts. New: three words to be written in reverse order, words of "
        f"the facts, one token each. Agreement: known, prefix: at least 80 %; new, prefix: below 10 %, with {TIMES} "
        "times the steps as well; new, full fine-tuning: at least 80 %. Control: the same words as they stand. If a "
        "prefix does not learn that either, the base lacks the copying of several words, and whether their order "
        "matters is open.",
    ),
)


def unlock(lab: Lab) -> Finding:
    """Section 5: what was part of pre-training, and what needs an attention pattern that it had no use for."""
    trials = [Trial(method, task=task) for task in ("short", "reversed", "copied") for method in ("prefix", "full")]
    measured = lab.measure(*trials)
    known, _, new, new_full, copied, copied_full = medians(measured)
    (longer,) = (found["exact_match"] for found in lab.run(train_longer, [Longer(trials[2], measured[2].rate, TIMES)]))
    tasks = (Text("已知的事实", "known facts"), Text("倒序", "reversed words"), Text("照抄", "copied words"))
    methods = (Text("前缀", "prefix"), Text("全量微调", "full fine-tuning"))
    names: list[str | Text] = [both(task, method) for task in tasks for method in methods]
    control = Text(
        f"对照，照抄：前缀 {percent(copied)}，全量微调 {percent(copied_full)}",
        f"control, copied words: prefix {percent(copied)}, full fine-tuning {percent(copied_full)}",
    )
    return UNLOCK.finding(
        training(lab.scale),
        [
            Part(Text(f"已知任务，前缀 {percent(known)}", f"known task, prefix {percent(known)}"), known >= 0.8),
            Part(Text(f"新任务，前缀 {percent(new)}", f"new task, prefix {percent(new)}"), new < 0.1),
            Part(
                Text(f"步数 {TIMES} 倍时 {percent(longer)}", f"with {TIMES} times the steps {percent(longer)}"), longer < 0.1
            ),
            Part(
                Text(f"新任务，全量微调 {percent(new_full)}", f"new task, full fine-tuning {percent(new_full)}"),
                new_full >= 0.8,
            ),
            Part(control, True if copied >= 0.5 else None),
        ],
        table_of(Text("任务与方法", "task and method"), names, measured),
        [
            Chart(
                "bar",
                "task · 任务",
                "exact match · 完全匹配",
                list(map(label, tasks)),
                {label(method): medians(measured[place::2]) for place, method in enumerate(methods)},
            )
        ],
    )
