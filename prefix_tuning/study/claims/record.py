"""What a claim's experiment leaves: texts in both languages, a table, charts and numbers, as JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
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
    series: Mapping[str, Sequence[float | None]]
    log_x: bool = False
    log_y: bool = False


@dataclass
class Part:
    """One statement of a claim: what came out here, with its figures, and whether that agrees with the paper. None: that is
    open, as the seeds differ by more than what is compared, or as the paper claims nothing of it.
    """

    found: Text
    agrees: bool | None


@dataclass
class Finding:
    """A claim of a paper and what its experiment found. says: the paper's words in ours, with its figures. ran: what was run
    here, and what would count as agreement.
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
        kinds = {True: Text("相符", "agrees"), False: Text("不符", "DISAGREES"), None: Text("未定", "open")}
        counts = {kind: sum(part.agrees is kind for part in self.parts) for kind in kinds}
        if len(self.parts) in counts.values():
            return kinds[self.parts[0].agrees]
        found = [(kinds[kind], count) for kind, count in counts.items() if count]
        zh, en = (
            "，".join(f"{count} 处{kind.zh}" for kind, count in found),
            ", ".join(f"{kind.en} {n}x" for kind, n in found),
        )
        return Text(zh, en)

    def line(self) -> str:
        """The verdict in one line."""
        found = "; ".join(part.found.en for part in self.parts)
        return f"{self.verdict.en}: {self.title.en} ({self.source.split(',')[0]}): {found}"

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"verdict": self.verdict.en, "line": self.line()}


def above(first: Sequence[float], second: Sequence[float]) -> bool | None:
    """Whether one is higher than the other, in figures of several seeds; None if some seeds say so and some do not."""
    if min(first) > max(second):
        return True
    return False if max(first) < min(second) else None


class Claim(NamedTuple):
    """What is known of a claim before its experiment. here: what the experiment is, and what counts as agreement."""

    title: Text
    source: str
    says: Text
    here: Text

    def finding(self, trained: Text, parts: list[Part], table: Table, charts: list[Chart]) -> Finding:
        """trained: how, as a sentence."""
        ran = Text(trained.zh + self.here.zh, f"{trained.en} {self.here.en}")
        return Finding(self.title, self.source, self.says, ran, parts, table, charts)


def percent(share: float) -> str:
    return f"{share:.1%}"
