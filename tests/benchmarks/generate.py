"""Greedy answers to 500 questions of the demo over two prefixes, mixed: by infer.py's way, and by PEFT, adapter by adapter.

    python tests/benchmarks/generate.py --repeats 7 --batch_size 16 64 128

Both prefixes are trained first (about two minutes), or taken from --prefixes SHORT SENTENCE. The contestants take turns in
one process, on the same questions with the same batch size; the texts must be equal. PEFT gets its questions in their order,
batch by batch, as its users write it; "sorted" is PEFT with the questions of each adapter sorted by length first.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import PeftModel

from prefix_tuning import PrefixBloom, bundled, load_prefix
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.cli import parse_train_config
from prefix_tuning.data.rows import prompt_of
from prefix_tuning.devices import resolve_device, resolve_dtype
from prefix_tuning.generation.batches import complete
from prefix_tuning.training.run import train

STYLES = ("short", "sentence")


def trained(folder: Path) -> list[str]:
    for style in STYLES:
        flags = ["--dataset", f"bundled:{style}", "--output_dir", str(folder / style), "--eval_exact_match", "false"]
        train(parse_train_config(flags))
    return [str(folder / style) for style in STYLES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefixes", nargs=2, metavar=("SHORT", "SENTENCE"))
    parser.add_argument("--questions", type=int, default=500)
    parser.add_argument("--batch_size", type=int, nargs="+", default=[64])
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"), help="ours; PEFT answers in both")
    args = parser.parse_args()
    temporary = tempfile.TemporaryDirectory()
    folders = args.prefixes or trained(Path(temporary.name))

    device = resolve_device(args.device)
    base, tokenizer = load_base(bundled.MODEL, resolve_dtype(args.precision, device), device)
    rng = random.Random(0)
    lines = Path(bundled.resolve("bundled:short-eval")).read_text("utf-8").splitlines()
    prompts = [prompt_of(json.loads(line)["instruction"]) for line in rng.sample(lines, args.questions)]
    styles = [rng.choice(STYLES) for _ in prompts]
    greedy = {"max_new_tokens": args.max_new_tokens, "do_sample": False}

    ours = PrefixBloom(base, tokenizer)
    for style, folder in zip(STYLES, folders, strict=True):
        ours.attach(style, load_prefix(folder))
    theirs = PeftModel.from_pretrained(base, folders[0], adapter_name=STYLES[0]).eval()
    theirs.load_adapter(folders[1], STYLES[1])

    def by_us(batch_size: int) -> list[str]:
        return complete(ours, tokenizer, prompts, prefix_name=styles, batch_size=batch_size, **greedy)

    @torch.no_grad()
    def by_peft(batch_size: int, by_length: bool = False) -> list[str]:
        answers = [""] * len(prompts)
        for style in STYLES:
            theirs.set_adapter(style)
            places = [place for place, wanted in enumerate(styles) if wanted == style]
            if by_length:
                places.sort(key=lambda place: len(prompts[place]))
            for start in range(0, len(places), batch_size):
                part = places[start : start + batch_size]
                inputs = tokenizer([prompts[place] for place in part], return_tensors="pt", padding=True).to(device)
                output = theirs.generate(**inputs, **greedy, pad_token_id=tokenizer.pad_token_id)
                texts = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
                for place, text in zip(part, texts, strict=True):
                    answers[place] = text
        return answers

    for batch_size in args.batch_size:
        contestants = {
            "ours": lambda n=batch_size: by_us(n),
            "peft": lambda n=batch_size: by_peft(n),
            "peft, sorted": lambda n=batch_size: by_peft(n, by_length=True),
        }
        seconds = {name: [] for name in contestants}
        expected = by_us(batch_size)
        for _ in range(args.repeats):
            for name, run in contestants.items():
                started = time.perf_counter()
                answers = run()
                seconds[name].append(time.perf_counter() - started)
                different = sum(a != b for a, b in zip(answers, expected, strict=True))
                assert not different, f"{name}: {different} answers differ"
        median = {name: statistics.median(values) for name, values in seconds.items()}
        for name, value in median.items():
            speed = len(prompts) / value
            print(f"batch {batch_size:4d}  {name:13s} {speed:7.1f} questions/s, {value / median['ours']:.2f}x our time")


if __name__ == "__main__":
    main()
