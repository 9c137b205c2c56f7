"""Li & Liang 2021, "Prefix-Tuning", https://arxiv.org/abs/2101.00190: what makes up a prefix (sections 4.3 and 7)."""

import math

from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.record import Chart, Claim, Finding, Part, above, percent
from prefix_tuning.study.claims.tables import medians, table_of, training
from prefix_tuning.study.claims.trials import Measured, Trial
from prefix_tuning.study.page import Text

METHOD = Text("方法", "method")


LENGTH = Claim(
    Text("前缀长度", "The length of a prefix"),
    "Li & Liang 2021, arXiv 2101.00190, section 7.1, figure 4",
    Text(
        "前缀越长训练损失越低，测试成绩却在某一长度之后略降：XSum 最佳 200，DART 最佳 10。",
        "A longer prefix lowers the training loss on and on; the test score is best at some length, 200 tokens on "
        "XSum and 10 on DART, and falls slightly beyond it.",
    ),
    Text(
        "相符：最长者的训练损失低于其余各个；留出损失最低者不是最长者。",
        "Agreement: the longest has a lower training loss than any other; the lowest held-out loss is at a shorter one.",
    ),
)


def length(lab: Lab) -> Finding:
    """Figure 4 shows test scores and training losses over the length."""
    lengths = lab.scale.lengths
    measured = lab.measure(*(Trial("prefix", rows=lab.scale.length_rows, tokens=tokens) for tokens in lengths))
    train, held_out = medians(measured, "train_loss"), medians(measured, "held_out_loss")
    *_, longest = measured
    rivals = [min(range(len(lengths) - 1), key=losses.__getitem__) for losses in (train, held_out)]
    lowest, best = lengths[train.index(min(train))], lengths[held_out.index(min(held_out))]
    return LENGTH.finding(
        training(lab.scale, lab.scale.length_rows),
        [
            Part(
                Text(
                    f"训练损失在 {lowest} 个虚拟词时最低（{min(train):.4f}）",
                    f"training loss is lowest with {lowest} tokens ({min(train):.4f})",
                ),
                above(measured[rivals[0]].train_loss, longest.train_loss),
            ),
            Part(
                Text(
                    f"留出损失在 {best} 个时最低（{min(held_out):.4f}）",
                    f"held-out loss is lowest with {best} tokens ({min(held_out):.4f})",
                ),
                above(longest.held_out_loss, measured[rivals[1]].held_out_loss),
            ),
        ],
        table_of(Text("虚拟词数", "tokens"), [str(tokens) for tokens in lengths], measured),
        [
            Chart(
                "line",
                "tokens · 虚拟词数",
                "loss, nats · 损失",
                list(lengths),
                {"training · 训练": [*train], "held-out · 留出": [*held_out]},
                log_x=True,
                log_y=True,
            )
        ],
    )


INFIX = Claim(
    Text(
        "前缀、中缀与仅嵌入",
        "Prefix, infix and embedding-only",
    ),
    "Li & Liang 2021, arXiv 2101.00190, sections 7.2-7.3, table 4",
    Text(
        "E2E 的 BLEU（GPT-2 medium）：前缀 70.3，中缀 66.7–67.9，仅嵌入 48.1–62.2。",
        "BLEU on E2E with GPT-2 medium: prefix 70.3, infix 66.7-67.9, embedding-only 48.1-62.2.",
    ),
    Text(
        "各 16 个虚拟词；中缀的键值位于问题最后一个词之前，只有预测答案的位置看得到；仅嵌入从随机词的嵌入开始。相符："
        "中位完全匹配低于前缀。",
        "16 tokens each. The infix stands before the last token of the prompt, so that only positions that predict "
        "the answer see it; embedding-only starts with the embeddings of random words. Agreement: a lower median "
        "exact match than the prefix.",
    ),
)


def infix(lab: Lab) -> Finding:
    """The paper gives 1 to 20 tokens to infix and embedding-only."""
    names: list[str | Text] = [
        Text("前缀", "prefix"),
        Text("中缀", "infix"),
        Text("仅嵌入", "embedding-only"),
    ]
    trials = [Trial(method) for method in ("prefix", "infix", "embeddings")]
    measured = lab.measure(*trials)
    prefix, middle, embeddings = medians(measured)
    matches = [found.exact_match for found in measured]
    return INFIX.finding(
        training(lab.scale),
        [
            Part(
                Text(
                    f"中缀 {percent(middle)}，前缀 {percent(prefix)}",
                    f"infix {percent(middle)} against prefix {percent(prefix)}",
                ),
                above(matches[0], matches[1]),
            ),
            Part(
                Text(f"仅嵌入 {percent(embeddings)}", f"embedding-only {percent(embeddings)}"), above(matches[0], matches[2])
            ),
        ],
        table_of(METHOD, names, measured),
        [
            Chart(
                "bar",
                "method · 方法",
                "exact match · 完全匹配",
                ["prefix · 前缀", "infix · 中缀", "embedding-only · 仅嵌入"],
                {"exact match · 完全匹配": [prefix, middle, embeddings]},
            )
        ],
    )


PROJECTION = Claim(
    Text("投影与直接训练", "Projection and direct pairs"),
    "Li & Liang 2021, arXiv 2101.00190, section 4.3",
    Text(
        "直接训练键值不稳定，对学习率敏感，成绩略低，因此用 MLP 重参数化。",
        "Training the pairs directly is unstable, sensitive to the learning rate, and slightly worse; hence the "
        "reparametrisation by an MLP.",
    ),
    Text(
        "相符：直接训练的完全匹配较低；离最佳学习率半个数量级时，它的损失升高的倍数更大（第一个种子）。",
        "Agreement: a lower exact match of the direct pairs; half a decade off the best rate, their loss grows by "
        "the larger factor (first seed).",
    ),
)


def projection(lab: Lab) -> Finding:
    """The rates are those that the search has tried."""
    names: list[str | Text] = [Text("经 MLP", "by the MLP"), Text("直接", "direct pairs")]
    measured = lab.measure(Trial("prefix"), Trial("direct"))
    projected, direct = medians(measured)
    by_mlp, by_itself = measured
    factors = [factor_beside_the_best(found) for found in measured]
    rates = sorted({float(rate) for found in measured for rate in found.tried})
    return PROJECTION.finding(
        training(lab.scale),
        [
            Part(
                Text(
                    f"直接 {percent(direct)}，MLP {percent(projected)}",
                    f"direct pairs {percent(direct)} against {percent(projected)} by the MLP",
                ),
                above(by_mlp.exact_match, by_itself.exact_match),
            ),
            Part(
                Text(
                    f"学习率偏半个数量级，损失升到 {factors[1]:.1f} 倍，MLP {factors[0]:.1f} 倍",
                    f"half a decade off the best rate, the loss is {factors[1]:.1f} times as high, by the MLP "
                    f"{factors[0]:.1f}",
                ),
                factors[1] > factors[0],
            ),
        ],
        table_of(METHOD, names, measured),
        [
            Chart(
                "line",
                "rate · 学习率",
                "held-out loss, nats · 留出损失",
                rates,
                {
                    name: [found.tried.get(f"{rate:g}") for rate in rates]
                    for name, found in zip(("MLP", "direct · 直接"), measured, strict=True)
                },
                log_x=True,
                log_y=True,
            )
        ],
    )


def factor_beside_the_best(found: Measured) -> float:
    """The larger loss of the two rates beside the best, over that of the best. A loss that was not finite is infinite."""
    losses = [math.inf if loss is None else loss for loss in found.tried.values()]
    place = losses.index(min(losses))
    return max(losses[max(0, place - 1) : place + 2]) / losses[place]
