import pytest
from forks import Fork


def test_what_runs_on_a_gpu_runs_on_a_pretended_one():
    """In a process of its own: torch counts the devices at its first backward pass, and torch.compile asks each of them for
    what this one does not have.
    """
    program = Fork("tests/on_pretended_device.py")
    out, err = program.communicate()
    if "this torch cannot make a device in Python" in out and " passed" not in out:
        pytest.skip("this torch cannot make a device in Python")
    assert program.returncode == 0 and " passed" in out, out + err
