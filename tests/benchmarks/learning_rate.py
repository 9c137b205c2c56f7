"""Held-out loss by learning rate, encoder width and prefix length, beside the rate that train.py finds: a table.

python tests/benchmarks/learning_rate.py --dataset a.jsonl --eval_dataset b.jsonl
python tests/benchmarks/learning_rate.py --rates 1e-3 1e-2 --widths 64 192 --tokens 4 16 --seeds 42 --num_train_epochs 2

Other flags are train.py's. The rate `found` leaves it to the search, and the table shows what was found. All figures are
medians over the seeds.
"""

import argparse
import contextlib
import io
import itertools
import json
import statistics
import tempfile
from pathlib import Path

import torch

from prefix_tuning.cli import parse_train_config
from prefix_tuning.files.names import CONFIG_FILE
from prefix_tuning.training.output import read_metrics
from prefix_tuning.training.run import train

RATES = ["found", "1e-4", "3.2e-4", "1e-3", "3.2e-3", "1e-2", "3.2e-2", "1e-1"]


def figures(flags: list[str]) -> tuple[float, float | None, float]:
    """The held-out loss at the end of a run, exact match if asked for, and the learning rate that it had."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train(parse_train_config([*flags, "--output_dir", folder, "--eval_steps", "1000000", "--save_steps", "0"]))
        lines = read_metrics(Path(folder))
        rate = json.loads((Path(folder) / CONFIG_FILE).read_text("utf-8"))["learning_rate"]
    last = [line for line in lines if "eval_loss" in line][-1]
    return last["eval_loss"], last.get("eval_exact_match"), rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=RATES)
    parser.add_argument("--widths", nargs="+", default=[None], help="of the encoder; default: the model's hidden size")
    parser.add_argument("--tokens", nargs="+", default=["10"])
    parser.add_argument("--seeds", nargs="+", default=["42", "1", "2"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args, rest = parser.parse_known_args()
    torch.set_num_threads(args.threads)
    print("| width | tokens | rate | held-out loss, median | each seed's | exact match |\n|---|---|---|---|---|---|")
    for width, tokens, rate in itertools.product(args.widths, args.tokens, args.rates):
        flags = [*rest, "--num_virtual_tokens", tokens]
        flags += ["--encoder_hidden_size", width] if width else []
        flags += ["--learning_rate", rate] if rate != "found" else []
        losses, matches, rates = zip(*(figures([*flags, "--seed", seed]) for seed in args.seeds), strict=True)
        median = statistics.median(losses)
        match = f"{statistics.median(matches):.1%}" if None not in matches else ""
        shown = rate if rate != "found" else "found: " + ", ".join(f"{found:.1e}" for found in rates)
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"| {width or 'hidden'} | {tokens} | {shown} | {median:.4f} | {each} | {match} |", flush=True)


if __name__ == "__main__":
    main()
