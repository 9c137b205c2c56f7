"""A page of interactive pictures: one HTML file that needs no network, in Chinese and English."""

import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import plotly.graph_objects as go
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from prefix_tuning.files.writing import atomic_write

_TEMPLATE = Path(__file__).with_name("page.html")


class Text(NamedTuple):
    """A text in both languages; the page's switch shows one of them."""

    zh: str
    en: str

    def html(self) -> str:
        return "".join(f'<span lang="{name}">{html.escape(text)}</span>' for name, text in self._asdict().items())


def joined(texts: Sequence[Text], zh: str = "，", en: str = ", ") -> Text:
    """Several texts as one. zh, en: what stands between them in each language."""
    return Text(zh.join(text.zh for text in texts), en.join(text.en for text in texts))


class Section(NamedTuple):
    """A part of the page: a heading, what was found, how to read the pictures, the pictures, a table, and notes.

    figures: pictures in a tuple are side by side where the screen is wide enough, else below each other.
    table: its first row is the head.
    """

    title: Text
    reading: Text
    figures: Sequence[go.Figure | tuple[go.Figure, ...]] = ()
    table: list[list[str | Text]] | None = None
    notes: Sequence[Text] = ()
    found: Sequence[Text] = ()

    def html(self, anchor: str) -> str:
        parts = [f'<section id="{anchor}"><h2>{self.title.html()}</h2>']
        parts += [f'<p class="found">{found.html()}</p>' for found in self.found]
        parts.append(f"<p>{self.reading.html()}</p>")
        for one in self.figures:
            together = one if isinstance(one, tuple) else (one,)
            kind = "together" if len(together) > 1 else "alone"
            parts.append(f'<div class="{kind}">{"".join(map(_picture, together))}</div>')
        if self.table:
            head, *rows = ([_cell(cell) for cell in row] for row in self.table)
            lines = ["".join(f"<th>{cell}</th>" for cell in head), *("".join(f"<td>{c}</td>" for c in row) for row in rows)]
            parts.append(f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>")
        parts += [f'<p class="note">{note.html()}</p>' for note in self.notes]
        return "\n".join([*parts, "</section>"])


def _cell(cell: str | Text) -> str:
    return cell.html() if isinstance(cell, Text) else html.escape(cell)


def _picture(figure: go.Figure) -> str:
    """A figure with its title as a caption of the page, because a title inside the picture would not break into lines.

    Where the screen is narrower than the least width in the figure's layout.meta, the picture scrolls.
    """
    caption, least = figure.layout.title.text, (figure.layout.meta or {}).get("least_width", 0)
    untitled = go.Figure(figure).update_layout(title=None, margin={"t": 20})
    plot = to_html(untitled, full_html=False, include_plotlyjs=False, config={"responsive": True, "displaylogo": False})
    caption = f"<figcaption>{html.escape(caption)}</figcaption>" if caption else ""
    return f'<figure>{caption}<div class="scroll"><div style="min-width: {least}px">{plot}</div></div></figure>'


def write_page(path: Path, title: Text, summary: Text, sections: list[Section]) -> None:
    """Writes the page, whole or not at all. The file contains plotly.js (4.8 MB)."""
    anchors = [f"section-{number}" for number in range(1, len(sections) + 1)]
    links = [f'<li><a href="#{at}">{one.title.html()}</a></li>' for at, one in zip(anchors, sections, strict=True)]
    parts = {
        "title": html.escape(f"{title.zh} · {title.en}"),
        "heading": title.html(),
        "summary": summary.html(),
        "contents": "\n".join(links),
        "plotly": get_plotlyjs(),
        "sections": "\n".join(section.html(at) for at, section in zip(anchors, sections, strict=True)),
    }
    text = _TEMPLATE.read_text("utf-8")
    for name, part in parts.items():  # no str.format, as CSS has braces
        text = text.replace(f"<!-- {name} -->", part, 1)
    with atomic_write(path) as draft:
        draft.write_text(text, "utf-8")
