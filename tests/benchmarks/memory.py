"""Peak memory of preparing and training on a JSONL file, by its number of rows: does it have to fit in memory?

    python tests/benchmarks/memory.py --rows 10000 1000000

Each size is a process of its own with an empty cache. Memory is read from /proc 20 times a second. Linux tells memory that
only the process holds ("anonymous") from pages of files, which the system may take back at any time.
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

from prefix_tuning import bundled

ROOT = Path(__file__).resolve().parents[2]
FLAGS = (
    "--eval_fraction 0.01 --max_steps 20 --eval_steps 20 --per_device_train_batch_size 32 --gradient_accumulation_steps 1"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 1_000_000])
    args = parser.parse_args()
    lines = Path(bundled.resolve("bundled:sentence")).read_text("utf-8").splitlines()
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "rows.jsonl"
            with open(source, "w", encoding="utf-8") as file:
                for number in range(rows):
                    row = json.loads(lines[number % len(lines)]) | {"input": f"({number})"}
                    file.write(json.dumps(row, ensure_ascii=False) + "\n")
            command = [sys.executable, str(ROOT / "train.py"), "--dataset", str(source), *FLAGS.split()]
            process = subprocess.Popen(
                [*command, "--output_dir", str(Path(folder) / "out")],
                env=os.environ | {"HF_HOME": str(Path(folder) / "cache")},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            started, peaks = time.perf_counter(), {"RssAnon": 0, "RssFile": 0}
            while process.poll() is None:
                status = Path(f"/proc/{process.pid}/status").read_text()
                for name in peaks:
                    if found := re.search(rf"{name}:\s+(\d+) kB", status):
                        peaks[name] = max(peaks[name], int(found[1]) // 1024)
                time.sleep(0.05)
            size = source.stat().st_size / 2**20
            seconds = time.perf_counter() - started
            print(
                f"{rows:>10,} rows, {size:.1f} MB of JSON: {peaks['RssAnon']} MB anonymous, {peaks['RssFile']} MB of files, "
                f"{seconds:.0f} s, exit code {process.returncode}"
            )


if __name__ == "__main__":
    main()
