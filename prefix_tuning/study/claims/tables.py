"""The measured trials of a claim as a table of the page."""

from prefix_tuning import bundled
from prefix_tuning.study.claims.record import Table, percent
from prefix_tuning.study.claims.settings import Scale
from prefix_tuning.study.claims.trials import Measured
from prefix_tuning.study.page import Text


def table_of(what: Text, names: list[str | Text], measured: list[Measured]) -> Table:
    """A row for each trial: name, rate, medians over the seeds, and the exact match of each seed. what: the names' "
    "head."""
    head: list[str | Text] = [
        what,
        Text("学习率", "rate"),
        Text("训练损失", "training loss"),
        Text("留出损失", "held-out loss"),
        Text("完全匹配", "exact match"),
        Text("各种子", "each seed"),
    ]
    return [head, *([name, *cells_of(found)] for name, found in zip(names, measured, strict=True))]


def cells_of(found: Measured) -> list[str | Text]:
    return [
        f"{found.rate:g}",
        f"{found.median('train_loss'):.4f}",
        f"{found.median('held_out_loss'):.4f}",
        percent(found.median("exact_match")),
        ", ".join(percent(share) for share in found.exact_match),
    ]


def medians(measured: list[Measured], figure: str = "exact_match") -> list[float]:
    return [found.median(figure) for found in measured]


def training(scale: Scale, rows: int | None = None) -> Text:
    """How the trials of a claim were trained, as a sentence. rows: of the training set, if that is not said elsewhere."""
    steps, each, seeds, scored = scale.steps, scale.rows_per_step, len(scale.seeds), scale.scored
    of_zh, of_en = (f"（共 {rows} 行）", f" out of {rows}") if rows else ("", "")
    return Text(
        f"每次训练 {steps} 步，每步 {each} 行{of_zh}，float32；"
        "每种方法各自在半个数量级的网格上按另外的留出行选学习率（用第一个种子）；"
        f"{seeds} 个种子取中位数；在至多 {scored} 个留出问题上评分。未定：各种子的范围有重叠。",
        f"Each training: {steps} steps of {each} rows{of_en}, float32; each method at its own best rate of a grid of "
        "half "
        f"decades, chosen with the first seed on other held-out rows; median of {seeds} seeds; scored on at most "
        f"{scored} "
        "held-out questions. Open: the ranges of the seeds overlap.",
    )


def training_once(scale: Scale) -> Text:
    """How the one prefix of a claim was trained, as a sentence."""
    rate = bundled.SETTINGS["learning_rate"]
    return Text(
        f"一个训练了 {scale.steps} 步的前缀，学习率为演示的 {rate:g}。",
        f"One prefix, tuned for {scale.steps} steps at the demo's rate of {rate:g}.",
    )
