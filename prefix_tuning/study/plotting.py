"""What all pictures have in common: their look, their menus, and text that plotly shows as it is."""

from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.colors import qualitative

from prefix_tuning.text import shorten

COLOURS = qualitative.D3 + qualitative.Set2
GREY, BLUE = "#999999", "#1f77b4"
LONGEST_NAME = 40  # columns of a name in a title or a legend
MOST_TICKS = 60  # tokens that are named on an axis


def styled(figure: go.Figure, title: str, height: int = 420) -> go.Figure:
    """The common look. No template, as each picture would have its own copy of one."""
    axis = {"gridcolor": "#e5e5e5", "zeroline": False, "automargin": True}
    return (
        figure.update_layout(
            template="none",
            title={"text": title, "font": {"size": 15}, "x": 0.05},
            font={"color": "#333", "size": 12},
            height=height,
            colorway=COLOURS,
            margin={"l": 70, "r": 30, "t": 90, "b": 60},
            hoverlabel={"align": "left"},
        )
        .update_xaxes(axis)
        .update_yaxes(axis)
        .update_annotations(font_size=13)
    )


def plain(text: str) -> str:
    """A text that plotly shows as it is: it takes <...> for a tag."""
    return text.replace("<", "‹").replace(">", "›")


def short_name(name: str) -> str:
    """The name of a prefix or of a dataset in a picture."""
    return plain(shorten(name, LONGEST_NAME))


def dropdown(figure: go.Figure, labels: Sequence[str], groups: Sequence[Sequence[int]], always: Sequence[int] = ()) -> None:
    """Adds a menu to a picture: choosing labels[i] shows the traces groups[i], and always those in `always`. The first is
    chosen.
    """
    number = len(figure.data)
    shown = [[trace in group or trace in always for trace in range(number)] for group in map(set, groups)]
    buttons = [
        {"label": label, "method": "restyle", "args": [{"visible": visible}]}
        for label, visible in zip(labels, shown, strict=True)
    ]
    for trace, visible in zip(figure.data, shown[0], strict=True):
        trace.visible = visible
    figure.update_layout(updatemenus=[{"buttons": buttons, "x": 1, "xanchor": "right", "y": 1.1, "yanchor": "bottom"}])


def token_axis(tokens: Sequence[str]) -> dict:
    """An axis that names its tokens, of a long text every second, third ... of them."""
    shown = [plain(token.replace("\n", "⏎").replace(" ", "␣")) for token in tokens]
    places = range(0, len(shown), -(-len(shown) // MOST_TICKS))
    return {"tickmode": "array", "tickvals": [*places], "ticktext": [shown[place] for place in places], "tickangle": -60}
