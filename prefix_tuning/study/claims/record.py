"""What an experiment leaves: a finding, which JSON can hold. It has texts in both languages, a table and charts.

All prose of the experiments and of their page is in texts.json; `say` reads it.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefix_tuning import bundled
from prefix_tuning.study.claims.settings import Scale
from prefix_tuning.study.claims.trials import Measured
from prefix_tuning.study.page import Text, joined
from prefix_tuning.study.texts import Texts

TEXTS = Texts(Path(__file__).with_name("texts.json"))
say = TEXTS.say
Table = list[list[str | Text]]  # its first row is the head
FIGURES = ("train_loss", "held_out_loss", "exact_match")
ByRows = Mapping[tuple[Any, str], Measured]  # trials by training rows (None: all of them) and method


@dataclass
class Chart:
    """One picture: lines or bars over x, one for each series. A value of None is a gap. Titles are in both languages."""

    kind: str  # "line" or "bar"
    x_title: str
    y_title: str
    x: list[Any]
    series: Mapping[str, Sequence[float | None]]
    log_x: bool = False
    log_y: bool = False


@dataclass
class Part:
    """One statement of a claim: what came out here, with its figures, and whether that agrees with the paper.

    agrees is None where this is open: the seeds differ by more than what is compared, or the paper claims nothing.
    """

    found: Text
    agrees: bool | None


@dataclass
class Finding:
    """A claim of a paper and what its experiment found.

    says: the paper's claim in our words, with its figures. ran: what was run here, and what would count as agreement.
    """

    title: Text
    source: str
    says: Text
    ran: Text
    parts: list[Part]
    table: Table
    charts: list[Chart] = field(default_factory=list)

    @property
    def verdict(self) -> Text:
        """One word if all parts say the same, else how many parts agree, disagree and are open."""
        counts = {agrees: sum(part.agrees is agrees for part in self.parts) for agrees in (True, False, None)}
        if len(self.parts) in counts.values():
            return say(f"verdict.{self.parts[0].agrees}")
        words = {agrees: say(f"verdict.{agrees}") for agrees in counts}
        return joined([say("verdict.count", count=counts[key], verdict=words[key]) for key in counts if counts[key]])

    def line(self) -> str:
        """The verdict in one line."""
        found = "; ".join(part.found.en for part in self.parts)
        return f"{self.verdict.en}: {self.title.en} ({self.source.split(',')[0]}): {found}"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"verdict": self.verdict.en, "line": self.line()}


def finding(
    claim: str, source: str, trained: Text, parts: list[Part], table: Table, charts: list[Chart], **fields: object
) -> Finding:
    """The finding of a claim, whose title and prose are in texts.json under its name.

    source: the paper and its section. trained: how, as a sentence. fields: what the text about the experiment names.
    """
    here = say(f"{claim}.here", **fields)
    ran = Text(trained.zh + here.zh, f"{trained.en} {here.en}")
    return Finding(say(f"{claim}.title"), source, say(f"{claim}.says"), ran, parts, table, charts)


def above(first: Sequence[float], second: Sequence[float]) -> bool | None:
    """Whether the first is higher than the second, where each has a figure per seed. None if their ranges overlap."""
    if min(first) > max(second):
        return True
    return False if max(first) < min(second) else None


def label(text: Text) -> str:
    """A text in a picture, which the page's language switch does not reach: both languages."""
    return text.en if text.en == text.zh else f"{text.en} · {text.zh}"


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


def named(claim: str, measured: Mapping[Any, Measured]) -> dict[Text, Measured]:
    """Trials by name. Their keys are methods, or rows and methods; texts.json names the methods under the claim."""
    names = [
        joined([say(f"{claim}.{key[1]}"), rows_text(key[0])]) if isinstance(key, tuple) else say(f"{claim}.{key}")
        for key in measured
    ]
    return dict(zip(names, measured.values(), strict=True))


def chart_by_rows(claim: str, measured: ByRows, figure: str = "exact_match", lines: bool = False) -> Chart:
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
