import plotly.graph_objects as go

from prefix_tuning.study.plotting import dropdown, plain, short_name, styled, token_axis


def test_a_picture_has_no_copy_of_a_template():
    """plotly's own is 7 KB in each picture."""
    assert len(styled(go.Figure(go.Bar(x=[1], y=[2])), "title").to_json()) < 2000


def test_text_that_plotly_would_take_for_a_tag():
    assert plain("</s> a<b") == "‹/s› a‹b"
    assert short_name("<b>" + "长" * 30) == "‹b›" + "长" * 17 + "..."


def test_a_menu_shows_one_group_and_what_always_stays():
    figure = go.Figure([go.Bar(y=[number]) for number in range(4)])
    dropdown(figure, ["a", "b"], [[0], [1, 2]], always=[3])
    assert [trace.visible for trace in figure.data] == [True, False, False, True]
    chosen = [list(button.args[0]["visible"]) for button in figure.layout.updatemenus[0].buttons]
    assert chosen == [[True, False, False, True], [False, True, True, True]]


def test_tokens_are_ticks_that_can_be_seen():
    assert token_axis(["a", "\n", " b", "</s>"])["ticktext"] == ["a", "⏎", "␣b", "‹/s›"]
    axis = token_axis([str(number) for number in range(130)])
    assert axis["tickvals"] == list(range(0, 130, 3)) and axis["ticktext"][1] == "3"
