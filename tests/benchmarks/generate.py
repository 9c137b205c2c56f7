"""Answers per second to 500 questions of the demo over two prefixes, mixed: by infer.py's way, and by PEFT's `generate`.

    python tests/benchmarks/generate.py --repeats 7 --batch_size 16 64 128

Both prefixes are trained first (about two minutes), or taken from --prefixes SHORT SENTENCE. Answers are greedy. The
contestants take turns in one process, on the same questions with the same batch size, each with a base in float32 and in
bfloat16. In float32 the texts must be equal. PEFT answers adapter by adapter, batch by batch, in the order of the questions,
as its users write it. "sorted" is PEFT with the questions of each adapter sorted by length first.
"""

import argparse
import functools
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoTokenizer

from prefix_tuning import PrefixBloom, bundled, load_prefix
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.cli import parse_train_config
from prefix_tuning.data.templates import prompt_of
from prefix_tuning.devices import PRECISIONS, resolve_device
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
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    args = parser.parse_args()
    temporary = tempfile.TemporaryDirectory()
    folders = args.prefixes or trained(Path(temporary.name))

    device = resolve_device(args.device)
    rng = random.Random(0)
    lines = Path(bundled.resolve("bundled:short-eval")).read_text("utf-8").splitlines()
    prompts = [prompt_of(json.loads(line)["instruction"]) for line in rng.sample(lines, args.questions)]
    styles = [rng.choice(STYLES) for _ in prompts]
    greedy = {"max_new_tokens": args.max_new_tokens, "do_sample": False}

    def models(precision: str) -> tuple[PrefixBloom, PeftModel]:
        base, tokenizer = load_base(bundled.MODEL, PRECISIONS[precision], device)
        ours = PrefixBloom(base, tokenizer)
        for style, folder in zip(STYLES, folders, strict=True):
            ours.attach(style, load_prefix(folder))
        theirs = PeftModel.from_pretrained(base, folders[0], adapter_name=STYLES[0]).eval()
        theirs.load_adapter(folders[1], STYLES[1])
        return ours, theirs

    def by_us(model: PrefixBloom, batch_size: int) -> list[str]:
        ids = tokenizer(prompts, split_special_tokens=True).input_ids
        return complete(model, tokenizer, ids, prefix_name=styles, batch_size=batch_size, **greedy)

    @torch.no_grad()
    def by_peft(model: PeftModel, batch_size: int, by_length: bool = False) -> list[str]:
        answers = [""] * len(prompts)
        for style in STYLES:
            model.set_adapter(style)
            indices = [index for index, wanted in enumerate(styles) if wanted == style]
            if by_length:
                indices.sort(key=lambda index: len(prompts[index]))
            for start in range(0, len(indices), batch_size):
                part = indices[start : start + batch_size]
                inputs = tokenizer([prompts[index] for index in part], return_tensors="pt", padding=True).to(device)
                output = model.generate(**inputs, **greedy, pad_token_id=tokenizer.pad_token_id)
                texts = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
                for index, text in zip(part, texts, strict=True):
                    answers[index] = text
        return answers

    tokenizer = AutoTokenizer.from_pretrained(bundled.resolve(bundled.MODEL), padding_side="left")
    contestants = {}
    for precision in args.precision:
        ours, theirs = models(precision)
        contestants["ours", precision] = functools.partial(by_us, ours)
        contestants["peft", precision] = functools.partial(by_peft, theirs)
        contestants["peft, sorted", precision] = functools.partial(by_peft, theirs, by_length=True)
    for batch_size in args.batch_size:
        expected = {precision: contestants["ours", precision](batch_size) for precision in args.precision}
        seconds, different = {key: [] for key in contestants}, {}
        for _ in range(args.repeats):
            for (name, precision), answer in contestants.items():
                started = time.perf_counter()
                answers = answer(batch_size)
                seconds[name, precision].append(time.perf_counter() - started)
                others = sum(a != b for a, b in zip(answers, expected[precision], strict=True))
                different[name, precision] = others
                assert precision == "bf16" or not others, f"{name}: {others} answers differ"
        median = {key: statistics.median(values) for key, values in seconds.items()}
        for (name, precision), value in median.items():
            ratios = ", ".join(f"{value / median['ours', each]:.2f}x ours in {each}" for each in args.precision)
            speed, others = len(prompts) / value, different[name, precision]
            print(f"batch {batch_size:4d}  {name:12s} {precision} {speed:7.1f} questions/s, {ratios}, {others} differ")


if __name__ == "__main__":
    main()
