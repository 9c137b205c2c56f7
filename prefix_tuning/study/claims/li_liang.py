"""Li & Liang 2021, "Prefix-Tuning", https://arxiv.org/abs/2101.00190: what makes up a prefix (sections 4.3 and 7)."""

from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.record import Chart, Claim, Finding, Part, percent
from prefix_tuning.study.claims.tables import medians, numbers_of, table_of, training
from prefix_tuning.study.claims.trials import Trial
from prefix_tuning.study.page import Text

METHOD = Text("方法", "method")


LENGTH = Claim(
    Text(
        "前缀长度",
        "The length of a prefix",
    ),
    "Li & Liang 2021, arXiv 2101.00190, section 7.1, figure 4",
    Text(
        "前缀越长训练损失越低，测试成绩却在某一长度之后略降：XSum 最佳 200，DART 最佳 10。",
        "A longer prefix lowers the training loss on and on; the test score is best at some length, 200 tokens on "
        "XSum and 10 on DART, and falls slightly beyond it.",
    ),
    Text(
        "相符：最长者训练损失最低；留出损失最低者不是最长者。",
        "Agreement: the longest has the lowest training loss; the lowest held-out loss is at a shorter one.",
    ),
)


def length(lab: Lab) -> Finding:
    """Section 7.1, figure 4: test scores rise with the length of the prefix up to a threshold (200 tokens for XSum, 10 for
    DART), then fall slightly, while the training loss falls on.
    """
    lengths = lab.scale.lengths
    trials = [Trial("prefix", rows=lab.scale.length_rows, tokens=tokens) for tokens in lengths]
    measured = lab.measure(*trials)
    train, held_out = medians(measured, "train_loss"), medians(measured, "held_out_loss")
    lowest, best = lengths[train.index(min(train))], lengths[held_out.index(min(held_out))]
    return LENGTH.finding(
        training(lab.scale, lab.scale.length_rows),
        [
            Part(
                Text(
                    f"训练损失在 {lowest} 个虚拟词时最低", f"training loss is lowest with {lowest} tokens ({min(train):.4f})"
                ),
                lowest == max(lengths),
            ),
            Part(
                Text(f"留出损失在 {best} 个时最低", f"held-out loss is lowest with {best} tokens ({min(held_out):.4f})"),
                best < max(lengths),
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
        numbers_of(trials, measured),
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
        "各 16 个虚拟词；中缀的键值位于问题最后一个词之前，只有预测答案的位置看得到；仅嵌入从随机词的嵌入开始。"
        "相符：中位完全匹配低于前缀。",
        "16 tokens each. The infix stands before the last token of the prompt, so that only positions that predict "
        "the answer see it; embedding-only starts with the embeddings of random words. Agreement: a lower median "
        "exact match than the prefix.",
    ),
)


def infix(lab: Lab) -> Finding:
    """Sections 7.2 and 7.3, table 4: E2E, GPT-2 medium, BLEU: prefix 70.3, infix 66.7 to 67.9, embedding-only 48.1 to 62.2
    (both with 1 to 20 tokens).
    """
    names: list[str | Text] = [
        Text("前缀", "prefix"),
        Text("中缀", "infix"),
        Text("仅嵌入", "embedding-only"),
    ]
    trials = [Trial(method) for method in ("prefix", "infix", "embeddings")]
    measured = lab.measure(*trials)
    prefix, middle, embeddings = medians(measured)
    return INFIX.finding(
        training(lab.scale),
        [
            Part(
                Text(
                    f"中缀 {percent(middle)}，前缀 {percent(prefix)}",
                    f"infix {percent(middle)} against prefix {percent(prefix)}",
                ),
                middle < prefix,
            ),
            Part(Text(f"仅嵌入 {percent(embeddings)}", f"embedding-only {percent(embeddings)}"), embeddings < prefix),
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
        numbers_of(trials, measured),
    )


PROJECTION = Claim(
    Text(
        "投影与直接训练",
        "Projection and direct pairs",
    ),
    "Li & Liang 2021, arXiv 2101.00190, section 4.3",
    Text(
        "直接训练键值不稳定，成绩略低，因此用 MLP 重参数化。",
        "Training the pairs directly is unstable and slightly worse; hence the reparametrisation by an MLP.",
    ),
    Text(
        "相符：直接训练的中位完全匹配较低；种子之间相差更大。",
        "Agreement: a lower median exact match of the direct pairs; a larger difference between seeds.",
    ),
)


def projection(lab: Lab) -> Finding:
    """Section 4.3: to train the pairs directly is unstable and slightly worse, so an MLP emits them."""
    names: list[str | Text] = [Text("经 MLP", "by the MLP"), Text("直接", "direct pairs")]
    trials = [Trial("prefix"), Trial("direct")]
    measured = lab.measure(*trials)
    projected, direct = medians(measured)
    spread = [max(found.exact_match) - min(found.exact_match) for found in measured]
    rates = sorted({float(rate) for found in measured for rate in found.tried})
    parts = [
        Part(
            Text(
                f"直接 {percent(direct)}，MLP {percent(projected)}",
                f"direct pairs {percent(direct)} against {percent(projected)} by the MLP",
            ),
            direct < projected,
        )
    ]
    if len(lab.scale.seeds) > 1:
        parts.append(
            Part(
                Text(
                    f"种子间相差 {percent(spread[1])}，MLP {percent(spread[0])}",
                    f"seeds differ by {percent(spread[1])} against {percent(spread[0])}",
                ),
                spread[1] > spread[0],
            )
        )
    return PROJECTION.finding(
        training(lab.scale),
        parts,
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
        numbers_of(trials, measured),
    )
