"""The pictures of the study. Each is made of numbers that study.json has, too. Labels are in both languages, as the page's
switch does not reach into a picture.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from prefix_tuning.generation.prefix_bloom import BASE
from prefix_tuning.study.plotting import BLUE, COLOURS, GREY, dropdown, plain, short_name, styled, token_axis
from prefix_tuning.study.vectors import QUANTILES

MOST_BARS = 60  # removals that are drawn, the worst first
KINDS = {
    "layer": "层 layer",
    "head": "头 head",
    "token": "虚拟词 token",
    "keys only": "只有键 keys only",
    "values only": "只有值 values only",
}
HALVES = {"键 keys": 0, "值 values": 1}


def share_map(shares: dict, name: str) -> go.Figure:
    """Layer x head: the share of attention that answer positions give to the prefix. shares: of `attention_shares`."""
    share, slopes = np.array(shares["share"]), shares["slopes"]
    figure = go.Figure(
        go.Heatmap(
            z=(100 * share).astype(np.float32),
            x=[f"{head}<br>{slope:.2g}" for head, slope in enumerate(slopes)],
            customdata=np.broadcast_to(np.float32(slopes), share.shape),
            texttemplate="%{z:.0f}" if share.size <= 400 else None,
            colorscale="Blues",
            zmin=0,
            zmax=100,
            colorbar={"title": "%"},
            hovertemplate="层 layer %{y}, 头 head %{x}<br>ALiBi %{customdata:.3g} / token<br>%{z:.1f} %<extra></extra>",
        )
    )
    figure.update_yaxes(title="层 layer", autorange="reversed", dtick=1)
    figure.update_xaxes(title="头 head, ALiBi 斜率 slope", type="category")
    return styled(figure, f"{name}: 前缀所得注意力 share of attention (%)", 180 + 30 * max(6, len(share)))


def share_by_distance(shares: dict, name: str, layers: list[int]) -> go.Figure:
    """The share over the distance from the prefix, one of `layers` at a time, and the penalty that ALiBi gives there."""
    share, slopes = np.array(shares["by_distance"], dtype=np.float32), shares["slopes"]
    titles = ("注意力份额 share (%)", "ALiBi 惩罚 penalty (nats)")
    figure = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.1)

    def add(column: int, head: int, y: np.ndarray, **line: str) -> None:
        label, colour = f"头 head {head} ({slopes[head]:.2g})", COLOURS[head % len(COLOURS)]
        style = {"line": {"color": colour, **line}, "legendgroup": label, "showlegend": column == 1}
        figure.add_trace(go.Scatter(x0=1, dx=1, y=y, name=label, mode="lines", **style), row=1, col=column)

    heads = range(len(slopes))
    for layer in layers:
        for head in heads:
            add(1, head, 100 * share[layer, head])
    for head in heads:
        add(2, head, (slopes[head] * np.arange(1, share.shape[2] + 1)).astype(np.float32), dash="dot")
    figure.update_xaxes(title="行内第几个词 token of the row")
    figure.update_yaxes(range=[0, 100], row=1, col=1)
    figure.update_yaxes(type="log", row=1, col=2)
    styled(figure, f"{name}: 离前缀的距离 distance from the prefix")
    lines = [range(place * len(heads), (place + 1) * len(heads)) for place in range(len(layers) + 1)]  # the last: penalties
    dropdown(figure, [f"层 layer {layer}" for layer in layers], lines[:-1], lines[-1])
    return figure


def next_tokens(question: dict, name: str) -> go.Figure:
    """The probability that base and prefix give to every token of a question and its answer. question: of `follow`."""
    tokens, figure = question["tokens"], go.Figure()
    for side, label, colour in (("base", "基座 base", GREY), ("prefix", name, BLUE)):
        expected = question["expected"][side]
        best = ["<br>".join(f"{plain(repr(text))} {value:.1%}" for text, value in one["likeliest"]) for one in expected]
        figure.add_bar(
            x=list(range(1, len(tokens))),
            y=[one["probability"] for one in expected],
            name=label,
            marker={"color": colour},
            customdata=best,
            hovertemplate="%{y:.1%}<br>%{customdata}",
        )
    figure.add_vrect(x0=question["prompt"] - 0.5, x1=len(tokens) - 0.5, fillcolor=BLUE, opacity=0.07, line_width=0)
    figure.update_xaxes(token_axis(tokens))
    figure.update_yaxes(title="概率 probability", range=[0, 1])
    return styled(figure, f"{name}: 每个下一词的概率 probability of each next token")


def question_attention(question: dict, name: str, count: int) -> go.Figure:
    """Which prefix tokens each token of a question and its answer attends to, in one of the first `count` heads."""
    figure, maps = go.Figure(), question["attention"][:count]
    for one in maps:
        figure.add_heatmap(
            z=(100 * np.array(one["weights"]).T).round().astype(np.uint8),  # whole percents take a quarter of the space
            colorscale="Blues",
            zmin=0,
            colorbar={"title": "%"},
            hovertemplate="%{x}, 虚拟词 prefix token %{y}: %{z} %<extra></extra>",
        )
    figure.update_xaxes(token_axis(question["tokens"]))
    figure.update_yaxes(title="虚拟词 prefix token", dtick=1)
    styled(figure, f"{name}: 每个词对虚拟词的注意力 attention to prefix tokens (%)")
    dropdown(figure, [f"层 layer {one['layer']}, 头 head {one['head']}" for one in maps], [[i] for i in range(len(maps))])
    return figure


def removal_name(part: dict) -> str:
    """What a removal is called: its kind and its place."""
    return ", ".join(f"{KINDS[key]} {part[key]}" for key in ("layer", "head", "token") if key in part) or KINDS[part["kind"]]


def removal_bars(removal: dict, name: str) -> go.Figure:
    """Loss and exact match without each part of the prefix, the worst first. removal: of `removals`."""
    parts = removal["parts"][:MOST_BARS]
    names = [removal_name(part) for part in parts]
    figure = make_subplots(1, 2, shared_yaxes=True, subplot_titles=("损失 loss (nats)", "完全匹配 exact match (%)"))
    for place, (kind, label) in enumerate(KINDS.items()):
        chosen = [(title, part) for title, part in zip(names, parts, strict=True) if part["kind"] == kind]
        for column, key, factor in ((1, "loss", 1), (2, "exact_match", 100)):
            bars = go.Bar(
                x=[factor * part[key] for _, part in chosen],
                y=[title for title, _ in chosen],
                orientation="h",
                name=label,
                legendgroup=kind,
                showlegend=column == 1,
                marker={"color": COLOURS[place]},
                hovertemplate="%{y}: %{x:.3g}",
            )
            figure.add_trace(bars, row=1, col=column)
    for column, whole in ((1, removal["whole"]["loss"]), (2, 100 * removal["whole"]["exact_match"])):
        figure.add_vline(x=whole, line={"dash": "dot", "color": "#333"}, row=1, col=column)
    figure.update_xaxes(range=[0, 102], row=1, col=2)
    figure.update_yaxes(categoryorder="array", categoryarray=names[::-1], tickfont={"size": 10})
    return styled(figure, f"{name}: 去掉一部分之后 without a part (···: 完整 whole)", 200 + 16 * len(parts))


def between_lines(pair: dict) -> go.Figure:
    """Exact match and loss on the way from one prefix to the other. pair: of `mixtures`, with the names first and second."""
    figure = make_subplots(1, 2, subplot_titles=("完全匹配 exact match (%)", "损失 loss (nats)"))
    way = [step / (len(pair["between"]) - 1) for step in range(len(pair["between"]))]
    for column, label, colour, values in _by_rows(pair["between"]):
        style = {"mode": "lines+markers", "line": {"color": colour}, "legendgroup": label, "showlegend": column == 1}
        figure.add_trace(go.Scatter(x=way, y=values, name=label, **style), row=1, col=column)
    figure.update_xaxes(title=f"0 = {pair['first']}, 1 = {pair['second']}")
    return styled(figure, f"{pair['first']} → {pair['second']}: 插值 interpolation")


def combination_bars(pair: dict) -> go.Figure:
    """Exact match and loss of what is made of two prefixes: each alone, one after the other, halves exchanged."""
    first, second = pair["first"], pair["second"]
    names = [first, second, f"{first}, {second}", f"{second}, {first}"]
    names += [f"键 keys {one}<br>值 values {other}" for one, other in ((first, second), (second, first))]
    made = [*pair["alone"], *pair["after"], *(pair["exchanged"] or [])]
    figure = make_subplots(1, 2, subplot_titles=("完全匹配 exact match (%)", "损失 loss (nats)"))
    for column, label, colour, values in _by_rows(made):
        style = {"marker": {"color": colour}, "legendgroup": label, "showlegend": column == 1}
        figure.add_trace(go.Bar(x=names[: len(made)], y=values, name=label, **style), row=1, col=column)
    figure.update_xaxes(type="category")
    return styled(figure, f"{first} + {second}", 480)


def _by_rows(made: list[dict]) -> Iterator[tuple[int, str, str, list[float]]]:
    """The scores of prefixes on each set of rows: the column of their plot, the name and colour of the rows, the values."""
    for place, rows in enumerate(made[0]):
        for column, key, factor in ((1, "exact_match", 100), (2, "loss", 1)):
            values = [factor * scores[rows][key] for scores in made]
            yield column, short_name(rows), COLOURS[place], values


def cosine_bars(pair: dict) -> go.Figure:
    """Cosine between the pairs of two prefixes, by layer."""
    figure = go.Figure()
    for label, half in HALVES.items():
        figure.add_bar(x=list(range(len(pair["cosine"][half]))), y=pair["cosine"][half], name=label)
    figure.update_xaxes(title="层 layer", dtick=1)
    figure.update_yaxes(title="余弦 cosine", range=[-1, 1])
    return styled(figure, f"{pair['first']}, {pair['second']}: 余弦 cosine", 340)


def quiz_bars(quiz: dict[str, float]) -> go.Figure:
    """The share of the base's own quiz questions that it still answers under each prefix."""
    names = ["基座 base" if name == BASE else short_name(name) for name in quiz]
    figure = go.Figure(go.Bar(x=names, y=[100 * share for share in quiz.values()], texttemplate="%{y:.0f}"))
    figure.update_xaxes(type="category")
    figure.update_yaxes(title="答对 right (%)", range=[0, 105])
    return styled(figure, "基座自己的小测验 the base's own quiz", 340)


def growth_lines(growth: dict, name: str) -> go.Figure:
    """Norms, attention, singular values and losses over the steps of the training. growth: of `growth`."""
    figure = make_subplots(2, 2, vertical_spacing=0.16, horizontal_spacing=0.12)
    stages = growth["stages"]
    steps = [stage["step"] for stage in stages]

    def add(row: int, column: int, label: str, x: Sequence[float], y: Sequence[float], **style: Any) -> None:
        line = go.Scatter(x=x, y=y, name=label, legend=f"legend{2 * row + column - 2}", **style)
        figure.add_trace(line, row=row, col=column)

    for label, key in (("训练 training", "losses"), ("留出 held out", "held_out")):
        if growth[key]:
            add(1, 1, label, *zip(*growth[key], strict=True))
    for label, half in HALVES.items():
        add(1, 2, label, steps, [stage["norm"][half] for stage in stages])
    for layer in range(len(stages[0]["share"])):
        add(2, 1, f"层 layer {layer}", steps, [100 * stage["share"][layer] for stage in stages])
    for place in range(len(stages[0]["singular_values"])):
        add(2, 2, str(place + 1), steps, [stage["singular_values"][place] for stage in stages], showlegend=False)
    titles = ("损失 loss (nats)", "键值的长度 norm", "注意力份额 share (%)", "奇异值 singular value")
    for place, title in enumerate(titles):
        row, column = divmod(place, 2)
        figure.update_yaxes(title=title, type="log" if place in (0, 3) else "linear", row=row + 1, col=column + 1)
        above = {"orientation": "h", "x": 0.56 * column, "y": 1.01 - 0.58 * row, "yanchor": "bottom", "font": {"size": 10}}
        figure.update_layout({f"legend{place + 1}": above})
    figure.update_xaxes(title="步 step", row=2)
    return styled(figure, f"{name}: 训练过程 training", 760)


def norm_boxes(norms: dict, name: str) -> go.Figure:
    """Lengths of keys and values by layer: of text beside those of the prefix. norms: both (L, 2, 5), of vectors.py."""
    figure = make_subplots(1, 2, subplot_titles=tuple(HALVES))
    low, first, middle, third, high = range(len(QUANTILES))
    for label, key, colour in (("文本 text", "text", GREY), (name, "prefix", BLUE)):
        for half in HALVES.values():
            five = np.array(norms[key])[:, half].T
            box = go.Box(
                x=list(range(len(norms[key]))),
                lowerfence=five[low],
                q1=five[first],
                median=five[middle],
                q3=five[third],
                upperfence=five[high],
                name=label,
                legendgroup=label,
                offsetgroup=label,
                showlegend=half == 0,
                marker={"color": colour},
            )
            figure.add_trace(box, row=1, col=half + 1)
    figure.update_xaxes(title="层 layer", dtick=1)
    figure.update_layout(boxmode="group")
    return styled(figure, f"{name}: 键值的长度 norms of keys and values")
