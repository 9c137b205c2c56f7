import re

import plotly.graph_objects as go

from prefix_tuning.study.page import Section, Text, write_page


def test_a_page_is_one_file_in_two_languages(tmp_path):
    sections = [
        Section(
            Text("标题 <一>", "heading <1>"),
            Text("说明", "how to read"),
            figures=[go.Figure(go.Bar(x=[1, 2], y=[3, 4]))],
            found=[Text("发现", "a finding")],
            table=[[Text("名", "name"), "b"], ["1 < 2", Text("是", "yes")]],
            notes=[Text("注意", "a warning")],
        )
    ]
    write_page(tmp_path / "page.html", Text("研究", "study"), Text("概要", "summary"), sections)
    text = (tmp_path / "page.html").read_text("utf-8")
    assert not re.search(r"<!-- \w+ -->", text)
    for zh, en in (
        ("标题 &lt;一&gt;", "heading &lt;1&gt;"),
        ("说明", "how to read"),
        ("发现", "a finding"),
        ("是", "yes"),
        ("注意", "a warning"),
    ):
        assert f'<span lang="zh">{zh}</span><span lang="en">{en}</span>' in text
    assert "<td>1 &lt; 2</td>" in text
    assert not re.search(r"<(?:script|link|img|iframe)[^>]+(?:src|href)=[\"'](?!data:)", text)  # nothing from a network
    assert len(text.encode()) < 6e6


def test_the_contents_lead_to_the_sections_and_titles_are_captions(tmp_path):
    def picture(title):
        figure = go.Figure(go.Bar(x=[1], y=[2]))
        return figure.update_layout(title={"text": title}, meta={"least_width": 640} if title == "wide <" else None)

    text = Text("读", "read")
    sections = [
        Section(Text("一", "one"), text, figures=[picture("wide <"), (picture("left"), picture("right"))]),
        Section(Text("二", "two"), text),
    ]
    write_page(tmp_path / "page.html", text, text, sections)
    page = (tmp_path / "page.html").read_text("utf-8")
    links = re.findall(r'<li><a href="#([^"]+)">', page)
    assert links == re.findall(r'<section id="([^"]+)">', page) and len(links) == 2
    assert re.findall(r"<figcaption>(.+?)</figcaption>", page) == ["wide &lt;", "left", "right"]
    assert page.count('"text":"left"') == 0 and page.count('class="together"') == 1  # no title in the picture itself
    assert re.findall(r"min-width: (\d+)px\">", page) == ["640", "0", "0"]
