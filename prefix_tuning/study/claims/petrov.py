"""Petrov et al. 2023, "When Do Prompting and Prefix-Tuning Work? A Theory of Capabilities and Limitations",
https://arxiv.org/abs/2310.19698.
"""

from prefix_tuning.study.claims.checks import EXACT, identities_of_a_tuned_prefix
from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.record import Chart, Claim, Finding, Part, Table, percent
from prefix_tuning.study.claims.tables import medians, numbers_of, table_of, training, training_once
from prefix_tuning.study.claims.trials import Trial
from prefix_tuning.study.page import Text

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
    """Section 4: a prefix cannot change the ratios of the attention between the tokens of the text; in each layer it scales
    all of it by one minus its own share, and adds its values.
    """
    (errors,) = lab.map(identities_of_a_tuned_prefix, [lab.scale])
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
        {name: value if isinstance(value, float) else value.tolist() for name, value in errors._asdict().items()},
    )


UNLOCK = Claim(
    Text(
        "解锁已会的，学不了新的注意力",
        "It unlocks what the base can do, and teaches no new attention",
    ),
    "Petrov et al. 2023, arXiv 2310.19698, section 5",
    Text(
        "预训练里有的四个任务，前缀达到 94–99.8 %；需要新注意力模式的任务，前缀 0 %，全量微调 85 %。",
        "Four tasks of the pre-training: a prefix reaches 94-99.8 %. A task that needs a new attention pattern: "
        "0 %, where full fine-tuning reaches 85 %.",
    ),
    Text(
        "已知任务：演示的问答（留出的事实）。新任务：把三个词倒过来写，词取自事实，每个词一个词元。相符："
        "已知任务前缀不低于 80 %；新任务前缀不到 10 %；新任务全量微调高于 80 %。",
        "Known: the demo's questions about other facts. New: three words to be written in reverse order, words of "
        "the facts, one token each. Agreement: known, prefix: at least 80 %; new, prefix: below 10 %; new, full "
        "fine-tuning: at least 80 %.",
    ),
)


def unlock(lab: Lab) -> Finding:
    """Section 5: on four tasks that were part of pre-training a prefix reaches 94 to 99.8 %; a task whose attention pattern
    pre-training had no use for stays at 0 %, where full fine-tuning reaches 85 %.
    """
    trials = [Trial(method, task=task) for task in ("short", "reversed") for method in ("prefix", "full")]
    measured = lab.measure(*trials)
    known, known_full, new, new_full = medians(measured)
    names: list[str | Text] = [
        Text(f"{task_zh}，{zh}", f"{task_en}, {en}")
        for task_zh, task_en in (("已知的事实", "known facts"), ("倒序", "reversed words"))
        for zh, en in (("前缀", "prefix"), ("全量微调", "full fine-tuning"))
    ]
    return UNLOCK.finding(
        training(lab.scale),
        [
            Part(Text(f"已知任务，前缀 {percent(known)}", f"known task, prefix {percent(known)}"), known >= 0.8),
            Part(Text(f"新任务，前缀 {percent(new)}", f"new task, prefix {percent(new)}"), new < 0.1),
            Part(
                Text(f"新任务，全量微调 {percent(new_full)}", f"new task, full fine-tuning {percent(new_full)}"),
                new_full >= 0.8,
            ),
        ],
        table_of(Text("任务与方法", "task and method"), names, measured),
        [
            Chart(
                "bar",
                "task · 任务",
                "exact match · 完全匹配",
                ["known facts · 已知的事实", "reversed words · 倒序"],
                {"prefix · 前缀": [known, new], "full fine-tuning · 全量微调": [known_full, new_full]},
            )
        ],
        numbers_of(trials, measured),
    )
