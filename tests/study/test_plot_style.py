import plotly.graph_objects as go

from prefix_tuning.study.plot_style import dropdown, log_axis, plain, short_name, styled, token_axis


def test_a_picture_has_no_copy_of_a_template():
    """plotly's own is 7 KB in each picture."""
    assert len(styled(go.Figure(go.Bar(x=[1], y=[2])), "title").to_json()) < 2000


def test_text_that_plotly_would_take_for_a_tag():
    assert plain("</s> a<b") == "‹/s› a‹b"
    assert short_name("<b>" + "长" * 30) == "‹b›" + "长" * 9 + "..."


def test_a_menu_shows_one_group_and_what_always_stays():
    figure = go.Figure([go.Bar(y=[number]) for number in range(4)])
    dropdown(figure, ["a", "b"], [[0], [1, 2]], always=[3])
    assert [trace.visible for trace in figure.data] == [True, False, False, True]
    chosen = [list(button.args[0]["visible"]) for button in figure.layout.updatemenus[0].buttons]
    assert chosen == [[True, False, False, True], [False, True, True, True]]


def test_tokens_stand_upright_so_that_spaces_and_line_breaks_can_be_read():
    axis = token_axis(["a", "\n", " b", "</s>", "\t", "everything"])
    assert axis["ticktext"] == ["a", "⏎", "␣<br>b", "‹<br>/<br>s<br>›", "\t", "<br>".join("everyth…")]
    assert axis["tickangle"] == 0 and axis["range"] == [-0.5, 5.5]
    axis = token_axis([str(number) for number in range(130)])
    assert axis["tickvals"] == list(range(0, 130, 3)) and axis["ticktext"][1] == "3"


def test_ticks_of_a_log_axis_are_written_out():
    assert log_axis([0.3, 20.0])["ticktext"] == ["0.1", "1", "10", "100"]
    near = log_axis([2.0, 30.0, float("nan"), 0.0])
    assert near["ticktext"] == ["1", "2", "5", "10", "20", "50", "100", "200", "500"] and near["type"] == "log"
    assert log_axis([0.00002])["ticktext"][:3] == ["0.00001", "0.00002", "0.00005"]
    assert log_axis([])["tickvals"][0] == 1  # a training without a single loss above 0
