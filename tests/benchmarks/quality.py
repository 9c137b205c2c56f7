"""Time to quality on the bundled demo: seconds of training until held-out exact match reaches 90 %.

    python tests/benchmarks/quality.py

This loop, in float32 and in bfloat16, against PEFT + Trainer. All have the same initial weights, order of rows, optimizer,
learning rate, schedule and batch of 32. Every 20 steps the clock is stopped, and the prefix is measured by the same code.
Each runs in a process of its own, in turn.
"""

import argparse
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules that tests share

EPOCHS, EVAL_STEPS, GOAL = 3, 20, 0.9
CONTESTANTS = ("peft", "ours", "ours bf16")


class Reached(Exception):
    """Held-out exact match has reached the goal."""


class Clock:
    """Seconds of training; stopped while a prefix is measured."""

    def __init__(self, evaluator):
        self.evaluator, self.seconds, self.curve = evaluator, 0.0, []
        self.started = time.perf_counter()

    def __getattr__(self, name: str):
        """The evaluator decides when to measure."""
        return getattr(self.evaluator, name)

    def __call__(self, prefix, title: str) -> dict:
        self.seconds += time.perf_counter() - self.started
        figures = {} if prefix is None else self.evaluator(prefix, title)
        if figures:
            self.curve.append((title, round(self.seconds, 2), figures["eval_exact_match"], figures["eval_loss"]))
            if figures["eval_exact_match"] >= GOAL:
                raise Reached
        self.started = time.perf_counter()
        return figures


def worker(name: str) -> None:
    import torch
    from models import beginning

    from prefix_tuning import bundled
    from prefix_tuning.evaluation import Evaluator
    from prefix_tuning.training.checkpoints import Checkpoints
    from prefix_tuning.training.loop import fit
    from prefix_tuning.training.metrics import Metrics
    from prefix_tuning.training.settings import TrainConfig

    config = TrainConfig(
        **bundled.SETTINGS | {"num_train_epochs": 1, "eval_dataset": "bundled:short-eval", "shuffle": False}
    )
    dtype = torch.bfloat16 if name == "ours bf16" else torch.float32
    base, tokenizer, eval_set, state, steps = beginning(config, dtype, EPOCHS)
    clock = Clock(
        Evaluator(
            base,
            tokenizer,
            eval_set,
            steps.max_tokens,
            steps.total,
            every=EVAL_STEPS,
            wants_answers=True,
        )
    )
    with contextlib.suppress(Reached), tempfile.TemporaryDirectory() as folder:
        if name != "peft":
            metrics = Metrics(Path(folder), config.logging_steps, steps)
            fit(base, state, steps, metrics, clock, Checkpoints(Path(folder), {}, None))
        else:
            run_peft(config, base, tokenizer, state.encoder, steps.train_set, clock)
    print(json.dumps(clock.curve))


def run_peft(config, model, tokenizer, encoder, rows, clock) -> None:
    from peft import PrefixTuningConfig, get_peft_model
    from speed import peft_trainer
    from transformers import TrainerCallback

    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.num_virtual_tokens, prefix_projection=True)
    wrapped = get_peft_model(model, prefix)
    theirs = wrapped.prompt_encoder["default"]
    theirs.load_state_dict(encoder.state_dict())

    class Measure(TrainerCallback):
        def on_train_begin(self, *_, **__):
            clock.started = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            if state.global_step % EVAL_STEPS == 0:
                # Our encoder has the same keys and shapes. PEFT's prefix is measured through it, by the same code as ours.
                encoder.load_state_dict(theirs.state_dict())
                clock(encoder.bake(), f"step {state.global_step}")
            return control

    trainer = peft_trainer(
        wrapped,
        tokenizer,
        rows,
        [Measure()],
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
    )
    with contextlib.suppress(Reached):
        trainer.train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker)
        return
    seconds = {name: [] for name in CONTESTANTS}
    for _ in range(args.repeats):
        for name in seconds:
            result = subprocess.run([sys.executable, __file__, "--worker", name], capture_output=True, text=True)
            if result.returncode:
                sys.exit(f"{name} failed:\n{result.stderr}")
            curve = json.loads(result.stdout.splitlines()[-1])
            for title, at, exact, loss in curve:
                print(f"{name:9s} {title:9s} {at:7.2f} s  exact match {exact:6.1%}  eval loss {loss:.4f}")
            seconds[name].append(curve[-1][1])
    medians = {name: statistics.median(each) for name, each in seconds.items()}
    ratios = ", ".join(f"{name} is {medians['peft'] / medians[name]:.2f}x as fast" for name in CONTESTANTS[1:])
    print(f"seconds to {GOAL:.0%}: {medians}; {ratios}")


if __name__ == "__main__":
    main()
