"""Kills a training again and again (SIGKILL at random moments) and checks that it always ends with the same bits.

    python tests/benchmarks/faults.py --kills 100

Each run trains a small random Bloom on 40 rows for 42 steps, with a checkpoint after every step and evaluations between
them. The VARIANTS of settings take turns. After each kill the run goes on with --resume_from_checkpoint latest. Its end is
compared with a run that was never killed.
"""

import argparse
import collections
import itertools
import random
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launching import seconds_of_a_run, start_run
from models import random_bloom
from runs import assert_same_run
from transformers import AutoTokenizer

from prefix_tuning import bundled

VARIANTS = {
    "best": {"save_best": True},
    "early stopping": {"learning_rate": 0.3, "early_stopping_patience": 3, "logging_steps": 7},
    "text start": {"prefix_init": "text", "init_text": "请回答下面的问题。"},
    "exact match": {"eval_exact_match": True, "max_tokens_per_batch": 100},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), random.Random(args.seed), args.kills)


def run(folder: Path, chance: random.Random, wanted: int) -> None:
    random_bloom().save_pretrained(folder / "base")
    AutoTokenizer.from_pretrained(bundled.resolve(bundled.MODEL)).save_pretrained(folder / "base")
    lines = Path(bundled.resolve("bundled:sentence")).read_text("utf-8").splitlines(True)[:40]
    (folder / "rows.jsonl").write_text("".join(lines), "utf-8")
    settings = {
        "model_name_or_path": str(folder / "base"),
        "dataset": str(folder / "rows.jsonl"),
        "eval_dataset": str(folder / "rows.jsonl"),
        "output_dir": str(folder / "whole"),
        "device": "cpu",
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 6,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "eval_steps": 3,
        "save_steps": 1,
    }
    seconds_of_a_run(settings | {"max_steps": 1, "output_dir": str(folder / "first")})
    lifetimes = {}
    for name, changes in VARIANTS.items():
        lifetimes[name] = seconds_of_a_run(settings | changes | {"output_dir": str(folder / name)})
        print(f"{name}: a run lives for {lifetimes[name]:.2f} s")
    kills = runs = drafts = 0
    met = collections.Counter()
    started = time.perf_counter()
    names = itertools.cycle(VARIANTS)
    name = next(names)
    while kills < wanted:
        killed = settings | VARIANTS[name] | {"output_dir": str(folder / "killed"), "resume_from_checkpoint": "latest"}
        process = start_run(killed)
        process.join(chance.uniform(0, lifetimes[name]))
        if process.exitcode is None:
            process.kill()
            process.join()
            kills += 1
            left = sorted(path.name for path in (folder / "killed").glob("*")) if (folder / "killed").exists() else []
            drafts += any((folder / "killed").glob(".*.draft"))
            steps = [int(step) for step in re.findall(r"checkpoint-(\d+)", " ".join(left))]
            met["before the first checkpoint" if not steps else "finished" if 42 in steps else "between"] += 1
            continue
        assert process.exitcode == 0
        assert_same_run(killed["output_dir"], folder / name)
        shutil.rmtree(killed["output_dir"])
        name, runs = next(names), runs + 1
    process = start_run(killed)
    process.join()
    assert process.exitcode == 0
    assert_same_run(killed["output_dir"], folder / name)
    print(f"{kills} kills over {runs + 1} runs in {time.perf_counter() - started:.0f} s, all ended with the same bits")
    print(f"kills that came: {dict(met)}; in the middle of writing a file: {drafts}")


if __name__ == "__main__":
    main()
