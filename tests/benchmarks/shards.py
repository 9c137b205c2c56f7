"""Peak memory of each process with --shard_base, by the number of processes, next to the ideal; and the bytes sent per step.

    python tests/benchmarks/shards.py --shape 389m --processes 1 2 4

A Bloom with random weights of a real shape is saved as float32, loaded by torchrun's processes and trained for some steps, a
row of --tokens tokens per process and step. The prefix has no projection, so little is held beside the base. The table
counts memory that only the process holds ("anonymous", read from /proc/self/status every 2 ms), above what it held before
loading. The ideal is the process's share of the base plus one layer. "whole" is one process without the flag. Its base lies
in pages of the file, which do not count, so all that it holds is needed by the pass itself. Bytes are sent by all processes
together over gloo, as scale.py reads them.
"""

import argparse
import json
import re
import tempfile
import threading
import time
from pathlib import Path

from scale import bytes_sent, launch
from speed import SHAPES, make_encoder, make_model, train_ours


def anonymous() -> float:
    """MB that only this process holds."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024 / 1e6


class Peak:
    """The largest value of `anonymous` since the last call of `since`."""

    def __init__(self):
        self.most = anonymous()
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self) -> None:
        while True:
            self.most = max(self.most, anonymous())
            time.sleep(0.002)

    def since(self) -> float:
        most, self.most = self.most, anonymous()
        return most


def work(args) -> None:
    """The work of each process."""
    import torch
    from datasets import Dataset
    from torch import distributed as dist
    from transformers import AutoConfig

    from prefix_tuning import distributed
    from prefix_tuning.base_model.loading import wrap_layers
    from prefix_tuning.base_model.sharding import load_sharded
    from prefix_tuning.model.bloom import Bloom

    with distributed.processes(torch.device("cpu")):
        before, peak = anonymous(), Peak()
        if args.worker == "sharded":
            config = AutoConfig.from_pretrained(args.model)
            model = load_sharded(args.model, config, torch.float32, torch.device("cpu"), dist.get_world_size())
        else:
            model = Bloom.from_pretrained(args.model, dtype=torch.float32).requires_grad_(False).eval()
        loading, held = peak.since() - before, anonymous() - before
        wrap_layers(model, args.gradient_checkpointing, torch_compile=False)
        shape, encoder = model.config, make_encoder(model, width=1)
        ids = torch.randint(4, shape.vocab_size, (args.steps * dist.get_world_size(), args.tokens)).tolist()
        rows = Dataset.from_dict({"input_ids": ids, "labels": ids})
        distributed.barrier()
        started, sent = time.perf_counter(), bytes_sent()
        train_ours(model, encoder, rows, dist.get_world_size(), args.steps)
        distributed.barrier()
        seconds, sent = (time.perf_counter() - started) / args.steps, (bytes_sent() - sent) / args.steps / 1e6
        figures = {"loading": loading, "held": held, "training": peak.since() - before, "seconds": seconds, "sent": sent}
        worst = {name: max(found[name] for found in distributed.gather(figures)) for name in figures}
        if distributed.is_main():
            weights = [*model.named_parameters()]
            worst["base"] = sum(tensor.numel() for _, tensor in weights) * 4 / 1e6
            worst["layer"] = sum(tensor.numel() for name, tensor in weights if ".h.0." in name) * 4 / 1e6
            worst["embeddings"] = shape.vocab_size * shape.hidden_size * 4 / 1e6
            Path(args.result).write_text(json.dumps(worst))
        distributed.barrier()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="389m")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        import torch

        make_model(args.shape, "cpu", torch.float32).save_pretrained(folder)
        print("MB above the start:      while loading  after loading  in training  ideal  s/step  sent, MB/step")
        for worker, processes in [("whole", 1), *(("sharded", processes) for processes in args.processes)]:
            flags = ["--worker", worker, "--model", folder, "--tokens", str(args.tokens), "--steps", str(args.steps)]
            found = launch(__file__, processes, flags + ["--gradient_checkpointing"] * args.gradient_checkpointing)
            ideal = found["base"] / processes + (found["layer"] if worker == "sharded" else 0)
            print(
                f"{worker:8s} {processes} processes {found['loading']:16.0f} {found['held']:14.0f} "
                f"{found['training']:12.0f} {ideal:6.0f} {found['seconds']:7.2f} {found['sent']:14.0f}"
            )
        sizes = {name: f"{found[name]:.0f} MB" for name in ("base", "layer", "embeddings")}
        print(", ".join(f"{name} {size}" for name, size in sizes.items()))


if __name__ == "__main__":
    main()
