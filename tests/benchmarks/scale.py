"""What processes exchange per optimizer step, and steps per second: this loop, and PEFT under DDP.

    python tests/benchmarks/scale.py --shape 389m --processes 1 2 4

torchrun starts the processes on this machine, and they exchange with gloo. Bytes are read from the loopback device
(/proc/net/dev): everything that all processes together have sent, headers included. Each process has one row of --tokens
tokens per step, float32, 10 virtual tokens, the projection, AdamW. The processes share the cores of one machine, so steps
per second show what the exchange costs, not what more machines gain.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from speed import SHAPES, VIRTUAL_TOKENS, make_encoder, make_model, train_ours

WARM_UP = 2


def bytes_sent() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(re.split(r"[\s:]+", line.strip())[9])


def ours(model, rows: list[list[int]]):
    """Returns a function of the number of optimizer steps, which makes them with all processes together."""
    from datasets import Dataset

    encoder, data = make_encoder(model), Dataset.from_dict({"input_ids": rows, "labels": rows})
    return lambda steps: train_ours(model, encoder, data, len(rows), steps)


def peft(model, rows: list[list[int]]):
    import torch
    from peft import PrefixTuningConfig, get_peft_model
    from torch import distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(1)
    settings = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS, prefix_projection=True)
    wrapped = get_peft_model(model, settings)
    if dist.get_world_size() > 1:
        wrapped = DistributedDataParallel(wrapped)
    optimizer = torch.optim.AdamW([p for p in wrapped.parameters() if p.requires_grad], lr=5e-5)
    ids = torch.tensor([rows[dist.get_rank()]])

    def run(steps: int) -> None:
        for _ in range(steps):
            wrapped(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return run


def work(args) -> None:
    """The work of each process."""
    import torch
    from torch import distributed as dist

    from prefix_tuning import distributed

    with distributed.processes(torch.device("cpu")):
        model = make_model(args.shape, "cpu", torch.float32).requires_grad_(False).eval()
        generator = torch.Generator().manual_seed(0)
        size = (dist.get_world_size(), args.tokens)
        rows = torch.randint(4, SHAPES[args.shape]["vocab_size"], size, generator=generator).tolist()
        run = {"ours": ours, "peft": peft}[args.worker](model, rows)
        run(WARM_UP)
        dist.barrier()
        before, started = bytes_sent(), time.perf_counter()
        run(args.steps)
        dist.barrier()
        seconds, sent = time.perf_counter() - started, bytes_sent() - before
        if dist.get_rank() == 0:
            figures = {"bytes_per_step": round(sent / args.steps), "steps_per_second": args.steps / seconds}
            Path(args.result).write_text(json.dumps(figures))
        dist.barrier()


def launch(script: str, processes: int, flags: list[str]) -> dict:
    """Runs a script in several processes, which share the cores. Returns what it wrote to its --result."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // processes))}
        done = subprocess.run(
            [*command, script, *flags, "--result", str(result)], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr)
        return json.loads(result.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="389m")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    for processes in args.processes:
        figures = {}
        for contestant in ("peft", "ours"):
            flags = ["--worker", contestant, "--shape", args.shape, "--tokens", str(args.tokens), "--steps", str(args.steps)]
            figures[contestant] = launch(__file__, processes, flags)
        for contestant, found in figures.items():
            megabytes = found["bytes_per_step"] / 1e6
            print(
                f"{processes} processes  {contestant:5s} {megabytes:10.3f} MB/step  {found['steps_per_second']:.3f} steps/s"
            )
        if processes > 1:
            print(f"   {figures['peft']['bytes_per_step'] / figures['ours']['bytes_per_step']:.0f} times fewer bytes")


if __name__ == "__main__":
    main()
