"""What a distilled text costs: the seconds of its training, and the memory and speed of answering by it.

    python tests/benchmarks/distil.py --repeats 5

It trains the README's prefix of the bundled sheet, which prints its own seconds, and asks 64 questions about the sheet in
one batch, in three ways: with the sheet in the prompt of each question, with the sheet's keys and values in front, which the
base computes once, and with the prefix. The ways take turns. "answers" are the greedy ones, two tokens each; "long" are
forced to 64 tokens, as the answers of a larger model would be. Memory is what a way adds to a process of its own at its
peak.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from prefix_tuning import PrefixBloom, bundled, load_prefix
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.data.templates import prompt_of
from prefix_tuning.training.teacher import read_pairs, text_tokens

ROOT = Path(__file__).resolve().parents[2]
TRAIN = f"--model_name_or_path {bundled.READER} --distill_text bundled:sheet --dataset {bundled.SHEET_QUESTIONS}"
WAYS = ("sheet in the prompt", "sheet's pairs in front", "prefix")
QUESTIONS, LONG = 64, 64


class Ways:
    def __init__(self, folder: str):
        self.base, self.tokenizer = load_base(bundled.READER, torch.float32, torch.device("cpu"))
        ids = text_tokens(self.tokenizer, Path(bundled.resolve("bundled:sheet")).read_text("utf-8"))
        self.model = PrefixBloom(self.base, self.tokenizer)
        saved = load_prefix(folder)
        self.model.attach("prefix", saved)
        self.model.attach("pairs", read_pairs(self.base, ids, len(ids)))
        print(f"{len(ids)} tokens of text, {saved.tensor.shape[3]} of the prefix", file=sys.stderr)
        names = (f"{bundled.SHEET_QUESTIONS}-eval", bundled.SHEET_QUESTIONS)
        lines = [line for name in names for line in Path(bundled.resolve(name)).read_text("utf-8").splitlines()]
        rows = [json.loads(line) for line in lines[:QUESTIONS]]
        self.expected = [row["output"] for row in rows]
        questions = self.tokenizer([prompt_of(row["instruction"]) for row in rows]).input_ids
        self.inputs = {
            way: self.tokenizer.pad(
                {"input_ids": [front + question for question in questions]}, padding_side="left", return_tensors="pt"
            )
            for way, front in zip(WAYS, (ids, [], []), strict=True)
        }

    def answer(self, way: str, **settings: int) -> torch.Tensor:
        name = dict(zip(WAYS, ("base", "pairs", "prefix"), strict=True))[way]
        output = self.model.generate(**self.inputs[way], prefix_name=name, do_sample=False, **settings)
        return output[:, self.inputs[way].input_ids.shape[1] :]


def megabytes(kind: str) -> float:
    """Of this process. kind: VmRSS, now; VmHWM, at the peak."""
    return int(re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--prefix", help="a folder of this prefix; default: it is trained")
    parser.add_argument("--memory_of", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        ways = Ways(args.prefix)
        before = megabytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        ways.answer(args.memory_of, min_new_tokens=LONG, max_new_tokens=LONG)
        print(f"{megabytes('VmHWM') - before:.0f}")
        return

    temporary = tempfile.TemporaryDirectory()
    folder = args.prefix or f"{temporary.name}/sheet"
    if not args.prefix:
        started = time.perf_counter()
        subprocess.run([sys.executable, ROOT / "train.py", *TRAIN.split(), "--output_dir", folder], check=True)
        print(f"train.py took {time.perf_counter() - started:.0f} s")
    ways, taken = Ways(folder), {}
    for repeat in range(args.repeats + 1):
        for way in WAYS:
            for kind, settings in (
                ("answers", {"max_new_tokens": 8}),
                ("long", {"min_new_tokens": LONG, "max_new_tokens": LONG}),
            ):
                started = time.perf_counter()
                found = ways.answer(way, **settings)
                if repeat:
                    taken.setdefault((way, kind), []).append(time.perf_counter() - started)
                elif kind == "answers":
                    texts = ways.tokenizer.batch_decode(found, skip_special_tokens=True)
                    right = sum(text == other for text, other in zip(texts, ways.expected, strict=True))
                    print(f"{way:24s} {right} of {QUESTIONS} right")
    for way in WAYS:
        short, long = (statistics.median(taken[way, kind]) for kind in ("answers", "long"))
        command = [sys.executable, __file__, "--prefix", folder, "--memory_of", way]
        memory = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
        print(f"{way:24s} {QUESTIONS / short:7.0f} answers/s, long: {QUESTIONS * LONG / long:7.0f} tokens/s, {memory} MB")


if __name__ == "__main__":
    main()
