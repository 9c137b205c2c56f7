import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress

import pytest
from checkout import ROOT
from forks import torchrun_forks
from runs import metrics_of

from prefix_tuning.screen import Screen
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig


@pytest.fixture
def broken():
    """A text stream whose reader is gone, so that each line raises BrokenPipeError."""
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w", buffering=1)  # noqa: SIM115 (closed below)
    yield stream
    with suppress(BrokenPipeError):
        stream.close()


def test_a_screen_writes_to_its_stream_and_drops_what_that_cannot_take(tmp_path, broken):
    with open(tmp_path / "log", "w", encoding="utf-8") as log:
        print("法国", file=Screen(log), flush=True)
        assert (tmp_path / "log").read_text("utf-8") == "法国\n"
        assert Screen(log).name == log.name and not Screen(log).isatty()
    print("dropped, as the file is closed", file=Screen(log), flush=True)
    print("dropped", file=Screen(broken), flush=True)
    with pytest.raises(BrokenPipeError):
        print("not dropped", file=broken)


def test_a_run_called_by_a_program_survives_a_broken_stream_and_leaves_it_in_use(quick_settings, broken):
    with redirect_stdout(broken), redirect_stderr(broken):
        train(TrainConfig(**quick_settings))
        assert sys.stdout is sys.stderr is broken
    assert metrics_of(quick_settings["output_dir"])[-1]["steps"] == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
def test_processes_of_one_run_survive_a_full_screen(quick_settings):
    flags = [f"--{name}={value}" for name, value in quick_settings.items()]
    code, _, err = torchrun_forks(2, "train.py", *flags, screen="/dev/full")
    assert code == 0, err
    assert metrics_of(quick_settings["output_dir"])[-1]["steps"] == 3


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a file that is always full")
def test_a_full_screen_at_the_end_of_a_command_changes_no_exit_code():
    with open("/dev/full", "w") as full:
        command = [sys.executable, "train.py", "--max_steps=x"]
        assert subprocess.run(command, stdout=full, stderr=full, cwd=ROOT).returncode == 2
