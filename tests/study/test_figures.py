"""The pictures say the numbers that they are given. That a browser draws them: test_browser.py."""

import numpy as np
import pytest

from prefix_tuning.study import figures

SHARES = {"share": [[0.1, 0.9], [0.25, 0.5]], "by_distance": [[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.6], [0.7, 0.8]]]}
SHARES["slopes"] = [0.0625, 0.00390625]


def shown(figure, button):
    """The indices of the traces that a choice of the menu shows."""
    (arguments,) = figure.layout.updatemenus[0].buttons[button].args
    return [place for place, visible in enumerate(arguments["visible"]) if visible]


def test_the_map_names_every_head_by_its_slope():
    figure = figures.share_map(SHARES, "short")
    (heat,) = figure.data
    np.testing.assert_allclose(heat.z, [[10, 90], [25, 50]])
    assert list(heat.x) == ["0<br>0.062", "1<br>0.0039"] and "short" in figure.layout.title.text


def test_a_menu_chooses_the_layer_and_penalties_stay():
    figure = figures.share_by_distance(SHARES, "short")
    assert [button.label for button in figure.layout.updatemenus[0].buttons] == ["层 layer 0", "层 layer 1"]
    assert shown(figure, 0) == [0, 1, 4, 5] and shown(figure, 1) == [2, 3, 4, 5]
    assert [bool(trace.visible) for trace in figure.data] == [True, True, False, False, True, True]
    np.testing.assert_allclose(figure.data[3].y, [70, 80])
    np.testing.assert_allclose(figure.data[4].y, [0.0625, 0.125])  # nats, of head 0 at token 1 and 2


def test_tokens_are_ticks_that_can_be_seen():
    ticks = figures.token_axis(["a", "\n", " b", "</s>"])["ticktext"]
    assert ticks == ["a", "⏎", "␣b", "‹/s›"]  # plotly takes <...> for a tag


def test_a_question_s_pictures():
    side = [{"probability": 0.5, "likeliest": [["x", 0.5]]}, {"probability": 1.0, "likeliest": [["y", 1.0]]}]
    question = {"tokens": ["a", "b", "c"], "prompt": 2, "expected": {"base": side, "short": side[::-1]}}
    bars = figures.next_tokens(question, "short").data
    assert [list(bar.y) for bar in bars] == [[0.5, 1], [1, 0.5]] and "'x' 50.0%" in bars[0].customdata[0]
    maps = [{"layer": 0, "head": head, "weights": [[0.1 * head, 0.2]] * 3} for head in (1, 0)]
    figure = figures.question_attention(question | {"attention": maps}, "short")
    assert shown(figure, 1) == [1] and figure.data[0].z.shape == (2, 3)  # prefix tokens x tokens
    assert figure.layout.updatemenus[0].buttons[0].label == "层 layer 0, 头 head 1"


def test_removals_are_sorted_from_the_top():
    kinds = [{"kind": "keys only"}, {"kind": "head", "layer": 1, "head": 3}, {"kind": "token", "token": 7}]
    parts = [one | {"loss": loss, "exact_match": 0.5} for one, loss in zip(kinds, (3.0, 2.0, 1.0), strict=True)]
    figure = figures.removal_bars({"parts": parts, "whole": {"loss": 0.5, "exact_match": 1.0}}, "short")
    names = ["只有键 keys only", "层 layer 1, 头 head 3", "虚拟词 token 7"]
    assert list(figure.layout.yaxis.categoryarray) == names[::-1]  # plotly counts from below
    assert {y: x for trace in figure.data if trace.xaxis == "x" for x, y in zip(trace.x, trace.y, strict=True)} == dict(
        zip(names, (3.0, 2.0, 1.0), strict=True)
    )


@pytest.mark.parametrize("equal", [True, False])
def test_combinations_are_named_by_their_halves(equal):
    def scores(match):
        return {"rows": {"loss": 1.0, "exact_match": match}}

    pair = {"first": "a", "second": "b", "alone": [scores(0.1), scores(0.2)], "after": [scores(0.3), scores(0.4)]}
    pair |= {"exchanged": [scores(0.5), scores(0.6)] if equal else None, "between": [scores(0.1), scores(0.2)]}
    (bar,) = figures.combination_bars(pair).data
    names = ["a", "b", "a, b", "b, a", "键 keys a<br>值 values b", "键 keys b<br>值 values a"]
    assert list(bar.x) == names[: len(bar.y)] and list(bar.y) == pytest.approx([10, 20, 30, 40, 50, 60][: 6 if equal else 4])
    lines = figures.between_lines(pair).data
    assert list(lines[0].x) == [0, 1] and list(lines[0].y) == pytest.approx([10, 20])


def test_growth_s_four_plots_share_the_steps():
    stages = [{"step": step, "norm": [1, 2], "share": [0.1, 0.2], "singular_values": [3, 1]} for step in (5, 10)]
    figure = figures.growth_lines({"stages": stages, "losses": [[1, 2.0]], "held_out": []}, "short")
    by_axis = {axis: [trace.name for trace in figure.data if trace.yaxis == axis] for axis in ("y", "y2", "y3", "y4")}
    assert by_axis == {
        "y": ["训练 training"],
        "y2": ["键 keys", "值 values"],
        "y3": ["层 layer 0", "层 layer 1"],
        "y4": ["1", "2"],
    }


def test_boxes_are_the_quantiles():
    five = [[[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]]
    figure = figures.norm_boxes({"text": five, "prefix": five}, "short")
    assert [(box.lowerfence[0], box.median[0], box.upperfence[0]) for box in figure.data] == [(1, 3, 5), (6, 8, 10)] * 2
