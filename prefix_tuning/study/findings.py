"""What was found: one sentence for each part of the page, made from the numbers of run.py."""

import itertools

import numpy as np

from prefix_tuning.generation.prefix_bloom import BASE
from prefix_tuning.study.page import Text, joined
from prefix_tuning.study.shares import heads_by_share
from prefix_tuning.study.texts import say

UNSEEN = 0.01  # a head with a smaller share of attention does not look at the prefix
LIGHT = 1.1  # a part matters little if the loss without it is below LIGHT times the loss
MOST_OF = 0.9  # the singular values that are counted hold this part of the sum of squares


def attention(name: str, prefix: dict) -> Text:
    share = np.array(prefix["attention"]["share"])
    layer, head = heads_by_share(prefix["attention"]["share"])[0]
    figures = {"mean": share.mean(), "most": share[layer, head], "blind": (share < UNSEEN).sum(), "heads": share.size}
    return say("attention.found", name=name, layer=layer, head=head, **figures)


def distance(name: str, prefix: dict) -> Text:
    by_distance, slopes = np.array(prefix["attention"]["by_distance"]), prefix["attention"]["slopes"]
    if not slopes:
        return _distance_without_alibi(name, by_distance)
    share = by_distance.mean(axis=0)
    ends: dict[str, float] = {}
    for kind, head in (("steep", np.argmax(slopes)), ("flat", np.argmin(slopes))):
        ends |= {kind: slopes[head], f"{kind}_near": share[head, 0], f"{kind}_far": share[head, -1]}
    return say("distance.found", name=name, last=share.shape[1], **ends)


def _distance_without_alibi(name: str, share: np.ndarray) -> Text:
    """share: (L, H, K)."""
    far = share[:, :, -1]
    layer, head = heads_by_share(far.tolist())[0]
    ends = {"near": share[layer, head, 0], "far": far[layer, head], "seeing": (far >= UNSEEN).sum(), "heads": far.size}
    return say("distance.found.no_alibi", name=name, last=share.shape[2], layer=layer, head=head, **ends)


def question(name: str, prefix: dict) -> Text:
    one, first = prefix["question"], prefix["question"]["prompt"]  # expected begins with the second token
    tuned, alone = (one["expected"][side][first - 1]["probability"] for side in ("prefix", "base"))
    shown = {side: f"{share:.1%}" if share >= 0.001 else "<0.1%" for side, share in (("tuned", tuned), ("alone", alone))}
    return say("question.found", name=name, token=one["tokens"][first], **shown)


def removal(name: str, prefix: dict) -> Text:
    whole, rows = prefix["removal"]["whole"], prefix["rows"]
    parts = [part for part in prefix["removal"]["parts"] if part["kind"] in ("layer", "head", "token")]
    worst = parts[0]
    return say(
        "removal.found",
        name=name,
        part=say(f"removal.{worst['kind']}", **worst),
        loss=worst["loss"],
        whole=whole["loss"],
        right=round(rows * worst["exact_match"]),
        whole_right=round(rows * whole["exact_match"]),
        rows=rows,
        parts=len(parts),
        light=sum(part["loss"] < LIGHT * whole["loss"] for part in parts),
    )


def pair(pair: dict, prefixes: dict) -> Text:
    """On the rows of the first prefix."""
    first, second = pair["first"], pair["second"]
    dataset = prefixes[first]["dataset"]
    alone, other, near, far = (scores[dataset]["exact_match"] for scores in (*pair["alone"], *pair["after"]))
    half = Text("", "")
    if pair["between"]:
        share = pair["between"][len(pair["between"]) // 2][dataset]["exact_match"]
        keys, values = np.mean(pair["cosine"], axis=1)
        half = say("pairs.half", share=share, keys=keys, values=values)
    shares = {"alone": alone, "other": other, "near": near, "far": far}
    return say("pairs.found", dataset=dataset, first=first, second=second, half=half, **shares)


def quiz(quiz: dict) -> Text:
    tuned = [say("quiz.with", name=name, share=share) for name, share in quiz["right"].items() if name != BASE]
    return say("quiz.found", base=quiz["right"][BASE], each=joined(tuned))


def growth(name: str, prefix: dict) -> Text:
    first, last = prefix["growth"]["stages"][0], prefix["growth"]["stages"][-1]
    squares = np.square(last["singular_values"])
    few = int(np.searchsorted(np.cumsum(squares), MOST_OF * squares.sum())) + 1
    keys, values = zip(first["norm"], last["norm"], strict=True)
    lengths = {"keys": keys, "values": values}
    return say("growth.found", name=name, first=first["step"], last=last["step"], few=few, tokens=len(squares), **lengths)


def norms(name: str, prefix: dict) -> Text:
    text, own = (np.array(prefix["norms"][side])[:, :, 2] for side in ("text", "prefix"))  # medians, (layers, 2)
    keys, values = zip((own / text).min(axis=0), (own / text).max(axis=0), strict=True)
    return say("norms.found", name=name, keys=keys, values=values)


def words(name: str, prefix: dict) -> Text:
    tokens = prefix["nearest_words"]
    word, cosine = max(itertools.chain(*(token["words"] for token in tokens)), key=lambda pair: pair[1])
    unexplained = [token["unexplained"] for token in tokens]
    if None in unexplained:
        return say("words.found.pairs", name=name, tokens=len(tokens), word=word, cosine=cosine)
    return say("words.found", name=name, tokens=len(tokens), word=word, cosine=cosine, least=min(unexplained))
