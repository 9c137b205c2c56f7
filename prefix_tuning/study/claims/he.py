"""He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer Learning", https://arxiv.org/abs/2110.04366."""

from prefix_tuning.study.claims.checks import EXACT, tuned_errors
from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.record import Chart, Claim, Finding, Part, Table
from prefix_tuning.study.claims.tables import training_once
from prefix_tuning.study.page import Text

GATED = Claim(
    Text(
        "前缀是带门的适配器",
        "A prefix is a gated adapter",
    ),
    "He et al. 2021, arXiv 2110.04366, section 3.1",
    Text(
        "对 [前缀; 文本] 的注意力等于（1 − λ）× 文本的注意力 + λ × softmax(q P_k^T) P_v，λ 为前缀的份额。",
        "Attention over [prefix; text] equals (1 - λ) times attention over the text plus λ times softmax(q P_k^T) "
        "P_v, where λ is the prefix's share.",
    ),
    Text(
        f"两种形式，float64：逐层逐头，以及把门的形式装到每一层后整个模型的 logits。相符：最大误差不超过 {EXACT:g}。",
        "Both forms in float64: layer by layer and head by head, and the logits of the whole model with the gated "
        f"form on every layer. Agreement: no error above {EXACT:g}.",
    ),
)


def gated(lab: Lab) -> Finding:
    """An adapter beside the attention, behind a gate, the share."""
    errors = tuned_errors(lab)
    layers = range(len(errors.gated))
    worst = errors.gated.max().item()
    heads = range(errors.gated.shape[1])
    head: list[str | Text] = [Text("层", "layer"), *(Text(f"头 {head}", f"head {head}") for head in heads)]
    table: Table = [head]
    for layer in layers:
        table.append([str(layer), *(f"{error:.1e}" for error in errors.gated[layer].tolist())])
    return GATED.finding(
        training_once(lab.scale),
        [
            Part(
                Text(f"各层各头最大误差 {worst:.1e}", f"largest error of any layer and head {worst:.1e}"),
                worst <= EXACT,
            ),
            Part(
                Text(
                    f"logits 最大误差 {errors.logits:.1e}（logits 最大 {errors.largest_logit:.1f}）",
                    f"of the logits {errors.logits:.1e}, the largest of which is {errors.largest_logit:.1f}",
                ),
                errors.logits <= EXACT,
            ),
        ],
        table,
        [
            Chart(
                "bar",
                "layer · 层",
                "largest error · 最大误差",
                [str(layer) for layer in layers],
                {f"head {head} · 头 {head}": errors.gated[:, head].tolist() for head in heads},
                log_y=True,
            )
        ],
    )
