from prefix_tuning.study.claims.record import Chart, Finding, Part
from prefix_tuning.study.claims.report import figure_of, write_claims
from prefix_tuning.study.page import Text


def test_the_page_has_every_verdict_in_both_languages(tmp_path):
    finding = Finding(
        Text("题", "The title"),
        "Someone 2020",
        Text("论文说", "it says"),
        Text("跑了", "it ran"),
        [Part(Text("甲", "one"), True), Part(Text("乙", "two"), False)],
        [[Text("名", "name"), "b"], ["1", "2"]],
        [Chart("bar", "x · 横", "y · 纵", ["a"], {"s": [1.0]})],
    )
    write_claims(tmp_path / "claims.html", [finding], quick=True)
    text = (tmp_path / "claims.html").read_text("utf-8")
    for shown in (
        "agrees 1x, DISAGREES 1x",
        "1 处相符，1 处不符",
        "✓ agrees: one",
        "✗ 不符：乙",
        "Quick run",
        "The paper: it says",
    ):
        assert shown in text
    write_claims(tmp_path / "claims.html", [finding], quick=False)
    assert "Quick run" not in (tmp_path / "claims.html").read_text("utf-8")


def test_charts_become_figures():
    lines = figure_of(Chart("line", "x", "loss", [1, 2, 4], {"a": [1.0, None, 3.0], "b": [1.0, 2.0, 3.0]}, True, True))
    assert [trace.type for trace in lines.data] == ["scatter"] * 2
    assert lines.layout.xaxis.type == lines.layout.yaxis.type == "log" and lines.layout.xaxis.ticktext == ("1", "2", "4")
    bars = figure_of(Chart("bar", "x", "exact match", ["a"], {"a": [0.5]}))
    assert bars.data[0].type == "bar" and bars.layout.yaxis.tickformat == ".0%" and not bars.layout.showlegend
