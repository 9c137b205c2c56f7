from prefix_tuning.errors import reason_of


def test_a_reason_is_the_first_line_of_an_error_or_its_class():
    assert reason_of(ValueError("  no such name\nTraceback: ...")) == "no such name"
    assert reason_of(MemoryError()) == "MemoryError"
