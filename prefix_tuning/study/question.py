"""One question token by token: what base and prefix expect next, and which prefix tokens each position attends to."""

import torch
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from prefix_tuning.data.rows import parts_of, prompt_ids
from prefix_tuning.generation.prefix_bloom import BASE, PrefixBloom
from prefix_tuning.model.batch import Example, pack
from prefix_tuning.study.attention import watching
from prefix_tuning.study.scoring import label_logits

MOST_NEW_TOKENS = 48
LIKELIEST = 5  # tokens that are named for each place
MOST_MAPS = 64  # layers x heads whose attention is kept; of a larger base, those to which the prefix owes the most attention


@torch.no_grad()
def follow(
    model: PrefixBloom, tokenizer: PreTrainedTokenizerBase, question: str, name: str, shares: list[list[float]]
) -> dict:
    """Follows a question and the greedy answer that the prefix `name` gives. shares: (L, H), of `attention_shares`.

    question: its text. answers: by base and prefix. tokens: of the prompt and the prefix's answer, T texts. prompt: how many
    of them are the prompt's.
    expected: of each token after the first, T - 1, by base and prefix: the probability of that token, and the likeliest ones
    with theirs.
    attention: of some layers and heads, the weights that each token gives to each prefix token (T, P). left_out: how many
    layers and heads it does not have.
    """
    prompt = prompt_ids(tokenizer, [parts_of(question)])[0]
    replies = {side: _reply(model, prompt, side) for side in (BASE, name)}
    ids = prompt + replies[name]
    (batch,) = pack([Example(ids, ids)], max_tokens=len(ids))  # every token after the first is a label
    batch = batch.to(model.device)
    prefix, maps = model.prefixes[name], {}
    places = [(layer, head) for layer, line in enumerate(shares) for head in range(len(line))]
    places.sort(key=lambda place: -shares[place[0]][place[1]])

    def keep(layer: int, weights: torch.Tensor) -> None:
        maps.update({(layer, head): weights[0, head, :, : prefix.shape[3]].cpu() for head in range(weights.shape[1])})

    with watching(model, keep):
        tuned = label_logits(model, batch, prefix)
    logits = {BASE: label_logits(model, batch, None), name: tuned}
    return {
        "question": question,
        "answers": {side: tokenizer.decode(reply, skip_special_tokens=True) for side, reply in replies.items()},
        "tokens": [token_text(tokenizer, token) for token in ids],
        "prompt": len(prompt),
        "expected": {side: _expected(tokenizer, logits[side].softmax(dim=-1), batch.labels) for side in logits},
        "attention": [
            {"layer": layer, "head": head, "weights": maps[layer, head].tolist()} for layer, head in places[:MOST_MAPS]
        ],
        "left_out": len(places[MOST_MAPS:]),
    }


def _reply(model: PrefixBloom, prompt: list[int], name: str) -> list[int]:
    """The greedy answer's token ids, EOS included unless it is longer than MOST_NEW_TOKENS."""
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(ids, prefix_name=name, max_new_tokens=MOST_NEW_TOKENS, do_sample=False)
    return output[0, len(prompt) :].tolist()


def _expected(tokenizer: PreTrainedTokenizerBase, probabilities: torch.Tensor, labels: torch.Tensor) -> list[dict]:
    """probabilities: (N, V). Of each label, its own and the likeliest tokens'."""
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
    """A token as text; where it is a part of a character, its bytes in hexadecimal."""
    text = str(tokenizer.decode([token]))
    if "\N{REPLACEMENT CHARACTER}" not in text:
        return text
    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}  # how byte-level BPE writes bytes
    return "<" + " ".join(f"{byte_of[character]:02x}" for character in tokenizer.convert_ids_to_tokens(token)) + ">"
