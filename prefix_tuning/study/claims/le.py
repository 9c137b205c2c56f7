"""Le et al. 2025 (ICLR), "Revisiting Prefix-tuning: Statistical Benefits of Reparameterization among Prompts",
https://arxiv.org/abs/2410.02200.
"""

from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.record import Chart, Claim, Finding, Part
from prefix_tuning.study.claims.tables import medians, numbers_of, table_of, training
from prefix_tuning.study.claims.trials import Trial
from prefix_tuning.study.page import Text

METHODS = ("prefix", "separate", "direct")
NAMES = ("shared · 共享", "separate MLPs · 各自的 MLP", "direct, no sharing · 直接，不共享")


SHARED = Claim(
    Text(
        "键和值来自同一嵌入",
        "Keys and values from one shared embedding",
    ),
    "Le et al. 2025, arXiv 2410.02200",
    Text(
        "键和值由同一嵌入产生（共享结构）比互相独立需要的样本少；样本越少差别越明显。",
        "Keys and values that come from one embedding need fewer samples than independent ones; the gain is "
        "largest with few samples.",
    ),
    Text(
        "共享：本项目的 MLP；各自：键和值各有嵌入与 MLP；直接：键值本身为参数。相符：共享的留出损失更低。",
        "Shared: the MLP as it is; separate: an embedding and an MLP for keys and another for values; direct: the "
        "pairs are parameters. Agreement: a lower held-out loss of the shared form.",
    ),
)


def shared(lab: Lab) -> Finding:
    """Keys and values that come from one embedding (deep share) are estimated from fewer samples than independent ones (no
    share); measured on vision (FGVC, VTAB) and language (E2E, WebNLG) tasks, the more clearly the fewer the samples.
    """
    sizes = [*lab.scale.sizes[:3:2], None]
    trials = [Trial(method, rows=size) for size in sizes for method in METHODS]
    measured = lab.measure(*trials)
    losses, shares = medians(measured, "held_out_loss"), medians(measured)
    texts = [Text(f"{size} 行", f"{size} rows") if size else Text("全部行", "all rows") for size in sizes]
    names: list[str | Text] = [
        Text(f"{name.split(' · ')[1]}，{text.zh}", f"{name.split(' · ')[0]}, {text.en}") for text in texts for name in NAMES
    ]
    parts = []
    for place, text in enumerate(texts):
        together, apart, direct = losses[3 * place : 3 * place + 3]
        for zh, en, other in (("各自的 MLP", "separate MLPs", apart), ("直接", "direct pairs", direct)):
            found = Text(
                f"{text.zh}：共享 {together:.3f}，{zh} {other:.3f}",
                f"loss with {text.en}: shared {together:.3f}, {en} {other:.3f}",
            )
            parts.append(Part(found, together < other))
    return SHARED.finding(
        training(lab.scale),
        parts,
        table_of(Text("方法与行数", "method and rows"), names, measured),
        [
            Chart(
                "bar",
                "training rows · 训练行数",
                title,
                [str(size or "all · 全部") for size in sizes],
                {name: list(figures[place::3]) for place, name in enumerate(NAMES)},
            )
            for title, figures in (("held-out loss, nats · 留出损失", losses), ("exact match · 完全匹配", shares))
        ],
        numbers_of(trials, measured),
    )
