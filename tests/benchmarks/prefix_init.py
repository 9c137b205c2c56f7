"""Which start is best: trains from each --prefix_init, with and without the projection, and prints a table.

python tests/benchmarks/prefix_init.py                                       # the bundled demo
python tests/benchmarks/prefix_init.py --dataset a.jsonl --eval_dataset b.jsonl --num_train_epochs 3
"""

import argparse
import tempfile
from pathlib import Path

from prefix_tuning import bundled
from prefix_tuning.cli import parse_train_config
from prefix_tuning.training.output import read_metrics
from prefix_tuning.training.run import train

TEXTS = {"bare": "请直接回答下面的问题。", "template": "Human: 法国的首都是哪里？\n\nAssistant: 巴黎</s>"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default=bundled.DATASETS[0])
    parser.add_argument("--learning_rates", default="1e-3,5e-3")
    args, flags = parser.parse_known_args()
    rows = []
    for projection in ("true", "false"):
        for learning_rate in args.learning_rates.split(","):
            for start in ("random", "zero", *TEXTS):
                init = (
                    ["--prefix_init", start]
                    if start not in TEXTS
                    else ["--prefix_init", "text", "--init_text", TEXTS[start]]
                )
                with tempfile.TemporaryDirectory() as folder:
                    argv = ["--dataset", args.dataset, "--prefix_projection", projection, "--output_dir", folder, *init]
                    summary = train(parse_train_config([*argv, "--learning_rate", learning_rate, *flags]))
                    lines = read_metrics(Path(folder))
                last = [line for line in lines if "eval_loss" in line][-1]
                rows.append((projection, learning_rate, start, last, summary["train_seconds"]))
    print("| projection | learning rate | init | eval loss | exact match | seconds |\n|---|---|---|---|---|---|")
    for projection, learning_rate, start, last, seconds in rows:
        match = f"{last['eval_exact_match']:.1%}" if "eval_exact_match" in last else ""
        print(f"| {projection} | {learning_rate} | {start} | {last['eval_loss']:.4f} | {match} | {seconds:.0f} |")


if __name__ == "__main__":
    main()
