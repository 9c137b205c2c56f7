"""The page in a real browser: Debian's chromium, headless, driven by playwright. .ci/browser installs both and runs this.

Screenshots land in a folder of the test session, or in the one that the variable SCREENSHOTS names.
"""

import os
import shutil
from pathlib import Path

import pytest

from prefix_tuning.demo.knowledge import load_relations
from prefix_tuning.study import run
from prefix_tuning.study.__main__ import parse_study_config
from prefix_tuning.study.run import study

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed; .ci/browser does it")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed; .ci/browser does it")


@pytest.fixture(scope="module")
def page_file(tuned, tmp_path_factory):
    """The study of two prefixes, one of them from a run with checkpoints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "load_relations", lambda: load_relations()[-1:])
        path = tmp_path_factory.mktemp("page") / "study.html"
        flags = [f"--prefix={name}={folder}" for name, folder in tuned.items()]
        study(parse_study_config([*flags, "--rows", "12", "--output", str(path)]))
    return path


@pytest.fixture(scope="module")
def screenshots(tmp_path_factory):
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture
def page(page_file, request):
    """The page, opened from the disk. `said` holds its console messages and errors, `asked` the addresses it requests."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": getattr(request, "param", 1100), "height": 900})
        page.said, page.asked = [], []
        page.on("console", lambda message: page.said.append(message.text))
        page.on("pageerror", lambda error: page.said.append(str(error)))
        page.on("request", lambda request: page.asked.append(request.url))
        page.goto(page_file.as_uri())
        page.locator(".js-plotly-plot").last.locator(".main-svg").first.wait_for()
        yield page
        browser.close()


def test_every_picture_is_drawn_without_an_error_or_a_request(page, page_file, screenshots):
    assert page.said == []
    assert [url for url in page.asked if not url.startswith(("data:", "blob:"))] == [page_file.as_uri()]
    pictures = page.locator(".plotly-graph-div")
    assert pictures.count() == 23
    for number in range(pictures.count()):
        picture = pictures.nth(number)
        assert picture.locator(".main-svg").count() >= 2 and picture.bounding_box()["height"] > 200
        marks = picture.locator(".heatmaplayer image, .barlayer path, .scatterlayer path, .boxlayer path")
        assert marks.count() > 0, number
        picture.screenshot(path=screenshots / f"picture-{number:02}.png")
    page.screenshot(path=screenshots / "page.png", full_page=True)


def test_the_switch_shows_one_language_at_a_time(page, screenshots):
    chinese, english = (page.locator("h2").get_by_text(text) for text in ("谁在看前缀", "Who looks at the prefix"))
    assert chinese.is_visible() and not english.is_visible()
    page.get_by_text("English", exact=True).click()
    assert english.is_visible() and not chinese.is_visible()
    page.screenshot(path=screenshots / "english.png")
    page.get_by_text("中文", exact=True).click()
    assert chinese.is_visible() and not english.is_visible()
    page.keyboard.press("ArrowRight")  # a radio button, so keys reach it too
    assert english.is_visible()
    assert page.said == []


def test_a_menu_changes_the_picture_and_hovering_names_the_number(page):
    picture = page.locator(".plotly-graph-div").nth(2)  # share over distance, of the first prefix
    before = picture.locator(".scatterlayer path.js-line").first.get_attribute("d")
    picture.locator(".updatemenu-header").click()
    picture.locator(".updatemenu-dropdown-button").nth(1).click()
    assert picture.locator(".scatterlayer path.js-line").first.get_attribute("d") != before
    heat = page.locator(".plotly-graph-div").first
    heat.scroll_into_view_if_needed()
    box = heat.locator(".heatmaplayer image").bounding_box()
    page.mouse.move(box["x"] + 20, box["y"] + 20)
    page.mouse.move(box["x"] + 25, box["y"] + 25)
    label = heat.locator(".hoverlayer .hovertext")
    label.wait_for()
    assert "layer 0" in label.text_content() and "ALiBi 0.25" in label.text_content()
    assert page.said == []


# For each picture: the boxes [left, top, right, bottom] of parts that must not overlap, and its sizes of text.
BOXES = """() => [...document.querySelectorAll(".js-plotly-plot")].map(picture => {
    const box = one => { const r = one.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
    const all = selector => [...picture.querySelectorAll(selector)].filter(one => one.textContent.trim()).map(box);
    const [left, top] = box(picture);
    const areas = Object.values(picture._fullLayout._plots).map(({xaxis, yaxis}) => [
        left + xaxis._offset, top + yaxis._offset,
        left + xaxis._offset + xaxis._length, top + yaxis._offset + yaxis._length]);
    return {
        whole: box(picture), areas, xaxes: all(".xtick text"), titles: all(".xtitle, .x2title, .ytitle, .y2title"),
        yaxes: all(".ytick text"), legends: all(".legend"), menus: all(".updatemenu-header"),
        sizes: [...picture.querySelectorAll("text")].filter(one => one.textContent.trim())
            .map(one => parseFloat(getComputedStyle(one).fontSize)),
    };
})"""


def overlap(one, other):
    """Whether two boxes have an area of more than a pixel's width in common."""
    return min(one[2], other[2]) - max(one[0], other[0]) > 1 and min(one[3], other[3]) - max(one[1], other[1]) > 1


@pytest.mark.parametrize("page", [390, 1400], indirect=True)
def test_nothing_lies_on_anything_else(page, screenshots):
    width = page.viewport_size["width"]
    page.screenshot(path=screenshots / f"page-{width}.png", full_page=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= width  # wide pictures scroll by themselves
    for number, picture in enumerate(page.evaluate(BOXES)):
        parts = [*picture["areas"], *picture["titles"], *picture["legends"], *picture["menus"]]
        for index, one in enumerate(parts):
            assert not any(overlap(one, other) for other in parts[index + 1 :]), (number, one)
            assert not any(overlap(one, tick) for tick in picture["xaxes"] + picture["yaxes"]), (number, one)
        for ticks in (picture["xaxes"], picture["yaxes"]):
            for index, one in enumerate(ticks):
                assert not any(overlap(one, other) for other in ticks[index + 1 :]), (number, one)
        left, top, right, bottom = picture["whole"]
        for one in parts + picture["xaxes"] + picture["yaxes"]:
            assert left - 1 <= one[0] and one[2] <= right + 1 and top - 1 <= one[1] and one[3] <= bottom + 1, (number, one)
        assert min(area[2] - area[0] for area in picture["areas"]) > 180, number
        assert min(picture["sizes"]) >= 11, number
        for legend in picture["legends"]:
            assert legend[1] >= max(area[3] for area in picture["areas"]), number
            assert legend[3] - legend[1] < (bottom - top) / 4, number


@pytest.mark.parametrize("page", [390, 1400], indirect=True)
def test_pictures_stand_side_by_side_only_where_there_is_room(page):
    lefts = page.evaluate(
        """() => [...document.querySelectorAll(".together")].map(
            one => new Set([...one.children].map(figure => figure.getBoundingClientRect().left)).size)"""
    )
    assert lefts and set(lefts) == {1 if page.viewport_size["width"] == 390 else 2}


def test_a_question_s_two_pictures_have_the_same_columns(page):
    (first, second), *_ = [one["areas"] for one in page.evaluate(BOXES) if len(one["areas"]) == 2]
    assert (first[0], first[2]) == pytest.approx((second[0], second[2])) and first[3] < second[1]


@pytest.mark.parametrize("page", [390], indirect=True)
def test_the_contents_lead_to_every_section(page):
    links = page.locator("nav a")
    assert links.count() == page.locator("section").count() == 9
    for number in range(links.count()):
        links.nth(number).click()
        heading = page.locator("section").nth(number).locator("h2")
        box = heading.bounding_box()
        assert 0 <= box["y"] < 900, number
        page.evaluate("window.scrollTo(0, 0)")
