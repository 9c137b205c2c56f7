"""The page in a real browser: Debian's chromium, headless, driven by playwright. .ci/browser installs both and runs this.

Screenshots land in a folder of the test session, or in the one that the variable SCREENSHOTS names.
"""

import os
import shutil
from pathlib import Path

import pytest

from prefix_tuning.cli import parse_study_config
from prefix_tuning.demo.build import load_relations
from prefix_tuning.study import run
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
def page(page_file):
    """The page, opened from the disk, with all that it said to the console and asked for in `said` and `asked`."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1100, "height": 900})
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
    assert pictures.count() == 15
    for number in range(pictures.count()):
        picture = pictures.nth(number)
        assert picture.locator(".main-svg").count() >= 2 and picture.bounding_box()["height"] > 200
        marks = picture.locator(".heatmaplayer image, .barlayer path, .scatterlayer path, .boxlayer path")
        assert marks.count() > 0, number
        picture.screenshot(path=screenshots / f"picture-{number:02}.png")
    page.screenshot(path=screenshots / "page.png", full_page=True)


def test_the_switch_shows_one_language_at_a_time(page, screenshots):
    chinese, english = page.get_by_text("谁在看前缀"), page.get_by_text("Who looks at the prefix")
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
    picture = page.locator(".plotly-graph-div").nth(2)  # share over distance
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
