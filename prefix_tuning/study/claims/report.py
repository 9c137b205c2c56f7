"""The claims' page: a section for each finding, the verdicts above all."""

from pathlib import Path

import plotly.graph_objects as go

from prefix_tuning.study.claims.record import Chart, Finding, Table
from prefix_tuning.study.page import Section, Text, write_page
from prefix_tuning.study.plotting import styled

TITLE = Text("论文的论断，在随包的小模型上检验", "The papers' claims, tried on the bundled base")
SUMMARY = Text(
    "每个论断是随包小 Bloom 上的一个小实验：论文怎么说，这里跑了什么，得到什么，是否相符。与论文不符也是结果，"
    "照样写出；没有为了相符而调整。",
    "Each claim is a small experiment on the bundled mini Bloom: what the paper says, what was run, what came out, "
    "and whether that agrees. Disagreement is a finding and printed as such; nothing was tuned until it agreed.",
)
MARKS = {True: Text("✓ 相符", "✓ agrees"), False: Text("✗ 不符", "✗ disagrees"), None: Text("○ 未定", "○ open")}
QUICK_NOTE = Text("快速运行：一个种子，步数和点数较少。", "Quick run: one seed, fewer steps and points.")


def write_claims(path: Path, findings: list[Finding], quick: bool) -> None:
    """Writes the page, whole or not at all."""
    head: list[str | Text] = [
        Text("论断", "claim"),
        Text("来源", "source"),
        Text("结果", "what came out"),
        Text("相符？", "agrees?"),
    ]
    table: Table = [head]
    for finding in findings:
        found = Text("；".join(part.found.zh for part in finding.parts), "; ".join(part.found.en for part in finding.parts))
        table.append([finding.title, finding.source, found, finding.verdict])
    reading = Text("所有论断，每行一个；细节在下面。", "All claims, one a row; the details are below.")
    notes = [QUICK_NOTE] if quick else []
    summary = Section(Text("总览", "All verdicts"), reading, table=table, notes=notes)
    write_page(path, TITLE, SUMMARY, [summary, *map(section_of, findings)])


def section_of(finding: Finding) -> Section:
    marks = [
        Text(f"{MARKS[part.agrees].zh}：{part.found.zh}", f"{MARKS[part.agrees].en}: {part.found.en}")
        for part in finding.parts
    ]
    run = Text(f"这里：{finding.ran.zh}", f"Here: {finding.ran.en}")
    source = Text(f"来源：{finding.source}", f"Source: {finding.source}")
    says = Text(f"论文：{finding.says.zh}", f"The paper: {finding.says.en}")
    return Section(finding.title, says, [figure_of(chart) for chart in finding.charts], finding.table, [*marks, run, source])


def figure_of(chart: Chart) -> go.Figure:
    figure = go.Figure()
    for name, values in chart.series.items():
        trace = (
            go.Scatter(x=chart.x, y=values, name=name, mode="lines+markers", connectgaps=True)
            if chart.kind == "line"
            else go.Bar(x=chart.x, y=values, name=name)
        )
        figure.add_trace(trace)
    figure.update_xaxes(title=chart.x_title, type="log" if chart.log_x else None)
    if chart.log_x:
        figure.update_xaxes(tickvals=chart.x, ticktext=[f"{x:g}" for x in chart.x])
    figure.update_yaxes(title=chart.y_title, type="log" if chart.log_y else None, exponentformat="power")
    if not chart.log_y:
        figure.update_yaxes(rangemode="tozero", tickformat=".0%" if chart.y_title.startswith("exact") else None)
    figure.update_layout(showlegend=len(chart.series) > 1)
    return styled(figure, "", 380)
