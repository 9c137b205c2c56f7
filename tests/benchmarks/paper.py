"""What many GPUs would give, on paper: memory, traffic and a lower bound of a step's time, for a base of any shape.

    python tests/benchmarks/paper.py --shape 7b1 176b --gpus 8 64 512 --rows 512 --row_tokens 150

Put in your own numbers. The rate of matrix products was measured on one H100 in bfloat16. The bandwidths of memory, of the
links, and of a network with a 400 Gbit/s card for each of 8 GPUs are the vendors' figures (one direction). Bytes and memory
follow formulas that scale.py and shards.py have checked at a smaller shape.

The columns of the table:

    to a copy   the GPUs that share one copy of the base (--shard_base, --shard_degree)
    memory      of one GPU
    sent        by one GPU per step
    tokens, computing, gathering    of one GPU per step
    floor       the least time of a step. Everything runs at full rate, gathering is hidden behind computing, and launches,
                latency, attention and waiting take no time. It is the larger of computing and gathering, plus the work that
                each process does however many there are: summing gradients with the others, and the encoder's step
    stops       the number of GPUs beyond which more gain little or nothing: computing then takes no longer than the work
                that does not shrink (one gathering, or the encoder's step), or each GPU has one row
"""

import argparse
import itertools
import math
from dataclasses import dataclass

from speed import SHAPES

SHAPES = SHAPES | {"176b": {"n_layer": 70, "hidden_size": 14_336, "n_head": 112, "vocab_size": 250_880}}
# Bytes of a number: of the frozen base, and of all that is trained.
HALF, SINGLE = 2, 4
# The share of a row's tokens that are labels.
LABELS = 0.7
# The loss holds the logits of this many labels at a time.
LABELS_AT_ONCE = 256
# How often a step reads or writes the encoder's bytes: forward, backward, clipping, AdamW.
PASSES_OVER_ENCODER = 12


@dataclass
class Paper:
    """The figures of one base on `gpus` GPUs. Each `parts` of them share one copy of the base."""

    shape: dict
    gpus: int
    parts: int
    args: argparse.Namespace

    def __post_init__(self):
        hidden, layers, vocab = (self.shape[name] for name in ("hidden_size", "n_layer", "vocab_size"))
        args, passes = self.args, 2  # a forward and a backward pass
        self.layer, self.embeddings = 12 * hidden**2 + 13 * hidden, vocab * hidden
        self.base = layers * self.layer + self.embeddings + 4 * hidden
        self.prefix = layers * 2 * hidden * args.num_virtual_tokens
        width = min(hidden, args.encoder_hidden_size)
        self.encoder = args.num_virtual_tokens * hidden + (hidden + 1) * width + (width + 1) * layers * 2 * hidden

        # Per step and GPU
        self.tokens = math.ceil(args.rows / self.gpus) * args.row_tokens
        micro_batches = math.ceil(self.tokens / args.max_tokens_per_batch)
        work = (6 if args.gradient_checkpointing else 4) * layers * self.layer + 4 * self.embeddings * LABELS
        self.computing = work * self.tokens / args.flops
        summed = 2 * (self.gpus - 1) / self.gpus * self.prefix * SINGLE
        # This share of the gathered bytes comes from other GPUs. They are counted per forward and backward pass.
        share = (self.parts - 1) / self.parts
        gathered = share * (passes * layers * self.layer + 2 * 2 * self.embeddings) * HALF
        self.sent = summed + micro_batches * gathered
        self.gathering = micro_batches * gathered / self.bandwidth(self.parts)
        self.alone = summed / self.bandwidth(self.gpus) + PASSES_OVER_ENCODER * self.encoder * SINGLE / args.memory_bandwidth
        self.floor = max(self.computing, self.gathering) + self.alone
        rest = max(gathered / self.bandwidth(self.parts), self.alone)
        self.stops = min(args.rows, work * args.rows * args.row_tokens / args.flops / rest)

        in_layers = (2 if args.gradient_checkpointing else 10) * hidden * layers * HALF
        self.memory = (
            (self.base / self.parts + (max(self.embeddings, 3 * self.layer) if self.parts > 1 else 0)) * HALF
            + 4 * self.encoder * SINGLE  # weights, gradient, AdamW's two
            + min(self.tokens, args.max_tokens_per_batch) * in_layers
            + 3 * LABELS_AT_ONCE * vocab * SINGLE  # logits, their softmax, their gradient
        )

    def bandwidth(self, gpus: int) -> float:
        """Of one GPU. Rings between machines share the network cards of each machine, and use the links within it."""
        return self.args.link if gpus <= self.args.gpus_per_node else min(self.args.link, self.args.network)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=["7b1", "176b"])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--rows", type=int, default=512, help="rows of an optimizer step, of all GPUs together")
    parser.add_argument("--row_tokens", type=float, default=150, help="mean tokens of a row")
    parser.add_argument("--num_virtual_tokens", type=int, default=10)
    parser.add_argument("--encoder_hidden_size", type=int, default=512)
    parser.add_argument("--max_tokens_per_batch", type=float, default=2048)
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--flops", type=float, default=798e12, help="of one GPU's matrix products, per second")
    parser.add_argument("--memory_bandwidth", type=float, default=3.35e12, help="of one GPU, bytes per second")
    parser.add_argument("--link", type=float, default=450e9, help="between GPUs of one machine, bytes per second")
    parser.add_argument("--network", type=float, default=400e9, help="of all cards of one machine, bytes per second")
    parser.add_argument("--gpus_per_node", type=int, default=8)
    parser.add_argument("--gpu_memory", type=float, default=72e9, help="bytes that are left beside those of CUDA and NCCL")
    args = parser.parse_args()
    print("| base | GPUs | to a copy | memory, GB | sent, MB | tokens | computing, s | gathering, s | floor, s | stops |")
    print("|" + "---|" * 10)
    for name, gpus in itertools.product(args.shape, args.gpus):
        for parts in dict.fromkeys((1, min(gpus, args.gpus_per_node), gpus)):
            paper = Paper(SHAPES[name], gpus, parts, args)
            figures = f"{paper.memory / 1e9:.1f} | {paper.sent / 1e6:,.0f} | {paper.tokens:,.0f} | {paper.computing:.3f}"
            figures += f" | {paper.gathering:.3f} | {paper.floor:.3f} | {paper.stops:,.0f} |"
            if paper.memory > args.gpu_memory:
                figures = f"{paper.memory / 1e9:.0f}, too much |" + " |" * 6
            print(f"| {name} | {gpus} | {parts} | {figures}")


if __name__ == "__main__":
    main()
