"""Training speed alone and beside another busy process, by how OpenMP's threads wait for each other.

    python tests/benchmarks/busy.py
    python tests/benchmarks/busy.py --shape 389m --rows 24 --settings default passive

Each kernel of torch ends with its threads waiting for the slowest one. Where a thread waits by spinning, it keeps its core
busy; where another program needs a core too, the thread that is waited for may be the one without. The loop of train.py runs
on the rows of speed.py, in turns for each setting, first alone, then beside processes that only count. Run it on a machine
that is otherwise quiet. giving-way is what the commands do (prefix_tuning/cores.py).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext

from speed import ROWS_PER_STEP, SHAPES, make_encoder, make_model, make_rows, train_ours

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
SETTINGS = {
    "default": {},
    "giving-way": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    **{f"spin-{count}": {"GOMP_SPINCOUNT": str(count)} for count in (300, 1000, 3000, 10_000, 30_000, 100_000)},
    "one-thread": {"OMP_NUM_THREADS": "1"},
}


def worker(args) -> None:
    """Prints the tokens per second alone and beside busy processes, and this process's number of threads, as JSON."""
    import torch
    from datasets import Dataset

    from prefix_tuning.cores import giving_way
    from prefix_tuning.devices import PRECISIONS

    rows = make_rows(args.rows, SHAPES[args.shape]["vocab_size"])
    model = make_model(args.shape, "cpu", PRECISIONS[args.precision]).requires_grad_(False).eval()
    encoder, data = make_encoder(model), Dataset.from_list(rows)
    steps, tokens = -(-len(rows) // ROWS_PER_STEP), sum(len(row["input_ids"]) for row in rows)

    def tokens_per_second() -> float:
        start = time.perf_counter()
        with giving_way() if args.give_way else nullcontext():
            train_ours(model, encoder, data, ROWS_PER_STEP, steps)
        return tokens / (time.perf_counter() - start)

    tokens_per_second()  # the first time, oneDNN prepares its kernels
    alone = tokens_per_second()
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(args.others)]
    try:
        beside = tokens_per_second()
    finally:
        for other in others:
            other.kill()
            other.wait()
    print(json.dumps({"alone": alone, "beside": beside, "threads": torch.get_num_threads()}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mini")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--others", type=int, default=1, help="busy processes beside the loop")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--give_way", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    runs = {name: [] for name in args.settings}
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    for number in range(args.repeats):
        for name in args.settings:
            command = [sys.executable, __file__, "--worker", *(["--give_way"] if name == "giving-way" else [])]
            for flag in ("shape", "precision", "rows", "others"):
                command += [f"--{flag}", str(getattr(args, flag))]
            result = subprocess.run(command, env=environment | SETTINGS[name], capture_output=True, text=True)
            if result.returncode:
                sys.exit(f"{name} failed:\n{result.stderr}")
            runs[name].append(json.loads(result.stdout.splitlines()[-1]))
            load = os.getloadavg()[0]
            print(f"round {number + 1}, load {load:.1f}: {name} {runs[name][-1]}", file=sys.stderr, flush=True)
    medians = {
        name: {key: statistics.median(run[key] for run in each) for key in ("alone", "beside")}
        for name, each in runs.items()
    }
    reference = medians[args.settings[0]]["alone"]
    print(f"shape {args.shape}, {args.precision}, {args.rows} rows, {args.repeats} rounds, beside {args.others}; medians")
    print(f"| | alone, tokens/s | spread | of {args.settings[0]} | beside, tokens/s | spread | times slower than alone |")
    print("|---" * 7 + "|")
    for name, median in medians.items():
        spread = {key: [f"{limit(run[key] for run in runs[name]):,.0f}" for limit in (min, max)] for key in median}
        print(
            f"| {name} | {median['alone']:,.0f} | {'-'.join(spread['alone'])} | {median['alone'] / reference:.0%} "
            f"| {median['beside']:,.0f} | {'-'.join(spread['beside'])} | {reference / median['beside']:.1f} |"
        )


if __name__ == "__main__":
    main()
