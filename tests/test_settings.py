from dataclasses import dataclass

import pytest

from prefix_tuning.errors import UserError
from prefix_tuning.settings import Needs, check_flags, content_flag, names_on_resume, new_flag, same_flag


@dataclass
class Settings:
    count: int = same_flag(3, "bounded on both sides", at_least=1, at_most=5)
    rate: float | None = new_flag(None, "bounded below", at_least=1e-5)
    rows: str | None = content_flag(None, "names something")
    lamp: bool = new_flag(False, "")
    shade: str = same_flag("white", "", needs=Needs(("lamp", "rows"), "needs a lamp or rows in {room}"))


@pytest.mark.parametrize(
    "values, message",
    [
        ({"count": 0}, "--count must be at least 1 and at most 5, not 0"),
        ({"count": 6}, "--count must be at least 1 and at most 5, not 6"),
        ({"rate": 0.0}, "--rate must be at least 0.00001, not 0.0"),
        ({"rate": float("inf")}, "--rate must be at least 0.00001, not inf"),
        ({"rate": float("nan")}, "--rate must be at least 0.00001, not nan"),
        ({"shade": "red"}, "--shade needs a lamp or rows in the attic"),
    ],
)
def test_a_value_out_of_bounds_or_without_what_it_needs_is_refused(values, message):
    with pytest.raises(UserError) as error:
        check_flags(Settings(**values), room="the attic")
    assert str(error.value) == message


def test_other_values_pass():
    for values in (
        {},
        {"count": 1},
        {"count": 5, "rate": 1e-5},
        {"shade": "red", "lamp": True},
        {"shade": "red", "rows": "a"},
    ):
        check_flags(Settings(**values), room="the attic")


def test_settings_are_found_by_what_a_resume_does_with_them():
    assert names_on_resume(Settings, "same") == ("count", "shade")
    assert names_on_resume(Settings, "content") == ("rows",)
    assert names_on_resume(Settings, "new") == ("rate", "lamp")
