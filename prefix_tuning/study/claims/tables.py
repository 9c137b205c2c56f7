"""Measured trials as a table of the page and as its pictures."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prefix_tuning import bundled
from prefix_tuning.study.claims.record import Chart, Table, Text, joined, label, say
from prefix_tuning.study.claims.settings import Scale
from prefix_tuning.study.claims.trials import Measured

FIGURES = ("train_loss", "held_out_loss", "exact_match")
ByRows = Mapping[tuple[Any, str], Measured]  # trials by training rows (None: all of them) and method


def table_of(first: Text, measured: Mapping[Text, Measured] | Mapping[str, Measured]) -> Table:
    """A row for each trial: name, rate, medians over the seeds, and the exact match of each seed. first: heads the names."""
    table: Table = [[first, *map(say, ("rate", *FIGURES, "each_seed"))]]
    for name, found in measured.items():
        train_loss, held_out_loss, match = map(found.median, FIGURES)
        seeds = ", ".join(f"{share:.1%}" for share in found.exact_match)
        table.append([name, f"{found.rate:g}", f"{train_loss:.4f}", f"{held_out_loss:.4f}", f"{match:.1%}", seeds])
    return table


def chart_of(
    figure: str, axis: Text, x: Sequence[int | str | Text], series: Mapping[Text, Iterable[Measured]], lines: bool = False
) -> Chart:
    """A picture of one of FIGURES, as medians over the seeds: bars, or lines over the logarithm of x. axis: what x is."""
    values = {label(name): [found.median(figure) for found in trials] for name, trials in series.items()}
    ticks = [label(one) if isinstance(one, Text) else one for one in x]
    return Chart("line" if lines else "bar", label(axis), label(say(f"axis.{figure}")), ticks, values, log_x=lines)


def bars_of(measured: Mapping[Text, Measured], axis: str = "method") -> Chart:
    """The exact match of each trial as a bar."""
    return chart_of("exact_match", say(axis), list(measured), {say("exact_match"): measured.values()})


def named(claim: str, measured: Mapping[str, Measured]) -> dict[Text, Measured]:
    """Trials by the names that texts.json has for them under a claim."""
    return {say(f"{claim}.{key}"): found for key, found in measured.items()}


def named_by_rows(claim: str, measured: ByRows) -> dict[Text, Measured]:
    """The same for trials by rows and method."""
    return {
        joined([say(f"{claim}.{method}"), rows_text(size)], "，", ", "): found for (size, method), found in measured.items()
    }


def chart_by_rows(claim: str, measured: ByRows, figure: str, lines: bool = False) -> Chart:
    """One of FIGURES over the number of training rows, a bar or a line for each method."""
    sizes, methods = (list(dict.fromkeys(keys)) for keys in zip(*measured, strict=True))
    ticks = sizes if lines else [str(size) if size else say("all") for size in sizes]
    series = {say(f"{claim}.{method}"): [measured[size, method] for size in sizes] for method in methods}
    return chart_of(figure, say("axis.rows"), ticks, series, lines)


def rows_text(size: int | None) -> Text:
    """The name of a training set of this size. None: all rows."""
    return say("rows", size=size) if size else say("rows.all")


def training(scale: Scale, rows: int | None = None) -> Text:
    """How the trials of a claim were trained, as a sentence. rows: of the training set, if nothing else says it."""
    return say("trained", scale=scale, seeds=len(scale.seeds), rows=say("trained.rows", rows=rows) if rows else "")


def training_once(scale: Scale) -> Text:
    """How the one prefix of a claim was trained, as a sentence."""
    return say("trained.once", steps=scale.steps, rate=bundled.SETTINGS["learning_rate"])
