"""What all plots have in common: their look, their menus, and text that plotly shows as it is."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.colors import qualitative

from prefix_tuning.text import shorten

COLOURS = qualitative.D3 + qualitative.Set2
GREY, BLUE = "#999999", "#1f77b4"
FONT = 'system-ui, "Noto Sans CJK SC", sans-serif'
LONGEST_NAME = 24  # columns of a name in a picture, which may be 300 pixels wide
MOST_TICKS = 60  # tokens that an axis names
# Pixels: enough to read the name of a token and the number in a cell.
TOKEN_WIDTH, CELL_WIDTH, LINE_HEIGHT = 20, 44, 18
LONGEST_TOKEN = 8  # characters


def styled(figure: go.Figure, title: str, height: int = 420, least_width: int = 0) -> go.Figure:
    """The common look. There is no template, because each picture would contain a copy of it.

    least_width: pixels below which the picture scrolls on the page.
    """
    axis = {"gridcolor": "#e5e5e5", "zeroline": False, "automargin": True}
    return (
        figure.update_layout(
            template="none",
            title={"text": title, "font": {"size": 15}, "x": 0.05},
            font={"family": FONT, "color": "#333", "size": 12},
            height=height,
            colorway=COLOURS,
            margin={"l": 55, "r": 15, "t": 70, "b": 50},
            legend={"orientation": "h", "x": 0, "yref": "container", "y": 0, "yanchor": "bottom"},
            hoverlabel={"align": "left"},
            meta={"least_width": least_width} if least_width else None,
        )
        .update_xaxes(axis)
        .update_yaxes(axis)
    )


def plain(text: str) -> str:
    """A text that plotly shows as it is. It would take <...> for a tag."""
    return text.replace("<", "‹").replace(">", "›")


def short_name(name: str) -> str:
    """The name of a prefix or of a dataset in a picture."""
    return plain(shorten(name, LONGEST_NAME))


def dropdown(figure: go.Figure, labels: Sequence[str], groups: Sequence[Sequence[int]], always: Sequence[int] = ()) -> None:
    """Adds a menu to a picture: choosing labels[i] shows the traces groups[i]. Those in `always` are always shown. The menu
    begins with the first label.
    """
    number = len(figure.data)
    shown = [[trace in group or trace in always for trace in range(number)] for group in map(set, groups)]
    buttons = [
        {"label": label, "method": "restyle", "args": [{"visible": visible}]}
        for label, visible in zip(labels, shown, strict=True)
    ]
    for trace, visible in zip(figure.data, shown[0], strict=True):
        trace.visible = visible
    figure.update_layout(updatemenus=[{"buttons": buttons, "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}])


def log_axis(values: Iterable[float]) -> dict:
    """A logarithmic axis for these values. Its ticks are numbers such as 0.02; plotly itself would write 2."""
    powers = [math.log10(value) for value in values if value > 0]
    low, high = (math.floor(min(powers)), math.ceil(max(powers))) if powers else (0, 1)
    digits = (1, 2, 5) if high - low <= 2 else (1,)
    ticks = [float(f"{digit}e{power}") for power in range(low, high + 1) for digit in digits]
    return {"type": "log", "tickvals": ticks, "ticktext": [np.format_float_positional(tick, trim="-") for tick in ticks]}


def token_axis(tokens: Sequence[str]) -> dict:
    """An axis that names its tokens; for a long text, every second, third ... token.

    Characters stand upright, one below the other. Side by side there is no room, and a turned ␣ looks like a bracket.
    """
    shown = [plain(token.replace("\n", "⏎").replace(" ", "␣")) for token in tokens]
    shown = [text if len(text) <= LONGEST_TOKEN else text[: LONGEST_TOKEN - 1] + "…" for text in shown]
    indices = range(0, len(shown), -(-len(shown) // MOST_TICKS))
    ticks = {"tickvals": [*indices], "ticktext": ["<br>".join(shown[index]) for index in indices]}
    return ticks | {"tickmode": "array", "tickangle": 0, "tickfont": {"size": 14}, "range": [-0.5, len(shown) - 0.5]}
