"""Li & Liang 2021, "Prefix-Tuning", https://arxiv.org/abs/2101.00190: few rows, and other ones than those trained on."""

from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.methods import RELATED, UNRELATED
from prefix_tuning.study.claims.record import Chart, Claim, Finding, Part, percent
from prefix_tuning.study.claims.tables import medians, numbers_of, table_of, training
from prefix_tuning.study.claims.trials import Trial
from prefix_tuning.study.page import Text

LOW_DATA = Claim(
    Text(
        "数据少时与全量微调比较",
        "Few rows, against full fine-tuning",
    ),
    "Li & Liang 2021, arXiv 2101.00190, section 6.3, figure 3",
    Text(
        "50 到 500 行时，前缀平均比全量微调高 2.9 BLEU；数据越多差距越小。",
        "With 50 to 500 rows, prefix tuning is 2.9 BLEU above full fine-tuning on average; more rows narrow the gap.",
    ),
    Text(
        "训练行随种子抽取。相符：前缀的完全匹配平均更高；行数最多时的差距小于最少时。",
        "The seed draws the training rows. Agreement: a higher exact match of the prefix on average over the "
        "sizes; a smaller gap with most than with fewest rows.",
    ),
)


def low_data(lab: Lab) -> Finding:
    """Section 6.3, figure 3: with 50 to 500 rows, a prefix is 2.9 BLEU above full fine-tuning on average; the gap narrows
    as rows are added.
    """
    sizes = lab.scale.sizes
    trials = [Trial(method, rows=size) for method in ("prefix", "full") for size in sizes]
    measured = lab.measure(*trials)
    shares = medians(measured)
    prefix, full = shares[: len(sizes)], shares[len(sizes) :]
    gaps = [a - b for a, b in zip(prefix, full, strict=True)]
    mean = sum(gaps) / len(gaps)
    names: list[str | Text] = [
        Text(f"{zh}，{size} 行", f"{en}, {size} rows")
        for zh, en in (("前缀", "prefix"), ("全量微调", "full fine-tuning"))
        for size in sizes
    ]
    return LOW_DATA.finding(
        training(lab.scale),
        [
            Part(
                Text(
                    f"前缀减全量微调，各行数平均 {mean:+.1%}",
                    f"prefix minus full fine-tuning, mean over sizes: {mean:+.1%} exact match",
                ),
                mean > 0,
            ),
            Part(
                Text(
                    f"差距：{sizes[0]} 行 {gaps[0]:+.1%}，{sizes[-1]} 行 {gaps[-1]:+.1%}",
                    f"the gap is {gaps[0]:+.1%} with {sizes[0]} rows and {gaps[-1]:+.1%} with {sizes[-1]}",
                ),
                gaps[-1] < gaps[0],
            ),
        ],
        table_of(Text("方法与行数", "method and rows"), names, measured),
        [
            Chart(
                "line",
                "training rows · 训练行数",
                "exact match · 完全匹配",
                list(sizes),
                {"prefix · 前缀": [*prefix], "full fine-tuning · 全量微调": [*full]},
                log_x=True,
            )
        ],
        numbers_of(trials, measured),
    )


WORDS = Claim(
    Text(
        "从真实词开始",
        "A start from real words",
    ),
    "Li & Liang 2021, arXiv 2101.00190, section 7.4, figure 5",
    Text(
        "数据少时，从真实词（尤其是与任务相关的词）的激活开始优于随机；数据充足时没有差别。",
        "With few rows a start from the activations of real words, best of words of the task, beats a random one; "
        "with all data the start makes no difference.",
    ),
    Text(
        f"相关词：{RELATED} 无关词：{UNRELATED} 相符：行少时相关词的完全匹配高于随机；全部行时相差不到 2%。",
        f"Words of the task: {RELATED} Other words: {UNRELATED} Agreement: with few rows a higher exact match than "
        "the random start; with all rows a difference of at most 2 points.",
    ),
)


def words(lab: Lab) -> Finding:
    """Section 7.4, figure 5: with few rows, a start from the activations of real words is better than a random one, and
    words of the task better than others; with all data the start makes no difference.
    """
    few = lab.scale.sizes[:3:2]  # the smallest and the third
    methods = ("prefix", "related", "unrelated")
    sizes = [*few, None]
    trials = [Trial(method, rows=size) for size in sizes for method in methods]
    measured = lab.measure(*trials)
    starts = ("random · 随机", "words of the task · 相关词", "other words · 无关词")
    shares = medians(measured)
    by_size = [shares[place : place + 3] for place in range(0, len(shares), 3)]
    texts = [Text(f"{size} 行", f"{size} rows") if size else Text("全部行", "all rows") for size in sizes]
    names: list[str | Text] = [
        Text(f"{start.split(' · ')[1]}，{text.zh}", f"{start.split(' · ')[0]}, {text.en}")
        for text in texts
        for start in starts
    ]
    parts = [
        Part(
            Text(
                f"{text.zh}：相关词 {percent(related)}，随机 {percent(random)}",
                f"{text.en}: words of the task {percent(related)}, random {percent(random)}",
            ),
            related > random if size else round(abs(related - random), 4) <= 0.02,
        )
        for size, text, (random, related, _) in zip(sizes, texts, by_size, strict=True)
    ]
    return WORDS.finding(
        training(lab.scale),
        parts,
        table_of(Text("起点与行数", "start and rows"), names, measured),
        [
            Chart(
                "bar",
                "training rows · 训练行数",
                "exact match · 完全匹配",
                [str(size or "all · 全部") for size in sizes],
                {start: [group[place] for group in by_size] for place, start in enumerate(starts)},
            )
        ],
        numbers_of(trials, measured),
    )


EXTRAPOLATION = Claim(
    Text(
        "未见过的关系",
        "Relations that were not trained on",
    ),
    "Li & Liang 2021, arXiv 2101.00190, section 6.4, table 3",
    Text(
        "在一些类别上训练、在另一些类别上测试（WebNLG、XSum）时，前缀各项指标都优于全量微调。",
        "Trained on some categories and tested on others (WebNLG, XSum), prefix tuning is better than full "
        "fine-tuning on all metrics.",
    ),
    Text(
        "训练问题只涉及一半关系（每隔一个），评分的问题涉及另一半；学习率按见过的关系的其他事实选。相符："
        "前缀的完全匹配更高、损失更低。",
        "Training questions are about every second relation, scored ones about the others; the rate is chosen on "
        "other facts of the relations that were seen. Agreement: a higher exact match of the prefix; a lower loss.",
    ),
)


def extrapolation(lab: Lab) -> Finding:
    """Section 6.4, table 3: trained on some categories and tested on others (WebNLG; XSum across topics), a prefix is better
    than full fine-tuning on all metrics.
    """
    trials = [Trial("prefix", task="relations"), Trial("full", task="relations")]
    measured = lab.measure(*trials)
    prefix, full = medians(measured)
    losses = medians(measured, "held_out_loss")
    names: list[str | Text] = [Text("前缀", "prefix"), Text("全量微调", "full fine-tuning")]
    return EXTRAPOLATION.finding(
        training(lab.scale),
        [
            Part(
                Text(
                    f"未见关系：前缀 {percent(prefix)}，全量微调 {percent(full)}",
                    f"exact match on unseen relations: prefix {percent(prefix)}, full fine-tuning {percent(full)}",
                ),
                prefix > full,
            ),
            Part(
                Text(f"损失 {losses[0]:.3f} 与 {losses[1]:.3f}", f"loss {losses[0]:.3f} against {losses[1]:.3f}"),
                losses[0] < losses[1],
            ),
        ],
        table_of(Text("方法", "method"), names, measured),
        [
            Chart(
                "bar",
                "method · 方法",
                "exact match, unseen relations · 完全匹配",
                ["prefix · 前缀", "full fine-tuning · 全量微调"],
                {"exact match · 完全匹配": [prefix, full]},
            )
        ],
        numbers_of(trials, measured),
    )
