"""The measured trials of a claim as a table of the page."""

from collections.abc import Sequence

from prefix_tuning import bundled
from prefix_tuning.study.claims.record import Chart, Table, percent
from prefix_tuning.study.claims.settings import Scale
from prefix_tuning.study.claims.trials import Measured
from prefix_tuning.study.page import Text


def table_of(what: Text, names: list[str | Text], measured: list[Measured]) -> Table:
    """A row for each trial: name, rate, medians over the seeds, and the exact match of each seed. what: the names' head."""
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


def both(first: Text, second: Text) -> Text:
    """Two names as one."""
    return Text(f"{first.zh}，{second.zh}", f"{first.en}, {second.en}")


def label(text: Text) -> str:
    """A name in a chart, which the page's switch does not reach."""
    return f"{text.en} · {text.zh}"


def rows_text(size: int | None) -> Text:
    """The name of a training set of so many rows; None: all of them."""
    return Text(f"{size} 行", f"{size} rows") if size else Text("全部行", "all rows")


TITLES = {"held_out_loss": "held-out loss, nats · 留出损失", "exact_match": "exact match · 完全匹配"}


def bars_over_rows(sizes: Sequence[int | None], methods: Sequence[Text], measured: list[Measured], figure: str) -> Chart:
    """A bar for each method at each size. measured: of each size, those of the methods in their order. figure: of TITLES."""
    values, ticks = medians(measured, figure), [str(size or "all · 全部") for size in sizes]
    series = {label(name): values[place :: len(methods)] for place, name in enumerate(methods)}
    return Chart("bar", "training rows · 训练行数", TITLES[figure], ticks, series)


def training(scale: Scale, rows: int | None = None) -> Text:
    """How the trials of a claim were trained, as a sentence. rows: of the training set, if that is not said elsewhere."""
    steps, each, seeds, scored = scale.steps, scale.rows_per_step, len(scale.seeds), scale.scored
    of_zh, of_en = (f"（共 {rows} 行）", f" out of {rows}") if rows else ("", "")
    return Text(
        f"每次训练 {steps} 步，每步 {each} 行{of_zh}，float32；"
        f"每种方法各自在半个数量级的网格上按另外的留出行选学习率（用第一个种子）；{seeds} 个种子取中位数；在至多 "
        f"{scored} 个留出问题上评分。未定：各种子的范围有重叠。",
        f"Each training: {steps} steps of {each} rows{of_en}, float32; each method at its own best rate of a grid of "
        f"half decades, chosen with the first seed on other held-out rows; median of {seeds} seeds; scored on at most "
        f"{scored} held-out questions. Open: the ranges of the seeds overlap.",
    )


def training_once(scale: Scale) -> Text:
    """How the one prefix of a claim was trained, as a sentence."""
    rate = bundled.SETTINGS["learning_rate"]
    return Text(
        f"一个训练了 {scale.steps} 步的前缀，学习率为演示的 {rate:g}。",
        f"One prefix, tuned for {scale.steps} steps at the demo's rate of {rate:g}.",
    )
