"""Training speed on the same rows: this loop, PEFT + Trainer as the notebook runs it, and the matmuls alone.

    python tests/benchmarks/speed.py --shape mini --rows 400
    python tests/benchmarks/speed.py --shape 1b4 --device cuda --rows 256

Each runs in float32 and in bfloat16 (PEFT: a float32 base and bf16=True). Every measurement is a process of its own, and the
contestants take turns, `--repeats` times. The models have random weights
of a real shape; the rows are random tokens with the lengths of alpaca_zh at max_length 256 (5/25/50/75/95 % at
41/77/149/242/256 tokens), the first 30 % of each without labels. Batch 1 x accumulation 8, 10 virtual tokens, projection.
"""

import argparse
import functools
import json
import math
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Blooms, except where a model_type says otherwise.
SHAPES = {
    "mini": {"n_layer": 6, "hidden_size": 256, "n_head": 8, "vocab_size": 4096},
    "389m": {"n_layer": 24, "hidden_size": 1024, "n_head": 16, "vocab_size": 46_145},
    "560m": {"n_layer": 24, "hidden_size": 1024, "n_head": 16, "vocab_size": 250_880},
    "1b4": {"n_layer": 24, "hidden_size": 2048, "n_head": 16, "vocab_size": 46_145},
    "7b1": {"n_layer": 30, "hidden_size": 4096, "n_head": 32, "vocab_size": 250_880},
    "llama-mini": {
        "model_type": "llama", "num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 704,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 4096,
    },
    "llama-mini-152k": {
        "model_type": "llama", "num_hidden_layers": 6, "hidden_size": 256, "intermediate_size": 704,
        "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 151_936,
    },
    "llama-24x1024": {
        "model_type": "llama", "num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 2816,
        "num_attention_heads": 16, "num_key_value_heads": 4, "vocab_size": 32_000,
    },
    "qwen3-0.6b": {
        "model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 1024, "intermediate_size": 3072,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
ROWS_PER_STEP = 8
VIRTUAL_TOKENS = 10


def make_rows(count: int, vocab_size: int) -> list[dict[str, list[int]]]:
    """Rows as columns input_ids and labels; the same for every contestant."""
    rng = random.Random(0)
    shares, lengths = (0, 0.05, 0.25, 0.5, 0.75, 0.95, 1), (20, 41, 77, 149, 242, 256, 256)
    rows = []
    for _ in range(count):
        share = rng.random()
        segment = max(index for index, least in enumerate(shares) if least <= share)
        part = (share - shares[segment]) / (shares[segment + 1] - shares[segment])
        length = round(lengths[segment] + part * (lengths[segment + 1] - lengths[segment]))
        ids = [rng.randrange(4, vocab_size) for _ in range(length)]
        prompt = max(1, length * 3 // 10)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:], "attention_mask": [1] * length})
    return rows


def make_model(shape: str, device: str, dtype):
    """A random model with a second, packed forward, which PEFT does not use."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    from prefix_tuning.model.decoder import as_packed

    torch.manual_seed(0)
    size = {"model_type": "bloom", "pad_token_id": 3, **SHAPES[shape]}
    config = CONFIG_MAPPING[size.pop("model_type")](**size)
    with torch.device(device):
        return as_packed(AutoModelForCausalLM.from_config(config).to(dtype))


def make_encoder(model, width: int | None = None):
    import torch

    from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder

    torch.manual_seed(1)
    return PrefixEncoder(PrefixConfig.of(model.config, VIRTUAL_TOKENS, width, width is None)).to(model.device)


def train_ours(model, encoder, data, rows_per_step: int, total: int) -> list[float]:
    """Runs `total` steps of train.py's loop, with its metrics, on a tokenised dataset. Returns the losses that it logs."""
    from prefix_tuning.base_model.sharding import is_sharded
    from prefix_tuning.devices import suggested_max_tokens
    from prefix_tuning.evaluation import Evaluator
    from prefix_tuning.training.checkpoints import Checkpoints
    from prefix_tuning.training.loop import fit
    from prefix_tuning.training.metrics import Metrics
    from prefix_tuning.training.state import TrainingState, make_optimizer, make_schedule
    from prefix_tuning.training.steps import Steps

    max_tokens = suggested_max_tokens(model, is_sharded(model))
    steps = Steps(data, rows_per_step, total, max_tokens, equal_passes=is_sharded(model))
    schedule = make_schedule("linear", warmup_steps=0, total_steps=total)
    state = TrainingState(encoder, make_optimizer(encoder, 0.0), schedule, max_grad_norm=1.0, loss_scaling=False)
    state.progress.peak_learning_rate = 5e-5
    state.progress.rows_per_step = rows_per_step
    evaluator = Evaluator(model, None, None, max_tokens, total)
    with tempfile.TemporaryDirectory() as folder:
        fit(model, state, steps, Metrics(Path(folder), 10, steps), evaluator, Checkpoints(Path(folder), {}, None))
        lines = (
            (Path(folder) / "metrics.jsonl").read_text().splitlines() if (Path(folder) / "metrics.jsonl").exists() else []
        )
    return [json.loads(line)["loss"] for line in lines]


def run_ours(args, rows) -> dict:
    from datasets import Dataset

    from prefix_tuning.devices import PRECISIONS

    model = make_model(args.shape, args.device, PRECISIONS[args.precision[0]])
    model.requires_grad_(False).eval()
    encoder, data = make_encoder(model), Dataset.from_list(rows)
    train_ours(model, encoder, data, ROWS_PER_STEP, args.warm_up)
    start = time.perf_counter()
    losses = train_ours(model, encoder, data, ROWS_PER_STEP, -(-len(rows) // ROWS_PER_STEP))
    return {"seconds": time.perf_counter() - start, "losses": losses}


def peft_model(shape: str, device: str):
    """PEFT around a float32 base, as the notebook has it."""
    import torch
    from peft import PrefixTuningConfig, get_peft_model

    base = make_model(shape, device, torch.float32)
    torch.manual_seed(1)
    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL_TOKENS, prefix_projection=True)
    return get_peft_model(base, prefix)


def peft_trainer(model, tokenizer, rows, callbacks=(), **arguments):
    """Trainer as the notebook uses it, on these rows in their order. arguments: more of its TrainingArguments."""
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    with tempfile.TemporaryDirectory() as folder:
        settings = TrainingArguments(
            output_dir=folder,
            logging_steps=10,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            **arguments,
        )
    collator = DataCollatorForSeq2Seq(tokenizer=tokenizer, padding=True)
    return Trainer(
        model=model, args=settings, train_dataset=rows, processing_class=tokenizer, data_collator=collator,
        callbacks=list(callbacks),
    )  # fmt: skip


def run_peft(args, rows) -> dict:
    from datasets import Dataset
    from transformers import AutoTokenizer, TrainerCallback

    from prefix_tuning import bundled

    losses = []

    class Record(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            losses.extend([float(logs["loss"])] if "loss" in logs else [])

    tokenizer = AutoTokenizer.from_pretrained(bundled.resolve(bundled.MODEL))
    given = peft_model(args.shape, args.device), tokenizer, Dataset.from_list(rows)
    batch = {
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": ROWS_PER_STEP,
        "bf16": args.precision == ["bf16"],
    }
    if args.warm_up:
        peft_trainer(*given, max_steps=args.warm_up, **batch).train()
    timed = peft_trainer(*given, [Record()], **batch)
    start = time.perf_counter()
    timed.train()
    return {"seconds": time.perf_counter() - start, "losses": losses}


@functools.cache
def linear_sizes(shape: str) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """The outputs and inputs of each linear layer of the blocks, in their order, and those of the head."""
    import torch

    model = make_model(shape, "meta", torch.float32)
    linear = [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    return [tuple(layer.weight.shape) for layer in linear], tuple(model.get_output_embeddings().weight.shape)


def counted(shape: str, rows: list[dict]) -> tuple[int, int, int]:
    """The tokens and labels of rows, and the operations that no way of training on them can leave out.

    These are the forward and backward-to-the-input products of all linear layers over the tokens, and of the lm_head over
    the labels: 4 x block parameters x tokens + 4 x vocab x hidden x labels.
    """
    sizes, head = linear_sizes(shape)
    tokens = sum(len(row["input_ids"]) for row in rows)
    labels = sum(label != -100 for row in rows for label in row["labels"][1:])
    return tokens, labels, 4 * (sum(map(math.prod, sizes)) * tokens + math.prod(head) * labels)


def run_floor(args, rows) -> dict:
    """The matmuls of `counted`, step by step."""
    import torch

    from prefix_tuning.devices import PRECISIONS

    dtype = PRECISIONS[args.precision[0]]
    layers, (vocab_size, hidden) = linear_sizes(args.shape)
    weights = [torch.randn(size, device=args.device, dtype=dtype) for size in layers]
    head = torch.randn(vocab_size, hidden, device=args.device, dtype=dtype)
    widths = {width for size in layers for width in size}
    values = torch.randn(ROWS_PER_STEP * 256, max(widths), device=args.device, dtype=dtype)
    inputs = {width: values[:, :width].contiguous() for width in widths}
    logits = torch.randn(ROWS_PER_STEP * 256, vocab_size, device=args.device, dtype=dtype)

    def step(tokens: int, labels: int) -> None:
        for weight in weights:
            inputs[weight.shape[1]][:tokens] @ weight.T
        inputs[hidden][:labels] @ head.T
        logits[:labels] @ head
        for weight in weights:
            inputs[weight.shape[0]][:tokens] @ weight

    steps = [rows[start : start + ROWS_PER_STEP] for start in range(0, len(rows), ROWS_PER_STEP)]
    sizes = [counted(args.shape, part)[:2] for part in steps]
    operations = counted(args.shape, rows)[2]
    for tokens, labels in sizes[: args.warm_up]:
        step(tokens, labels)
    if args.device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for tokens, labels in sizes:
        step(tokens, labels)
    if args.device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "gflops_per_second": round(operations / seconds / 1e9, 1)}


def worker(args) -> None:
    """Runs one contestant in this process and prints its figures as the last line."""
    rows = make_rows(args.rows, SHAPES[args.shape]["vocab_size"])
    figures = {"ours": run_ours, "peft": run_peft, "floor": run_floor}[args.worker](args, rows)
    tokens = sum(len(row["input_ids"]) for row in rows)
    if args.device == "cuda":
        import torch

        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**figures, "tokens_per_second": tokens / figures["seconds"], "peak_memory_mb": round(peak)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="mini")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"])
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm_up", type=int, default=1, help="optimizer steps before the clock starts")
    parser.add_argument("--output", help="write all figures to this JSON file")
    parser.add_argument("--worker", choices=("ours", "peft", "floor"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    contestants = [(name, precision) for precision in args.precision for name in ("peft", "ours", "floor")]
    runs = {contestant: [] for contestant in contestants}
    for _ in range(args.repeats):
        for name, precision in contestants:
            command = [sys.executable, __file__, "--worker", name, "--precision", precision]
            for flag in ("shape", "device", "rows", "warm_up"):
                command += [f"--{flag}", str(getattr(args, flag))]
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                sys.exit(f"{name} {precision} failed:\n{result.stderr}")
            runs[name, precision].append(json.loads(result.stdout.splitlines()[-1]))
    speed = {key: statistics.median(run["tokens_per_second"] for run in runs[key]) for key in contestants}
    print(f"shape {args.shape}, {args.rows} rows, {args.device}, {args.repeats} repeats, medians")
    ours = [f"ours {precision} is" for precision in args.precision]
    print(f"| | tokens/s | spread | {' | '.join(ours)} | share of the floor | peak memory, MB |")
    print("|---" * (5 + len(ours)) + "|")
    for name, precision in contestants:
        key = name, precision
        each = [run["tokens_per_second"] for run in runs[key]]
        peak = statistics.median(run["peak_memory_mb"] for run in runs[key])
        ratios = [f"{speed['ours', other] / speed[key]:.2f}x" for other in args.precision]
        print(
            f"| {name} {precision} | {speed[key]:,.0f} | {min(each):,.0f}-{max(each):,.0f} | {' | '.join(ratios)} "
            f"| {speed[key] / speed['floor', precision]:.0%} | {peak:,.0f} |"
        )
    if args.output:
        with open(args.output, "w", encoding="utf-8") as file:
            json.dump(
                {
                    "arguments": vars(args),
                    "machine": platform.processor(),
                    "runs": {" ".join(key): value for key, value in runs.items()},
                },
                file,
                indent=1,
            )


if __name__ == "__main__":
    main()
