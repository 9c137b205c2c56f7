import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from checkout import HERE, ROOT

from prefix_tuning.cores import giving_way

# How a user may choose how threads wait; conftest.py does.
CHOICES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or "libgomp" not in Path("/proc/self/maps").read_text() or len(os.sched_getaffinity(0)) == 1,
    reason="needs libgomp and two cores",
)


@pytest.fixture
def nothing_chosen(monkeypatch):
    """Two threads, and a user who has set no variable."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    for name in CHOICES:
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(before)


def test_the_threads_of_a_command_spin_until_another_program_needs_a_core(nothing_chosen, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    subprocess.run([sys.executable, str(HERE / "spinning.py")], check=True)


@pytest.mark.parametrize("variable", CHOICES)
def test_how_threads_wait_is_left_to_a_user_who_has_chosen(variable, nothing_chosen, monkeypatch):
    monkeypatch.setenv(variable, "ACTIVE")
    threads = threading.active_count()
    with giving_way():
        assert threading.active_count() == threads
