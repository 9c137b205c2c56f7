"""The pictures of the README: what can be checked of them without eyes."""

import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import prefix_tuning

DEMO = Path(prefix_tuning.__file__).parent / "demo"
SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", ["study.png", "training.png"])
def test_drawings_have_all_colours_and_are_small(name):
    image = pytest.importorskip("PIL.Image")
    with image.open(DEMO / name) as picture:
        assert picture.mode == "RGB" and picture.width >= 900
    assert (DEMO / name).stat().st_size < 150_000


def test_the_mechanism_says_the_whole_formula_on_a_ground_of_its_own():
    root = ElementTree.parse(DEMO / "mechanism.svg").getroot()
    texts = ["".join(text.itertext()) for text in root.iter(f"{SVG}text")]
    (formula,) = [text for text in texts if text.startswith("softmax(")]
    assert "/ √D + bias" in formula and any("ALiBi" in text and "slope" in text for text in texts)
    ground = root.find(f"{SVG}rect")
    width, height = (float(root.get(side)) for side in ("width", "height"))
    assert ground.get("fill") == "#ffffff" and float(ground.get("width")) >= width - 1  # on GitHub's dark page, too
    assert float(ground.get("height")) >= height - 1
    assert min(float(text.get("font-size")) for text in root.iter(f"{SVG}text")) >= 11


def test_only_weights_are_drawn_as_trained():
    root = ElementTree.parse(DEMO / "mechanism.svg").getroot()
    trained = [rect for rect in root.iter(f"{SVG}rect") if rect.get("fill") == "#ffd9a8" and float(rect.get("height")) > 20]
    texts = [(float(text.get("y")), "".join(text.itertext())) for text in root.iter(f"{SVG}text") if text.get("x") == "110"]
    inside = []
    for rect in trained:
        top, height = float(rect.get("y")), float(rect.get("height"))
        inside.append(next(text for y, text in texts if top < y < top + height).split(":")[0])
    assert inside == ["Embedding", "Linear", "Linear"]
