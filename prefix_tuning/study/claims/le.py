"""Le et al. 2025 (ICLR), "Revisiting Prefix-tuning: Statistical Benefits of Reparameterization among Prompts",
https://arxiv.org/abs/2410.02200.
"""

from prefix_tuning.study.claims.lab import Lab
from prefix_tuning.study.claims.record import Finding, Part, above, finding, say
from prefix_tuning.study.claims.tables import chart_by_rows, named_by_rows, rows_text, table_of, training
from prefix_tuning.study.claims.trials import Trial


def shared(lab: Lab) -> Finding:
    """Trained: a prefix by one MLP, direct pairs, and keys and values by an MLP each, on few rows and on all.

    Agrees: the one MLP has the lower held-out loss. Each of the others is compared with it at each number of rows.
    """
    sizes, methods = [*lab.scale.few, None], ("prefix", "direct", "separate")
    found = lab.run_trials({(size, method): Trial(method, rows=size) for size in sizes for method in methods})
    parts = []
    for size in sizes:
        ours = found[size, "prefix"]
        for method in methods[1:]:
            theirs = found[size, method]
            losses = {"shared": ours.median("held_out_loss"), "loss": theirs.median("held_out_loss")}
            text = say("shared.loss", rows=rows_text(size), other=say(f"shared.{method}"), **losses)
            parts.append(Part(text, above(theirs.held_out_loss, ours.held_out_loss)))
    return finding(
        "shared",
        "Le et al. 2025, arXiv 2410.02200",
        training(lab.scale),
        parts,
        table_of(say("method and rows"), named_by_rows("shared", found)),
        [chart_by_rows("shared", found, figure) for figure in ("held_out_loss", "exact_match")],
    )
