"""A page of pictures that people can hover: one HTML file that needs no network, in Chinese and English."""

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
    """What is said in both languages; the page's switch shows one of them."""

    zh: str
    en: str

    def html(self) -> str:
        return "".join(f'<span lang="{name}">{html.escape(text)}</span>' for name, text in self._asdict().items())


class Section(NamedTuple):
    """A part of the page: a heading, a sentence of what is seen and how to read it, pictures, a table, and notes.

    table: its first row is the head.
    """

    title: Text
    reading: Text
    figures: Sequence[go.Figure] = ()
    table: list[list[str | Text]] | None = None
    notes: Sequence[Text] = ()

    def html(self) -> str:
        parts = [f"<section><h2>{self.title.html()}</h2>", f"<p>{self.reading.html()}</p>"]
        options = {"responsive": True, "displaylogo": False}
        parts += [to_html(figure, full_html=False, include_plotlyjs=False, config=options) for figure in self.figures]
        if self.table:
            head, *rows = ([_cell(cell) for cell in row] for row in self.table)
            lines = ["".join(f"<th>{cell}</th>" for cell in head), *("".join(f"<td>{c}</td>" for c in row) for row in rows)]
            parts.append(f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>")
        parts += [f'<p class="note">{note.html()}</p>' for note in self.notes]
        return "\n".join([*parts, "</section>"])


def _cell(cell: str | Text) -> str:
    return cell.html() if isinstance(cell, Text) else html.escape(cell)


def write_page(path: Path, title: Text, summary: Text, sections: list[Section]) -> None:
    """Writes the page, whole or not at all. plotly.js, 4.8 MB, is part of the file."""
    parts = {
        "title": html.escape(f"{title.zh} · {title.en}"),
        "heading": title.html(),
        "summary": summary.html(),
        "plotly": get_plotlyjs(),
        "sections": "\n".join(section.html() for section in sections),
    }
    text = _TEMPLATE.read_text("utf-8")
    for name, part in parts.items():  # no str.format, as CSS has braces
        text = text.replace(f"<!-- {name} -->", part, 1)
    with atomic_write(path) as draft:
        draft.write_text(text, "utf-8")
