"""What each departure of the product from plain.py gains, one after the other, on the same rows.

    python tests/benchmarks/page.py --shape mini --rows 100 --repeats 3

Training is measured three times: the page as it is; the page with the encoder once per optimizer step; and the loop of
train.py, which also packs rows and computes logits at labels only. Answers are measured for the same held-out questions of
the bundled demo: the page's, one at a time, and infer.py's, in batches of 64. Each measurement is a process of its own, in
turn, and the table shows medians.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

from speed import ROWS_PER_STEP, SHAPES, make_encoder, make_model, make_rows, train_ours

STAGES = ("page", "once", "product", "page-answers", "product-answers")


def train_once_per_step(base, encoder, examples) -> None:
    """plain.train with one change: the gradients of a step's rows add up in the prefix."""
    import torch

    from prefix_tuning import plain

    optimizer = torch.optim.AdamW(encoder.parameters(), lr=plain.LEARNING_RATE, weight_decay=0.0)
    for start in range(0, len(examples), ROWS_PER_STEP):
        step = examples[start : start + ROWS_PER_STEP]
        labels_in_step = sum(int((labels[:, 1:] != -100).sum()) for _, labels in step)
        prefix = encoder()
        leaf = prefix.detach().requires_grad_()
        for ids, labels in step:
            (plain.loss_of(base, leaf, ids, labels) / labels_in_step).backward()
        prefix.backward(leaf.grad)
        torch.nn.utils.clip_grad_norm_(encoder.parameters(), plain.MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()


def measure_training(args) -> dict:
    import torch
    from datasets import Dataset

    from prefix_tuning import plain

    rows = make_rows(args.rows, SHAPES[args.shape]["vocab_size"])
    base = make_model(args.shape, "cpu", torch.float32).requires_grad_(False).eval()
    encoder, data = make_encoder(base), Dataset.from_list(rows)
    examples = [(torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])) for row in rows]
    plain.EPOCHS, plain.DEVICE = 1, "cpu"
    train = {
        "page": lambda count: plain.train(base, encoder, examples[:count]),
        "once": lambda count: train_once_per_step(base, encoder, examples[:count]),
        "product": lambda count: train_ours(base, encoder, data, ROWS_PER_STEP, -(-count // ROWS_PER_STEP)),
    }[args.worker]
    # Warms up.
    train(ROWS_PER_STEP)
    started = time.perf_counter()
    train(len(rows))
    seconds = time.perf_counter() - started
    return {"per_second": sum(len(row["input_ids"]) for row in rows) / seconds}


def measure_answers(args) -> dict:
    import torch

    from prefix_tuning import bundled, plain
    from prefix_tuning.base_model.loading import load_base
    from prefix_tuning.data.readers import load_rows
    from prefix_tuning.generation.batches import complete
    from prefix_tuning.generation.prefix_bloom import PrefixBloom
    from prefix_tuning.model.encoder import PrefixEncoder

    base, tokenizer = load_base(bundled.MODEL, torch.float32, torch.device("cpu"))
    torch.manual_seed(plain.SEED)
    plain.EPOCHS, plain.DEVICE = 1, "cpu"
    encoder: PrefixEncoder = plain.new_encoder(base)
    rows = load_rows("bundled:short", splits=("train",)).to_list()[:800]
    plain.train(base, encoder, [plain.tokenize(row, tokenizer) for row in rows])
    questions = load_rows("bundled:short-eval", splits=("train",)).to_list()[:200]
    prefix = encoder.bake()
    started = time.perf_counter()
    if args.worker == "page-answers":
        answers = [plain.answer(base, tokenizer, row, prefix) for row in questions]
    else:
        model = PrefixBloom(base)
        model.attach("own", prefix)
        prompts = tokenizer([plain.prompt_of(row) for row in questions], split_special_tokens=True).input_ids
        answers = complete(model, tokenizer, prompts, prefix_name="own", max_new_tokens=32, do_sample=False)
    return {"per_second": len(answers) / (time.perf_counter() - started), "answers": answers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mini")
    parser.add_argument("--rows", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--worker", choices=STAGES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        figures = (measure_answers if args.worker.endswith("answers") else measure_training)(args)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps({**figures, "peak_memory_mb": round(peak)}))
        return
    runs = {stage: [] for stage in args.stages}
    for _ in range(args.repeats):
        for stage in args.stages:
            command = [sys.executable, __file__, "--worker", stage, "--shape", args.shape, "--rows", str(args.rows)]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                sys.exit(f"{stage} failed:\n{result.stderr}")
            runs[stage].append(json.loads(result.stdout.splitlines()[-1]))
    print("| | tokens or answers per second | spread | peak memory, MB |\n|---|---|---|---|")
    for stage, each in runs.items():
        speeds = [run["per_second"] for run in each]
        peak = statistics.median(run["peak_memory_mb"] for run in each)
        print(f"| {stage} | {statistics.median(speeds):,.1f} | {min(speeds):,.1f}-{max(speeds):,.1f} | {peak:,.0f} |")
    answers = [run["answers"] for stage in args.stages if stage.endswith("answers") for run in runs[stage]]
    if answers:
        print(f"all answers equal: {all(other == answers[0] for other in answers)}")


if __name__ == "__main__":
    main()
