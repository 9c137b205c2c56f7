"""Programs as users start them, but in processes forked from one that has imported torch and transformers already.

In each new process these imports take 5 s of processor time. A fork has its own arguments, folder, stdout, stderr, signal
handlers and exit code. Tests of the start and the end of Python itself (closed streams, locales, Ctrl-C while modules are
imported) need a real process: `start_process` of launching.py.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from checkout import ROOT
from launching import at_end, forks
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from prefix_tuning import distributed

# The signals that torchrun handles.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


def become(program, flags, outputs, cwd=ROOT, limit=None, stdin=None):
    """The work of a fork: runs the program. outputs: the files for stdout and stderr. limit: as for `Fork`."""
    for name, number, output in zip(("stdout", "stderr"), (1, 2), outputs, strict=True):
        os.dup2(os.open(output, os.O_WRONLY | os.O_APPEND), number)
        # A new stream object, because the old one remembers what kind of file it wrote to.
        setattr(sys, name, open(number, "w", buffering=1 if number == 2 else -1))  # noqa: SIM115 (open until the fork ends)
    if stdin is not None:
        sys.stdin = open(stdin, encoding="utf-8")  # noqa: SIM115 (open until the fork ends)
    os.chdir(cwd)
    sys.argv = [str(ROOT / program), *flags]
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    runpy.run_path(sys.argv[0], run_name="__main__")


class Fork:
    """A program that runs, with the methods of subprocess.Popen that tests use. It ends with the test at the latest.

    limit: the most bytes that a file may grow to. stdin: a file. screen: a path that stdout and stderr are written to,
    instead of files whose text `communicate` returns.
    """

    def __init__(self, program, *flags, cwd=ROOT, limit=None, stdin=None, screen=None):
        self._files = outputs()
        names = [screen or file.name for file in self._files]
        arguments = program, [str(flag) for flag in flags], names, cwd, limit, stdin
        self._process = forks().Process(target=become, args=arguments)
        self._process.start()
        self.pid = self._process.pid
        at_end.callback(self._end)

    @property
    def returncode(self):
        return self._process.exitcode

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout):
        self._process.join(timeout)

    def send_signal(self, number):
        os.kill(self.pid, number)

    def communicate(self):
        """Waits until the program ends; returns its stdout and stderr."""
        self._process.join()
        return texts(self._files)

    def _end(self):
        self._process.terminate()
        self._process.join()


def outputs():
    return [tempfile.NamedTemporaryFile(prefix=name) for name in ("stdout", "stderr")]


def texts(files):
    return [Path(file.name).read_text("utf-8") for file in files]


def become_worker(program, flags, outputs, more):
    """The work of each process of `torchrun_forks`. more: further flags of a process, by rank."""
    torch.set_num_threads(1)  # as torchrun has it
    become(program, [*flags, *more.get(os.environ["RANK"], [])], outputs)


@contextmanager
def handlers_kept():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def torchrun_forks(processes, program, *flags, restarts=0, more=None, screen=None):
    """Runs the program in several processes. torchrun's agent starts, watches and restarts them as it does for a user.

    Returns torchrun's exit code, and what all processes wrote to stdout and to stderr (nothing if there is a `screen`).
    """
    files, code = outputs(), 0
    names = [screen or file.name for file in files]
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        max_restarts=restarts,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=Path(files[0].name).name,
        start_method="forkserver",
    )
    forks()
    with handlers_kept():
        try:
            elastic_launch(config, become_worker)(program, [str(f) for f in flags], names, more or {})
        except ChildFailedError as error:
            code = error.get_first_failure()[1].exitcode
            with open(files[1].name, "a", encoding="utf-8") as err:
                err.write(str(error))
    return code, *texts(files)


def in_forks(count, work, **environment):
    """Calls work() in `count` forks of this process, connected as torchrun connects its processes.

    Returns what each call returned (None if it did not return), and the exit codes.
    """
    forked = multiprocessing.get_context("fork")
    # The store's thread looks up the name of each rank that connects. A fork at that moment would inherit libc's lock of
    # such lookups, and never get it. So all ranks wait until the last one is forked.
    all_forked = forked.Event()
    answers, store = forked.SimpleQueue(), dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    environment = {
        "WORLD_SIZE": str(count), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port), "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_RUN_ID": "job", "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0", **environment,
    }  # fmt: skip

    def become(rank):
        os.environ.update(environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        all_forked.wait()
        with distributed.processes(torch.device("cpu")):
            answers.put((rank, work()))

    ranks = [forked.Process(target=become, args=(rank,)) for rank in range(count)]
    for process in ranks:
        process.start()
    all_forked.set()
    for process in ranks:
        process.join(timeout=300)
        process.kill()  # one that hangs
        process.join()
    found = {}
    while not answers.empty():
        found.update([answers.get()])
    return [found.get(rank) for rank in range(count)], [process.exitcode for process in ranks]
