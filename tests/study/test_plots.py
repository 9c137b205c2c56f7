"""The pictures show the figures that they are given. test_browser.py checks how a browser draws them."""

import numpy as np
import pytest

from prefix_tuning.study import plots

SHARES = {"share": [[0.1, 0.9], [0.25, 0.5]], "by_distance": [[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.6], [0.7, 0.8]]]}
SHARES["slopes"] = [0.0625, 0.00390625]


def shown(figure, button):
    """The indices of the traces that a choice of the menu shows."""
    (arguments,) = figure.layout.updatemenus[0].buttons[button].args
    return [index for index, visible in enumerate(arguments["visible"]) if visible]


def test_the_map_names_every_head_by_its_slope():
    figure = plots.share_map(SHARES, "short")
    (heat,) = figure.data
    np.testing.assert_allclose(heat.z, [[10, 90], [25, 50]])
    assert list(heat.x) == ["0<br>0.062", "1<br>0.0039"] and "short" in figure.layout.title.text


def test_a_map_scrolls_before_its_numbers_touch():
    assert plots.share_map(SHARES, "short").layout.meta["least_width"] >= 2 * 40
    large = SHARES | {"share": [[0.5] * 112] * 70, "slopes": [0.5] * 112}
    assert plots.share_map(large, "short").layout.meta is None  # without numbers


def test_a_menu_chooses_the_layer_and_the_penalty_is_that_of_the_nearest_token():
    seen, penalty = plots.share_by_distance(SHARES, "short", [0, 1])
    assert [button.label for button in seen.layout.updatemenus[0].buttons] == ["层 layer 0", "层 layer 1"]
    assert shown(seen, 0) == [0, 1] and shown(seen, 1) == [2, 3]
    assert [bool(trace.visible) for trace in seen.data] == [True, True, False, False]
    np.testing.assert_allclose(seen.data[3].y, [70, 80])
    np.testing.assert_allclose(penalty.data[0].y, [0.0625, 0.125])  # nats, of head 0 at token 1 and 2
    assert penalty.layout.yaxis.type == "log" and "0.01" in penalty.layout.yaxis.ticktext
    for figure in (seen, penalty):
        assert "distance to the nearest virtual token" in figure.layout.xaxis.title.text
    assert "nearest" in penalty.layout.title.text


def test_without_alibi_heads_have_numbers_alone_and_there_is_no_penalty():
    shares = SHARES | {"slopes": None}
    figure = plots.share_map(shares, "short")
    assert list(figure.data[0].x) == ["0", "1"] and "ALiBi" not in str(figure)
    (seen,) = plots.share_by_distance(shares, "short", [0, 1])
    assert [trace.name for trace in seen.data] == ["0", "1"] * 2 and "ALiBi" not in str(seen)
    assert shown(seen, 1) == [2, 3] and seen.layout.height == 460


def test_a_question_s_bars_and_map_share_their_columns():
    side = [{"probability": 0.5, "likeliest": [["</s>", 0.5]]}, {"probability": 1.0, "likeliest": [["y", 1.0]]}]
    maps = [{"layer": 0, "head": head, "weights": [[0.1 * head, 0.256]] * 3} for head in (1, 0)]
    question = {"tokens": ["a", "b", "c"], "prompt": 2, "expected": {"base": side, "prefix": side[::-1]}}
    figure = plots.question_map(question | {"attention": [*maps, {}]}, "short", 2)
    bars = figure.data[:2]
    assert [(list(bar.x), list(bar.y)) for bar in bars] == [([1, 2], [0.5, 1]), ([1, 2], [1, 0.5])]
    assert figure.layout.shapes[0].x0 == 1.5  # the answer begins with token 2
    assert bars[0].customdata[0] == "'‹/s›' 50.0%"
    assert shown(figure, 1) == [0, 1, 3] and figure.data[2].z.tolist() == [[10] * 3, [26] * 3]  # prefix tokens x tokens
    assert figure.layout.updatemenus[0].buttons[0].label == "层 layer 0, 头 head 1"
    assert figure.layout.xaxis.domain == figure.layout.xaxis2.domain and figure.layout.xaxis.matches == "x2"
    assert figure.layout.xaxis.range == figure.layout.xaxis2.range == (-0.5, 2.5)


def test_removals_are_sorted_from_the_top_and_losses_begin_at_the_whole_prefix_s():
    kinds = [{"kind": "keys only"}, {"kind": "head", "layer": 1, "head": 3}, {"kind": "token", "token": 7}]
    parts = [one | {"loss": loss, "exact_match": 0.5} for one, loss in zip(kinds, (3.0, 2.0, 0.25), strict=True)]
    removal = {"parts": parts, "whole": {"loss": 0.5, "exact_match": 0.95}}
    loss, match = plots.removal_bars(removal, "short", 40)
    names = ["只有键 keys only", "层 layer 1, 头 head 3", "虚拟词 token 7"]
    for figure in (loss, match):
        assert list(figure.layout.yaxis.categoryarray) == names[::-1]  # plotly counts from below
    ends = {y: x + trace.base for trace in loss.data for x, y in zip(trace.x, trace.y, strict=True)}
    assert ends == dict(zip(names, (3.0, 2.0, 0.25), strict=True)) and {trace.base for trace in loss.data} == {0.5}
    assert loss.layout.xaxis.type == "log" and "0.5" in loss.layout.xaxis.ticktext
    assert "40" in match.layout.xaxis.title.text
    (band,) = [shape for shape in match.layout.shapes if shape.type == "rect"]
    assert (band.x0, band.x1) == pytest.approx((83.5, 98.6), abs=0.1)  # 38 of 40 rows


@pytest.mark.parametrize("equal", [True, False])
def test_combinations_are_named_by_their_halves(equal):
    def scores(match):
        return {"rows": {"loss": 1.0, "exact_match": match}}

    pair = {"first": "a", "second": "b", "alone": [scores(0.1), scores(0.2)], "after": [scores(0.3), scores(0.4)]}
    pair |= {"exchanged": [scores(0.5), scores(0.6)] if equal else None, "between": [scores(0.1), scores(0.2)]}
    matches, losses = plots.combination_bars(pair)
    (bar,) = matches.data
    names = ["a", "b", "a,<br>b", "b,<br>a", "键 keys a<br>值 values b", "键 keys b<br>值 values a"]
    assert list(bar.y) == names[: len(bar.x)] and list(bar.x) == pytest.approx([10, 20, 30, 40, 50, 60][: 6 if equal else 4])
    assert list(losses.data[0].x) == [1] * len(bar.x) and losses.layout.yaxis.type == "category"
    match, loss = (figure.data[0] for figure in plots.between_lines(pair))
    assert list(match.x) == [0, 1] and list(match.y) == pytest.approx([10, 20]) and list(loss.y) == [1, 1]


def test_cosines_are_seen_at_their_own_size():
    figure = plots.cosine_bars({"first": "a", "second": "b", "cosine": [[0.1, 0.2], [0.3, 0.05]]})
    assert figure.layout.yaxis.range is None and [list(bar.y) for bar in figure.data] == [[0.1, 0.2], [0.3, 0.05]]


def test_growth_s_four_pictures_share_the_steps():
    stages = [{"step": step, "norm": [1, 2], "share": [0.1, 0.2], "singular_values": [3, 1]} for step in (5, 10)]
    drawn = plots.growth_lines({"stages": stages, "losses": [[1, 2.0]], "held_out": []}, "short")
    assert [[trace.name for trace in figure.data] for figure in drawn] == [
        ["训练 training"],
        ["键 keys", "值 values"],
        ["层 layer 0", "层 layer 1"],
        ["1", "2"],
    ]
    assert [figure.layout.yaxis.type for figure in drawn] == ["log", None, None, "log"]
    assert [list(figure.data[0].x) for figure in drawn] == [[1], [5, 10], [5, 10], [5, 10]]


def test_boxes_are_the_quantiles():
    five = [[[1, 2, 3, 4, 5], [6, 7, 8, 9, 10]]]
    drawn = plots.norm_boxes({"text": five, "prefix": five}, "short")
    found = [[(box.lowerfence[0], box.median[0], box.upperfence[0]) for box in figure.data] for figure in drawn]
    assert found == [[(1, 3, 5)] * 2, [(6, 8, 10)] * 2]
