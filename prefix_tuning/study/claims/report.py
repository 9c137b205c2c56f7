"""The claims' page: a section for each finding, the verdicts above all."""

from pathlib import Path

import plotly.graph_objects as go

from prefix_tuning.study.claims.record import Chart, Finding, Table, say
from prefix_tuning.study.page import Section, Text, joined, write_page
from prefix_tuning.study.plot_style import styled


def write_claims(path: Path, findings: list[Finding], quick: bool) -> None:
    """Writes the page, whole or not at all."""
    table: Table = [[say(f"page.{key}") for key in ("claim", "source", "found", "agrees")]]
    for finding in findings:
        found = joined([part.found for part in finding.parts], "；", "; ")
        table.append([finding.title, finding.source, found, finding.verdict])
    notes = [say("page.quick")] if quick else []
    verdicts = Section(say("page.verdicts"), say("page.reading"), table=table, notes=notes)
    write_page(path, say("page.title"), say("page.summary"), [verdicts, *map(section_of, findings)])


def section_of(finding: Finding) -> Section:
    notes: list[Text] = [say("section.part", mark=say(f"mark.{part.agrees}"), found=part.found) for part in finding.parts]
    notes += [say("section.ran", ran=finding.ran), say("section.source", source=finding.source)]
    figures = [figure_of(chart) for chart in finding.charts]
    return Section(finding.title, say("section.says", says=finding.says), figures, finding.table, notes)


def figure_of(chart: Chart) -> go.Figure:
    figure = go.Figure()
    for name, values in chart.series.items():
        if chart.kind == "line":
            figure.add_scatter(x=chart.x, y=values, name=name, mode="lines+markers", connectgaps=True)
        else:
            figure.add_bar(x=chart.x, y=values, name=name)
    figure.update_xaxes(title=chart.x_title, type="log" if chart.log_x else None)
    if chart.log_x:
        figure.update_xaxes(tickvals=chart.x, ticktext=[f"{x:g}" for x in chart.x])
    figure.update_yaxes(title=chart.y_title, type="log" if chart.log_y else None, exponentformat="power")
    if not chart.log_y:
        figure.update_yaxes(rangemode="tozero", tickformat=".0%" if chart.y_title.startswith("exact") else None)
    figure.update_layout(showlegend=len(chart.series) > 1)
    return styled(figure, "", 380)
