"""The plots of the study, made from the numbers in study.json. Labels are in both languages, because the page's switch does
not reach into a picture.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from prefix_tuning.generation.prefix_bloom import BASE
from prefix_tuning.study.plot_style import (
    BLUE,
    CELL_WIDTH,
    COLOURS,
    GREY,
    LINE_HEIGHT,
    TOKEN_WIDTH,
    dropdown,
    log_axis,
    plain,
    short_name,
    styled,
    token_axis,
)
from prefix_tuning.study.scoring import interval
from prefix_tuning.study.vectors import QUANTILES

MOST_BARS = 60  # removals that are drawn, the worst first
MOST_CELLS = 400  # a larger map shows no numbers
KINDS = {
    "layer": "层 layer",
    "head": "头 head",
    "token": "虚拟词 token",
    "keys only": "只有键 keys only",
    "values only": "只有值 values only",
}
HALVES = {"键 keys": 0, "值 values": 1}
MATCH, LOSS = "完全匹配 exact match (%)", "损失 loss (nats)"


def share_map(shares: dict, name: str) -> go.Figure:
    """Layer x head: the share of attention that answer positions give to the prefix. shares: from `attention_shares`."""
    share, slopes = np.array(shares["share"]), shares["slopes"]
    numbered, hover = share.size <= MOST_CELLS, "层 layer %{y}, 头 head %{x}<br>%{z:.1f} %<extra></extra>"
    names, axis = [str(head) for head in range(share.shape[1])], "头 head"
    if slopes:
        names = [f"{head}<br>{slope:.2g}" for head, slope in enumerate(slopes)]
        axis += "<br>ALiBi 斜率 slope"
        hover = hover.replace("<br>", "<br>ALiBi %{customdata:.3g} / token<br>")
    figure = go.Figure(
        go.Heatmap(
            z=(100 * share).astype(np.float32),
            x=names,
            customdata=np.broadcast_to(np.float32(slopes), share.shape) if slopes else None,
            texttemplate="%{z:.0f}" if numbered else None,
            colorscale="Blues",
            zmin=0,
            zmax=100,
            colorbar={"title": "%", "thickness": 12},
            showscale=not numbered,
            hovertemplate=hover,
        )
    )
    figure.update_yaxes(title="层 layer", autorange="reversed", dtick=1)
    figure.update_xaxes(title=axis, type="category", tickangle=0 if numbered else None)
    height, least_width = 180 + 30 * max(6, len(share)), 70 + CELL_WIDTH * len(names)
    title = f"{name}: 前缀所得注意力 share of attention (%)"
    return styled(figure, title, height, least_width if numbered else 0)


def share_by_distance(shares: dict, name: str, layers: list[int]) -> tuple[go.Figure, ...]:
    """The share over the distance from the prefix, one of `layers` at a time, and the penalty of ALiBi at that distance, if
    the model has ALiBi.
    """
    share, slopes = np.array(shares["by_distance"], dtype=np.float32), shares["slopes"]
    heads = share.shape[1]
    labels = [f"{head} ({slope:.2g})" for head, slope in enumerate(slopes)] if slopes else [str(x) for x in range(heads)]

    def lines(rows: np.ndarray, **line: str) -> Iterator[go.Scatter]:
        for head, (label, y) in enumerate(zip(labels, rows, strict=True)):
            colour = COLOURS[head % len(COLOURS)]
            yield go.Scatter(x0=1, dx=1, y=y, name=label, mode="lines", line={"color": colour, **line})

    seen = go.Figure([line for layer in layers for line in lines(100 * share[layer])])
    seen.update_yaxes(title="注意力份额 share (%)", range=[0, 100])
    groups = [range(number * heads, (number + 1) * heads) for number in range(len(layers))]
    dropdown(seen, [f"层 layer {layer}" for layer in layers], groups)
    drawn = {"各词给前缀的注意力 share of attention, by the token of the row": seen}
    if slopes:
        nats = np.outer(slopes, np.arange(1, share.shape[2] + 1)).astype(np.float32)
        penalty = go.Figure([*lines(nats, dash="dot")])
        penalty.update_yaxes(log_axis(nats.flatten().tolist()), title="ALiBi 惩罚 penalty (nats)")
        drawn["ALiBi 对最近的虚拟词的惩罚 penalty of the nearest virtual token"] = penalty
    for title, figure in drawn.items():
        figure.update_xaxes(title="第几个词 = 到最近虚拟词的距离<br>token = distance to the nearest virtual token")
        figure.update_layout(legend={"title": {"text": "头 head (ALiBi) " if slopes else "头 head "}})
        styled(figure, f"{name}: {title}", 460)
    return tuple(drawn.values())


def question_map(question: dict, name: str, count: int) -> go.Figure:
    """A column for each token of a question and its answer: the probability that base and prefix give to it, and the prefix
    tokens that it attends to, in one of the first `count` heads. question: from `follow`.
    """
    tokens, maps = question["tokens"], question["attention"][:count]
    axis = token_axis(tokens)
    bars_height, map_height = 160, 240
    names_height = 20 + LINE_HEIGHT * max(text.count("<br>") + 1 for text in axis["ticktext"])
    together = bars_height + names_height + map_height
    heights = {"vertical_spacing": names_height / together, "row_heights": [bars_height, map_height]}
    figure = make_subplots(2, 1, shared_xaxes="all", **heights)
    for side, label, colour in (("base", "基座 base", GREY), ("prefix", name, BLUE)):
        expected = question["expected"][side]
        best = ["<br>".join(f"{plain(repr(text))} {value:.1%}" for text, value in one["likeliest"]) for one in expected]
        bars = go.Bar(
            x=list(range(1, len(tokens))),
            y=[one["probability"] for one in expected],
            name=label,
            marker={"color": colour},
            customdata=best,
            hovertemplate="%{y:.1%}<br>%{customdata}",
        )
        figure.add_trace(bars, row=1, col=1)
    for one in maps:
        heat = go.Heatmap(
            z=(100 * np.array(one["weights"]).T).round().astype(np.uint8),  # whole percents take a quarter of the space
            colorscale="Blues",
            zmin=0,
            colorbar={"title": "%", "thickness": 12, "len": map_height / together, "y": 0, "yanchor": "bottom"},
            hovertemplate="虚拟词 virtual token %{y}: %{z} %<extra></extra>",
        )
        figure.add_trace(heat, row=2, col=1)
    figure.add_vrect(question["prompt"] - 0.5, len(tokens) - 0.5, fillcolor=BLUE, opacity=0.07, line_width=0, row=1, col=1)
    figure.update_xaxes(axis, showticklabels=True)
    figure.update_yaxes(title="概率 probability", range=[0, 1], row=1)
    figure.update_yaxes(title="虚拟词 virtual token", row=2)
    labels = [f"层 layer {one['layer']}, 头 head {one['head']}" for one in maps]
    dropdown(figure, labels, [[2 + number] for number in range(len(maps))], always=[0, 1])
    least_width = 110 + TOKEN_WIDTH * len(axis["tickvals"])
    title = f"{name}: 每个词的概率 probability of each token; 它对虚拟词的注意力 its attention to the virtual tokens (%)"
    return styled(figure, title, 120 + together + names_height, least_width)


def removal_bars(removal: dict, name: str, rows: int) -> tuple[go.Figure, go.Figure]:
    """Loss and exact match without each part, the most important part at the top.

    removal: from `removals`. rows: number of scored rows. Bars of losses begin at the loss of the whole prefix. Grey: the
    95 % interval of its exact match.
    """
    parts, whole = removal["parts"][:MOST_BARS], removal["whole"]
    titles = [part_name(part) for part in parts]
    low, high = (100 * end for end in interval(whole["exact_match"], rows))
    losses = [whole["loss"], *(part["loss"] for part in parts)]
    drawn = []
    for key, factor, base in (("loss", 1, whole["loss"]), ("exact_match", 100, 0)):
        figure = go.Figure()
        for colour, (kind, label) in zip(COLOURS, KINDS.items(), strict=False):
            chosen = [(title, factor * part[key]) for title, part in zip(titles, parts, strict=True) if part["kind"] == kind]
            if not chosen:
                continue
            figure.add_bar(
                x=[value - base for _, value in chosen],
                base=base,
                y=[title for title, _ in chosen],
                orientation="h",
                name=label,
                marker={"color": colour},
                customdata=[value for _, value in chosen],
                hovertemplate="%{y}: %{customdata:.3g}",
            )
        figure.add_vline(factor * whole[key], line={"dash": "dot", "color": "#333"})
        figure.update_yaxes(categoryorder="array", categoryarray=titles[::-1], tickfont={"size": 11})
        drawn.append(figure)
    loss, match = drawn
    loss.update_xaxes(log_axis(losses), title=LOSS)
    match.add_vrect(low, high, fillcolor=GREY, opacity=0.25, line_width=0)
    match.update_xaxes(title=f"完全匹配 exact match<br>(% / {rows} 行 rows)", range=[0, 102])
    for figure, title in (
        (loss, "去掉一部分之后的损失 loss without a part (···: 完整 whole)"),
        (match, "完全匹配 exact match (···, 灰 grey: 完整及其 95 % 区间 whole and its 95 % interval)"),
    ):
        styled(figure, f"{name}: {title}", 200 + 18 * len(parts))
    return loss, match


def part_name(part: dict) -> str:
    """The name in a picture of a part that `removals` removes."""
    where = [f"{KINDS[key]} {part[key]}" for key in ("layer", "head", "token") if key in part]
    return ", ".join(where) or KINDS[part["kind"]]


def between_lines(pair: dict) -> tuple[go.Figure, go.Figure]:
    """Exact match and loss on the way from one prefix to the other. pair: from `mixtures`, with both names."""
    way = [step / (len(pair["between"]) - 1) for step in range(len(pair["between"]))]

    def draw(key: str, factor: float, title: str) -> go.Figure:
        figure = go.Figure()
        for label, values in _by_rows(pair["between"], key, factor):
            figure.add_scatter(x=way, y=values, name=label, mode="lines+markers")
        figure.update_xaxes(title=f"0 = {pair['first']}, 1 = {pair['second']}")
        figure.update_yaxes(title=title)
        return styled(figure, f"{pair['first']} → {pair['second']}: {title}")

    return draw("exact_match", 100, MATCH), draw("loss", 1, LOSS)


def combination_bars(pair: dict) -> tuple[go.Figure, go.Figure]:
    """Exact match and loss of two prefixes: each alone, one after the other, keys and values exchanged."""
    first, second = pair["first"], pair["second"]
    names = [first, second, f"{first},<br>{second}", f"{second},<br>{first}"]
    names += [f"键 keys {one}<br>值 values {other}" for one, other in ((first, second), (second, first))]
    made = [*pair["alone"], *pair["after"], *(pair["exchanged"] or [])]

    def draw(key: str, factor: float, title: str) -> go.Figure:
        figure = go.Figure()
        for label, values in _by_rows(made, key, factor):
            figure.add_bar(x=values, y=names[: len(made)], orientation="h", name=label)
        figure.update_xaxes(title=title)
        figure.update_yaxes(type="category", autorange="reversed")
        return styled(figure, f"{first} + {second}: {title}", 480)

    return draw("exact_match", 100, MATCH), draw("loss", 1, LOSS)


def _by_rows(made: list[dict], key: str, factor: float) -> Iterator[tuple[str, list[float]]]:
    """For each set of rows: its name, and the value of `key` times `factor` for each of the scores."""
    for rows in made[0]:
        yield short_name(rows), [factor * scores[rows][key] for scores in made]


def cosine_bars(pair: dict) -> go.Figure:
    """The cosine between keys, and between values, of two prefixes, by layer."""
    figure = go.Figure()
    for label, half in HALVES.items():
        figure.add_bar(x=list(range(len(pair["cosine"][half]))), y=pair["cosine"][half], name=label)
    figure.update_xaxes(title="层 layer", dtick=1)
    figure.update_yaxes(title="余弦 cosine")
    return styled(figure, f"{pair['first']}, {pair['second']}: 余弦 cosine", 340)


def quiz_bars(quiz: dict[str, float]) -> go.Figure:
    """The share of the base's own quiz questions that it still answers with each prefix."""
    names = ["基座 base" if name == BASE else short_name(name) for name in quiz]
    figure = go.Figure(go.Bar(x=names, y=[100 * share for share in quiz.values()], texttemplate="%{y:.0f}"))
    figure.update_xaxes(type="category")
    figure.update_yaxes(title="答对 right (%)", range=[0, 105])
    return styled(figure, "基座自己的小测验 the base's own quiz", 340)


def growth_lines(growth: dict, name: str) -> tuple[go.Figure, ...]:
    """Losses, norms, attention and singular values over the steps of the training. growth: from `growth`."""
    stages = growth["stages"]
    steps = [stage["step"] for stage in stages]

    def draw(title: str, lines: dict[str, tuple], axis: dict[str, Any], showlegend: bool = True) -> go.Figure:
        figure = go.Figure([go.Scatter(x=x, y=y, name=label) for label, (x, y) in lines.items()])
        figure.update_xaxes(title="步 step")
        figure.update_yaxes(axis, title=title).update_layout(showlegend=showlegend)
        return styled(figure, f"{name}: {title}", 400)

    records = {"训练 training": growth["losses"], "留出 held out": growth["held_out"]}
    losses = {label: tuple(zip(*points, strict=True)) for label, points in records.items() if points}
    norms = {label: (steps, [stage["norm"][half] for stage in stages]) for label, half in HALVES.items()}
    layers = range(len(stages[0]["share"]))
    shares = {f"层 layer {layer}": (steps, [100 * stage["share"][layer] for stage in stages]) for layer in layers}
    ranks = range(len(stages[0]["singular_values"]))
    values = {str(rank + 1): (steps, [stage["singular_values"][rank] for stage in stages]) for rank in ranks}
    return (
        draw(LOSS, losses, log_axis(y for _, line in losses.values() for y in line)),
        draw("键值的平均长度 mean norm", norms, {}),
        draw("注意力份额 share of attention (%)", shares, {}),
        draw("奇异值 singular values", values, log_axis(y for _, line in values.values() for y in line), showlegend=False),
    )


def norm_boxes(norms: dict, name: str) -> tuple[go.Figure, ...]:
    """Lengths of keys and values by layer, for text and for the prefix. norms: (L, 2, 5) each, from vectors.py."""
    low, first, middle, third, high = range(len(QUANTILES))

    def draw(title: str, half: int) -> go.Figure:
        figure = go.Figure()
        for label, key, colour in (("文本 text", "text", GREY), (name, "prefix", BLUE)):
            five = np.array(norms[key])[:, half].T
            figure.add_box(
                x=list(range(len(norms[key]))),
                lowerfence=five[low],
                q1=five[first],
                median=five[middle],
                q3=five[third],
                upperfence=five[high],
                name=label,
                offsetgroup=label,
                marker={"color": colour},
            )
        figure.update_xaxes(title="层 layer", dtick=1)
        figure.update_yaxes(title="长度 length", rangemode="tozero")
        return styled(figure.update_layout(boxmode="group"), f"{name}: {title}: 长度 length", 400)

    return tuple(draw(title, half) for title, half in HALVES.items())
