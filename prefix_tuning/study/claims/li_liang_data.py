"""Li & Liang 2021, "Prefix-Tuning", https://arxiv.org/abs/2101.00190: few rows, and other ones than those trained on."""

import statistics

from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.methods import RELATED, UNRELATED
from prefix_tuning.study.claims.record import Chart, Claim, Finding, Part, above, percent
from prefix_tuning.study.claims.tables import bars_over_rows, both, medians, rows_text, table_of, training
from prefix_tuning.study.claims.trials import Measured, Trial
from prefix_tuning.study.page import Text

FEWEST = 50  # rows, as in the paper's figure

LOW_DATA = Claim(
    Text("数据少时与全量微调比较", "Few rows, against full fine-tuning"),
    "Li & Liang 2021, arXiv 2101.00190, section 6.3, figure 3",
    Text(
        "50 到 500 行时，前缀平均比全量微调高 2.9 BLEU；数据越多领先越少。",
        "With 50 to 500 rows, prefix tuning is 2.9 BLEU above full fine-tuning on average; with more rows the lead shrinks.",
    ),
    Text(
        f"训练行随种子抽取。相符：{FEWEST} 行以上各行数平均，前缀的完全匹配更高；"
        "行数最多时的领先小于最少时（没有领先则未定）。",
        "The seed draws the training rows. Agreement: a higher exact match of the prefix on average over the sizes "
        f"from {FEWEST} rows on; a smaller lead with most than with fewest of these rows (open where there is none).",
    ),
)


def low_data(lab: Lab) -> Finding:
    """Both sides at their own best rate for each size."""
    sizes = lab.scale.sizes
    measured = lab.measure(*(Trial(method, rows=size) for method in ("prefix", "full") for size in sizes))
    shares = medians(measured)
    prefix, full = shares[: len(sizes)], shares[len(sizes) :]
    leads = [a - b for a, b in zip(prefix, full, strict=True)]
    pairs = zip(measured[: len(sizes)], measured[len(sizes) :], sizes, strict=True)
    compared = [(ours, theirs) for ours, theirs, size in pairs if size >= FEWEST]
    by_seed = [
        statistics.mean(ours.exact_match[seed] - theirs.exact_match[seed] for ours, theirs in compared)
        for seed in range(len(lab.scale.seeds))
    ]
    mean, first, last = statistics.median(by_seed), leads[len(sizes) - len(compared)], leads[-1]
    names: list[str | Text] = [
        both(name, rows_text(size))
        for name in (Text("前缀", "prefix"), Text("全量微调", "full fine-tuning"))
        for size in sizes
    ]
    return LOW_DATA.finding(
        training(lab.scale),
        [
            Part(
                Text(f"前缀减全量微调，平均 {points(mean)}", f"prefix minus full fine-tuning, mean: {points(mean)}"),
                above(by_seed, [0.0]),
            ),
            Part(
                Text(
                    f"领先：最少时 {points(first)}，最多时 {points(last)}",
                    f"the lead is {points(first)} with fewest and {points(last)} with most rows",
                ),
                last < first if first > 0 else None,
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
    )


def points(difference: float) -> str:
    """A difference of two shares, in percentage points."""
    return f"{100 * difference:+.1f} points"


STARTS = {
    "prefix": Text("随机", "random"),
    "related": Text("相关词", "words of the task"),
    "unrelated": Text("无关词", "other words"),
}
WORDS = Claim(
    Text("从真实词开始", "A start from real words"),
    "Li & Liang 2021, arXiv 2101.00190, section 7.4, figure 5",
    Text(
        "数据少时，从真实词的激活开始优于随机，与任务相关的词又优于别的词；数据充足时没有差别。",
        "With few rows a start from the activations of real words beats a random one, and words of the task beat "
        "others; with all data the start makes no difference.",
    ),
    Text(
        f"相关词：{RELATED} 无关词：{UNRELATED} 相符：行少时，相关词比随机、比无关词，"
        "完全匹配和损失都更好（只有一项更好则未定）；全部行时完全匹配相差至多 2 个百分点。",
        f"Words of the task: {RELATED} Other words: {UNRELATED} Agreement: with few rows words of the task are better "
        "than random, and than others, in exact match and in loss (open where in one only); with all rows exact "
        "match differs by at most 2 points.",
    ),
)


def words(lab: Lab) -> Finding:
    """The start is added to the output of an MLP whose last layer begins at zero."""
    sizes = [*lab.scale.few, None]
    measured = lab.measure(*(Trial(method, rows=size) for size in sizes for method in STARTS))
    texts = [rows_text(size) for size in sizes]
    names: list[str | Text] = [both(start, text) for text in texts for start in STARTS.values()]
    parts = []
    for place, (size, text) in enumerate(zip(sizes, texts, strict=True)):
        of_size = dict(zip(STARTS, measured[3 * place : 3 * place + 3], strict=True))
        for other in ("prefix", "unrelated") if size else ("prefix",):
            found = _compared(of_size["related"], of_size[other], text, STARTS[other])
            parts.append(Part(found, _better(of_size["related"], of_size[other]) if size else _alike(of_size)))
    return WORDS.finding(
        training(lab.scale),
        parts,
        table_of(Text("起点与行数", "start and rows"), names, measured),
        [bars_over_rows(sizes, list(STARTS.values()), measured, figure) for figure in ("exact_match", "held_out_loss")],
    )


def _compared(related: Measured, other: Measured, rows: Text, start: Text) -> Text:
    """Exact match and loss with words of the task, and with another start."""
    shares = [percent(found.median("exact_match")) for found in (related, other)]
    losses = [f"{found.median('held_out_loss'):.3f}" for found in (related, other)]
    return Text(
        f"{rows.zh}：相关词 {shares[0]}（损失 {losses[0]}），{start.zh} {shares[1]}（{losses[1]}）",
        f"{rows.en}: words of the task {shares[0]} (loss {losses[0]}), {start.en} {shares[1]} ({losses[1]})",
    )


def _better(related: Measured, other: Measured) -> bool | None:
    by_match, by_loss = (
        above(related.exact_match, other.exact_match),
        above(other.held_out_loss, related.held_out_loss),
    )
    return by_match if by_match == by_loss else None


def _alike(of_size: dict[str, Measured]) -> bool:
    shares = [found.median("exact_match") for found in (of_size["related"], of_size["prefix"])]
    return round(abs(shares[0] - shares[1]), 4) <= 0.02


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
        "训练问题只涉及一半关系（每隔一个），评分的问题涉及另一半，其中几个关系的问法与训练过的相同（如加法与乘法）；"
        "学习率按见过的关系的其他事实选。相符：前缀的完全匹配更高、损失更低。",
        "Training questions are about every second relation, scored ones about the others, a few of which are asked "
        "in the same words (sums and products, say); the rate is chosen on other facts of the relations that were "
        "seen. Agreement: a higher exact match of the prefix; a lower loss.",
    ),
)


def extrapolation(lab: Lab) -> Finding:
    """The bundled relations in their order, every second one held out."""
    trials = [Trial("prefix", task="relations"), Trial("full", task="relations")]
    ours, theirs = measured = lab.measure(*trials)
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
                above(ours.exact_match, theirs.exact_match),
            ),
            Part(
                Text(f"损失 {losses[0]:.3f} 与 {losses[1]:.3f}", f"loss {losses[0]:.3f} against {losses[1]:.3f}"),
                above(theirs.held_out_loss, ours.held_out_loss),
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
    )
