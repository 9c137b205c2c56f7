"""What the flags of train.py and infer.py have in common."""

from dataclasses import field

MAX_LENGTH = 256  # tokens per row in training, and so the longest text that a prefix has seen
MAX_SEED = 2**62  # of what torch takes as a seed, with room to count on


def flag(default, help: str):
    return field(default=default, metadata={"help": help})


FORCE_HELP = "Use a prefix even if the base has other weights or another tokenizer than the one that it was trained on."


SHARD_BASE_HELP = (
    "Split the weights of the base over the processes that torchrun starts, and gather them layer by layer: for a base that "
    "is larger than one device. The result stays the same. Reads safetensors only."
)


SHARD_DEGREE_HELP = (
    "With --shard_base: how many processes share one copy of the base; None: all. On several machines, those of one if the "
    "base fits there: then gathering stays off the network."
)
