"""The two drawn pictures of the README: training.png and study.png, in prefix_tuning/demo.

    python tests/benchmarks/pictures.py training
    python tests/benchmarks/pictures.py study study.json

training: this project's own optimizer steps beside PEFT + Trainer, on the demo's rows and settings, in float32, from equal
weights, with the rows in the same order. Both prefixes are scored by the same code on held-out rows, evenly spaced. It has
one seed and takes minutes. study: each prefix's share of attention, from the study.json that `python -m prefix_tuning.study`
writes. The Chinese labels need a font such as Debian's fonts-noto-cjk.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the modules that tests share

# The prefix is scored after these steps and after the last one.
STEPS = (0, 10, 25, 50, 100, 200, 300, 400, 500)
# The number of held-out rows that it is scored on.
HELD_OUT = 800
DEMO = Path(__file__).resolve().parents[2] / "prefix_tuning" / "demo"


def draw_training(path: Path) -> None:
    from models import beginning
    from peft import PrefixTuningConfig, get_peft_model
    from speed import peft_trainer
    from transformers import TrainerCallback

    from prefix_tuning import bundled
    from prefix_tuning.study.scoring import pack_rows, score_prefix, spaced
    from prefix_tuning.training.loop import optimizer_step
    from prefix_tuning.training.settings import TrainConfig

    demo = bundled.SETTINGS | {"eval_dataset": "bundled:short-eval", "shuffle": False}
    epochs = int(demo.pop("num_train_epochs"))
    config = TrainConfig(**demo, num_train_epochs=1)
    base, tokenizer, eval_set, state, steps = beginning(config, shuffled_epochs=epochs)
    held_out = pack_rows(spaced(eval_set, HELD_OUT), steps.max_tokens)
    encoder, initial = state.encoder, {name: weight.clone() for name, weight in state.encoder.state_dict().items()}
    curves = {}

    def measure(name: str, step: int) -> None:
        if step in (*STEPS, steps.total):
            scored = score_prefix(base, held_out, encoder.bake() if step else None)
            curves.setdefault(name, []).append((step, *scored))
            print(
                f"{name:16s} step {step:3d}: held-out loss {scored.loss:.4f}, exact match {scored.exact_match:.1%}",
                flush=True,
            )

    measure("ours", 0)
    for step in steps:
        state.advance(step, *optimizer_step(base, state, step))
        measure("ours", state.progress.step)

    class Measure(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            encoder.load_state_dict(theirs.state_dict())  # of the same keys and shapes
            measure("PEFT + Trainer", state.global_step)

    prefix = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=config.num_virtual_tokens, prefix_projection=True)
    wrapped = get_peft_model(base, prefix)
    theirs = wrapped.prompt_encoder["default"]
    theirs.load_state_dict(initial)
    measure("PEFT + Trainer", 0)
    peft_trainer(
        wrapped,
        tokenizer,
        steps.train_set,
        [Measure()],
        per_device_train_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
    ).train()
    draw_curves(curves, path)


def draw_curves(curves: dict[str, list[tuple[int, float, float]]], path: Path) -> None:
    """curves: for each contestant, tuples of step, held-out loss and exact match."""
    figure = new_figure((8, 3.6))
    left, right = figure.subplots(1, 2)
    for (name, points), style in zip(curves.items(), ("o-", "s--"), strict=True):
        steps, losses, matches = zip(*points, strict=True)
        left.plot(steps, losses, style, label=name, markersize=4)
        right.plot(steps, [100 * match for match in matches], style, label=name, markersize=4)
    left.set(title="held-out loss (nats per token)", yscale="log")
    left.set_yticks([0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10], ["0.05", "0.1", "0.2", "0.5", "1", "2", "5", "10"])
    left.minorticks_off()
    right.set(title="held-out exact match (%)", ylim=(-2, 102))
    for axes in (left, right):
        axes.set_xscale("symlog", linthresh=25)
        ticks = [step for step in steps if step <= 200 or step == steps[-1]]
        axes.set_xticks(ticks, map(str, ticks))
        axes.set_xlim(-2, 1.1 * steps[-1])
        axes.minorticks_off()
        axes.set_xlabel("optimizer step")
        axes.grid(color="#e5e5e5")
        axes.legend()
    save(figure, path)


def draw_study(numbers: dict, path: Path) -> None:
    """numbers: the content of study.json."""
    figure = new_figure((8, 3.4))
    prefixes = numbers["prefixes"]
    for axes, (name, prefix) in zip(figure.subplots(1, len(prefixes), squeeze=False)[0], prefixes.items(), strict=True):
        shares, slopes = prefix["attention"]["share"], prefix["attention"]["slopes"]
        axes.imshow([[100 * share for share in layer] for layer in shares], cmap="Blues", vmin=0, vmax=100, aspect="auto")
        for layer, heads in enumerate(shares):
            for head, share in enumerate(heads):
                axes.text(head, layer, f"{100 * share:.0f}", ha="center", va="center", color="w" if share > 0.6 else "#222")
        axes.set_xticks(range(len(slopes)), [f"{head}\n{slope:.2g}" for head, slope in enumerate(slopes)])
        axes.set_yticks(range(len(shares)))
        axes.set(title=name, xlabel="头 head", ylabel="层 layer")
    caption = (
        "每格：写出答案的位置给前缀的注意力（%）。头下面是它的 ALiBi 斜率：每远一个词，分数减去这么多。\n"
        "Cells: % of attention from answer positions to the prefix. Below each head: its ALiBi slope,\n"
        "which is subtracted from a score once for every token of distance."
    )
    figure.supxlabel(caption, fontsize=9)
    save(figure, path)


def new_figure(inches: tuple[float, float]):
    import matplotlib
    from matplotlib.figure import Figure

    # The second font is for the characters that the first does not have.
    matplotlib.rcParams["font.family"] = ["DejaVu Sans", "Noto Sans CJK JP"]
    return Figure(figsize=inches, layout="constrained")


def save(figure, path: Path) -> None:
    """As RGB: matplotlib itself adds an alpha channel, in which every pixel is opaque."""
    from PIL import Image

    figure.savefig(path, dpi=120)
    with Image.open(path) as picture:
        picture.convert("RGB").save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    pictures = parser.add_subparsers(dest="picture", required=True)
    pictures.add_parser("training")
    pictures.add_parser("study").add_argument("numbers", type=Path, help="study.json")
    args = parser.parse_args()
    if args.picture == "training":
        draw_training(DEMO / "training.png")
    else:
        draw_study(json.loads(args.numbers.read_text("utf-8")), DEMO / "study.png")


if __name__ == "__main__":
    main()
