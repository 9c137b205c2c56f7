"""What an experiment leaves: a finding of texts in both languages, a table and charts, which JSON can hold.

All prose of the experiments and of their page is in texts.json; `say` reads it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefix_tuning.study.page import Text
from prefix_tuning.study.texts import Texts

TEXTS = Texts(Path(__file__).with_name("texts.json"))
say = TEXTS.say
Table = list[list[str | Text]]  # its first row is the head


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
        counted = [
            say("verdict.count", count=count, verdict=say(f"verdict.{agrees}")) for agrees, count in counts.items() if count
        ]
        return joined(counted, "，", ", ")

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


def joined(texts: Sequence[Text], zh: str, en: str) -> Text:
    """Several texts as one. zh, en: what stands between them in each language."""
    return Text(zh.join(text.zh for text in texts), en.join(text.en for text in texts))


def label(text: Text) -> str:
    """A text in a picture, which the page's language switch does not reach: both languages."""
    return text.en if text.en == text.zh else f"{text.en} · {text.zh}"
