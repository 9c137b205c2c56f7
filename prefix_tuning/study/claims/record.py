"""What a claim's experiment leaves: texts in both languages, a table, charts and numbers, as JSON and back."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from prefix_tuning.study.page import Text

Table = list[list[str | Text]]  # its first row is the head


@dataclass
class Chart:
    """One picture: lines or bars over x, one for each series; a None is a gap. Titles are short, in both languages."""

    kind: str  # "line" or "bar"
    x_title: str
    y_title: str
    x: list[Any]
    series: dict[str, list[float | None]]
    log_x: bool = False
    log_y: bool = False


@dataclass
class Part:
    """One statement of a claim: what came out here, with its figures, and whether that agrees with the paper."""

    found: Text
    agrees: bool


@dataclass
class Finding:
    """A claim of a paper and what its experiment found. says: the paper's words in ours, with its figures. ran: what was run
    here, and what would count as agreement. numbers: all of them, for the JSON.
    """

    title: Text
    source: str
    says: Text
    ran: Text
    parts: list[Part]
    table: Table
    charts: list[Chart] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def verdict(self) -> Text:
        agreeing = sum(part.agrees for part in self.parts)
        if agreeing == len(self.parts):
            return Text("相符", "agrees")
        if not agreeing:
            return Text("不符", "DISAGREES")
        of = f"{agreeing}/{len(self.parts)}"
        return Text(f"部分相符（{of}）", f"agrees in {of} parts")

    def line(self) -> str:
        """The verdict in one line."""
        found = "; ".join(part.found.en for part in self.parts)
        return f"{self.verdict.en}: {self.title.en} ({self.source.split(',')[0]}): {found}"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"verdict": self.verdict.en, "line": self.line()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Finding":
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError for what that did not write."""
        values = {name.name: content[name.name] for name in dataclasses.fields(cls)}
        for name in ("title", "says", "ran"):
            values[name] = Text(*values[name])
        values["parts"] = [Part(Text(*part["found"]), part["agrees"]) for part in values["parts"]]
        values["table"] = [[Text(*cell) if isinstance(cell, list) else cell for cell in row] for row in values["table"]]
        values["charts"] = [Chart(**chart) for chart in values["charts"]]
        return cls(**values)


class Claim(NamedTuple):
    """What is known of a claim before its experiment. here: what the experiment is, and what counts as agreement."""

    title: Text
    source: str
    says: Text
    here: Text

    def finding(
        self, trained: Text, parts: list[Part], table: Table, charts: list[Chart], numbers: dict[str, Any]
    ) -> Finding:
        """trained: how, as a sentence."""
        ran = Text(trained.zh + self.here.zh, f"{trained.en} {self.here.en}")
        return Finding(self.title, self.source, self.says, ran, parts, table, charts, numbers)


def percent(share: float) -> str:
    return f"{share:.1%}"
