"""Processes that tests start, and that end with them."""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
from checkout import HERE, ROOT
from runs import run_quietly

from prefix_tuning.files.names import METRICS_FILE

# Ends the processes of a test.
at_end = contextlib.ExitStack()


def start_process(command, **options) -> subprocess.Popen:
    """Starts a process. It gets SIGTERM at the end of the test, which torchrun passes on to its workers."""
    process = at_end.enter_context(subprocess.Popen(command, **options))
    at_end.callback(process.terminate)
    return process


def run_script(script, *flags, cwd=ROOT):
    """Runs train.py or infer.py as a user does."""
    return subprocess.run([sys.executable, str(ROOT / script), *flags], cwd=cwd, capture_output=True, text=True)


TRAIN = ("train",)


def forks():
    """multiprocessing's context. Its processes are forked from one that has made the slow imports."""
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["models", "runs", "forks", "matplotlib.figure"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(HERE)]), prepend=os.pathsep)
        forkserver.ensure_running()
    return processes


def start_run(settings: dict) -> multiprocessing.Process:
    """A process that runs a training."""
    process = forks().Process(target=run_quietly, args=(settings,))
    process.start()
    return process


def seconds_of_a_run(settings: dict) -> float:
    """How long a process of `start_run(settings)` lives if nobody kills it."""
    started = time.perf_counter()
    process = start_run(settings)
    process.join()
    assert process.exitcode == 0
    return time.perf_counter() - started


def wait_until(done, process) -> None:
    """Returns once done() is true, or the process (Popen or Fork) has ended."""
    while process.poll() is None and not done():
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.005)


def wait_for_step(process, folder: Path, step: int) -> None:
    """Returns as soon as the process has logged `step`."""

    def logged():
        with contextlib.suppress(FileNotFoundError, IndexError, ValueError):
            return json.loads((folder / METRICS_FILE).read_text("utf-8").splitlines()[-1])["step"] >= step

    wait_until(logged, process)


def torchrun(processes, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--max_restarts={restarts}"]
    return [*command, "--master_port=0", "--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]


def worker(job, rank):
    """The process id of torchrun's worker with this rank; None if there is none at the moment."""
    for pid in Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split():
        with contextlib.suppress(OSError):
            if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                return int(pid)
    return None
