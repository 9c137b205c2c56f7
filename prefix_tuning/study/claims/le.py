"""Le et al. 2025 (ICLR), "Revisiting Prefix-tuning: Statistical Benefits of Reparameterization among Prompts",
https://arxiv.org/abs/2410.02200.
"""

from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.record import Claim, Finding, Part, above
from prefix_tuning.study.claims.tables import bars_over_rows, both, rows_text, table_of, training
from prefix_tuning.study.claims.trials import Trial
from prefix_tuning.study.page import Text

METHODS = {
    "prefix": Text("共享", "shared"),
    "direct": Text("直接，不共享", "direct, no sharing"),
    "separate": Text("各自的 MLP", "an MLP each"),
}

SHARED = Claim(
    Text("键和值来自同一嵌入", "Keys and values from one shared embedding"),
    "Le et al. 2025, arXiv 2410.02200",
    Text(
        "键和值由同一嵌入产生（共享结构），比各自独立的键和值需要的样本少。",
        "Keys and values that come from one embedding are estimated from fewer samples than independent ones.",
    ),
    Text(
        "共享：本项目的 MLP；直接：键值本身为参数，即论文所比较的；各自：键和值各有嵌入与 MLP，参数多一倍，"
        "是我们加的对照。相符：共享的留出损失更低。",
        "Shared: the MLP as it is; direct: the pairs are parameters, which is what the paper compares with; an MLP "
        "each for keys and values, with twice the parameters, is a control of ours. Agreement: a lower held-out loss "
        "of the shared form.",
    ),
)


def shared(lab: Lab) -> Finding:
    """The paper measures on vision (FGVC, VTAB) and language (E2E, WebNLG) tasks."""
    sizes = [*lab.scale.few, None]
    trials = [Trial(method, rows=size) for size in sizes for method in METHODS]
    measured = lab.measure(*trials)
    texts = [rows_text(size) for size in sizes]
    names: list[str | Text] = [both(name, text) for text in texts for name in METHODS.values()]
    parts = []
    for place, text in enumerate(texts):
        together, *others = measured[3 * place : 3 * place + 3]
        ours = together.median("held_out_loss")
        for name, other in zip(list(METHODS.values())[1:], others, strict=True):
            theirs = other.median("held_out_loss")
            found = Text(
                f"{text.zh}：共享 {ours:.3f}，{name.zh} {theirs:.3f}",
                f"loss with {text.en}: shared {ours:.3f}, {name.en} {theirs:.3f}",
            )
            parts.append(Part(found, above(other.held_out_loss, together.held_out_loss)))
    return SHARED.finding(
        training(lab.scale),
        parts,
        table_of(Text("方法与行数", "method and rows"), names, measured),
        [bars_over_rows(sizes, list(METHODS.values()), measured, figure) for figure in ("held_out_loss", "exact_match")],
    )
