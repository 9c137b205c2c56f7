import re

import plotly.graph_objects as go

from prefix_tuning.study.page import Section, Text, write_page


def test_a_page_is_one_file_in_two_languages(tmp_path):
    sections = [
        Section(
            Text("标题 <一>", "heading <1>"),
            Text("说明", "how to read"),
            figures=[go.Figure(go.Bar(x=[1, 2], y=[3, 4]))],
            table=[[Text("名", "name"), "b"], ["1 < 2", Text("是", "yes")]],
            notes=[Text("注意", "a warning")],
        )
    ]
    write_page(tmp_path / "page.html", Text("研究", "study"), Text("概要", "summary"), sections)
    text = (tmp_path / "page.html").read_text("utf-8")
    assert not re.search(r"<!-- \w+ -->", text)
    for zh, en in (("标题 &lt;一&gt;", "heading &lt;1&gt;"), ("说明", "how to read"), ("是", "yes"), ("注意", "a warning")):
        assert f'<span lang="zh">{zh}</span><span lang="en">{en}</span>' in text
    assert "<td>1 &lt; 2</td>" in text
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"'](?!data:)", text)  # nothing from a network
    assert len(text.encode()) < 6e6
