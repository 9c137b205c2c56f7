"""Prefix tuning on one page: the whole method in plain PyTorch and transformers. Start reading here.

    python -m prefix_tuning.plain                          tunes a prefix on the bundled demo, about a minute on a CPU
    python -m prefix_tuning.plain ROWS.jsonl BASE          on your rows and your Bloom, by folder or by hub name

Everything is here, in the order in which it happens, except the network that emits the prefix: model/encoder.py explains
it, so read that next. train.py does the same, faster and safer; tests hold both to the same losses, gradient norms and
answers. README.md beside this file lists the lines that train.py replaces, and what each replacement gains.
"""

import json
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, BloomForCausalLM, DynamicCache, get_scheduler

from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder

DEMO = Path(__file__).parent / "demo"
NUM_VIRTUAL_TOKENS = 16
MAX_LENGTH = 256  # tokens of a row, prompt and answer together
EPOCHS = 1
ACCUMULATION = 8  # rows per optimizer step; each has its own forward and backward pass
LEARNING_RATE = 5e-3
MAX_GRAD_NORM = 1.0
SEED = 42
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PRECISION = torch.float32  # of the frozen base; on a GPU also torch.bfloat16 or torch.float16. The encoder stays float32.
OUTPUT = "prefix.safetensors"


# 1. From a row to tokens and labels.


def prompt_of(row: dict) -> str:
    """The template: what the model reads before its answer."""
    return "\n".join(["Human: " + row["instruction"], row.get("input") or ""]).strip() + "\n\nAssistant: "


def tokenize(row: dict, tokenizer) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and labels of a row, each (1, T), int64. Prompt positions get the label -100, which cross_entropy ignores:
    only the answer is learned. The answer ends with EOS, otherwise the model would never learn to stop.
    """
    prompt = tokenizer(prompt_of(row), split_special_tokens=True).input_ids
    answer = [*tokenizer(row["output"], split_special_tokens=True).input_ids, tokenizer.eos_token_id]
    ids, labels = prompt + answer, [-100] * len(prompt) + answer
    return torch.tensor([ids[:MAX_LENGTH]]), torch.tensor([labels[:MAX_LENGTH]])


# 2. From the prefix to a loss.


def as_past_key_values(prefix: torch.Tensor, base: BloomForCausalLM) -> DynamicCache:
    """A prefix (layers, 2, heads, P, head_dim) as the cached keys and values of P tokens that the model has already read."""
    cache = DynamicCache()  # each forward pass needs a new one, because it appends to it
    for layer, (key, value) in enumerate(prefix.to(base.dtype)):  # here the prefix gets the precision of the base
        cache.update(key.unsqueeze(0), value.unsqueeze(0), layer)  # (1, heads, P, head_dim)
    return cache


def loss_of(base: BloomForCausalLM, prefix: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, summed over the labels of one row, differentiable in the prefix."""
    # Each layer puts the cached keys and values in front of the text's, and every token attends to all P of them. Bloom sees
    # positions only as distances (ALiBi). Those within the text stay the same; only the prefix is nearer or farther.
    # The cache is given by position, because transformers 5.24 renamed the argument from past_key_values to cache.
    logits = base(ids, as_past_key_values(prefix, base)).logits
    logits = logits.to(prefix.dtype)  # the loss is float32, as the encoder is, also where the base is bf16 or fp16
    return F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")  # position i predicts token i + 1


# 3. Training: the base is frozen, the encoder learns.


def new_encoder(base: BloomForCausalLM) -> PrefixEncoder:
    return PrefixEncoder(PrefixConfig.of(base.config, NUM_VIRTUAL_TOKENS))


def train(base: BloomForCausalLM, encoder: PrefixEncoder, examples: list) -> list[tuple[float, float]]:
    """Trains the encoder in place. Returns loss and gradient norm of each step; the loss is the mean over its labels."""
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    total_steps = EPOCHS * math.ceil(len(examples) / ACCUMULATION)
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=total_steps)
    scaler = torch.amp.GradScaler(DEVICE, enabled=base.dtype == torch.float16)  # otherwise a no-op
    history = []
    for epoch in range(EPOCHS):
        order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(SEED + epoch))
        for rows in order.split(ACCUMULATION):
            step = [[tensor.to(base.device) for tensor in examples[row]] for row in rows]
            labels_in_step = sum(int((labels[:, 1:] != -100).sum()) for _, labels in step)
            loss = 0.0
            for ids, labels in step:
                part = loss_of(base, encoder(), ids, labels) / labels_in_step
                scaler.scale(part).backward()  # gradients of all rows add up in the encoder's parameters
                loss += part.item()
            scaler.unscale_(optimizer)  # fp16: undo the loss scale before clipping
            grad_norm = torch.nn.utils.clip_grad_norm_(encoder.parameters(), MAX_GRAD_NORM).item()
            scale = scaler.get_scale()
            # fp16: if a gradient overflowed, the scaler skips this step and lowers the scale.
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= scale:
                scheduler.step()
            optimizer.zero_grad()
            history.append((loss, grad_norm))
            if len(history) % 25 == 0 or len(history) == total_steps:
                print(f"step {len(history)} of {total_steps}: loss {loss:.4f}, gradient norm {grad_norm:.4f}")
    return history


# 4. Answers.


@torch.no_grad()
def answer(base: BloomForCausalLM, tokenizer, row: dict, prefix: torch.Tensor | None = None) -> str:
    """The greedy answer to a row's question: with the prefix in front, or, without one, by the frozen base alone."""
    new = tokenizer(prompt_of(row), return_tensors="pt", split_special_tokens=True).input_ids.to(base.device)
    cache = DynamicCache() if prefix is None else as_past_key_values(prefix, base)
    reply: list[int] = []
    while len(reply) < 32 and tokenizer.eos_token_id not in reply:
        new = base(new, cache).logits[:, -1:].argmax(-1)  # the likeliest next token, (1, 1)
        reply.append(new.item())
    return tokenizer.decode(reply, skip_special_tokens=True)


def main(rows_file: str = str(DEMO / "data" / "short.jsonl"), base_name: str = str(DEMO / "mini-bloom")) -> None:
    base = BloomForCausalLM.from_pretrained(base_name, dtype=PRECISION).requires_grad_(False).eval().to(DEVICE)
    tokenizer = AutoTokenizer.from_pretrained(base_name)
    rows = [json.loads(line) for line in Path(rows_file).read_text("utf-8").split("\n") if line.strip()]
    held_out, rows = rows[-3:], rows[:-3]
    examples = [example for example in (tokenize(row, tokenizer) for row in rows) if (example[1][:, 1:] != -100).any()]
    if not examples:
        sys.exit(f"{rows_file}: no row is left to train on; the last three are held out")
    torch.manual_seed(SEED)
    encoder = new_encoder(base)
    print(f"{len(examples):,} rows, {sum(p.numel() for p in encoder.parameters()):,} trainable parameters")
    train(base, encoder.to(DEVICE), examples)
    # The encoder's input never changes, so its output is one constant tensor. That is all there is to save.
    save_file({"prefix": encoder.bake().contiguous()}, OUTPUT)
    prefix = load_file(OUTPUT, device=DEVICE)["prefix"]
    for row in held_out:
        print(f"\n{row['instruction']}\n  frozen base  {answer(base, tokenizer, row)}")
        print(f"  with prefix  {answer(base, tokenizer, row, prefix)}\n  expected     {row['output']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
