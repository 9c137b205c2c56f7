"""One question token by token: what base and prefix expect next, and which prefix tokens each position attends to."""

import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from prefix_tuning.generation.prefix_bloom import BASE, PrefixBloom
from prefix_tuning.model.batch import Example, pack
from prefix_tuning.study.attention import watching
from prefix_tuning.study.scoring import label_logits
from prefix_tuning.study.shares import heads_by_share

MOST_NEW_TOKENS = 48
LIKELIEST = 5  # tokens that are named at each position
MOST_MAPS = 64  # heads whose attention is kept: those that give the prefix the most


@torch.no_grad()
def follow(
    model: PrefixBloom, tokenizer: PreTrainedTokenizerBase, prompt: list[int], name: str, shares: list[list[float]]
) -> dict:
    """Follows a prompt (token ids) and the greedy answer that the prefix `name` gives, T tokens together.

    shares: (L, H), from `attention_shares`. Returns

    question: the prompt's text
    answers: the base's and the prefix's
    tokens: the T tokens as texts; the first `prompt` of them are the prompt
    expected: by base and by prefix, for each of the T - 1 tokens after the first: its probability, and the likeliest tokens
    attention: for some layers and heads, the weights that each token gives to each prefix token (T, P)
    """
    replies = {"base": _reply(model, prompt, BASE), "prefix": _reply(model, prompt, name)}
    ids = prompt + replies["prefix"]
    (batch,) = pack([Example(ids, ids)], max_tokens=len(ids))  # every token after the first is a label
    batch = batch.to(model.device)
    prefix = model.prefixes[name]
    kept, maps = heads_by_share(shares)[:MOST_MAPS], {}

    def keep(layer: int, weights: torch.Tensor) -> None:
        for head in (head for at, head in kept if at == layer):
            maps[layer, head] = weights[0, head, :, : prefix.shape[3]].tolist()

    with watching(model, keep):
        tuned = label_logits(model, batch, prefix)
    logits = {"base": label_logits(model, batch, None), "prefix": tuned}
    return {
        "question": tokenizer.decode(prompt),
        "answers": {side: tokenizer.decode(reply, skip_special_tokens=True) for side, reply in replies.items()},
        "tokens": [token_text(tokenizer, token) for token in ids],
        "prompt": len(prompt),
        "expected": {side: _expected(tokenizer, logits[side].softmax(dim=-1), batch.labels) for side in logits},
        "attention": [{"layer": layer, "head": head, "weights": maps[layer, head]} for layer, head in kept],
    }


def _reply(model: PrefixBloom, prompt: list[int], name: str) -> list[int]:
    """The token ids of the greedy answer: up to MOST_NEW_TOKENS, EOS included."""
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(ids, prefix_name=name, max_new_tokens=MOST_NEW_TOKENS, do_sample=False)
    return output[0, len(prompt) :].tolist()


def _expected(tokenizer: PreTrainedTokenizerBase, probabilities: torch.Tensor, labels: torch.Tensor) -> list[dict]:
    """For each label, its probability and the likeliest tokens with theirs. probabilities: (N, V)."""
    own = probabilities.gather(1, labels[:, None]).flatten().tolist()
    likeliest = zip(*(x.tolist() for x in probabilities.topk(LIKELIEST)), strict=True)
    return [
        {
            "probability": probability,
            "likeliest": [[token_text(tokenizer, token), value] for value, token in zip(*best, strict=True)],
        }
        for probability, best in zip(own, likeliest, strict=True)
    ]


def token_text(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token as text. If it is only a part of a character: its bytes in hexadecimal, as <e5 8c>."""
    text = str(tokenizer.decode([token]))
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}  # how byte-level BPE writes bytes
    return "<" + " ".join(f"{byte_of[character]:02x}" for character in tokenizer.convert_ids_to_tokens(token)) + ">"
