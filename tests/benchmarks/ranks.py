"""Kills random processes of a torchrun job until it has ended, and compares what it leaves with a job that was never killed.

    python tests/benchmarks/ranks.py --kills 20 --processes 2

Each job has a checkpoint after every step and no more restarts than kills; torchrun goes on by itself. Weights must be the
same bit for bit, and so must metrics without the clock's figures. If a job ends before all kills are done, a new one starts.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from checkout import ROOT
from launching import torchrun, worker
from runs import assert_same_run

FLAGS = "--dataset bundled:short --eval_exact_match false --eval_steps 1000 --max_steps 60 --num_virtual_tokens 4"
FLAGS += " --per_device_train_batch_size 2 --save_steps 1 --logging_steps 1"


def start(processes: int, output: Path, restarts: int, *more: str) -> subprocess.Popen:
    command = [*torchrun(processes, restarts), str(ROOT / "train.py"), *FLAGS.split(), *more, "--output_dir", str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(output.parent / f"{output.name}.log", "w") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shard_base", action="store_true")
    args = parser.parse_args()
    more = ["--shard_base"] * args.shard_base
    rng, kills, jobs, slowest = random.Random(args.seed), 0, 0, 0.0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        assert start(args.processes, whole, 0, *more).wait() == 0
        while kills < args.kills:
            output = Path(folder) / f"job{jobs}"
            job = start(args.processes, output, args.kills, *more)  # one attempt for each kill
            while job.poll() is None:
                deadline = time.monotonic() + rng.uniform(2, 12)  # a start takes about six seconds
                while job.poll() is None and time.monotonic() < deadline:
                    time.sleep(0.05)
                running = [worker(job, rank) for rank in range(args.processes)] if job.poll() is None else [None]
                if kills >= args.kills or None in running:
                    continue
                rank = rng.randrange(args.processes)
                os.kill(running[rank], signal.SIGKILL)
                kills, killed = kills + 1, time.monotonic()
                # How long until the other processes are gone? They must not wait for the dead one in a collective operation.
                while any(Path(f"/proc/{pid}").exists() for pid in running) and time.monotonic() < killed + 120:
                    time.sleep(0.05)
                slowest = max(slowest, time.monotonic() - killed)
            jobs += 1
            assert job.returncode == 0, Path(f"{output}.log").read_text()
            assert_same_run(output, whole)
            print(f"{jobs} jobs, {kills} kills, the same bits; the others ended within {slowest:.1f} s", flush=True)


if __name__ == "__main__":
    main()
